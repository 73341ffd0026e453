"""Sweeps: checked before they start, killed in every way, resumed, and gathered in one table."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pandas as pd
import psutil
import pytest

from labkit import lab
from labkit.lab import cli, engines, live, project, runner, sweeps, tables

from .small import save

PARAMETERS = 'size: str = "smoke"\nseed: int = 0\nact: str = ""\n'
# Notes that it was made, acts as told, and leaves what a paper's notebook leaves. Told to wait, it waits for ever the
# first time and goes through the second.
BODY = """
import json, os, time
from pathlib import Path
top = Path({top!r})
with open(top / "made", "a") as file:
    print(seed, act, os.getpid(), file=file)
once = top / f"waited-{{seed}}"
if act == "wait" and not once.exists():
    once.touch()
    time.sleep(300)
if act == "sleep":
    time.sleep(300)
if act == "hog":
    block = bytearray(400_000_000)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(300)
if act == "die":
    os._exit(9)
values = [seed + 0.25 * index for index in range(3)]
claim = {{"id": "gain", "values": values, "mean": values[1], "interval": [values[0], values[2]],
         "verdict": "reproduced", "threshold": 0.5, "direction": ">=", "unit": ""}}
record = {{"claims": [claim], "metrics": {{"loss": seed / 2, "curve": [1, 2.5], "notes": {{"a": 1}}}},
          "device": "cpu", "changed": {{}}, "environment": {{"python": "3"}}}}
Path(os.environ["LABKIT_RUN_DIR"], "verdicts.json").write_text(json.dumps(record))
"""


@pytest.fixture
def tiny(tmp_path):
    """A notebook that does what its parameter `act` says."""
    return save(tmp_path, "tiny", BODY.format(top=str(tmp_path)), parameters=PARAMETERS)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def made(tmp_path):
    """How often each seed was begun, and the kernels that did it."""
    path = tmp_path / "made"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return Counter(int(line[0]) for line in lines), [int(line[-1]) for line in lines]


def until(condition, seconds=90):
    """Wait for something that another process does."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        time.sleep(0.05)


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def by_seed(table, name):
    return dict(zip(table["seed"], table[name], strict=True))


class TestBeforeTheFirstRun:
    @pytest.mark.parametrize(
        ("values", "error"),
        [
            ({"budget": [0.1, 0.95]}, r"budget=0\.95 is out of range"),
            ({"bugdet": [0.1]}, r"no parameter 'bugdet'; did you mean 'budget'\?"),
            ({"size": ["smoke", "lptop"]}, "size='lptop' is not allowed"),
            ({}, "the grid is empty"),
        ],
    )
    def test_every_value_is_checked_against_the_registry(self, values, error, tmp_path, out):
        with pytest.raises(ValueError, match=error):
            lab.sweep(save(tmp_path, "nacl"), values, out=out)
        assert not out.exists()

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"jobs": 0}, "jobs=0 must be at least 1"),
            ({"timeout": 0.0}, r"timeout=0\.0 must be a positive number of seconds"),
            ({"memory": float("nan")}, "memory=nan must be a positive number of megabytes"),
            ({"retries": -1}, "retries=-1 must be at least 0"),
            ({"jobs": 2, "scheduler": "tcp://x:1"}, "leave it out"),
            ({"resume": True, "fresh": True}, "give one of them"),
            ({"retry_failed": True}, "retry_failed goes with resume"),
        ],
    )
    def test_options(self, options, error, tiny, out):
        with pytest.raises(ValueError, match=error):
            lab.sweep(tiny, {"seed": 1}, out=out, **options)
        assert not out.exists()

    def test_a_parameter_can_not_be_named_like_a_column(self, tmp_path, out):
        path = save(tmp_path, "odd", parameters="status: int = 0\n")
        with pytest.raises(ValueError, match="a parameter 'status', which a sweep's table has"):
            lab.sweep(path, {"status": [1, 2]}, out=out)

    def test_two_ways_to_write_a_run_are_one(self, tiny, out):
        what = sweeps.plan(tiny, [{"seed": [0, 1]}, {"seed": 0, "act": ""}], out=out)
        assert [run.key for run in what.runs] == ["smoke-seed0", "smoke-seed1"]

    def test_a_thousand_runs_are_planned_at_once(self, tmp_path, out):
        path = save(tmp_path, "nacl", "from labkit.kv import NACLPress")
        started = time.process_time()
        what = sweeps.plan(path, {"seed": range(250), "proxies": [1, 2, 3, 4]}, out=out)
        assert len({run.key for run in what.runs}) == len({run.fingerprint for run in what.runs}) == 1000
        assert time.process_time() - started < 3

    def test_the_folder_of_a_sweep_follows_its_grid(self, repository):
        one, same, other = (sweeps.default_folder("nacl", [{"seed": seed}]) for seed in (0, 0, 1))
        assert one == same != other
        assert one.parent == repository / "build" / "sweeps"

    def test_the_function_wins_over_modules(self):
        import labkit.lab.sweeps

        assert callable(lab.sweep)
        assert labkit.lab.sweeps.sweep is lab.sweep

    def test_no_scheduler(self, tiny, out, monkeypatch):
        pytest.importorskip("distributed")
        with pytest.raises(ConnectionError, match="no scheduler answers at 'nowhere://x'"):
            lab.sweep(tiny, {"seed": 1}, out=out, scheduler="nowhere://x", progress=False)


