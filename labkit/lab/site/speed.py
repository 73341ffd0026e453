"""The recorded benchmarks as tables: the newest record of each point, losing ones marked, never left out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured point.

    Parameters
    ----------
    labels : tuple of str
        Shape, mode, dtype; or phase and provider.
    baseline, candidate : float or None
        Seconds.
    speedup, low, high : float or None
        Baseline's time over the candidate's, with its 90 % interval; None where the result was wrong.
    state : {"faster", "even", "slower", "wrong", "baseline"}
    memory : tuple
        Bytes of baseline and candidate, None where not measured.
    note : str
        Why the correctness gate was red.
    """

    labels: tuple[str, ...]
    baseline: float | None
    candidate: float | None
    speedup: float | None
    low: float | None
    high: float | None
    state: str
    memory: tuple[float | None, float | None] = (None, None)
    note: str = ""


@dataclass(frozen=True)
class Group:
    """A table: one operation, or one race, on one device."""

    benchmark: str
    title: str
    subtitle: str
    heads: tuple[str, ...]
    baseline: str
    candidate: str
    rows: Sequence[Row]
    environment: Mapping[str, Any]
    kind: str = "comparison"
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def losing(self) -> int:
        """How many points are wrong, slower, or not faster beyond the spread."""
        return sum(row.state in ("even", "slower", "wrong") for row in self.rows)


def groups(folder: Path) -> list[Group]:
    """All tables of the results under a folder, by benchmark."""
    found: list[Group] = []
    files = sorted(folder.glob("*.jsonl"))
    if files:
        from labkit.lab import bench

        for path in files:
            found += of_records(path.stem, bench.read(path))
    return found


def of_records(benchmark: str, records: Iterable[Mapping[str, Any]]) -> list[Group]:
    """The tables of one results file; of points measured more than once the newest counts."""
    records = list(records)
    found = [
        *_grouped(records, "comparison", ("op", "baseline", "candidate", "device"), ("shape", "mode", "dtype"),
                  lambda key, rows: _comparison(benchmark, rows)),
        *_grouped(records, "race", ("race", "baseline", "setting"), ("phase", "provider"),
                  lambda key, rows: _race(benchmark, rows)),
        *_grouped(records, "memory", ("op",), ("provider",), lambda key, rows: _memory(benchmark, rows)),
    ]  # fmt: skip
    return found


