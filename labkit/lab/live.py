"""How far the runs are: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from labkit.lab.result import RunResult


class Board:
    """State of several runs. This one shows nothing; see :func:`board`."""

    def __init__(self, slugs: Sequence[str]) -> None:
        self.slugs = list(slugs)
        self.rows: list[dict[str, Any]] = [{"state": "waiting"} for _ in slugs]
        self.ended: list[int] = []
        self.lock = threading.Lock()

    def start(self, index: int) -> None:
        """A run was taken up."""
        with self.lock:
            self.rows[index] = {"state": "running", "since": time.monotonic(), "cell": 0, "total": 0, "mb": 0}

    def event(self, index: int, event: dict[str, Any]) -> None:
        """A run reported a cell or its memory."""
        with self.lock:
            row = self.rows[index]
            if event["event"] == "cell":
                row |= {"cell": event["index"] + 1, "total": event["total"]}
            else:
                row["mb"] = max(row["mb"], event["mb"])

    def finish(self, index: int, result: RunResult) -> None:
        """A run is over."""
        with self.lock:
            self.rows[index] = {"state": "done", "result": result}
            self.ended.append(index)

    def tick(self) -> None:
        """Called a few times a second."""

    def cells(self, index: int) -> tuple[str, str, str, str]:
        """Progress, seconds, memory and verdicts of a row, as text."""
        row = self.rows[index]
        if row["state"] == "waiting":
            return "waiting", "", "", ""
        if row["state"] == "running":
            elapsed = f"{time.monotonic() - row['since']:.0f}"
            where = f"cell {row['cell']}/{row['total']}" if row["total"] else "starting"
            return where, elapsed, f"{row['mb']}" if row["mb"] else "", ""
        result: RunResult = row["result"]
        state = "unchanged" if result.reused else "done" if result.ok else result.status
        return state, f"{result.seconds:.1f}", f"{result.peak_memory_mb:.0f}", result.summary()


class Lines(Board):
    """One line when a run starts and one when it is over."""

    def start(self, index: int) -> None:
        super().start(index)
        self._say(index, "started")

    def finish(self, index: int, result: RunResult) -> None:
        super().finish(index, result)
        state, seconds, memory, verdicts = self.cells(index)
        self._say(index, f"{state}, {seconds} s, {memory} MB, {verdicts}")

    def _say(self, index: int, text: str) -> None:
        done = sum(row["state"] == "done" for row in self.rows)
        print(f"[{done}/{len(self.rows)}] {self.slugs[index]}: {text}", flush=True)


class Live(Board):
    """A table that is redrawn in place: of many runs those that run, failed or ended last."""

    #: More runs than this are shown in part.
    tallest = 30

    def __init__(self, slugs: Sequence[str]) -> None:
        from rich.live import Live as RichLive

        super().__init__(slugs)
        self.view = RichLive(self.table(), refresh_per_second=4, transient=False)

    def table(self) -> Table:
        """The table as it stands."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for title, side in (("run", "left"), ("progress", "left"), ("s", "right"), ("peak MB", "right")):
            table.add_column(title, justify="right" if side == "right" else "left", no_wrap=True)
        table.add_column("verdicts")
        with self.lock:
            for index in self._shown():
                state, seconds, memory, verdicts = self.cells(index)
                style = {"waiting": "dim", "done": "green", "unchanged": "green"}.get(state, "")
                if state in ("failed", "timeout", "memory", "died"):
                    style = "bold red"
                table.add_row(self.slugs[index], Text(state, style=style), seconds, memory, verdicts)
            if len(self.rows) > self.tallest:
                done = [row for row in self.rows if row["state"] == "done"]
                failed = sum(not row["result"].ok for row in done)
                table.caption = f"{len(done)} of {len(self.rows)} done, {failed} failed"
        return table

    def _shown(self) -> list[int]:
        if len(self.rows) <= self.tallest:
            return list(range(len(self.rows)))
        running = [index for index, row in enumerate(self.rows) if row["state"] == "running"]
        failed = [index for index in self.ended if not self.rows[index]["result"].ok]
        return sorted({*running, *failed[-5:], *self.ended[-5:]})

    def tick(self) -> None:
        self.view.update(self.table())

    def finish(self, index: int, result: RunResult) -> None:
        super().finish(index, result)
        self.tick()


@contextmanager
def board(slugs: Sequence[str], enabled: bool | None = None) -> Iterator[Board]:
    """Board of runs: live on a terminal, lines elsewhere; `enabled` False shows nothing."""
    if enabled is False:
        yield Board(slugs)
    elif not sys.stdout.isatty():
        yield Lines(slugs)
    else:
        shown = Live(slugs)
        with shown.view:
            yield shown
            shown.tick()
