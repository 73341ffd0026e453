"""Runs notebooks: one in a process of its own, or many with a live table, resumable.

Each run has a folder ``OUT/SLUG/KEY`` with the executed notebook, the verdicts that the notebook wrote, a log, and
``run.json``, the record of the run itself. A run works in a folder beside the results and is renamed into place
when it is over, so a result is either there or not; ``run.json`` carries a fingerprint of all that the run depends
on (:mod:`labkit.lab.fingerprint`), by which a later call knows what need not be done again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from labkit import papers
from labkit.lab import cache, fingerprint, notebook, project, spacing
from labkit.lab.parameters import check_parameters, parse_parameters, parse_value, run_key
from labkit.lab.result import RunResult, load, load_all

__all__ = [
    "TIMEOUTS",
    "WORKING",
    "RunResult",
    "Stopped",
    "check_parameters",
    "environment",
    "execute",
    "kill_tree",
    "load",
    "load_all",
    "parse_parameters",
    "parse_value",
    "plan",
    "plan_many",
    "run_key",
    "run_many",
    "stop_all",
    "sweep_leftovers",
]

T = TypeVar("T")

#: Seconds that a run of each size may take before it is stopped, where the caller names no limit.
TIMEOUTS: dict[str, float] = {"smoke": 600.0, "laptop": 1200.0, "gpu": 7200.0}
#: Folder, beside the results, of the runs that are under way.
WORKING = ".running"
_live: set[subprocess.Popen[str]] = set()
_stopped: set[subprocess.Popen[str]] = set()


class Stopped(RuntimeError):
    """The run was ended by :func:`stop_all`; nothing is recorded of it."""


def environment(size: str, folder: Path) -> dict[str, str]:
    """Environment of a kernel that runs in batch.

    One thread at the sizes meant for a laptop: two kernels whose threads share two cores are many times slower,
    and the number of threads moves the last digits. Those sizes never ask the hub.
    """
    inherited = dict(os.environ)
    scratch = folder / ".scratch"
    own = {
        "LABKIT_BATCH": "1",
        "LABKIT_RUN_DIR": str(folder),
        "PLOTLY_RENDERER": "plotly_mimetype",
        "TOKENIZERS_PARALLELISM": "false",
        "MPLBACKEND": "agg",
        "PYTHONHASHSEED": "0",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        # Kernels that share a user's history database wait for its lock, and start-up files change results.
        "IPYTHONDIR": str(scratch / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
    }
    if size in ("smoke", "laptop", ""):
        own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    source = str(project.package_folder().parent)
    own["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | own


def plan(
    slug_or_path: str | os.PathLike[str], out: Path, parameters: Mapping[str, Any]
) -> tuple[RunResult, papers.Paper | None, Path]:
    """Check a run without starting it.

    Returns
    -------
    result : RunResult
        Status ``"planned"``, with the folder, the parameters and the fingerprint that the run will have.
    paper, path
        Registry entry, if there is one, and the notebook.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        As :func:`check_parameters` and :func:`labkit.lab.project.resolve`.
    """
    results, paper, path = plan_many(slug_or_path, out, [parameters])
    return results[0], paper, path


def plan_many(
    slug_or_path: str | os.PathLike[str], out: Path, grid: Sequence[Mapping[str, Any]]
) -> tuple[list[RunResult], papers.Paper | None, Path]:
    """Check many runs of one notebook, reading it and what it imports once; see :func:`plan`."""
    paper, path = project.resolve(slug_or_path)
    checked = [check_parameters(paper, path, parameters) for parameters in grid]
    defaults = check_parameters(paper, path, {})
    slug = paper.slug if paper else path.stem
    nb_hash = fingerprint.of_notebook(notebook.read(path), paper)
    results = []
    for values in checked:
        key = run_key(values, defaults)
        folder = out.resolve() / slug / key
        digest = fingerprint.with_parameters(nb_hash, values)
        results.append(RunResult(slug, key, folder, "planned", values, 0.0, 0.0, {}, None, digest))
    return results, paper, path


def execute(
    slug_or_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    parameters: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    timeout: float | None = None,
    memory: float | None = None,
    retries: int = 0,
    begun: int = 0,
    start_timeout: float = 180.0,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> RunResult:
    """Run one notebook and record what came of it.

    Parameters
    ----------
    slug_or_path : str or path
        A registered paper, or a notebook.
    out_dir : str or path
        The run gets the folder ``out_dir/SLUG/KEY``.
    parameters : mapping, optional
        Checked before a kernel starts. Only what is given is injected into the notebook.
    fresh : bool
        Run even if the same run is recorded already.
    timeout : float, optional
        Seconds before the run is stopped; by size if not given.
    memory : float, optional
        Resident megabytes (10^6 bytes) of the kernel and what it started, above which the run is stopped. They are
        looked at ten times a second, so a fast allocation may go over for a moment.
    retries : int
        How often a run that was killed (its worker or its kernel, not by a limit) is begun again.
    begun : int
        How often the run was begun before this call, for its record.
    start_timeout : float
        Seconds that the kernel has to answer for the first time. One that never answers is tried once more.
    on_event : callable, optional
        Gets ``{"event": "cell", "index", "total"}`` and ``{"event": "memory", "mb"}`` while the notebook runs.

    Returns
    -------
    RunResult
        Whatever the notebook did; a notebook that raises is a result with status ``"failed"``.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        For an unknown paper or a wrong parameter, before anything starts.
    OSError
        If the disk is full; no half-written result is left.
    """
    given = dict(parameters or {})
    planned, _paper, path = plan(slug_or_path, Path(out_dir), given)
    if not fresh:
        earlier = load(planned.directory)
        if earlier is not None and earlier.ok and earlier.fingerprint == planned.fingerprint:
            return _with(earlier, reused=True)
    size = str(planned.parameters.get("size", ""))
    limit = timeout if timeout is not None else TIMEOUTS.get(size)
    parent = Path(out_dir).resolve() / WORKING
    sweep_leftovers(parent)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    attempts, deaths, silent = begun, 0, False
    earlier_log: list[str] = []
    while True:
        attempts += 1
        stem = f"{os.getpid()}.{threading.get_ident()}.{_host()}"
        folder = parent / f"{stem}.{planned.slug}.{planned.key}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / ".scratch" / "runtime").mkdir(parents=True)
        try:
            done = _carry(folder, path, given, size, limit, memory, start_timeout, on_event)
            if done["status"] == "never answered" and not silent:
                silent = True
                earlier_log.append(f"attempt {attempts}: the kernel never answered")
                continue
            if done["status"] == "died" and deaths < retries:
                deaths += 1
                earlier_log.append(f"attempt {attempts}: {done['error']['message']}")
                continue
            result = _with(
                planned,
                status="died" if done["status"] == "never answered" else done["status"],
                seconds=done["seconds"],
                peak_memory_mb=done["peak_memory_mb"],
                cells=done["cells"],
                error=done["error"],
                attempts=attempts,
                started=started,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=fingerprint.versions(),
                limits={"timeout": limit, "memory_mb": memory},
                host=platform.node(),
            )
            if earlier_log:
                log = folder / "log.txt"
                last = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
                log.write_text("\n".join([*earlier_log, last]), encoding="utf-8")
            _commit(folder, result)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return load(planned.directory) or result


def record_lost(planned: RunResult, attempts: int, message: str) -> RunResult:
    """Record a run that nothing is left of, because each machine that began it was lost.

    Parameters
    ----------
    planned : RunResult
        As :func:`plan` gives it.
    attempts : int
        How often it was begun.
    message : str
        What is known of its end.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    error: dict[str, Any] = {"cell": None, "name": "WorkerLost", "message": message, "traceback": []}
    result = _with(
        planned, status="died", error=error, attempts=attempts, cells={"done": 0, "total": 0}, finished=now
    )
    stem = f"{os.getpid()}.{threading.get_ident()}.{_host()}"
    folder = planned.directory.parent.parent / WORKING / f"{stem}.{planned.slug}.{planned.key}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text(message + "\n", encoding="utf-8")
    _commit(folder, result)
    return result


