"""Recorded sweeps: which parameters vary, what was measured, and both in the form that the sweep page draws."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit import papers
from labkit.lab import claims
from labkit.lab.figures.look import number as rounded

if TYPE_CHECKING:
    import pandas as pd

_COSTS = {"seconds": "seconds", "peak_memory_mb": "peak memory, MB"}


@dataclass(frozen=True)
class Measure:
    """A column of the table that can be drawn: a claim, a metric or a cost."""

    column: str
    label: str
    kind: str  # "claim", "metric" or "cost"
    threshold: float | None = None
    direction: str = ""


@dataclass(frozen=True)
class Sweep:
    """One sweep as recorded in a folder.

    Parameters
    ----------
    folder : Path
    slug, created : str
    table : DataFrame
        One row a run.
    parameters : list of str
        Those that take more than one value.
    fixed : dict
        Parameters with one value.
    measures : list of Measure
    """

    folder: Path
    slug: str
    created: str
    table: pd.DataFrame
    parameters: list[str]
    fixed: dict[str, Any]
    measures: list[Measure]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def page(self) -> str:
        """Address of the page from the root of the site."""
        return f"sweeps/{self.slug}--{self.name}.html"

    @property
    def machines(self) -> dict[str, str]:
        """Devices, hosts and torch versions that the runs had."""
        columns = {"device": "env.gpu" if "env.gpu" in self.table else "env.device", "host": "env.host"}
        return {
            label: ", ".join(sorted(map(str, self.table[column].dropna().unique())))
            for label, column in {**columns, "torch": "env.torch"}.items()
            if column in self.table and self.table[column].notna().any()
        }

    @property
    def exploratory(self) -> int:
        """How many runs turn a knob away from the setting that the thresholds were fixed for."""
        if "exploratory" not in self.table:
            return 0
        return int((self.table["exploratory"].astype(str) == "True").sum())

    @property
    def states(self) -> dict[str, int]:
        """How many runs ended how."""
        if "status" not in self.table:
            return {"ok": len(self.table)}
        return {str(name): int(n) for name, n in self.table["status"].value_counts().items()}


def find(*places: Path) -> list[Sweep]:
    """All readable sweeps under the folders, newest first; each folder is looked at two levels deep."""
    folders: dict[Path, None] = {}
    for place in places:
        for pattern in ("sweep.json", "*/sweep.json", "*/*/sweep.json"):
            folders |= dict.fromkeys(path.parent.resolve() for path in sorted(place.glob(pattern)))
    found = [sweep for folder in folders if (sweep := read(folder)) is not None]
    return sorted(found, key=lambda sweep: (sweep.created, sweep.name), reverse=True)


def read(folder: Path) -> Sweep | None:
    """A sweep's folder; None while it has no table yet or can't be read."""
    import pandas as pd

    try:
        head = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
        table = pd.read_csv(folder / "table.csv")
        slug, names = str(head["slug"]), list(head["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    paper = papers.load(slug) if slug in papers.slugs() else None
    # The paper's own knobs first: the seed is what one averages over.
    own = sorted((name for name in names if name in table.columns), key=lambda name: name == "seed")
    varied = [name for name in own if table[name].nunique(dropna=True) > 1]
    fixed = {
        name: table[name].dropna().iloc[0] for name in own if name not in varied and table[name].notna().any()
    }
    size = str(fixed.get("size", ""))
    return Sweep(
        folder, slug, str(head.get("started", "")), table, varied, fixed, list(_measures(table, paper, size))
    )


def _measures(table: pd.DataFrame, paper: papers.Paper | None, size: str) -> Iterable[Measure]:
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    for column in map(str, table.columns):
        kind, _, name = column.partition(".")
        numeric = is_numeric_dtype(table[column]) and not is_bool_dtype(table[column])
        if not numeric or not table[column].notna().any():
            continue
        if kind == "claim" and not name.endswith((".low", ".high", ".verdict", ".values")):
            known = next((claim for claim in paper.claims if claim.id == name), None) if paper else None
            threshold = known.threshold.get(size) if known else None
            yield Measure(
                column, known.text if known else name, "claim", threshold, known.direction if known else ""
            )
        elif kind == "metric":
            yield Measure(column, name, "metric")
    for column, label in _COSTS.items():
        if column in table.columns and table[column].notna().any():
            yield Measure(column, label, "cost")


def points(sweep: Sweep, measure: Measure) -> list[list[Any]]:
    """What was measured, each as the values of the varied parameters and then the number itself.

    A claim has one point per seed where the table tells them, each seed of a setting once: a run takes several seeds
    from its first one on, so two runs may share some. Anything else has one point per run.
    """
    values = f"{measure.column}.values"
    per_seed = measure.kind == "claim" and values in sweep.table
    found: dict[str, list[Any]] = {}
    for number, row in enumerate(sweep.table.to_dict("records")):
        if per_seed:
            given = _listed(row[values])
            first = row.get("seed")
            for index, value in enumerate(given):
                own = {**row, "seed": int(first) + index} if isinstance(first, int | float) else row
                at = [_plain(own[name]) for name in sweep.parameters]
                # The very seed tells points of one setting apart also where the first seed does not vary.
                found.setdefault(json.dumps([at, own.get("seed", number)]), [*at, _plain(value)])
        else:
            value = _plain(row[measure.column])
            if value is not None:
                found[str(number)] = [*(_plain(row[name]) for name in sweep.parameters), value]
    return list(found.values())


def _listed(cell: Any) -> list[float]:
    """Values per seed, which a CSV file holds as JSON."""
    try:
        given = json.loads(cell) if isinstance(cell, str) else []
    except ValueError:
        return []
    return [value for value in given if isinstance(value, int | float)] if isinstance(given, list) else []


def payload(sweep: Sweep) -> dict[str, Any]:
    """What the page's script draws from: names of the parameters, and the points of every measure."""
    return {
        "parameters": sweep.parameters,
        "runs": len(sweep.table),
        "measures": [
            {
                "label": measure.label,
                "threshold": measure.threshold,
                "direction": measure.direction,
                "missing": int(sweep.table[measure.column].isna().sum()),
                "points": points(sweep, measure),
            }
            for measure in sweep.measures
        ],
    }


