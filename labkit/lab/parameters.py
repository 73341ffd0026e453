"""Parameters of a run: checked before a kernel starts, read from a command line, and as the run's name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import notebook


def check_parameters(paper: papers.Paper | None, path: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run, checked before a kernel starts.

    Raises
    ------
    ValueError, TypeError
        For a name that the paper's registry entry (or, for an unregistered notebook, its parameters cell) does
        not have, with the nearest one; for a value that is not allowed.
    """
    if paper is not None:
        return paper.check(parameters)
    known = notebook.parameters(notebook.read(path))
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"{path.name} has no parameter {name!r}; {papers.nearest(name, known)}")
        wanted = type(known[name])
        if (
            known[name] is not None
            and not isinstance(value, wanted)
            and not (wanted is float and type(value) is int)
        ):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}; a {wanted.__name__} is wanted")
    return {**known, **parameters}


def parse_parameters(paper: papers.Paper, given: Mapping[str, str]) -> dict[str, Any]:
    """Turn the text of a command line's ``name=value`` into values of the right type, and check them.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one, or text that is not a value of the parameter's type.
    """
    values = {}
    for name, text in given.items():
        knob = paper.parameter(name)
        values[name] = parse_value(name, text, type(knob.default), knob.allowed())
    paper.check(values)
    return values


def parse_value(name: str, text: str, wanted: type, allowed: str = "") -> Any:
    """One value from text, in the type of its parameter; ValueError, saying what is allowed, if it is none."""
    if wanted is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
    else:
        with contextlib.suppress(ValueError):
            return wanted(text)
    remedy = "; 'true' or 'false'" if wanted is bool else f"; {allowed}" if allowed else ""
    raise ValueError(f"{name}={text!r} is not {'an' if wanted is int else 'a'} {wanted.__name__}{remedy}")


def run_key(parameters: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Name of a run's folder: size and seed, then whatever else differs from the defaults.

    Values that can't be part of a file's name, or would make it too long, are given as a short hash.

    Examples
    --------
    >>> run_key({"size": "smoke", "seed": 3, "budget": 0.2}, {"size": "laptop", "seed": 0, "budget": 0.2})
    'smoke-seed3'
    >>> run_key({"size": "smoke", "seed": 3, "budget": 0.5}, {"size": "laptop", "seed": 0, "budget": 0.2})
    'smoke-seed3-budget=0.5'
    """
    rest = {
        name: value
        for name, value in parameters.items()
        if name not in ("size", "seed") and value != defaults.get(name)
    }
    parts = [str(parameters[name]) for name in ("size",) if name in parameters]
    parts += [f"seed{parameters['seed']}"] if "seed" in parameters else []
    named = "-".join(f"{name}={value}" for name, value in sorted(rest.items()))
    if rest and len(named) <= 60 and re.fullmatch(r"[A-Za-z0-9_.+=-]+", named):
        parts.append(named)
    elif rest:
        text = json.dumps(rest, sort_keys=True, default=str)
        parts.append(hashlib.sha256(text.encode()).hexdigest()[:12])
    return "-".join(parts) or "default"
