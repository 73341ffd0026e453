"""The command line: exit codes, one-line errors with the nearest name, JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from labkit.lab import cli, doctor, project, runner

from .small import save


def call(monkeypatch, capsys, *arguments):
    """Exit code, output and errors of a command."""
    monkeypatch.setattr(sys, "argv", ["labkit", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nacll"], "paper 'nacll' is not in the collection; did you mean 'nacl'?"),
        (["rnu"], "there is no command 'rnu'; did you mean 'run'?"),
        (["refresh", "nacll"], "did you mean 'nacl'?"),
        (["run", "nacl", "-p", "sead"], "-p 'sead' is not of the form name=value"),
        (["run", "nacl", "-p", "seed=1", "-p", "seed=2"], "-p seed is given twice"),
        (["run", "nacl", "--seed", "x"], "valid integer"),
        (["new", "Bad", "--family", "kv"], "slug 'Bad' must be lower case"),
        (["report", "--out", "nowhere"], "no runs are recorded under nowhere"),
    ],
)
def test_bad_usage_is_one_line_and_code_two(arguments, message, repository, monkeypatch, capsys):
    (repository / "notebooks" / "kv").mkdir()
    save(repository / "notebooks" / "kv", "nacl")
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in err
    assert err.startswith("labkit: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "buget=1"], "nacl has no parameter 'buget'; did you mean 'budget'?"),
        (["-p", "budget=lots"], "budget='lots' is not a float; any float from"),
        (["-p", "budget=7"], "budget=7.0 is out of range"),
        (["--size", "lptop"], "size 'lptop' is unknown; did you mean 'laptop'?"),
        (["--seed", "-1"], "seed=-1 is out of range"),
    ],
)
def test_wrong_parameters_stop_before_anything_runs(arguments, message, tmp_path, monkeypatch, capsys):
    path = save(tmp_path, "nacl")
    code, _, err = call(monkeypatch, capsys, "run", str(path), "--out", str(tmp_path / "out"), *arguments)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "out").exists()


def test_run_reports_json_and_fails_only_when_a_run_fails(tmp_path, monkeypatch, capsys):
    verdicts = {"claims": [{"id": "x", "verdict": "not reproduced"}]}
    results = [runner.RunResult("nacl", "k", tmp_path, "ok", {}, 1.0, 1.0, {}, None, "f", verdicts)]
    monkeypatch.setattr(runner, "run_many", lambda *_, **__: results)
    path = str(save(tmp_path, "nacl"))
    code, out, _ = call(monkeypatch, capsys, "run", path, "--json", "--out", str(tmp_path))
    assert code == 0, "a claim that is not reproduced is no failure"
    assert json.loads(out)[0]["verdicts"] == verdicts
    results.append(runner.RunResult("bad", "k", tmp_path, "died", {}, 1.0, 1.0, {}, {"name": "x"}, "f"))
    code, out, _ = call(monkeypatch, capsys, "run", path, "--json", "--out", str(tmp_path))
    assert code == 1


def test_list(monkeypatch, capsys, repository):
    code, out, _ = call(monkeypatch, capsys, "list", "--json")
    row = next(row for row in json.loads(out) if row["slug"] == "nacl")
    assert code == 0
    assert row["family"] == "kv"
    assert row["notebook"] is None
    code, out, _ = call(monkeypatch, capsys, "list")
    assert "no notebook yet" in out


def test_doctor_names_what_is_missing_and_what_mends_it(monkeypatch, capsys):
    from importlib import metadata

    real = metadata.version

    def version(name):
        if name == "papermill":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    code, out, _ = call(monkeypatch, capsys, "doctor", "--json")
    found = {item["name"]: item for item in json.loads(out)}
    assert code == 1
    assert found["papermill"]["state"] == "missing"
    assert "pip install" in found["papermill"]["mend"]
    assert found["chromium"]["mend"]
    assert found["python"]["state"] == "ok"


def test_doctor_finds_too_old_versions():
    assert not doctor._satisfies("4.0", ">=5.17")
    assert doctor._satisfies("2.13.0+cpu", ">=2.11")


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys; from labkit.lab import cli\n"
        "heavy = {'torch', 'transformers', 'papermill', 'plotly', 'nbformat', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(project.package_folder().parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    started = time.process_time()
    done = subprocess.run(
        [sys.executable, "-m", "labkit.lab.cli", "--help"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.process_time() - started < 1
    assert "doctor" in done.stdout


def test_outside_a_clone_the_message_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LABKIT_ROOT", raising=False)
    monkeypatch.setattr(project, "package_folder", lambda: tmp_path / "site-packages" / "labkit")
    code, _, err = call(monkeypatch, capsys, "run", "nacl")
    assert code == 2
    assert "run labkit inside a clone of the repository" in err
