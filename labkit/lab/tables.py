"""The table of a sweep: one row a run, with parameters, claim values, metrics, cost and environment.

Columns
-------
``run``
    Name of the run's folder.
the parameters
    Under their own names, defaults included.
``status``, ``attempts``, ``seconds``, ``peak_memory_mb``, ``error``
    What became of the run; ``missing`` where it has not been made yet.
``exploratory``
    Whether a knob of the paper differs from the setting that the claims' thresholds were registered for.
``as_planned``
    False if the notebook, the package or a library changed between the start of the sweep and that of the run.
``claim.ID``, ``.low``, ``.high``, ``.verdict``, ``.values``
    Mean over the run's seeds, its 95 % interval, the verdict, and the list of values per seed.
``metric.NAME``
    What the notebook kept with ``run.record(NAME=...)``.
``env.NAME``
    Host, device and versions.
``started``, ``finished``, ``folder``
    Times in UTC; the folder is relative to the sweep's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.lab import cache, runner

if TYPE_CHECKING:
    import pandas as pd

MISSING = "missing"
#: Columns that no parameter may be named after.
OWN = (
    "run", "status", "attempts", "seconds", "peak_memory_mb", "error", "as_planned", "exploratory",
    "started", "finished", "folder",
)  # fmt: skip


def build(
    planned: Sequence[runner.RunResult], results: Mapping[str, runner.RunResult], folder: Path
) -> pd.DataFrame:
    """Table of a sweep.

    Parameters
    ----------
    planned : sequence of RunResult
        All runs, in order.
    results : mapping
        Key of a run to its result, for those that are over.
    folder : Path
        Folder of the sweep.

    Returns
    -------
    pandas.DataFrame
        One row per planned run, in order. ``attrs`` holds ``folder``, and under ``parameters`` and ``varied`` the
        names of all parameters and of those with more than one value.
    """
    import pandas as pd

    rows = [_row(run, results.get(run.key), folder) for run in planned]
    names: dict[str, None] = {}
    for part in ("head", "claims", "metrics", "environment", "tail"):
        for row in rows:
            names |= dict.fromkeys(row[part])
    flat = [{name: value for part in row.values() for name, value in part.items()} for row in rows]
    table = pd.DataFrame({name: _column([row.get(name) for row in flat]) for name in names})
    parameters = list(planned[0].parameters) if planned else []
    table.attrs = {
        "folder": str(folder),
        "parameters": parameters,
        "varied": [name for name in parameters if len({repr(run.parameters[name]) for run in planned}) > 1],
    }
    return table


def _row(run: runner.RunResult, result: runner.RunResult | None, folder: Path) -> dict[str, dict[str, Any]]:
    record = (result.verdicts or {}) if result else {}
    claims: dict[str, Any] = {}
    for claim in record.get("claims", []):
        low, high = claim.get("interval") or (None, None)
        name = f"claim.{claim['id']}"
        claims |= {
            name: claim.get("mean"),
            f"{name}.low": low,
            f"{name}.high": high,
            f"{name}.verdict": claim.get("verdict"),
            f"{name}.values": claim.get("values"),
        }
    environment: dict[str, Any] = {}
    if result:
        found = {"host": result.host or None, "device": record.get("device"), **result.versions}
        environment = {
            f"env.{name}": value for name, value in {**found, **record.get("environment", {})}.items()
        }
    return {
        "head": {
            "run": run.key,
            **run.parameters,
            "status": result.status if result else MISSING,
            "attempts": result.attempts if result else 0,
            "seconds": result.seconds if result else None,
            "peak_memory_mb": result.peak_memory_mb if result else None,
            "error": _error(result) if result else None,
            "as_planned": result.fingerprint == run.fingerprint if result else None,
            "exploratory": bool(record["changed"]) if "changed" in record else None,
        },
        "claims": claims,
        "metrics": {f"metric.{name}": value for name, value in record.get("metrics", {}).items()},
        "environment": environment,
        "tail": {
            "started": (result.started or None) if result else None,
            "finished": (result.finished or None) if result else None,
            "folder": run.directory.relative_to(folder).as_posix(),
        },
    }


def _error(result: runner.RunResult) -> str | None:
    if result.ok or not result.error:
        return None
    cell = result.error.get("cell")
    where = f" (cell {cell})" if cell is not None else ""
    return f"{result.error.get('name')}: {result.error.get('message')}{where}"


def _column(values: list[Any]) -> Any:
    """A column of one type: numbers, text, truth values or lists of numbers; JSON text for anything else."""
    import pandas as pd

    kinds = {_kind(value) for value in values if value is not None}
    if kinds <= {"int"} and kinds:
        return pd.array(values, dtype="Int64") if None in values else pd.Series(values, dtype="int64")
    if kinds <= {"int", "float"}:
        return pd.Series([float("nan") if value is None else value for value in values], dtype="float64")
    if kinds == {"bool"}:
        return pd.array(values, dtype="boolean") if None in values else pd.Series(values, dtype="bool")
    if kinds == {"str"}:
        return pd.Series(values, dtype="str")
    if kinds == {"list"}:
        lists = [None if value is None else [float(item) for item in value] for value in values]
        return pd.Series(lists, dtype="object")
    return pd.Series([None if value is None else json.dumps(value) for value in values], dtype="str")


def _kind(value: Any) -> str:
    if isinstance(value, bool | int | float | str):
        # Beyond 64 bits a number is kept as text.
        return "other" if type(value) is int and not -(2**63) <= value < 2**63 else type(value).__name__
    if isinstance(value, list | tuple) and all(type(item) in (int, float) for item in value):
        return "list"
    return "other"


def write(table: pd.DataFrame, folder: Path) -> None:
    """Write ``table.parquet`` and ``table.csv``, the lists of values as JSON in the latter."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    cache.write_atomic(folder / "table.parquet", buffer.getvalue())
    text = table.copy()
    for name in text.columns:
        if any(isinstance(value, list) for value in text[name]):
            text[name] = [json.dumps(value) if isinstance(value, list) else None for value in text[name]]
    cache.write_atomic(folder / "table.csv", text.to_csv(index=False, lineterminator="\n"))