def _grouped(
    records: Sequence[Mapping[str, Any]],
    kind: str,
    table: Sequence[str],
    point: Sequence[str],
    make: Callable[[str, list[Mapping[str, Any]]], Group],
) -> list[Group]:
    newest: dict[str, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        if record.get("kind") == kind:
            names = [json.dumps(record.get(name), sort_keys=True) for name in table]
            place = json.dumps([record.get(name) for name in point], sort_keys=True)
            rows = newest.setdefault(" ".join(names), {})
            rows.pop(place, None)  # keep the order of the newest measurement
            rows[place] = record
    return [make(key, list(rows.values())) for key, rows in newest.items()]


def _state(speedup: float | None, low: float | None, high: float | None) -> str:
    if speedup is None or low is None or high is None:
        return "wrong"
    return "faster" if low > 1 else "slower" if high < 1 else "even"


def _comparison(benchmark: str, records: list[Mapping[str, Any]]) -> Group:
    first, last = records[0], records[-1]
    rows = []
    for item in records:
        ours, theirs = item["candidate"], item["baseline"]
        seconds, memory = item.get("seconds", {}), item.get("memory", {})
        state = "wrong" if item.get("failure") else _state(item["speedup"], item["low"], item["high"])
        rows.append(
            Row(
                (item["shape"], item["mode"], item["dtype"]),
                seconds.get(theirs),
                seconds.get(ours),
                item["speedup"],
                item["low"],
                item["high"],
                state,
                (memory.get(theirs), memory.get(ours)),
                item.get("failure") or "",
            )
        )
    title = f"{first['op']}"
    return Group(
        benchmark,
        title,
        f"{first['candidate']} against {first['baseline']} on {first['device']}, by {first['clock']} time",
        ("shape", "mode", "dtype"),
        first["baseline"],
        first["candidate"],
        rows,
        last.get("environment", {}),
    )


def _race(benchmark: str, records: list[Mapping[str, Any]]) -> Group:
    first, last = records[0], records[-1]
    baseline = first["baseline"]
    base = {item["phase"]: item for item in records if item["provider"] == baseline}
    rows = []
    for item in records:
        own = item["provider"] == baseline
        ratio, low, high = (item[name] for name in ("time_ratio", "low", "high"))
        speedup = 1 / ratio if ratio else math.inf
        bounds = (1 / high if high else math.inf, 1 / low if low else math.inf)
        beside = base.get(item["phase"], {})
        rows.append(
            Row(
                (item["phase"], item["provider"]),
                beside.get("seconds"),
                item["seconds"],
                speedup,
                *bounds,
                "baseline" if own else _state(speedup, *bounds),
                (beside.get("memory"), item.get("memory")),
            )
        )
    setting = ", ".join(f"{name} {value}" for name, value in first.get("setting", {}).items())
    return Group(
        benchmark,
        first["race"],
        f"{setting}; against {baseline}, by {first['clock']} time",
        ("phase", "provider"),
        baseline,
        "time",
        rows,
        last.get("environment", {}),
        "race",
    )


def _memory(benchmark: str, records: list[Mapping[str, Any]]) -> Group:
    providers = [str(item["provider"]) for item in records]
    peaks = [item.get("peak_bytes", {}) for item in records]
    sizes = sorted({size for found in peaks for size in found}, key=lambda size: (len(size), size))
    rows = [
        Row((size, *(megabytes(found.get(size)) for found in peaks)), None, None, None, None, None, "")
        for size in sizes
    ]
    facts = {
        str(item["provider"]): f"grows as n^{item['exponent']:.2f}" for item in records if "exponent" in item
    }
    heads = ("size", *(f"{provider} MB" for provider in providers))
    return Group(
        benchmark, f"{records[0]['op']}, memory", "peak above the inputs as the size grows",
        heads, "", "", rows, records[-1].get("environment", {}), "memory", facts,
    )  # fmt: skip


def milliseconds(seconds: float | None) -> str:
    """Three digits in milliseconds.

    >>> milliseconds(0.00197), milliseconds(1.5), milliseconds(None)
    ('1.97', '1500', '–')
    """
    if seconds is None:
        return "–"
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(count: float | None) -> str:
    """Bytes in MB.

    >>> megabytes(1234567), megabytes(None)
    ('1.23', '–')
    """
    if count is None:
        return "–"
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def bar(row: Row) -> str:
    """A speedup on a logarithmic scale from 1/16 to 16 with the line of equal speed, as inline SVG."""
    from markupsafe import Markup

    if row.speedup is None or row.low is None or row.high is None:
        return ""

    def x(value: float) -> float:
        return round(60 + 56 * max(-1.0, min(1.0, math.log2(max(value, 1e-9)) / 4)), 1)

    begin, end = sorted((60.0, x(row.speedup)))
    return Markup(
        f'<svg class="speed {row.state}" viewBox="0 0 120 16" aria-hidden="true">'
        f'<rect x="{begin}" y="4" width="{max(end - begin, 0.8):.1f}" height="8"/>'
        f'<line class="bar" x1="{x(row.low)}" x2="{x(row.high)}" y1="8" y2="8"/>'
        f'<line class="limit" x1="60" x2="60" y1="1" y2="15"/></svg>'
    )


def machine(environment: Mapping[str, Any]) -> str:
    """The machine of a record in one line."""
    parts = [
        environment.get("gpu") or environment.get("processor"),
        f"{environment.get('threads', '?')} threads",
    ]
    parts += [f"{name} {environment[name]}" for name in ("torch", "triton") if environment.get(name)]
    if environment.get("load"):
        parts.append(f"load {environment['load'][0]}")
    if environment.get("commit"):
        parts.append(f"commit {environment['commit']}")
    if environment.get("date"):
        parts.append(str(environment["date"])[:10])
    return " · ".join(str(part) for part in parts if part)
