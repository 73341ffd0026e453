"""Sweeps: one notebook over a grid of parameters, on this machine or on a cluster, and one table of what came out.

A sweep has a folder: ``sweep.json`` (the plan), ``SLUG/RUN/`` for each run (executed notebook, ``verdicts.json``,
log, ``run.json``), and ``table.parquet`` and ``table.csv`` (:mod:`labkit.lab.tables`). What is done is read off the
runs' own files, so a sweep that was killed at any moment goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import papers
from labkit.lab import cache, engines, grid, project, runner, tables

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
#: Statuses that are results: a resumed sweep keeps them, unless asked to try failed runs again.
SETTLED = ("ok", "failed", "timeout", "memory")


@dataclass(frozen=True)
class Plan:
    """What a sweep is going to do, checked.

    Parameters
    ----------
    slug : str
        Paper, or stem of the notebook.
    source : Path
        Notebook.
    folder : Path
        Folder of the sweep.
    given : tuple of dict
        The parameters that each run is given.
    runs : tuple of RunResult
        The runs, planned.
    paper : Paper or None
    """

    slug: str
    source: Path
    folder: Path
    given: tuple[dict[str, Any], ...]
    runs: tuple[runner.RunResult, ...]
    paper: papers.Paper | None

    def recorded(self) -> dict[str, runner.RunResult]:
        """Runs that have a record which still stands, by key."""
        found = {}
        for run in self.runs:
            earlier = runner.load(run.directory)
            if earlier is not None and earlier.fingerprint == run.fingerprint:
                found[run.key] = earlier
        return found

    def seconds(self, jobs: int) -> float | None:
        """Estimate of the whole, from what the registry says of the sizes."""
        if self.paper is None:
            return None
        each = [self.paper.sizes[run.parameters["size"]].seconds for run in self.runs]
        return sum(each) / min(jobs, len(each))


def plan(
    slug_or_path: str | os.PathLike[str],
    parameters: grid.Grid | Sequence[grid.Grid] | str | os.PathLike[str],
    *,
    zip: bool | Sequence[str] = False,
    out: str | os.PathLike[str] | None = None,
) -> Plan:
    """Expand a grid and check every run; nothing is started or written.

    Parameters
    ----------
    slug_or_path, parameters, zip, out
        As for :func:`sweep`.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        For an unknown paper or parameter, a value that is not allowed, or a grid that can't be expanded.
    """
    paper, source = project.resolve(slug_or_path)
    slug = paper.slug if paper else source.stem
    known = grid.defaults(paper, source)
    for name in known:
        if name in tables.OWN:
            raise ValueError(
                f"{slug} has a parameter {name!r}, which a sweep's table has as a column of its own"
            )
    if isinstance(parameters, str | os.PathLike):
        parameters = grid.read(parameters, known, slug)
    given = grid.expand(parameters, zip)
    if not any(given):
        raise ValueError("the grid is empty; name a parameter and its values at least")
    folder = Path(out).resolve() if out is not None else default_folder(slug, given)
    runs, _, _ = runner.plan_many(slug_or_path, folder, given)
    # Two ways to write one run are one run.
    first = {run.key: index for index, run in reversed(list(enumerate(runs)))}
    order = sorted(first.values())
    return Plan(
        slug,
        source,
        folder,
        tuple(given[index] for index in order),
        tuple(runs[index] for index in order),
        paper,
    )


def default_folder(slug: str, given: Sequence[Mapping[str, Any]]) -> Path:
    """Folder of a sweep where the caller names none; the same grid has the same folder."""
    text = json.dumps([sorted(values.items()) for values in given], default=str)
    return project.root() / "build" / "sweeps" / f"{slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def recall(out: str | os.PathLike[str]) -> tuple[str, list[dict[str, Any]]]:
    """Notebook and parameters of the sweep that a folder holds, for going on with it.

    Raises
    ------
    ValueError
        If there is no sweep in the folder.
    """
    path = Path(out) / engines.PLAN
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["source"], [run["given"] for run in content["runs"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{str(out)!r} holds no sweep; name the paper and its grid") from None


def sweep(
    slug_or_path: str | os.PathLike[str],
    parameters: grid.Grid | Sequence[grid.Grid] | str | os.PathLike[str] | None = None,
    *,
    zip: bool | Sequence[str] = False,
    jobs: int | None = None,
    scheduler: str | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    fresh: bool = False,
    timeout: float | None = None,
    memory: float | None = None,
    retries: int = 2,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Run a notebook over a grid of parameters.

    Parameters
    ----------
    slug_or_path : str or path
        A registered paper, or a notebook.
    parameters : mapping, sequence of mappings, or path
        Name to a value or to a list, range or array of values. The runs of several mappings are put together. A
        path is read as YAML. Everything is checked against the registry before the first run starts.
    zip : bool or sequence of str
        Parameters whose values go in step instead of being crossed: with True, all that have several.
    jobs : int, optional
        Runs at a time on this machine. By default one per core as memory allows; one at the sizes for a GPU.
    scheduler : str, optional
        Address of a dask.distributed scheduler, such as ``"tcp://10.0.0.1:8786"``, whose workers carry the runs
        instead. They need labkit, and this machine's folders under the same paths.
    out : path, optional
        Folder of the sweep; by default one under ``build/sweeps`` that is named after paper and grid.
    resume : bool
        Keep the runs that the folder holds, and make what is missing: runs that have no record, that were killed,
        or whose notebook, package or limits have changed since.
    retry_failed : bool
        With `resume`: also make runs again that failed or were stopped at a limit.
    fresh : bool
        Remove the runs that the folder holds.
    timeout : float, optional
        Seconds per run; by size if not given.
    memory : float, optional
        Megabytes (10^6 bytes) per run.
    retries : int
        How often a run is begun again whose worker or kernel was killed.
    progress : bool, optional
        Live table on a terminal and plain lines elsewhere; False shows nothing.

    Returns
    -------
    pandas.DataFrame
        One row per run, as :mod:`labkit.lab.tables` describes; also written into the folder, which is
        ``table.attrs["folder"]``. A run that failed is a row whose ``status`` says so.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        Before the first run starts, if anything is wrong with the grid, or if the folder holds runs and neither
        `resume` nor `fresh` is given.
    ConnectionError
        If the scheduler can't be reached or used. Finished runs are kept.

    Examples
    --------
    >>> from labkit import lab
    >>> table = lab.sweep("nacl", {"budget": [0.05, 0.1], "seed": range(2), "size": "smoke"})  # doctest: +SKIP
    >>> table.groupby("budget")["claim.keeps-retrieval"].mean()                                # doctest: +SKIP
    """
    _check_options(jobs, timeout, memory, retries)
    if parameters is None:
        raise ValueError("a sweep needs a grid, such as {'seed': range(3)}")
    if jobs is not None and scheduler is not None:
        raise ValueError(
            "jobs counts runs on this machine; on a cluster the workers' threads do, so leave it out"
        )
    if resume and fresh:
        raise ValueError("resume keeps what is there and fresh removes it: give one of them")
    if retry_failed and not resume:
        raise ValueError("retry_failed goes with resume")
    what = plan(slug_or_path, parameters, zip=zip, out=out)
    _require("pyarrow", "notebooks")
    if scheduler is not None:
        _require("distributed", "dask")
    workers = jobs if jobs is not None else default_jobs(what)
    with _alone(what.folder):
        if fresh:
            for run in what.runs:
                shutil.rmtree(run.directory, ignore_errors=True)
        there = what.recorded()
        if there and not resume:
            raise ValueError(
                f"{what.folder} holds {len(there)} of these {len(what.runs)} runs already; "
                "--resume (resume=True) makes the others, --fresh (fresh=True) makes all anew"
            )
        limits = {"timeout": timeout, "memory": memory, "retries": retries}
        return _carry_out(what, there, limits, workers, scheduler, retry_failed, progress)


