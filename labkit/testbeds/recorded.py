"""Results of runs that are too long for a laptop, recorded with the environment they ran in.

A record is one JSON file of the folder ``recordings``. Notebooks show what it holds as recorded, never as live, and
say how to run it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from labkit.lab.cache import write_atomic

FOLDER = Path(str(resources.files("labkit.testbeds"))) / "recordings"


def read(name: str) -> dict[str, Any]:
    """Read a record: its values, and under ``environment`` where they were measured.

    Raises
    ------
    ValueError
        When there is none of this name.

    Examples
    --------
    >>> sorted(read("hft"))
    ['environment', 'sequences', 'sweep']
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise ValueError(f"no record is called {name!r}. There are: {names}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(name: str, values: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
    """Write a record, for maintainers."""
    document = {**values, "environment": dict(environment)}
    return write_atomic(FOLDER / f"{name}.json", json.dumps(document, separators=(",", ":")) + "\n")