def _host() -> str:
    """Name of this machine, as part of a file's name: a folder that several machines share tells them apart."""
    return re.sub(r"[^A-Za-z0-9-]+", "-", platform.node()) or "host"


def _with(result: RunResult, **changes: Any) -> RunResult:
    from dataclasses import replace

    return replace(result, **changes)


def _carry(
    folder: Path,
    source: Path,
    inject: Mapping[str, Any],
    size: str,
    limit: float | None,
    memory: float | None,
    start_timeout: float,
    on_event: Callable[[dict[str, Any]], None] | None,
) -> dict[str, Any]:
    """Run a worker to its end and return its last event; make one up if it was killed."""
    spec = folder / ".scratch" / "spec.json"
    spec.write_text(
        json.dumps(
            {
                "source": str(source),
                "folder": str(folder),
                "inject": dict(inject),
                "timeout": limit,
                "memory": memory,
                "start_timeout": start_timeout,
            }
        ),
        encoding="utf-8",
    )
    spacing.wait_turn()
    started = time.monotonic()
    done: dict[str, Any] | None = None
    peak, cells = 0.0, {"done": 0, "total": 0}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "labkit.lab.worker", str(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=folder,
            env=environment(size, folder),
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then ends the worker
        )
        _live.add(process)
        # The worker keeps the limit itself and saves what the notebook did; this is for a worker that hangs.
        backstop = threading.Timer((limit or 0) + start_timeout + 60, kill_tree, [process.pid])
        backstop.daemon = True
        if limit is not None:
            backstop.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                try:
                    event = json.loads(line)
                except ValueError:  # the worker was killed in the middle of a line
                    continue
                if event["event"] == "done":
                    done = event
                elif event["event"] == "cell":
                    cells = {"done": event["index"], "total": event["total"]}
                else:
                    peak = max(peak, event["mb"])
                if on_event is not None and event["event"] != "done":
                    on_event(event)
            process.wait()
        finally:
            backstop.cancel()
            kill_tree(process.pid)
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            _live.discard(process)
    if process in _stopped:
        _stopped.discard(process)
        raise Stopped("the run was stopped")
    if done is not None:
        return done
    kill_strays(folder)
    tail = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
    seconds = time.monotonic() - started
    return {
        "status": "timeout" if limit is not None and seconds > limit else "died",
        "seconds": round(seconds, 2),
        "peak_memory_mb": peak,
        "cells": cells,
        "error": {
            "cell": cells["done"],
            "name": "WorkerDied",
            "message": f"the process of the run ended with code {process.returncode} before the notebook did",
            "traceback": tail,
        },
    }