def _listed(value: Any) -> list[float]:
    """A cell with values per seed; Parquet gives back arrays, a missing one is None or NaN."""
    return list(value) if hasattr(value, "__len__") and not isinstance(value, str) else []


def per_seed(table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and seed, each seed of a setting once.

    A run takes several seeds from its first one on, so runs whose first seeds lie close share some. Averaging over
    their rows would count these seeds twice.

    Parameters
    ----------
    table : DataFrame
        As :func:`labkit.lab.sweep` returns it.

    Returns
    -------
    pandas.DataFrame
        Columns ``run``, the parameters (``seed`` being the very seed of the value), ``claim``, ``value``.
    """
    import pandas as pd

    parameters = list(table.attrs.get("parameters", []))
    suffix = ".values"
    claims = [name for name in table.columns if name.startswith("claim.") and name.endswith(suffix)]
    rows = []
    for _, run in table.iterrows():
        for name in claims:
            for index, value in enumerate(_listed(run[name])):
                own = {parameter: run[parameter] for parameter in parameters}
                own["seed"] = int(own.get("seed", 0)) + index
                claim = name.removeprefix("claim.").removesuffix(suffix)
                rows.append({"run": run["run"], **own, "claim": claim, "value": value})
    columns = ["run", *dict.fromkeys([*parameters, "seed"]), "claim", "value"]
    long = pd.DataFrame(rows, columns=columns)
    return long.drop_duplicates([name for name in columns if name not in ("run", "value")], ignore_index=True)


def shared_seeds(table: pd.DataFrame) -> int:
    """How many values of the table's claims repeat a seed that another run of the same setting has."""
    values = [name for name in table.columns if name.startswith("claim.") and name.endswith(".values")]
    held = sum(len(_listed(item)) for name in values for item in table[name])
    return held - len(per_seed(table))
