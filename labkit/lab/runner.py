"""Runs notebooks: one in a process of its own, or many with a live table, resumable.

Each run has a folder ``OUT/SLUG/KEY`` with the executed notebook, the verdicts that the notebook wrote, a log, and
``run.json``, the record of the run itself. A run works in a folder beside the results and is renamed into place
when it is over, so a result is either there or not; ``run.json`` carries a fingerprint of all that the run depends
on (:mod:`labkit.lab.fingerprint`), by which a later call knows what need not be done again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import cache, fingerprint, notebook, project, spacing

SCHEMA = 1
#: Seconds that a run of each size may take before it is stopped, where the caller names no limit.
TIMEOUTS: dict[str, float] = {"smoke": 600.0, "laptop": 1200.0, "gpu": 7200.0}
_WORKING = ".running"
_live: set[subprocess.Popen[str]] = set()
_stopped: set[subprocess.Popen[str]] = set()


class Stopped(RuntimeError):
    """The run was ended by :func:`stop_all`; nothing is recorded of it."""


@dataclass(frozen=True)
class RunResult:
    """What became of one run; the content of its ``run.json``.

    Parameters
    ----------
    slug : str
        The paper, or the stem of the notebook where it is not registered.
    key : str
        Name of the run within its paper, such as ``"laptop-seed0"``.
    directory : Path
        Folder of the run.
    status : {"ok", "failed", "timeout", "died"}
        A claim that is not reproduced is no failure: the status says whether the notebook ran to its end.
    parameters : dict
        All of them, defaults filled in.
    seconds, peak_memory_mb : float
        Wall time with the start of the kernel; resident memory of the kernel and what it started.
    cells : dict
        ``{"done": int, "total": int}``.
    error : dict or None
        Cell, name, message and last lines of the traceback.
    fingerprint : str
        Hash of all that the run depends on.
    verdicts : dict or None
        Content of ``verdicts.json``, if the notebook wrote one.
    attempts : int
        Two if the first kernel never answered.
    reused : bool
        Whether an earlier run was taken instead of running. Not stored.
    """

    slug: str
    key: str
    directory: Path
    status: str
    parameters: dict[str, Any]
    seconds: float
    peak_memory_mb: float
    cells: dict[str, int]
    error: dict[str, Any] | None
    fingerprint: str
    verdicts: dict[str, Any] | None = None
    attempts: int = 1
    started: str = ""
    finished: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    reused: bool = False

    @property
    def ok(self) -> bool:
        """Whether the notebook ran to its end."""
        return self.status == "ok"

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.directory / f"{self.slug}.ipynb"

    @property
    def counts(self) -> dict[str, int]:
        """How many claims got each verdict."""
        found: dict[str, int] = {}
        for claim in (self.verdicts or {}).get("claims", []):
            found[claim["verdict"]] = found.get(claim["verdict"], 0) + 1
        return found

    def summary(self) -> str:
        """The verdicts in a few words, or what went wrong.

        Examples
        --------
        >>> from pathlib import Path
        >>> claims = [{"verdict": "reproduced"}] * 5 + [{"verdict": "not reproduced"}]
        >>> result = RunResult("nacl", "laptop-seed0", Path(), "ok", {}, 1.0, 1.0, {}, None, "", {"claims": claims})
        >>> result.summary()
        '5 reproduced, 1 not'
        """
        if not self.ok:
            error = self.error or {}
            where = f" in cell {error['cell']}" if error.get("cell") is not None else ""
            what = f": {error['name']}" if error.get("name") and self.status == "failed" else ""
            return f"{self.status}{where}{what}"
        words = {"reproduced": "reproduced", "not reproduced": "not", "untestable here": "untestable"}
        parts = [f"{self.counts[name]} {word}" for name, word in words.items() if name in self.counts]
        return ", ".join(parts) or "no claims"

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        values = asdict(self)
        for name in ("directory", "verdicts", "reused"):
            del values[name]
        return {"schema": SCHEMA, **values}


def load(directory: Path) -> RunResult | None:
    """Read a run's folder; None if there is no complete record in it."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        if record.pop("schema") != SCHEMA:
            return None
        verdicts = directory / "verdicts.json"
        content = json.loads(verdicts.read_text(encoding="utf-8")) if verdicts.exists() else None
        return RunResult(directory=directory, verdicts=content, **record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_all(out: Path) -> list[RunResult]:
    """All recorded runs under a folder, by paper and key."""
    found = (load(path.parent) for path in sorted(out.glob("*/*/run.json")))
    return [run for run in found if run is not None]


def check_parameters(paper: papers.Paper | None, path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run, checked before a kernel starts.

    Raises
    ------
    ValueError, TypeError
        For a name that the paper's registry entry (or, for an unregistered notebook, its parameters cell) does
        not have, with the nearest one; for a value that is not allowed.
    """
    if paper is not None:
        return paper.check(parameters)
    known = notebook.parameters(notebook.read(path))
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{path.name} has no parameter {name!r}; {papers.nearest(name, known)}")
        wanted = type(known[name])
        if (
            known[name] is not None
            and not isinstance(value, wanted)
            and not (wanted is float and type(value) is int)
        ):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; a {wanted.__name__} is wanted")
    return {**known, **parameters}


def parse_parameters(paper: papers.Paper, given: Mapping[str, str]) -> dict[str, Any]:
    """Turn the text of a command line's ``name=value`` into values of the right type, and check them.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one, or text that is not a value of the parameter's type.
    """
    defaults = paper.check({})
    values = {}
    for name, text in given.items():
        if name not in defaults:
            raise ValueError(f"{paper.slug} has no parameter {name!r}; {papers.nearest(name, defaults)}")
        values[name] = _parse(name, text, type(defaults[name]))
    paper.check(values)
    return values


def _parse(name: str, text: str, wanted: type) -> Any:
    if wanted is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
    else:
        with contextlib.suppress(ValueError):
            return wanted(text)
    choices = ", 'true' or 'false'" if wanted is bool else ""
    raise ValueError(f"{name}={text!r} is not {'an' if wanted is int else 'a'} {wanted.__name__}{choices}")


def run_key(parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Name of a run's folder: size and seed, and a short hash of whatever else differs from the defaults.

    Examples
    --------
    >>> run_key({"size": "smoke", "seed": 3}, {"size": "laptop", "seed": 0})
    'smoke-seed3'
    """
    rest = {
        name: value
        for name, value in parameters.items()
        if name not in ("size", "seed") and value != defaults.get(name)
    }
    parts = [str(parameters[name]) for name in ("size",) if name in parameters]
    parts += [f"seed{parameters['seed']}"] if "seed" in parameters else []
    if rest:
        parts.append(hashlib.sha256(json.dumps(rest, sort_keys=True, default=str).encode()).hexdigest()[:6])
    return "-".join(parts) or "default"


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
    paper, path = project.resolve(slug_or_path)
    checked = check_parameters(paper, path, parameters)
    key = run_key(checked, check_parameters(paper, path, {}))
    slug = paper.slug if paper else path.stem
    digest = fingerprint.of_run(notebook.read(path), checked, paper)
    folder = out.resolve() / slug / key
    return RunResult(slug, key, folder, "planned", checked, 0.0, 0.0, {}, None, digest), paper, path


def execute(
    slug_or_path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    parameters: Mapping[str, Any] | None = None,
    *,
    fresh: bool = False,
    timeout: float | None = None,
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
    parent = Path(out_dir).resolve() / _WORKING
    sweep_leftovers(parent)
    started = datetime.now(UTC).isoformat(timespec="seconds")
    attempts = 0
    while True:
        attempts += 1
        folder = parent / f"{planned.slug}.{planned.key}.{os.getpid()}.{threading.get_ident()}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / ".scratch" / "runtime").mkdir(parents=True)
        try:
            done = _carry(folder, path, given, size, limit, start_timeout, on_event)
            if done["status"] == "never answered" and attempts == 1:
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
            )
            _commit(folder, result)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return load(planned.directory) or result


def _with(result: RunResult, **changes: Any) -> RunResult:
    from dataclasses import replace

    return replace(result, **changes)


def _carry(
    folder: Path,
    source: Path,
    inject: Mapping[str, Any],
    size: str,
    limit: float | None,
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
                event = json.loads(line)
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
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def sweep_leftovers(parent: Path) -> None:
    """Remove working folders whose runner is dead."""
    import psutil

    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        numbers = [part for part in folder.name.split(".") if part.isdigit()]
        if not numbers or not psutil.pid_exists(int(numbers[0])):
            shutil.rmtree(folder, ignore_errors=True)


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


def stop_all() -> None:
    """Kill every run that this process has started; none of them is recorded."""
    for process in list(_live):
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
        pool = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="labkit-run")
        stopped = threading.Event()

        def one(index: int) -> RunResult | None:
            if stopped.is_set():
                return None
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

        futures: dict[Future[RunResult | None], int] = {
            pool.submit(one, index): index for index in range(len(slugs))
        }
        try:
            results = {futures[future]: future.result() for future in _completed(futures, board.tick)}
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
    return [result for index in range(len(slugs)) if (result := results[index]) is not None]


def _completed(
    futures: Mapping[Future[RunResult | None], int], tick: Callable[[], None]
) -> Iterator[Future[RunResult | None]]:
    """Yield futures as they finish, calling `tick` in between."""
    pending = set(futures)
    while pending:
        finished, pending = wait(pending, timeout=0.25, return_when=FIRST_COMPLETED)
        tick()
        yield from finished
