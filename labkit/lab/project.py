"""Where the repository is: the notebooks are not part of the installed package."""

from __future__ import annotations

import os
from pathlib import Path

from labkit import papers


def root() -> Path:
    """Root of the repository.

    ``LABKIT_ROOT`` if set; else the nearest folder, from the working directory upward, that holds both
    ``notebooks/`` and ``labkit/``; else the folder that this package was imported from.

    Raises
    ------
    FileNotFoundError
        If none of them holds a ``notebooks`` folder.
    """
    named = os.environ.get("LABKIT_ROOT")
    if named:
        folder = Path(named).expanduser().resolve()
        if not (folder / "notebooks").is_dir():
            raise FileNotFoundError(f"LABKIT_ROOT={named!r} has no notebooks folder")
        return folder
    here = Path.cwd()
    for folder in (here, *here.parents, package_folder().parent):
        if (folder / "notebooks").is_dir() and (folder / "labkit" / "papers").is_dir():
            return folder
    raise FileNotFoundError(
        "there are no notebooks here: run labkit inside a clone of the repository, or set LABKIT_ROOT to one"
    )


def package_folder() -> Path:
    """Folder of the labkit package that is running."""
    return Path(papers.__file__).resolve().parent.parent


def default_out() -> Path:
    """Folder that runs are written to when the caller names none: ``build/runs`` of the repository."""
    return root() / "build" / "runs"


def notebook_path(slug: str) -> Path:
    """The committed notebook of a registered paper.

    Raises
    ------
    ValueError
        For an unknown paper.
    FileNotFoundError
        If the paper is registered but its notebook is missing.
    """
    paper = papers.load(slug)
    path = root() / paper.notebook
    if not path.is_file():
        raise FileNotFoundError(f"{paper.notebook} is missing; `labkit new {slug}` makes an empty one")
    return path


def resolve(slug_or_path: str | os.PathLike[str]) -> tuple[papers.Paper | None, Path]:
    """The paper and the notebook that a name stands for.

    Parameters
    ----------
    slug_or_path : str or path
        A registered slug, or the path of a notebook. A path whose stem is a slug gets that paper's registry
        entry; any other notebook runs without one.

    Returns
    -------
    paper : Paper or None
    path : Path
        Absolute.

    Raises
    ------
    ValueError
        If it is neither a registered slug nor an existing notebook; the nearest slug is named.
    """
    text = os.fspath(slug_or_path)
    path = Path(text)
    if path.suffix == ".ipynb":
        if not path.is_file():
            raise ValueError(f"notebook {text!r} does not exist")
        return (papers.load(path.stem) if path.stem in papers.slugs() else None), path.resolve()
    return papers.load(text), notebook_path(text)


def committed() -> list[Path]:
    """All notebooks of the collection, sorted; checkpoints excluded."""
    found = (root() / "notebooks").rglob("*.ipynb")
    return sorted(path for path in found if ".ipynb_checkpoints" not in path.parts)