def _check_options(jobs: int | None, timeout: float | None, memory: float | None, retries: int) -> None:
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    for name, value in (("timeout", timeout), ("memory", memory)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} must be a positive number of {_UNITS[name]}")
    if retries < 0:
        raise ValueError(f"retries={retries} must be at least 0")


_UNITS = {"timeout": "seconds", "memory": "megabytes"}


def _require(module: str, extra: str) -> None:
    """Find out before the first run, not after the last, that a library is missing."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise ImportError(f"a sweep needs {module}, of the extra labkit[{extra}]")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep two sweeps out of one folder. The lock goes with the process, however it ends."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0.5):
            yield
    except Timeout:
        raise ValueError(
            f"another sweep is at work in {folder}; wait for it, or name another --out"
        ) from None


def default_jobs(what: Plan) -> int:
    """Runs at a time on this machine: one per core as memory allows; one where a size is meant for a GPU."""
    import psutil

    sizes = {str(run.parameters.get("size", "")) for run in what.runs}
    if sizes & {"gpu", "paper"}:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    each = max((what.paper.sizes[size].memory_mb for size in sizes), default=0) if what.paper else 0
    room = int(psutil.virtual_memory().available / 1e6 / max(each, 500))
    return max(1, min(cores, room, len(what.runs)))


def _carry_out(
    what: Plan,
    there: Mapping[str, runner.RunResult],
    limits: Mapping[str, Any],
    workers: int,
    scheduler: str | None,
    retry_failed: bool,
    progress: bool | None,
) -> pd.DataFrame:
    from labkit.lab import live

    results = {key: run for key, run in there.items() if _stands(run, limits, retry_failed)}
    missing = [index for index, run in enumerate(what.runs) if run.key not in results]
    name = uuid.uuid4().hex[:12]
    cache.write_atomic(what.folder / engines.PLAN, json.dumps(_describe(what, name, limits), indent=1) + "\n")
    engines.forget(what.folder)
    jobs = [
        engines.Job(
            source=str(what.source),
            out=str(what.folder),
            given=what.given[index],
            key=what.runs[index].key,
            fingerprint=what.runs[index].fingerprint,
            sweep=name,
            **limits,
        )
        for index in missing
    ]
    if progress is not False:
        print(_opening(what, len(missing), workers, scheduler), flush=True)
    lock = threading.Lock()
    written = time.monotonic()

    def finished(index: int, result: runner.RunResult) -> None:
        nonlocal written
        with lock:
            results[result.key] = result
            # Every now and then, for whoever watches.
            if time.monotonic() - written > 15:
                tables.write(tables.build(what.runs, results, what.folder), what.folder)
                written = time.monotonic()

    try:
        if jobs:
            with live.board([job.key for job in jobs], enabled=progress) as board:
                if scheduler is not None:
                    engines.cluster(jobs, scheduler, board, finished)
                else:
                    engines.local(jobs, workers, board, finished)
    finally:
        table = tables.build(what.runs, results, what.folder)
        tables.write(table, what.folder)
    engines.forget(what.folder)
    return table


def _stands(run: runner.RunResult, limits: Mapping[str, Any], retry_failed: bool) -> bool:
    """Whether a recorded run is kept by a sweep that is resumed."""
    if run.ok:
        return True
    if retry_failed or run.status not in SETTLED:
        return False
    if run.status == "failed":
        return True
    before = run.limits.get("timeout" if run.status == "timeout" else "memory_mb")
    now = limits["timeout" if run.status == "timeout" else "memory"]
    if run.status == "timeout" and now is None:
        now = runner.TIMEOUTS.get(str(run.parameters.get("size", "")))
    return before is not None and now is not None and now <= before


def _describe(what: Plan, name: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "sweep": name,
        "slug": what.slug,
        "source": str(what.source),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "limits": dict(limits),
        "parameters": list(what.runs[0].parameters),
        "varied": varied(what),
        "runs": [
            {"key": run.key, "given": values, "parameters": run.parameters, "fingerprint": run.fingerprint}
            for values, run in zip(what.given, what.runs, strict=True)
        ],
    }


def varied(what: Plan) -> list[str]:
    """Parameters that have more than one value in the sweep."""
    names = what.runs[0].parameters
    return [name for name in names if len({repr(run.parameters[name]) for run in what.runs}) > 1]


def _opening(what: Plan, missing: int, workers: int, scheduler: str | None) -> str:
    where = f"on {scheduler}" if scheduler else f"{workers} at a time"
    count = len(what.runs)
    if missing < count:
        return f"{count} runs of {what.slug}: {count - missing} are there, {missing} to make, {where}"
    estimate = what.seconds(workers) if not scheduler else None
    about = f", about {duration(estimate)}" if estimate else ""
    return f"{count} runs of {what.slug}, {where}{about}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, in words.

    Examples
    --------
    >>> duration(42), duration(300), duration(9000)
    ('42 s', '5 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def megabytes(text: str) -> float:
    """An amount of memory, such as ``800``, ``800MB`` or ``1.5GB``, in megabytes (10^6 bytes).

    Examples
    --------
    >>> megabytes("800"), megabytes("1.5GB")
    (800.0, 1500.0)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(mb|gb|)\s*", text.lower())
    if not match or not float(match[1]):
        raise ValueError(f"--memory {text!r} is no amount of memory; write 800, 800MB or 1.5GB")
    return float(match[1]) * (1000 if match[2] == "gb" else 1)