@pytest.mark.slow
def test_limits_and_deaths_cost_their_own_run(tiny, tmp_path, out, monkeypatch, capsys):
    (tmp_path / "grid.yaml").write_text('seed: [0, 1, 2, 3]\nact: ["sleep", "hog", "die", "-"]\nzip: true\n')
    command = ["sweep", str(tiny), "--grid", str(tmp_path / "grid.yaml"), "--out", str(out), "--jobs", "2"]
    limits = ["--timeout", "4", "--memory", "300MB", "--retries", "1"]
    monkeypatch.setattr(sys, "argv", ["labkit", *command, *limits])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "4 runs: " in printed
    table = pd.read_parquet(out / "table.parquet")
    assert by_seed(table, "status") == {0: "timeout", 1: "memory", 2: "died", 3: "ok"}
    assert by_seed(table, "attempts") == {0: 1, 1: 1, 2: 2, 3: 1}
    assert made(tmp_path)[0] == {0: 1, 1: 1, 2: 2, 3: 1}
    errors = by_seed(table, "error")
    assert "stopped after the 4 s" in errors[0]
    assert re.search(r"stopped at \d+ MB; the run was given 300 MB", errors[1])
    assert errors[2].startswith("KernelDied")
    assert "attempt 1: the kernel was killed" in (out / table["folder"][2] / "log.txt").read_text()
    for folder in table["folder"]:
        assert {"run.json", "log.txt", "tiny.ipynb"} <= {path.name for path in (out / folder).iterdir()}
    # Going on: what failed at a limit stays, unless the limit was raised; what died is made again.
    what = sweeps.plan(tiny, [{"seed": 0, "act": "sleep"}], out=out)
    run = what.recorded()["smoke-seed0-act=sleep"]
    assert sweeps._stands(run, {"timeout": 4.0, "memory": None}, False)
    assert not sweeps._stands(run, {"timeout": 5.0, "memory": None}, False)
    assert not sweeps._stands(run, {"timeout": None, "memory": None}, False)
    assert not sweeps._stands(run, {"timeout": 4.0, "memory": None}, True)


def test_a_killed_worker_costs_its_run_alone_which_is_begun_again(tiny, tmp_path, out):
    def kill():
        until((tmp_path / "waited-1").exists)
        for process in list(runner._live):
            if "seed1" in str(process.args[-1]):
                os.kill(process.pid, signal.SIGKILL)

    (tmp_path / "waited-2").touch()
    killer = threading.Thread(target=kill)
    killer.start()
    table = lab.sweep(tiny, {"seed": [1, 2], "act": "wait"}, out=out, jobs=2, progress=False)
    killer.join()
    assert by_seed(table, "status") == {1: "ok", 2: "ok"}
    assert by_seed(table, "attempts") == {1: 2, 2: 1}
    counts, kernels = made(tmp_path)
    assert counts == {1: 2, 2: 1}
    until(lambda: all(gone(pid) for pid in kernels), 15)
    assert not (out / ".running").exists()


