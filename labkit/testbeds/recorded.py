"""Results of runs that are too long for a laptop, recorded with the environment they ran in.

A record is one JSON file of the folder ``recordings``. Notebooks show what it holds as recorded, never as live, and
say how to run it anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
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


def resumed(name: str, doc: str | None, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What a recording script goes on from: the record, or nothing where there is none or ``--fresh`` is asked for.

    Parameters
    ----------
    name : str
        Of the record.
    doc : str
        The script's docstring, for ``--help``.
    arguments : sequence of str, optional
        Instead of the command line's.

    Examples
    --------
    >>> resumed("hft", "Measures.", ["--fresh"]), sorted(resumed("hft", "Measures.", []))
    ({}, ['environment', 'sequences', 'sweep'])
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="forget what is recorded")
    fresh = parser.parse_args(arguments).fresh
    return {} if fresh or not (FOLDER / f"{name}.json").is_file() else read(name)


def write(name: str, values: Mapping[str, Any], environment: Mapping[str, Any]) -> Path:
    """Write a record, for maintainers."""
    document = {**values, "environment": dict(environment)}
    return write_atomic(FOLDER / f"{name}.json", json.dumps(document, separators=(",", ":")) + "\n")
