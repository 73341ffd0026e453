"""The process that carries one notebook: ``python -m labkit.lab.worker SPEC``, started by :mod:`labkit.lab.runner`.

A process of its own keeps the environment, the working directory and the event loop of a run apart from those of
its neighbours, and makes a run something that can be killed. It reads a JSON specification, runs the notebook
through papermill, prints one JSON event a line on standard output, and leaves ``executed.ipynb``, ``run.json`` and
what the notebook itself wrote in its folder. When its standard input closes, the runner is gone: it kills its
kernel and leaves.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

NEVER_ANSWERED = "never answered"


def papermill_execute(
    source: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[int, int], None],
    start_timeout: float,
    held: dict[str, Any],
) -> BaseException | None:
    """Run a notebook through papermill, in the interpreter that runs this: all that labkit asks of papermill.

    Parameters
    ----------
    source : Path
        Notebook; not touched.
    parameters : mapping
        Injected after the cell tagged ``parameters``. With none, no cell is injected.
    on_cell : callable
        Called with the index of each cell that starts, and the number of cells.
    start_timeout : float
        Seconds that the kernel has to answer for the first time.
    held : dict
        Gets the notebook under ``"nb"``, as far as it got.

    Returns
    -------
    BaseException or None
        What stopped it.
    """
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec
    from papermill.engines import NBClientEngine, papermill_engines

    class OwnKernel(AsyncKernelManager):
        """Starts this interpreter, whatever kernel a user's folders register as python3."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(resource_dir="", **get_kernel_dict())

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            held["nb"] = nb_man.nb
            start = nb_man.cell_start

            def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> None:
                on_cell(cell_index or 0, len(nb_man.nb.cells))
                start(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(
                nb_man, kernel_name, kernel_manager_class=OwnKernel, **options
            )

    papermill_engines.register("labkit", Engine)
    try:
        papermill.execute_notebook(
            str(source),
            None,
            parameters=dict(parameters),
            engine_name="labkit",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            request_save_on_cell_execute=False,
            autosave_cell_every=0,
            start_timeout=start_timeout,
        )
    except Exception as error:
        return error
    return None


class Watch(threading.Thread):
    """Samples the memory of the kernel's process tree, and ends the run at a limit of time or memory.

    Parameters
    ----------
    timeout : float or None
        Seconds from :meth:`begin` on after which the kernel is killed.
    memory : float or None
        Resident megabytes above which it is killed.
    overdue : callable
        Called if the run has not noticed, `grace` seconds later, that its kernel is gone.
    """

    def __init__(
        self,
        timeout: float | None,
        memory: float | None,
        overdue: Callable[[], None],
        grace: float = 10.0,
        interval: float = 0.1,
    ) -> None:
        super().__init__(daemon=True)
        self.timeout, self.memory, self.overdue = timeout, memory, overdue
        self.grace, self.interval = grace, interval
        self.peak = 0
        #: Limit that ended the run, ``"timeout"`` or ``"memory"``; empty if none did.
        self.stopped = ""
        self.finished = threading.Event()
        self._begun: float | None = None

    def begin(self) -> None:
        """The first cell starts: the time of the run counts from here."""
        if self._begun is None:
            self._begun = time.monotonic()

    def run(self) -> None:
        killed = 0.0
        while not self.finished.wait(self.interval):
            used = tree_memory()
            self.peak = max(self.peak, used)
            now = time.monotonic()
            if self.stopped:
                if now - killed > self.grace:
                    self.overdue()
                continue
            if self.memory is not None and used > self.memory * 1e6:
                self.stopped = "memory"
            elif self.timeout is not None and self._begun is not None and now - self._begun > self.timeout:
                self.stopped = "timeout"
            if self.stopped:
                killed = now
                kill_children()


def tree_memory() -> int:
    """Resident bytes of all descendants of this process: the kernel and what it started.

    For a kernel without children the kernel's own high-water mark is taken where the system has it (Linux), so
    that a short peak between two samples counts.
    """
    import psutil

    total = 0
    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            total += child.memory_info().rss
        except psutil.Error:
            continue
    if len(children) == 1:
        try:
            status = Path(f"/proc/{children[0].pid}/status").read_text()
            mark = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            total = max(total, int(mark.split()[1]) * 1024)
        except (OSError, StopIteration, ValueError):
            pass
    return total


def kill_children() -> None:
    """Kill all descendants of this process."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.Error:
            continue


def _leave_with_runner() -> None:
    """Block until standard input closes, then kill everything."""
    sys.stdin.buffer.read()
    kill_children()
    os._exit(3)


def describe(error: BaseException) -> dict[str, Any]:
    """What stopped a run, as a record: name, message, last lines of the traceback."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        return {
            "name": error.ename,
            "message": _plain(error.evalue)[-2000:],
            "traceback": _plain("\n".join(error.traceback)).splitlines()[-25:],
        }
    if isinstance(error, DeadKernelError):
        return {"name": "KernelDied", "message": "the kernel was killed or crashed", "traceback": []}
    lines = traceback.format_exception(error)
    return {
        "name": type(error).__name__,
        "message": _plain(str(error))[-2000:],
        "traceback": _plain("".join(lines)).splitlines()[-25:],
    }