@pytest.mark.slow
def test_kill_nine_on_the_sweep_then_resume(tiny, tmp_path, out, capsys):
    command = [sys.executable, "-m", "labkit.lab.cli", "sweep", str(tiny), "-p", "seed=0:3", "-p", "act=wait"]
    (tmp_path / "waited-0").touch()
    environment = {**os.environ, "PYTHONPATH": str(project.package_folder().parent)}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*command, "--jobs", "2", "--out", str(out)], env=environment, stdout=log, stderr=log
        )
    try:
        until(lambda: (tmp_path / "waited-1").exists() and (tmp_path / "waited-2").exists())
        until((out / "tiny" / "smoke-seed0-act=wait" / "run.json").exists)
        with pytest.raises(ValueError, match="another sweep is at work"):
            lab.sweep(tiny, {"seed": range(3), "act": "wait"}, out=out, resume=True)
    finally:
        process.kill()
        process.wait()
    kernels = made(tmp_path)[1]
    until(lambda: all(gone(pid) for pid in kernels), 15)
    with pytest.raises(ValueError, match="holds 1 of these 3 runs already"):
        lab.sweep(tiny, {"seed": range(3), "act": "wait"}, out=out)
    source, given = sweeps.recall(out)
    table = lab.sweep(source, given, out=out, resume=True, jobs=2)
    assert "3 runs of tiny: 1 are there, 2 to make" in capsys.readouterr().out
    assert made(tmp_path)[0] == {0: 1, 1: 2, 2: 2}
    assert list(table["seed"]) == [0, 1, 2]
    assert (table["status"] == "ok").all()
    assert not (out / ".running").exists()
    # Once more: nothing is made, nothing is counted twice.
    again = lab.sweep(source, given, out=out, resume=True, progress=False)
    assert made(tmp_path)[0] == {0: 1, 1: 2, 2: 2}
    pd.testing.assert_frame_equal(table, again)
    pd.testing.assert_frame_equal(table, pd.read_parquet(out / "table.parquet"), check_dtype=False)


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker(tiny, tmp_path, out):
    distributed = pytest.importorskip("distributed")
    (tmp_path / "waited-0").touch()
    (tmp_path / "waited-2").touch()
    note = out / engines.ATTEMPTS / "smoke-seed1-act=wait"

    def kill():
        until((tmp_path / "waited-1").exists)
        os.kill(int(re.search(r"process (\d+)", note.read_text())[1]), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        killer.start()
        address = cluster.scheduler_address
        table = lab.sweep(tiny, {"seed": range(3), "act": "wait"}, out=out, scheduler=address, progress=False)
        killer.join()
        assert (table["status"] == "ok").all()
        assert by_seed(table, "attempts") == {0: 1, 1: 2, 2: 1}
        assert made(tmp_path)[0] == {0: 1, 1: 2, 2: 1}
        assert not note.exists()


class TestOnAWorker:
    """What a worker of a cluster does with a job, without a cluster."""

    def job(self, tiny, out, **changes):
        what = sweeps.plan(tiny, {"seed": 1}, out=out)
        values = {
            "source": str(tiny), "out": str(out), "given": {"seed": 1}, "key": what.runs[0].key,
            "fingerprint": what.runs[0].fingerprint, "sweep": "abc", "retries": 1,
        }  # fmt: skip
        out.mkdir()
        (out / engines.PLAN).write_text('{"sweep": "abc"}')
        return values | changes

    def test_without_a_shared_file_system(self, tiny, out):
        answer = engines.carry_here(self.job(tiny, out, sweep="other"))
        assert "needs a file system that all machines share" in answer["problem"]

    def test_with_another_version(self, tiny, out):
        answer = engines.carry_here(self.job(tiny, out, fingerprint="other"))
        assert "has another labkit, torch, transformers or notebook" in answer["problem"]

    def test_a_run_that_takes_its_workers_down_is_given_up(self, tiny, tmp_path, out):
        job = self.job(tiny, out)
        note = out / engines.ATTEMPTS / job["key"]
        note.parent.mkdir()
        note.write_text("one process 1 at noon\ntwo process 2 at one\n")
        answer = engines.carry_here(job)
        assert (answer["record"]["status"], answer["record"]["attempts"]) == ("died", 2)
        assert "each of the 2 workers" in answer["record"]["error"]["message"]
        assert made(tmp_path)[0] == {}
        recorded = runner.load(out / "tiny" / job["key"])
        assert recorded.status == "died"
        assert not sweeps._stands(recorded, {"timeout": None, "memory": None}, False)


class TestTable:
    def results(self, folder):
        """Three planned runs: one with everything, one that failed, one that is missing."""
        planned = [
            runner.RunResult("tiny", f"s{seed}", folder / "tiny" / f"s{seed}", "planned", {"seed": seed, "rate": 0.5},
                             0.0, 0.0, {}, None, "f")
            for seed in range(3)
        ]  # fmt: skip
        claim = {
            "id": "gain",
            "values": [1.0, 2.0, 3.0],
            "mean": 2.0,
            "interval": [0.5, 3.5],
            "verdict": "reproduced",
        }
        metrics = {"loss": 1, "curve": [1, 2], "notes": {"a": 1}, "odd": "text", "flag": True}
        verdicts = {
            "changed": {"rate": 0.5},
            "claims": [claim],
            "metrics": metrics,
            "device": "cpu",
            "environment": {"torch": "2", "gpu": "x"},
        }
        good = runner._with(planned[0], status="ok", seconds=2.0, verdicts=verdicts, host="here")
        error = {"name": "E", "message": "m", "cell": 3}
        bad = runner._with(
            planned[1],
            fingerprint="other",
            status="failed",
            seconds=1.0,
            error=error,
            verdicts={"metrics": {"odd": 4}},
        )
        return planned, {"s0": good, "s1": bad}

    def test_columns(self, tmp_path):
        table = tables.build(*self.results(tmp_path), tmp_path)
        assert list(table["run"]) == ["s0", "s1", "s2"]
        assert list(table["status"]) == ["ok", "failed", "missing"]
        assert list(table.columns[:3]) == ["run", "seed", "rate"]
        assert table["claim.gain"][0] == 2.0
        assert (table["claim.gain.low"][0], table["claim.gain.high"][0]) == (0.5, 3.5)
        assert table["claim.gain.verdict"][0] == "reproduced"
        assert table["claim.gain.values"][0] == [1.0, 2.0, 3.0]
        assert table["metric.loss"][0] == 1
        assert table["metric.curve"][0] == [1.0, 2.0]
        assert json.loads(table["metric.notes"][0]) == {"a": 1}
        assert list(table["metric.odd"][:2]) == ['"text"', "4"]
        assert bool(table["metric.flag"][0]) is True
        assert bool(table["exploratory"][0])
        assert list(table["as_planned"][:2]) == [True, False]
        assert pd.isna(table["exploratory"][2])
        assert table["error"][1] == "E: m (cell 3)"
        assert (table["env.torch"][0], table["env.gpu"][0], table["env.host"][0]) == ("2", "x", "here")
        assert table["folder"][2] == "tiny/s2"
        assert table.attrs["varied"] == ["seed"]
        assert pd.isna(table["claim.gain"][2])

    def test_both_files_hold_it(self, tmp_path):
        table = tables.build(*self.results(tmp_path), tmp_path)
        tables.write(table, tmp_path)
        parquet, text = pd.read_parquet(tmp_path / "table.parquet"), pd.read_csv(tmp_path / "table.csv")
        assert list(parquet.columns) == list(text.columns) == list(table.columns)
        assert parquet.attrs == table.attrs
        assert (
            list(parquet["claim.gain.values"][0])
            == json.loads(text["claim.gain.values"][0])
            == [1.0, 2.0, 3.0]
        )
        assert len(tables.per_seed(parquet)) == 3

    def test_each_seed_of_a_setting_counts_once(self, tmp_path):
        planned, results = self.results(tmp_path)
        results["s1"] = runner._with(results["s0"], key="s1", parameters=planned[1].parameters)
        table = tables.build(planned, results, tmp_path)
        long = tables.per_seed(table)
        assert list(long["seed"]) == [0, 1, 2, 3]
        assert set(long["claim"]) == {"gain"}
        assert tables.shared_seeds(table) == 2


def test_command_line(tiny, out, monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["labkit", "sweep", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    code, text, _ = call(str(tiny), "-p", "seed=0:3", "-p", "act=a,b", "--out", str(out), "--dry-run")
    assert code == 0
    assert text.splitlines()[0] == "smoke-seed0-act=a"
    assert text.splitlines()[-1].startswith("6 runs of tiny")
    assert not out.exists()
    for arguments, message in (
        ([str(tiny)], "a sweep needs a grid"),
        ([], "name a paper or a notebook"),
        (["--resume", "--out", str(out)], "holds no sweep"),
        (
            [str(tiny), "-p", "seed=0:2", "-p", "act=a,b,c", "--zip"],
            "parameters that go in step (zip) need equally",
        ),
        ([str(tiny), "-p", "sead=0:2"], "did you mean 'seed'?"),
        ([str(tiny), "-p", "seed=1", "--memory", "lots"], "--memory 'lots' is no amount of memory"),
    ):
        code, _, error = call(*arguments)
        assert (code, message in error) == (2, True), error


def test_many_runs_are_shown_in_part(tmp_path):
    from rich.console import Console

    board = live.Live([f"run{number}" for number in range(100)])
    result = runner.RunResult("tiny", "k", tmp_path, "ok", {}, 1.0, 50.0, {}, None, "f")
    failed = runner._with(result, status="memory", error={"cell": 2})
    for index in range(50):
        board.start(index)
        board.finish(index, failed if index == 7 else result)
    board.start(50)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(board.table())
    shown = console.export_text().splitlines()
    assert [line.split()[0] for line in shown[1:8]] == ["run7", *(f"run{number}" for number in range(45, 51))]
    assert "memory in cell 2" in shown[1]
    assert "50 of 100 done, 1 failed" in shown[-1]
