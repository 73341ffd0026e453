"""The benchmarks of the repository: what there is, what was recorded, and running them."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import project


@dataclass(frozen=True)
class Benchmark:
    """One file ``benchmarks/NAME.py``.

    Parameters
    ----------
    name : str
    path : Path
    about : str
        First sentence of its docstring.
    points : int
        Records in ``benchmarks/results/NAME.jsonl``.
    newest : str
        Day of the newest record; empty if there is none.
    """

    name: str
    path: Path
    about: str
    points: int = 0
    newest: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "about": self.about, "points": self.points, "newest": self.newest}


def found() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    folder = project.root() / "benchmarks"
    known = {}
    for path in sorted(folder.glob("[a-z]*.py")):
        try:
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        except SyntaxError:
            words = "does not parse"
        points, newest = _recorded(folder / "results" / f"{path.stem}.jsonl")
        about = (words.strip().splitlines() or [""])[0]
        known[path.stem] = Benchmark(path.stem, path, about, points, newest)
    return known


def _recorded(path: Path) -> tuple[int, str]:
    if not path.is_file():
        return 0, ""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    days = [str(json.loads(line).get("environment", {}).get("date", ""))[:10] for line in lines]
    return len(lines), max(days, default="")


def get(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises
    ------
    ValueError
        If there is none; the nearest name is named.
    """
    known = found()
    if name not in known:
        raise ValueError(f"there is no benchmark {name!r}; {papers.nearest(name, known)}")
    return known[name]


def command(
    benchmark: Benchmark,
    *,
    quick: bool = False,
    device: str | None = None,
    out: Path | None = None,
    further: Sequence[str] = (),
) -> list[str]:
    """The command line that runs a benchmark.

    Parameters
    ----------
    benchmark : Benchmark
    quick : bool
        Small sizes and few rounds; prints, and records only with `out`.
    device : {"cpu", "cuda"}, optional
        By default the benchmark chooses.
    out : path, optional
        File of JSON lines to add to.
    further : sequence of str
        Options that only this benchmark has.

    Raises
    ------
    ValueError
        For an unknown device.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device {device!r} is not allowed; one of 'cpu', 'cuda'")
    line = [sys.executable, str(benchmark.path)]
    line += ["--quick"] if quick else []
    line += ["--device", device] if device else []
    line += ["--out", str(out.resolve())] if out else []
    return [*line, *further]


def run(line: Sequence[str]) -> int:
    """Run a benchmark in a process of its own with one thread; returns its exit code."""
    top = project.root()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    source = str(project.package_folder().parent)
    environment["PYTHONPATH"] = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(line, cwd=top, env=environment, check=False).returncode


def show(known: Sequence[Benchmark]) -> None:
    """Print the list as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("benchmark", "what it times", "recorded"):
        table.add_column(title, no_wrap=title == "benchmark")
    for item in known:
        recorded = f"{item.points} points, newest {item.newest}" if item.points else "nothing yet"
        table.add_row(item.name, item.about, recorded)
    Console(soft_wrap=False).print(table)
