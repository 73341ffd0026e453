"""Grids of parameters: lists, ranges, values that go in step, and files that hold them.

As text (a command line, a YAML file) the values of a parameter are a list ``0.05,0.1,0.2`` of values and ranges
``a:b`` or ``a:b:step``, which count up from a and leave b out, as Python's do. Text takes its type from the
parameter's default, so ``0:5`` is a range for a seed and plain text for a string.
"""

from __future__ import annotations

import ast
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import notebook, runner

#: More runs than this are taken for a slip of the pen.
LARGEST = 100_000
#: Key of a file that names the parameters that go in step.
ZIP = "zip"

Grid = Mapping[str, Any]


def parse(name: str, text: str, wanted: type) -> list[Any]:
    """Values of a parameter from text.

    Parameters
    ----------
    name : str
        For error messages.
    text : str
        List of values and, for numbers, ranges.
    wanted : type
        int, float, str, bool; anything else is read as a Python literal where it is one.

    Raises
    ------
    ValueError
        For an empty item, a value of another type, or a range without values.

    Examples
    --------
    >>> parse("seed", "0:5", int), parse("seed", "1,4:10:3", int)
    ([0, 1, 2, 3, 4], [1, 4, 7])
    >>> parse("budget", "0.1:0.4:0.1", float)
    [0.1, 0.2, 0.3]
    >>> parse("device", "cpu,cuda:1", str)
    ['cpu', 'cuda:1']
    """
    values: list[Any] = []
    for part in text.split(","):
        item = part.strip()
        if not item:
            raise ValueError(f"{name}={text!r} has an empty item; write values as a,b,c or a:b:step")
        if wanted in (int, float) and ":" in item:
            values += _range(name, item, wanted)
        elif wanted in (int, float, str, bool):
            values.append(runner.parse_value(name, item, wanted))
        else:
            values.append(_literal(item))
    return values


def _range(name: str, text: str, wanted: type) -> list[Any]:
    try:
        # Decimals, so that 0.1:0.4:0.1 has the three values that it seems to have.
        numbers = [Decimal(part.strip()) for part in text.split(":")]
        if not all(number.is_finite() for number in numbers):
            raise InvalidOperation
    except InvalidOperation:
        numbers = []
    if len(numbers) not in (2, 3):
        raise ValueError(f"{name}={text!r} is no range; write a:b or a:b:step, such as 0:5 or 0.1:0.5:0.1")
    start, stop, step = [*numbers, Decimal(1)][:3]
    if wanted is int and any(number != number.to_integral_value() for number in (start, stop, step)):
        raise ValueError(f"{name}={text!r}: {name} is an int, and so are the ends and the step of its range")
    if wanted is float and len(numbers) == 2:
        raise ValueError(f"{name}={text!r}: a range of floats needs its step, such as {start}:{stop}:0.1")
    if step == 0 or (stop - start) * step <= 0:
        raise ValueError(f"{name}={text!r} is an empty range; a:b:step goes from a by step and leaves b out")
    whole, rest = divmod(stop - start, step)
    count = int(whole) + (rest != 0)
    if count > LARGEST:
        raise ValueError(f"{name}={text!r} has {count} values; {LARGEST} are the most")
    return [wanted(start + index * step) for index in range(count)]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def defaults(paper: papers.Paper | None, path: Path) -> dict[str, Any]:
    """Names and default values of all parameters of a paper's notebook, or of another notebook."""
    return paper.check({}) if paper is not None else notebook.parameters(notebook.read(path))


def from_text(pairs: Mapping[str, str], known: Mapping[str, Any], owner: str) -> dict[str, list[Any]]:
    """Values from a command line's ``name=values``.

    Parameters
    ----------
    pairs : mapping
        Name to text.
    known : mapping
        Default values, which give the types.
    owner : str
        Paper or notebook, for error messages.

    Raises
    ------
    ValueError
        For an unknown name, with the nearest one, or values that can't be read.
    """
    found = {}
    for name, text in pairs.items():
        if name not in known:
            raise ValueError(f"{owner} has no parameter {name!r}; {papers.nearest(name, known)}")
        found[name] = parse(name, text, type(known[name]))
    return found


