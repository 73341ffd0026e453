"""What carries the runs of a sweep: processes of this machine, or the workers of a dask.distributed scheduler.

Either way a run is a process of its own (:mod:`labkit.lab.worker`) that writes its own folder and renames it into
place, so the files are the state. A worker that is lost costs the run that it was at, which is begun again a bounded
number of times: each beginning on a cluster leaves a line in a file under ``.attempts``, where the next worker, and
a scheduler that knows nothing of runs, can count them.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from labkit.lab import runner
from labkit.lab.live import Board

ATTEMPTS = ".attempts"
#: File of a sweep's folder that names the sweep; a worker that can't read it shares no file system.
PLAN = "sweep.json"


class ClusterError(ConnectionError):
    """The scheduler can't be reached, or its workers can't carry these runs."""


@dataclass(frozen=True)
class Job:
    """A run as it is handed to a worker.

    Parameters
    ----------
    source : str
        Notebook, as an absolute path.
    out : str
        Folder of the sweep, absolute.
    given : dict
        Parameters to be injected.
    key, fingerprint : str
        As planned.
    sweep : str
        Identity of the sweep, as its plan has it.
    timeout, memory, retries
        As for :func:`labkit.lab.runner.execute`.
    """

    source: str
    out: str
    given: dict[str, Any]
    key: str
    fingerprint: str
    sweep: str
    timeout: float | None = None
    memory: float | None = None
    retries: int = 2

    def planned(self) -> runner.RunResult:
        """The run as this process, with its own versions and sources, would make it."""
        return runner.plan(self.source, Path(self.out), self.given)[0]

    def execute(
        self, begun: int = 0, on_event: Callable[[dict[str, Any]], None] | None = None
    ) -> runner.RunResult:
        """Run it here."""
        return runner.execute(
            self.source,
            self.out,
            self.given,
            timeout=self.timeout,
            memory=self.memory,
            retries=max(0, self.retries - begun),
            begun=begun,
            on_event=on_event,
        )


Finished = Callable[[int, runner.RunResult], None]


def local(jobs: Sequence[Job], workers: int, board: Board, finished: Finished) -> None:
    """Carry out runs in processes of this machine, `workers` at a time.

    Parameters
    ----------
    board : Board
        Shows how far the runs are.
    finished : callable
        Gets the index of each job that is over, and its result.
    """

    def one(index: int) -> None:
        board.start(index)
        result = jobs[index].execute(on_event=lambda event: board.event(index, event))
        board.finish(index, result)
        finished(index, result)

    runner.in_threads(one, len(jobs), workers, board.tick)


def cluster(jobs: Sequence[Job], scheduler: str, board: Board, finished: Finished) -> None:
    """Carry out runs on the workers of a dask.distributed scheduler, as many at a time as these have threads.

    The workers need labkit in the same version, and the folder of the sweep under the same path.

    Parameters
    ----------
    scheduler : str
        Address, such as ``"tcp://10.0.0.1:8786"``.

    Raises
    ------
    ClusterError
        If nothing answers there, the scheduler is lost, or a worker can't carry the runs.
    """
    from distributed import Client

    try:
        client = Client(scheduler, timeout=15, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no scheduler answers at {scheduler!r} ({error}); `dask scheduler` starts one and prints its address"
        ) from None
    work = _Cluster(client, jobs, board, finished)
    try:
        # What a killed sweep of this folder left running is ended first, so that no run is made twice.
        client.run(stop_here, jobs[0].out, on_error="ignore")
        work.carry()
    except BaseException:
        # First what has not begun, so that nothing takes the place of what is ended.
        _quietly(lambda: client.cancel(list(work.futures.values()), force=True))
        _quietly(lambda: client.run(stop_here, jobs[0].out, on_error="ignore"))
        raise
    finally:
        _quietly(lambda: client.close(timeout=5))


def _quietly(call: Callable[[], Any]) -> None:
    """Do something on a cluster that may be gone; the error that led here is what counts."""
    with contextlib.suppress(Exception):
        call()


_LOST = "the scheduler is lost; finished runs are kept, and --resume makes the others"


class _Cluster:
    """The runs of a sweep on a cluster, followed until all are over."""

    def __init__(self, client: Any, jobs: Sequence[Job], board: Board, finished: Finished) -> None:
        self.client, self.jobs, self.board, self.finished = client, jobs, board, finished
        self.futures: dict[int, Any] = {}
        self.submitted = [0] * len(jobs)
        self.waiting = set(range(len(jobs)))

    def carry(self) -> None:
        for index, job in enumerate(self.jobs):
            _attempts(job).unlink(missing_ok=True)
            self.submit(index)
        warned = False
        looked = 0.0
        while self.futures:
            if self.client.status not in ("running", "connecting"):
                raise ClusterError(_LOST)
            for index, future in list(self.futures.items()):
                if future.status != "pending":
                    self.settle(index, future)
            if time.monotonic() - looked > 1.0:
                looked = time.monotonic()
                self.look_for_begun()
                if not warned and self.client.scheduler_info().get("workers") == {}:
                    warned = True
                    print("no worker is connected to the scheduler yet; waiting for one", flush=True)
            self.board.tick()
            time.sleep(0.1)

    def submit(self, index: int) -> None:
        job = self.jobs[index]
        self.submitted[index] += 1
        name = f"labkit-{job.sweep}-{job.key}-{time.time_ns()}"
        self.futures[index] = self.client.submit(carry_here, asdict(job), key=name, pure=False)

    def look_for_begun(self) -> None:
        """Show the runs that some worker has begun."""
        for index in sorted(self.waiting):
            if _attempts(self.jobs[index]).exists():
                self.waiting.discard(index)
                self.board.start(index)

    def settle(self, index: int, future: Any) -> None:
        """Take a run's result; submit it again if the cluster lost it."""
        del self.futures[index]
        job = self.jobs[index]
        if future.status == "finished":
            answer = self.fetch(future.result)
            if "problem" in answer:
                raise ClusterError(answer["problem"])
            record = answer["record"]
            record.pop("schema", None)
            directory = Path(job.out) / record["slug"] / record["key"]
            self.over(index, runner.RunResult(directory=directory, verdicts=answer["verdicts"], **record))
            return
        error = self.fetch(future.exception) if future.status == "error" else None
        if error is not None and type(error).__name__ != "KilledWorker":
            if isinstance(error, ImportError):
                raise ClusterError(f"a worker can't import labkit ({error}); install the same version there")
            raise ClusterError(f"a worker failed at run {job.key}: {type(error).__name__}: {error}")
        # The scheduler gave the run up after several workers had died with it, begun or not.
        if self.submitted[index] <= job.retries:
            self.submit(index)
            return
        message = f"the workers that had the run died, {self.submitted[index]} times over"
        self.over(index, runner.record_lost(job.planned(), len(_begun(job)), message))

    def fetch(self, get: Callable[[], Any]) -> Any:
        """Get what a future holds from the cluster."""
        try:
            return get()
        except OSError:  # distributed's own errors of communication are such, too
            raise ClusterError(_LOST) from None

    def over(self, index: int, result: runner.RunResult) -> None:
        self.waiting.discard(index)
        _attempts(self.jobs[index]).unlink(missing_ok=True)
        self.board.finish(index, result)
        self.finished(index, result)


