"""Small notebooks made on the fly, for the tests of the runner and its neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = 'size: str = "laptop"  # smoke | laptop\nseed: int = 0\nrate: float = 0.5\n'


def build(*cells: str, parameters: str = PARAMETERS) -> Any:
    """A notebook with a parameters cell and further code cells."""
    nb = new_notebook()
    nb.cells = [new_markdown_cell("# A small notebook")]
    nb.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nb.cells += [new_code_cell(source) for source in cells]
    nb.metadata.kernelspec = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    return nb


def save(folder: Path, name: str, *cells: str, **options: Any) -> Path:
    """Write a small notebook and return its path."""
    path = folder / f"{name}.ipynb"
    nbformat.write(build(*cells, **options), path)
    return path