def _plain(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def outcome(error: BaseException | None, stopped: str) -> str:
    """Status of a run from what ended it: ok, failed, a limit, died, or that the kernel never answered."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    if stopped:
        return stopped
    if error is None:
        return "ok"
    if isinstance(error, PapermillExecutionError):
        return "failed"
    if isinstance(error, DeadKernelError):
        return "died"
    if isinstance(error, RuntimeError) and (
        "before replying" in str(error) or "didn't respond" in str(error)
    ):
        return NEVER_ANSWERED
    return "failed"


def main(argument: str) -> None:
    """Carry out the run that a specification file describes."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing but events goes to the runner
    threading.Thread(target=_leave_with_runner, daemon=True).start()
    spec = json.loads(Path(argument).read_text(encoding="utf-8"))
    # Where it is installed, jsonschema imports this checker of internationalised addresses, which builds a grammar
    # for most of a second. No notebook has such addresses to check; jsonschema does without it.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]

    from labkit.lab import notebook

    seen = {"index": 0, "total": 0}
    held: dict[str, Any] = {}
    turn = threading.RLock()

    def emit(event: str, **values: Any) -> None:
        with turn:
            events.write(json.dumps({"event": event, **values}) + "\n")

    def on_cell(index: int, total: int) -> None:
        watch.begin()
        seen.update(index=index, total=total)
        emit("cell", index=index, total=total)

    def report_memory() -> None:
        while not watch.finished.wait(1.0):
            emit("memory", mb=round(watch.peak / 1e6))

    def conclude(error: BaseException | None) -> None:
        """Write the notebook, say how it ended, and leave. The first thread that comes here does it."""
        with turn:
            seconds = time.monotonic() - started
            watch.finished.set()
            kill_children()
            nb = held.get("nb")
            status = outcome(error, watch.stopped)
            failure = None if error is None else {"cell": seen["index"], **describe(error)}
            if status == "timeout":
                message = f"stopped after the {spec['timeout']:g} s that the run was given"
                failure = {"cell": seen["index"], "name": "Timeout", "message": message, "traceback": []}
            elif status == "memory":
                message = (
                    f"stopped at {watch.peak / 1e6:.0f} MB; the run was given {spec['memory']:g} MB of memory"
                )
                failure = {"cell": seen["index"], "name": "MemoryLimit", "message": message, "traceback": []}
            if nb is not None:
                notebook.write(notebook.strip(nb), Path(spec["folder"]) / "executed.ipynb")
            emit(
                "done",
                status=status,
                seconds=round(seconds, 2),
                peak_memory_mb=round(watch.peak / 1e6, 1),
                cells={
                    "done": seen["index"] + (status == "ok"),
                    "total": seen["total"] or (len(nb.cells) if nb is not None else 0),
                },
                error=failure,
            )
            events.close()
            os._exit(0)  # the thread that reads standard input never returns

    watch = Watch(spec["timeout"], spec["memory"], overdue=lambda: conclude(None))
    started = time.monotonic()
    watch.start()
    threading.Thread(target=report_memory, daemon=True).start()
    conclude(papermill_execute(Path(spec["source"]), spec["inject"], on_cell, spec["start_timeout"], held))


if __name__ == "__main__":
    main(sys.argv[1])