def _commit(folder: Path, result: RunResult) -> None:
    """Rename a finished working folder into place."""
    executed = folder / "executed.ipynb"
    if executed.exists():
        executed.rename(folder / f"{result.slug}.ipynb")
    shutil.rmtree(folder / ".scratch", ignore_errors=True)
    cache.write_atomic(folder / "run.json", json.dumps(result.record(), indent=1) + "\n")
    target = result.directory
    target.parent.mkdir(parents=True, exist_ok=True)
    old = folder.with_name(folder.name + ".old")
    for attempt in range(5):
        with contextlib.suppress(FileNotFoundError):
            target.rename(old)
        try:
            folder.rename(target)
            break
        except OSError:  # another machine, taken for lost, put the same run in place at this moment
            if attempt == 4 or not target.exists():
                raise
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def sweep_leftovers(parent: Path) -> None:
    """Remove working folders whose runner is dead."""
    import psutil

    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        pid, _, host, *_ = [*folder.name.split("."), "", "", ""]
        if pid.isdigit() and (host != _host() or psutil.pid_exists(int(pid))):
            continue
        kill_strays(folder)
        shutil.rmtree(folder, ignore_errors=True)


def kill_strays(folder: Path) -> None:
    """Kill whatever of a run is left when its worker was killed: a kernel no longer has a parent to be found by."""
    import psutil

    for process in psutil.process_iter(["environ"]):
        if (process.info["environ"] or {}).get("LABKIT_RUN_DIR") == str(folder):
            with contextlib.suppress(psutil.Error):
                process.kill()


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, whichever sessions they moved to."""
    import psutil

    try:
        process = psutil.Process(pid)
        family = [*process.children(recursive=True), process]
    except psutil.Error:
        return
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()


def stop_all(under: Path | None = None) -> None:
    """Kill every run that this process has started, or those that work under a folder; none of them is recorded."""
    for process in list(_live):
        spec = Path(str(process.args[-1]))  # type: ignore[index]
        if under is None or under in spec.parents:
            _stopped.add(process)
            kill_tree(process.pid)


def run_many(
    slugs: Sequence[str],
    size: str = "laptop",
    *,
    jobs: int = 1,
    out: str | os.PathLike[str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    fresh: bool = False,
    timeout: float | None = None,
    table: bool | None = None,
) -> list[RunResult]:
    """Run several notebooks, showing how far they are.

    Parameters
    ----------
    slugs : sequence of str
        Registered papers, or paths of notebooks.
    size : str
        Size of every run.
    jobs : int
        Kernels at a time; more than there are cores is slower than one after the other.
    out : path, optional
        Folder of the results; ``build/runs`` in the repository by default.
    parameters : mapping, optional
        Further parameters of every run, such as ``{"seed": 3}``.
    fresh : bool
        Run again what is recorded already.
    timeout : float, optional
        Seconds per run.
    table : bool, optional
        Live table, plain lines or, with False, nothing at all on a terminal; by default what suits the output.

    Returns
    -------
    list of RunResult
        In the order of `slugs`.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        Before the first run starts, if any of the runs is wrong.
    KeyboardInterrupt
        After Ctrl-C, once all kernels are gone. Finished runs are kept.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    folder = Path(out) if out is not None else project.default_out()
    given = {"size": size, **(parameters or {})}
    keys = [plan(name, folder, given)[0] for name in slugs]
    if len({(run.slug, run.key) for run in keys}) < len(keys):
        raise ValueError("the same run is asked for twice")
    from labkit.lab import live

    with live.board([run.slug for run in keys], enabled=table) as board:

        def one(index: int) -> RunResult:
            board.start(index)
            result = execute(
                slugs[index],
                folder,
                given,
                fresh=fresh,
                timeout=timeout,
                on_event=lambda event: board.event(index, event),
            )
            board.finish(index, result)
            return result

        return in_threads(one, len(slugs), jobs, board.tick)


def in_threads(
    one: Callable[[int], T], count: int, jobs: int, tick: Callable[[], None] = lambda: None
) -> list[T]:
    """Call `one` with 0 to `count` - 1, `jobs` at a time; each call runs a notebook in a process of its own.

    Parameters
    ----------
    one : callable
        Carries out a run; an exception ends all others.
    tick : callable
        Called a few times a second by the calling thread.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C, once all kernels are gone.
    """
    pool = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="labkit-run")
    stopped = threading.Event()

    def unless_stopped(index: int) -> T:
        if stopped.is_set():
            raise Stopped("the run was not begun")
        return one(index)

    futures: dict[Future[T], int] = {pool.submit(unless_stopped, index): index for index in range(count)}
    try:
        results = {futures[future]: future.result() for future in _completed(futures, tick)}
    except BaseException:
        stopped.set()
        for future in futures:
            future.cancel()
        while not all(future.done() for future in futures):
            stop_all()
            time.sleep(0.05)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [results[index] for index in range(count)]


def _completed(futures: Mapping[Future[T], int], tick: Callable[[], None]) -> Iterator[Future[T]]:
    """Yield futures as they finish, calling `tick` in between."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
        tick()
        yield from finished
