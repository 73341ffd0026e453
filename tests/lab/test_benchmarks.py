"""Listing and running the benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labkit.lab import benchmarks

from .test_cli import call


@pytest.fixture
def top(tmp_path, monkeypatch):
    """A repository with two benchmarks: one that prints its arguments, one that fails."""
    (tmp_path / "notebooks").mkdir()
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    says = (
        '"""Times the echo.\n\nMore."""\nimport os, sys\nprint(sys.argv[1:], os.environ["OMP_NUM_THREADS"])\n'
    )
    (tmp_path / "benchmarks" / "echo.py").write_text(says)
    (tmp_path / "benchmarks" / "fails.py").write_text("raise SystemExit(3)\n")
    (results / "echo.jsonl").write_text(json.dumps({"environment": {"date": "2026-01-02T03"}}) + "\n")
    monkeypatch.setenv("LABKIT_ROOT", str(tmp_path))
    return tmp_path


def test_list(top, monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "bench", "--json")
    assert code == 0
    assert json.loads(out) == [
        {"name": "echo", "about": "Times the echo.", "points": 1, "newest": "2026-01-02"},
        {"name": "fails", "about": "", "points": 0, "newest": ""},
    ]
    _, out, _ = call(monkeypatch, capsys, "bench")
    assert "1 points, newest 2026-01-02" in out
    assert "nothing yet" in out


def test_run_passes_the_options_on(top, monkeypatch, capfd):
    code, out, _ = call(
        monkeypatch, capfd, "bench", "echo", "--quick", "--device", "cpu", "--option", "only=kernels"
    )
    assert code == 0
    assert out == "== echo\n['--quick', '--device', 'cpu', '--only', 'kernels'] 1\n"


def test_one_that_fails_is_named_and_the_others_run(top, monkeypatch, capfd):
    code, out, err = call(monkeypatch, capfd, "bench", "--all")
    assert code == 1
    assert "== echo\n[] 1\n== fails" in out
    assert "labkit: fails ended with an error" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eco"], "there is no benchmark 'eco'; did you mean 'echo'?"),
        (["echo", "--all"], "give names or --all, not both"),
        (["echo", "--device", "tpu"], "device 'tpu' is not allowed; one of 'cpu', 'cuda'"),
        (["echo", "--option", "x"], "--option 'x' is not of the form name=value"),
    ],
)
def test_bad_usage(top, monkeypatch, capfd, arguments, message):
    code, out, err = call(monkeypatch, capfd, "bench", *arguments)
    assert code == 2
    assert message in err
    assert out == ""


def test_the_command_names_only_what_was_asked_for():
    item = benchmarks.Benchmark("x", Path("x.py"), "")
    line = benchmarks.command(item, quick=True)
    assert line[1:] == ["x.py", "--quick"]