def read(path: str | os.PathLike[str], known: Mapping[str, Any], owner: str) -> list[dict[str, Any]]:
    """Grids from a YAML file.

    The file is a mapping of names to a value, a list, or text as on the command line; or a list of such mappings,
    whose runs are put together. The key ``zip`` holds ``true``, or the names of the parameters that go in step.

    Raises
    ------
    ValueError
        If the file is missing, is no YAML, or holds something else.
    """
    import yaml

    source = Path(path)
    try:
        # The base loader leaves text as it stands: YAML itself would read 1:30 as ninety, and no as False.
        content = yaml.load(source.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise ValueError(f"grid file {str(path)!r} does not exist") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"grid file {str(path)!r} is no YAML: {error}") from None
    blocks = content if isinstance(content, list) else [content]
    found = []
    for block in blocks:
        if not isinstance(block, dict) or not block:
            raise ValueError(f"grid file {str(path)!r} must map names to values, or list such mappings")
        values: dict[str, Any] = {}
        for name, value in block.items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) for item in items):
                raise ValueError(f"grid file {str(path)!r}: {name} is neither a value nor a list of values")
            if name == ZIP:
                values[ZIP] = items[0] == "true" if items[0] in ("true", "false") else items
            else:
                texts = {name: ",".join(items)}
                values |= from_text(texts, known, owner)
        found.append(values)
    return found


def expand(grids: Grid | Sequence[Grid], zipped: bool | Sequence[str] = False) -> list[dict[str, Any]]:
    """All combinations of parameters, in the order in which they are written.

    Parameters
    ----------
    grids : mapping, or sequence of mappings
        Name to a value, or to a list, range or array of values. The combinations of several grids follow one
        another; one that occurs again is left out.
    zipped : bool or sequence of str
        Parameters that go in step instead of being crossed: with True, all that have more than one value.

    Raises
    ------
    ValueError
        If parameters that go in step have unequal numbers of values, a value is named twice, or there are none.

    Examples
    --------
    >>> expand({"budget": [0.1, 0.2], "seed": range(2)})
    [{'budget': 0.1, 'seed': 0}, {'budget': 0.1, 'seed': 1}, {'budget': 0.2, 'seed': 0}, {'budget': 0.2, 'seed': 1}]
    >>> expand({"budget": [0.1, 0.2], "proxies": [2, 4], "size": "smoke"}, zipped=True)
    [{'budget': 0.1, 'proxies': 2, 'size': 'smoke'}, {'budget': 0.2, 'proxies': 4, 'size': 'smoke'}]
    """
    found: dict[str, dict[str, Any]] = {}
    for grid in [grids] if isinstance(grids, Mapping) else grids:
        for run in _expand(grid, zipped):
            found.setdefault(repr(sorted(run.items())), run)
    return list(found.values())


def _expand(grid: Grid, zipped: bool | Sequence[str]) -> list[dict[str, Any]]:
    values = {name: _values(name, given) for name, given in grid.items() if name != ZIP}
    zipped = grid.get(ZIP, zipped)
    several = [name for name, items in values.items() if len(items) > 1]
    names = several if zipped is True else [*(zipped or ())]
    for name in names:
        if name not in values:
            raise ValueError(f"zip names {name!r}, which has no values; {papers.nearest(name, values)}")
    in_step = [name for name in names if name in several]
    counts = {name: len(values[name]) for name in in_step}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{name} has {count} values" for name, count in counts.items())
        raise ValueError(f"{said}; parameters that go in step (zip) need equally many")
    for name in several:
        counted = Counter(map(repr, values[name]))
        most, times = counted.most_common(1)[0]
        if times > 1 and name not in in_step:
            raise ValueError(f"{name} has the value {most} twice; each run is made once")
    axes: list[list[dict[str, Any]]] = []
    for name, items in values.items():
        if name in in_step:
            if name == in_step[0]:
                rows = zip(*(values[other] for other in in_step), strict=True)
                axes.append([dict(zip(in_step, row, strict=True)) for row in rows])
        else:
            axes.append([{name: item} for item in items])
    total = 1
    for axis in axes:
        total *= len(axis)
    if total > LARGEST:
        raise ValueError(f"the grid has {total} runs; {LARGEST} are the most")
    order = list(values)
    runs = []
    for parts in itertools.product(*axes):
        merged = {name: value for part in parts for name, value in part.items()}
        runs.append({name: merged[name] for name in order})
    return runs


def _values(name: str, given: Any) -> list[Any]:
    """A parameter's values as plain Python objects; NumPy's numbers become Python's."""
    several = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping)
    items = list(given) if several else [given]
    if not items:
        raise ValueError(f"{name} has no values; give one at least")
    return [item.item() if hasattr(item, "item") else item for item in items]