def _plain(value: Any) -> Any:
    """A value for JSON: Python's own types, numbers rounded, None for what is missing."""
    value = value.item() if hasattr(value, "item") else value
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return rounded(value, 6) if math.isfinite(value) else None
    return str(value)


def summaries(sweep: Sweep) -> list[dict[str, Any]]:
    """For each parameter a table in words: rows are its values, cells mean and range over all points."""
    measured = [points(sweep, measure) for measure in sweep.measures]
    found = []
    for index, name in enumerate(sweep.parameters):
        given = {point[index] for part in measured for point in part if point[index] is not None}
        numeric = all(isinstance(value, int | float) for value in given)
        rows = [
            {
                "value": value,
                "runs": int((sweep.table[name] == value).sum()),
                "cells": [_cell([point[-1] for point in part if point[index] == value]) for part in measured],
            }
            for value in (sorted(given) if numeric else sorted(given, key=str))
        ]
        found.append({"name": name, "rows": rows})
    return found


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = claims.number(sum(values) / len(values))
    if len(values) == 1 or min(values) == max(values):
        return mean
    return f"{mean} ({claims.number(min(values))} to {claims.number(max(values))})"


def runs(sweep: Sweep, limit: int = 500) -> list[dict[str, Any]]:
    """The runs as rows: values of the varied parameters, how it ended, cost, and the verdicts."""
    verdict_columns = [column for column in sweep.table.columns if str(column).endswith(".verdict")]
    found = []
    for row in sweep.table.head(limit).to_dict("records"):
        given = [
            {"id": str(column)[len("claim.") : -len(".verdict")], "verdict": row[column]}
            for column in verdict_columns
            if isinstance(row[column], str)
        ]
        found.append(
            {
                "at": [_plain(row[name]) for name in sweep.parameters],
                "status": row.get("status", "ok"),
                "seconds": _plain(row.get("seconds")),
                "memory": _plain(row.get("peak_memory_mb")),
                "claims": given,
            }
        )
    return found
