"""What a notebook runs at each size, read from its ``run.sizes(...)`` call without running anything."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from labkit import papers
from labkit.lab import notebook


def sizes(nb: Any) -> dict[str, dict[str, str]]:
    """Settings per size as text: ``{"smoke": {"seeds": "1", ...}, "laptop": ...}``; empty without such a call.

    Names that the notebook binds to literals (``qwen = "Qwen/..."``) are put in; whatever else is no literal stays
    as it is written.

    Examples
    --------
    >>> from nbformat.v4 import new_code_cell, new_notebook
    >>> code = "name = 'tiny'\\nrun.sizes(smoke=dict(seeds=1, model=name), laptop={'seeds': 3, 'model': f(2)})"
    >>> sizes(new_notebook(cells=[new_code_cell(code)]))
    {'smoke': {'seeds': '1', 'model': 'tiny'}, 'laptop': {'seeds': '3', 'model': 'f(2)'}}
    """
    known: dict[str, Any] = {}
    for cell in notebook.code_cells(nb):
        try:
            tree = ast.parse(cell.source)
        except SyntaxError:
            continue
        known |= dict(_literals(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "sizes":
                found = {
                    word.arg: dict(_items(word.value, known))
                    for word in node.keywords
                    if word.arg in papers.SIZES
                }
                if found:
                    return {size: found[size] for size in papers.SIZES if size in found}
    return {}


def _literals(tree: ast.Module) -> Iterator[tuple[str, Any]]:
    """Names that a cell binds to literals."""
    for node in tree.body:
        if not isinstance(node, ast.Assign) or len(node.targets) != 1:
            continue
        target = node.targets[0]
        pairs: list[tuple[ast.expr, ast.expr]] = [(target, node.value)]
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=False))
        for name, value in pairs:
            if isinstance(name, ast.Name):
                try:
                    yield name.id, ast.literal_eval(value)
                except ValueError:
                    continue


def _items(node: ast.expr, known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values of ``dict(...)`` or ``{...}``."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
        for word in node.keywords:
            if word.arg:
                yield word.arg, _text(word.value, known)
    elif isinstance(node, ast.Dict):
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant):
                yield str(key.value), _text(value, known)


def _text(node: ast.expr, known: dict[str, Any]) -> str:
    if isinstance(node, ast.Name) and node.id in known:
        return _shown(known[node.id])
    try:
        return _shown(ast.literal_eval(node))
    except ValueError:
        return ast.unparse(node)


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def table(found: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Rows of a table: name, value per size, and whether the sizes differ.

    >>> table({"smoke": {"n": "1"}, "laptop": {"n": "2"}})
    [{'name': 'n', 'values': {'smoke': '1', 'laptop': '2'}, 'differs': True}]
    """
    names = dict.fromkeys(name for values in found.values() for name in values)
    rows = []
    for name in names:
        values = {size: values.get(name, "–") for size, values in found.items()}
        rows.append({"name": name, "values": values, "differs": len(set(values.values())) > 1})
    return rows
