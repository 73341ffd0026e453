"""Lays out the files of a new paper: registry entry, module, notebook and tests, each with TODOs to fill in."""

from __future__ import annotations

import keyword
import re
from importlib import resources
from pathlib import Path
from typing import Any

from labkit.lab import cache, notebook, project
from labkit.lab.refresh import BEGIN, END


def create(slug: str, family: str, *, title: str = "TODO: title", arxiv: str = "0000.00000") -> list[Path]:
    """Write the frame of a new paper.

    Parameters
    ----------
    slug, family : str
        Identifiers in lower case; the slug names the paper in all its places.
    title, arxiv : str
        Of the paper.

    Returns
    -------
    list of Path
        Files written, relative to the repository.

    Raises
    ------
    ValueError
        If a name is not an identifier in lower case, or the slug is a family's name.
    FileExistsError
        If any of the files is there already; then nothing is written.
    """
    for what, name in (("slug", slug), ("family", family)):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
            raise ValueError(
                f"{what} {name!r} must be lower case letters, digits and underscores, a letter first"
            )
    if family in ("lab", "papers", "testbeds", "kernels"):
        raise ValueError(
            f"family {family!r} is a part of the house; families are named after a field, such as kv"
        )
    top = project.root()
    words = {
        "slug": slug,
        "family": family,
        "title": title,
        "arxiv": arxiv,
        "class_name": "".join(part.capitalize() for part in slug.split("_")),
    }
    files = {
        f"labkit/papers/{slug}.toml": _render("toml.j2", words),
        f"labkit/{family}/{slug}.py": _render("module.py.j2", words),
        f"tests/{family}/test_{slug}.py": _render("test.py.j2", words),
        f"notebooks/{family}/{slug}.ipynb": _notebook(words),
    }
    there = [name for name in files if (top / name).exists()]
    if there:
        raise FileExistsError(
            f"{', '.join(there)} exists; nothing was written. Choose another slug, or move it away"
        )
    package = f"labkit/{family}/__init__.py"
    if not (top / package).exists():
        files = {package: _render("package.py.j2", words), **files}
    for name, content in files.items():
        cache.write_atomic(top / name, content)
    return [Path(name) for name in files]


def _render(name: str, words: dict[str, str]) -> str:
    import jinja2

    source = (resources.files("labkit.lab") / "templates" / "new" / name).read_text(encoding="utf-8")
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    # TOML's basic strings and Python's share these escapes.
    environment.filters["quoted"] = lambda text: text.replace("\\", "\\\\").replace('"', '\\"')
    return environment.from_string(source).render(words)


def _notebook(words: dict[str, str]) -> str:
    """The frame of a notebook, from a text with one `%%` line a cell."""
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    text = _render("notebook.txt.j2", words | {"begin": BEGIN, "end": END})
    cells: list[Any] = []
    for part in re.split(r"^%% ", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind, *names = head.split()
        make = new_code_cell if kind == "code" else new_markdown_cell
        cells.append(make(body.strip(), metadata={"tags": names} if names else {}))
    for index, cell in enumerate(cells):
        cell.id = f"{words['slug'].replace('_', '-')[:40]}-{index:02d}"
    nb = new_notebook(cells=cells, metadata={"kernelspec": dict(notebook.KERNELSPEC)})
    return str(nbformat.writes(nb)) + "\n"
