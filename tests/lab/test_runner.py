"""Running notebooks: parameters, failures, resuming, and what a kill leaves behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import nbformat
import psutil
import pytest

from labkit import papers
from labkit.lab import live, notebook, project, runner, spacing

from .small import save


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def working(out):
    """Working folders that are left."""
    folder = out / ".running"
    return list(folder.iterdir()) if folder.exists() else []


class TestParameters:
    def test_unknown_paper_names_the_nearest(self, out):
        with pytest.raises(
            ValueError, match=r"paper 'nacll' is not in the collection; did you mean 'nacl'\?"
        ):
            runner.execute("nacll", out)

    def test_missing_notebook(self, out):
        with pytest.raises(ValueError, match=r"notebook 'no\.ipynb' does not exist"):
            runner.execute("no.ipynb", out)

    def test_misspelt_name_stops_before_a_kernel_starts(self, tmp_path, out):
        path = save(tmp_path, "tiny", "1 / 0")
        with pytest.raises(ValueError, match=r"no parameter 'sead'; did you mean 'seed'\?"):
            runner.execute(path, out, {"sead": 1})
        assert not out.exists()

    def test_wrong_type_of_an_unregistered_notebook(self, tmp_path, out):
        with pytest.raises(TypeError, match="seed='1' is a str; a int is wanted"):
            runner.execute(save(tmp_path, "tiny"), out, {"seed": "1"})

    @pytest.mark.parametrize(
        ("given", "error"),
        [
            ({"size": "lptop"}, r"size='lptop' is not allowed; one of 'smoke', 'laptop'"),
            ({"seed": -1}, "seed=-1 is out of range"),
            ({"bugdet": 0.1}, r"no parameter 'bugdet'; did you mean 'budget'\?"),
        ],
    )
    def test_registered_paper_is_checked_against_the_registry(self, given, error, tmp_path, out):
        path = save(tmp_path, "nacl")
        with pytest.raises(ValueError, match=error):
            runner.execute(path, out, given)
        assert not out.exists()

    def test_command_line_text_takes_the_registered_type(self):
        paper = papers.load("nacl")
        assert runner.parse_parameters(paper, {"seed": "3", "budget": "0.5", "size": "smoke"}) == {
            "seed": 3,
            "budget": 0.5,
            "size": "smoke",
        }
        with pytest.raises(ValueError, match="seed='three' is not an int"):
            runner.parse_parameters(paper, {"seed": "three"})
        with pytest.raises(ValueError, match=r"did you mean 'budget'\?"):
            runner.parse_parameters(paper, {"buget": "1"})

    def test_key_tells_runs_apart(self):
        defaults = {"size": "laptop", "seed": 0, "budget": 0.2}
        keys = {
            runner.run_key({"size": "laptop", "seed": seed, "budget": budget}, defaults)
            for seed in (0, 1)
            for budget in (0.2, 0.3, 0.4)
        }
        assert len(keys) == 6
        assert "laptop-seed0" in keys


def test_a_run_and_its_record(tmp_path, out):
    path = save(
        tmp_path,
        "tiny",
        "import os\nprint(seed, rate)",
        "block = bytearray(150_000_000)\nfor i in range(0, len(block), 4096): block[i] = 1",
        "print(os.getcwd() == os.environ['LABKIT_RUN_DIR'])\nprint(os.environ['OMP_NUM_THREADS'])",
        "from labkit.lab import cache\nimport sys\nprint(sys.executable)",
    )
    before = path.read_bytes()
    events = []
    result = runner.execute(path, out, {"seed": 3}, on_event=events.append)
    assert result.ok, result.error
    assert result.directory == out / "tiny" / "laptop-seed3"
    assert result.parameters == {"size": "laptop", "seed": 3, "rate": 0.5}
    assert 0 < result.seconds < 60
    assert 180 < result.peak_memory_mb < 600
    assert result.cells == {"done": 7, "total": 7}
    assert [event["index"] for event in events if event["event"] == "cell"] == list(range(7))
    assert path.read_bytes() == before
    assert working(out) == []
    assert sorted(item.name for item in result.directory.iterdir()) == ["log.txt", "run.json", "tiny.ipynb"]
    nb = nbformat.read(result.notebook, as_version=4)
    printed = [output.text for cell in nb.cells for output in cell.get("outputs", [])]
    assert printed == ["3 0.5\n", "True\n1\n", f"{sys.executable}\n"]
    assert "papermill" not in nb.metadata
    assert "widgets" not in nb.metadata
    assert all("papermill" not in cell.metadata and "execution" not in cell.metadata for cell in nb.cells)
    record = json.loads((result.directory / "run.json").read_text())
    assert record["status"] == "ok"
    assert record["fingerprint"] == result.fingerprint
    assert runner.load(result.directory) == result


def test_failures_are_recorded_and_not_taken_for_done(tmp_path, out):
    failing = save(tmp_path, "failing", "x = 1\n1 / 0", "never = True")
    result = runner.execute(failing, out)
    assert (result.status, result.error["cell"], result.error["name"]) == ("failed", 2, "ZeroDivisionError")
    assert result.cells == {"done": 2, "total": 4}
    assert "division by zero" in result.error["traceback"][-1]
    assert result.summary() == "failed in cell 2: ZeroDivisionError"
    assert any(
        output.ename == "ZeroDivisionError" for _, output in notebook.errors(notebook.read(result.notebook))
    )
    assert not runner.execute(failing, out).reused


def test_timeout_and_death_are_told_apart(tmp_path, out):
    slow = runner.execute(
        save(tmp_path, "slow", "print('begun')", "import time\ntime.sleep(60)"), out, timeout=4
    )
    assert slow.status == "timeout"
    assert slow.seconds < 20
    assert "after the 4 s" in slow.error["message"]
    text = notebook.read(slow.notebook).cells[2].outputs[0].text
    assert text == "begun\n"
    dead = runner.execute(save(tmp_path, "dead", "import os\nos._exit(9)"), out)
    assert (dead.status, dead.error["name"]) == ("died", "KernelDied")


def test_a_kernel_that_never_answers_is_tried_once_more(tmp_path, out, monkeypatch):
    path = save(tmp_path, "tiny")
    calls = []
    real = runner._carry

    def carry(*arguments):
        calls.append(1)
        if len(calls) == 1:
            return {"status": "never answered"}
        return real(*arguments)

    monkeypatch.setattr(runner, "_carry", carry)
    result = runner.execute(path, out)
    assert (result.status, result.attempts, len(calls)) == ("ok", 2, 2)


def test_a_kernel_that_never_answers_twice_died(tmp_path, out, monkeypatch):
    answer = {
        "status": "never answered",
        "seconds": 1.0,
        "peak_memory_mb": 0.0,
        "cells": {},
        "error": {"name": "x"},
    }
    monkeypatch.setattr(runner, "_carry", lambda *_: answer)
    result = runner.execute(save(tmp_path, "tiny"), out)
    assert (result.status, result.attempts) == ("died", 2)


def test_second_run_redoes_only_what_changed(tmp_path, out, monkeypatch, capsys):
    first, second = save(tmp_path, "first", "print(seed)"), save(tmp_path, "second", "print(rate)")
    names = [str(first), str(second)]
    done = runner.run_many(names, out=out)
    assert [run.ok for run in done] == [True, True]
    assert "[2/2] second: done" in capsys.readouterr().out
    # Prose and outputs may change without a new run; code may not.
    nb = notebook.read(first)
    nb.cells[0].source = "# Another title"
    notebook.write(nb, first)
    save(tmp_path, "second", "print(rate + 1)")
    again = runner.run_many(names, out=out)
    assert [run.reused for run in again] == [True, False]
    assert not runner.execute(first, out, {"size": "laptop"}, fresh=True).reused
    monkeypatch.setattr("labkit.lab.fingerprint.versions", lambda: {"torch": "0"})
    assert not runner.execute(first, out, {"size": "laptop"}).reused


def test_the_same_run_twice_is_refused(tmp_path, out):
    path = str(save(tmp_path, "tiny"))
    with pytest.raises(ValueError, match="asked for twice"):
        runner.run_many([path, path], out=out)
    with pytest.raises(ValueError, match="jobs=0"):
        runner.run_many([path], out=out, jobs=0)


def test_a_truncated_record_is_no_record(tmp_path):
    (tmp_path / "run.json").write_text('{"schema": 1, "slug"')
    assert runner.load(tmp_path) is None
    (tmp_path / "run.json").write_text('{"schema": 99}')
    assert runner.load(tmp_path) is None


def test_full_disk_leaves_no_half_result(tmp_path, out, monkeypatch):
    path = save(tmp_path, "tiny")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner.cache, "write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        runner.execute(path, out)
    assert working(out) == []
    assert runner.load_all(out) == []


_DRIVER = """
    import signal, sys
    # A shell that starts a job in the background makes it, and its children, ignore the interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from labkit.lab import runner
    runner.run_many(sys.argv[2:], out=sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killing_the_runner_costs_the_running_notebook_alone(tmp_path, out, number):
    pids = tmp_path / "pids"
    pids.mkdir()
    quick = save(tmp_path, "quick", "1 + 1")
    endless = save(
        tmp_path,
        "endless",
        f"import os, subprocess, time\nopen(r'{pids}/' + str(os.getpid()), 'w').close()",
        f"child = subprocess.Popen(['sleep', '300'])\nopen(r'{pids}/' + str(child.pid), 'w').close()",
        "time.sleep(300)",
    )
    environment = {**os.environ, "PYTHONPATH": str(project.package_folder().parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_DRIVER), str(out), str(quick), str(endless)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        limit = time.monotonic() + 90
        while len(list(pids.iterdir())) < 2 and time.monotonic() < limit:
            time.sleep(0.1)
        numbers = [int(path.name) for path in pids.iterdir()]
        assert len(numbers) == 2, "the endless notebook did not start"
        process.send_signal(number)
        process.wait(timeout=30)
    finally:
        process.kill()
    limit = time.monotonic() + 15
    while any(_alive(pid) for pid in numbers) and time.monotonic() < limit:
        time.sleep(0.1)
    assert not any(_alive(pid) for pid in numbers), "a kernel survived its runner"
    assert [run.slug for run in runner.load_all(out)] == ["quick"]
    assert not (out / "endless").exists()
    # The next call clears the leftovers away, and keeps what was done.
    assert runner.execute(quick, out, {"size": "laptop"}).reused
    runner.sweep_leftovers(out / ".running")
    assert working(out) == []


def _alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_two_at_a_time(tmp_path, out):
    names = [str(save(tmp_path, name, "import time\nprint(time.time())")) for name in ("one", "two")]
    results = runner.run_many(names, out=out, jobs=2, table=False)
    assert [run.slug for run in results] == ["one", "two"]
    assert all(run.ok for run in results)


def test_starts_are_spaced(tmp_path):
    spacing.wait_turn(0.3, tmp_path)
    started = time.monotonic()
    waited = spacing.wait_turn(0.3, tmp_path)
    assert time.monotonic() - started >= 0.2
    assert waited >= 0.2


def test_live_table_shows_progress_and_verdicts(tmp_path):
    from rich.console import Console

    board = live.Live(["nacl", "dha"])
    board.start(0)
    board.event(0, {"event": "cell", "index": 4, "total": 20})
    board.event(0, {"event": "memory", "mb": 512})
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board.table())
    text = console.export_text()
    assert "cell 5/20" in text
    assert "512" in text
    assert "waiting" in text
    verdicts = {"claims": [{"verdict": "reproduced"}] * 2 + [{"verdict": "untestable here"}]}
    result = runner.RunResult("nacl", "k", tmp_path, "ok", {}, 12.34, 512.0, {}, None, "", verdicts)
    assert result.summary() == "2 reproduced, 1 untestable"
    board.finish(0, result)
    assert board.cells(0) == ("done", "12.3", "512", "2 reproduced, 1 untestable")


def test_environment_is_quiet_and_offline_on_a_laptop(tmp_path):
    small, large = runner.environment("laptop", tmp_path), runner.environment("paper", tmp_path)
    assert small["HF_HUB_OFFLINE"] == "1"
    assert small["LABKIT_RUN_DIR"] == str(tmp_path)
    assert small["PYTHONPATH"].split(os.pathsep)[0] == str(project.package_folder().parent)
    assert large["LABKIT_BATCH"] == "1"