def show(table: pd.DataFrame) -> None:
    """Print a sweep's table: what varies, what became of each run, and what went wrong with failed ones."""
    import sys

    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=140)
    names = table.attrs["varied"] or ["run"]
    verdicts = [name for name in table.columns if name.startswith("claim.") and name.endswith(".verdict")]
    view = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in (*names, "status", "tries", "s", "peak MB", "reproduced"):
        view.add_column(title, justify="left" if title in (*names, "status") else "right", no_wrap=True)
    starred = False
    for _, run in table.head(60).iterrows():
        decided = [run[name] for name in verdicts if isinstance(run[name], str)]
        tested = [verdict for verdict in decided if verdict != "untestable here"]
        count = f"{tested.count('reproduced')} of {len(tested)}" if tested else "–"
        if tested and run["exploratory"] is True:
            count, starred = count + " *", True
        cost = [f"{run[name]:.{digits}f}" if run[name] == run[name] else "" for name, digits in _COST]
        style = {"ok": "", tables.MISSING: "dim"}.get(run["status"], "bold red")
        view.add_row(
            *(str(run[name]) for name in names),
            run["status"],
            str(run["attempts"]),
            *cost,
            count,
            style=style,
        )
    console.print(view)
    if starred:
        console.print("* exploratory: not the setting that the thresholds were registered for")
    if len(table) > 60:
        console.print(f"... and {len(table) - 60} more runs")
    folder = Path(table.attrs["folder"])
    for _, run in table[~table["status"].isin(["ok", tables.MISSING])].head(10).iterrows():
        console.print(f"\n{run['run']}: {run['status']}", style="bold red", markup=False, highlight=False)
        console.print(f"  {run['error']}", markup=False, highlight=False)
        console.print(
            f"  log: {folder / run['folder'] / 'log.txt'}", markup=False, highlight=False, soft_wrap=True
        )
    counts = table["status"].value_counts()
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    console.print(f"\n{len(table)} runs: {said}", highlight=False)
    changed = sum(value is False for value in table["as_planned"].astype(object))
    if changed:
        console.print(
            f"{changed} runs were made after the notebook, labkit or a library had changed: "
            "--resume makes anew whatever does not match",
            style="bold red",
            highlight=False,
        )
    shared = tables.shared_seeds(table)
    if shared:
        console.print(
            f"{shared} values come from seeds that runs of the same setting share, since a run takes several seeds "
            "from its first on: labkit.lab.tables.per_seed(table) counts each once",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"Table: {folder / 'table.csv'} and table.parquet", highlight=False, soft_wrap=True)


_COST = (("seconds", 1), ("peak_memory_mb", 0))
