"""Verdicts of recorded runs for the terminal; the pages are written by :mod:`labkit.lab.site`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.lab import claims, runner
from labkit.lab.site.build import write

__all__ = ["show", "write"]

_STYLE = {"reproduced": "green", "not reproduced": "red", "untestable here": "dim"}


def show(runs: Sequence[runner.RunResult]) -> None:
    """Print the verdict on each claim of each run, and what went wrong with failed ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=140)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("run", "claim", "measured", "threshold", "verdict"):
        table.add_column(title, no_wrap=title in ("threshold", "verdict"))
    rows = 0
    for run in runs:
        for index, claim in enumerate((run.verdicts or {}).get("claims", []) if run.ok else []):
            name = f"{run.slug} {run.key}" if index == 0 else ""
            style = _STYLE.get(claim["verdict"], "")
            table.add_row(
                name, claim["id"], claims.measured(claim), _bound(claim), Text(claim["verdict"], style=style)
            )
            rows += 1
    if rows:
        console.print()
        console.print(table)
    for run in runs:
        if run.ok:
            continue
        error = run.error or {}
        console.print(
            f"\n{run.slug} {run.key}: {run.summary()}", style="bold red", markup=False, highlight=False
        )
        for line in error.get("traceback", [])[-8:] or [error.get("message", "")]:
            console.print(f"  {line}", markup=False, highlight=False)
        console.print(f"  log: {run.directory / 'log.txt'}", markup=False, highlight=False, soft_wrap=True)


def _bound(claim: Mapping[str, Any]) -> str:
    if claim["threshold"] is None:
        return "–"
    return f"{claim['direction']} {claims.number(claim['threshold'])}"