def _attempts(job: Job) -> Path:
    return Path(job.out) / ATTEMPTS / job.key


def _begun(job: Job) -> list[str]:
    try:
        return _attempts(job).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []


def carry_here(values: dict[str, Any]) -> dict[str, Any]:
    """Carry out one run; called on a worker of the cluster.

    Returns
    -------
    dict
        ``{"record", "verdicts"}`` of the run, or ``{"problem"}``: why this worker can't carry it.
    """
    job = Job(**values)
    here = f"the worker on {platform.node()}"
    try:
        plan = (Path(job.out) / PLAN).read_text(encoding="utf-8")
    except OSError:
        plan = ""
    if job.sweep not in plan:
        return {
            "problem": f"{here} can't see {job.out}: the cluster needs a file system that all machines share"
        }
    try:
        planned = job.planned()
    except (ValueError, TypeError, OSError) as error:
        return {"problem": f"{here} can't carry the run: {error}"}
    if planned.fingerprint != job.fingerprint:
        what = "another labkit, torch, transformers or notebook"
        return {"problem": f"{here} has {what} than the sweep began with; finished runs are kept"}
    begun = _begun(job)
    if len(begun) > job.retries:
        message = f"each of the {len(begun)} workers that began the run was lost: {'; '.join(begun)}"
        result = runner.record_lost(planned, len(begun), message)
    else:
        path = _attempts(job)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(f"{platform.node()} process {os.getpid()} at {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        result = job.execute(begun=len(begun))
    return {"record": result.record(), "verdicts": result.verdicts}


def stop_here(folder: str) -> None:
    """End the runs that this worker carries for a sweep; called on the workers of the cluster."""
    runner.stop_all(Path(folder))


def forget(out: Path) -> None:
    """Remove what matters only while a sweep runs."""
    shutil.rmtree(out / ATTEMPTS, ignore_errors=True)
    working = out / runner.WORKING
    runner.sweep_leftovers(working)
    with contextlib.suppress(OSError):  # missing, or another machine still has a run there
        working.rmdir()
