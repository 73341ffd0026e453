"""What is installed and found on this machine, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from labkit import __version__, papers
from labkit.lab import cache, project

#: Where Debian, Fedora, macOS and others put a Chromium or a relative of it.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Parameters
    ----------
    name, value : str
        What it is, and what was found.
    state : {"ok", "missing", "note"}
    mend : str
        Command that mends it, if something is missing.
    required : bool
        Whether labkit can't run its notebooks without it.
    """

    name: str
    value: str
    state: str = "ok"
    mend: str = ""
    required: bool = False


def chromium() -> str | None:
    """Path of a Chromium that can draw figures and open notebooks; ``BROWSER_PATH`` comes first."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if Path(named).is_file() else None
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def findings() -> list[Finding]:
    """All findings, the required ones first."""
    return [*_interpreter(), *_packages(), *_device(), *_places(), *_tools()]


def _interpreter() -> Iterator[Finding]:
    yield Finding("labkit", f"{__version__} in {project.package_folder()}")
    yield Finding("python", f"{platform.python_version()} in {sys.prefix}", required=True)


def _floors() -> dict[str, tuple[str, str]]:
    """Requirement text and extra of each distribution that labkit asks for, from its metadata."""
    import re

    try:
        lines = metadata.requires("labkit") or []
    except metadata.PackageNotFoundError:
        lines = []
    found: dict[str, tuple[str, str]] = {}
    for line in lines:
        match = re.match(r"([A-Za-z0-9_.-]+)\s*([^;]*)", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        if match and match[1] != "labkit":
            found.setdefault(match[1].lower(), (match[2].strip(), extra[1] if extra else ""))
    return found


def _packages() -> Iterator[Finding]:
    needed = {
        "": (
            "torch",
            "transformers",
            "tokenizers",
            "numpy",
            "scipy",
            "pandas",
            "safetensors",
            "filelock",
            "psutil",
        ),
        "notebooks": (
            "papermill",
            "jupyterlab",
            "ipykernel",
            "ipywidgets",
            "plotly",
            "nbconvert",
            "latex2mathml",
        ),
        "png": ("kaleido",),
        "gpu": ("triton",),
        "dev": ("pytest", "nbval", "ruff", "mypy", "playwright"),
    }
    floors = _floors()
    for extra, names in needed.items():
        target = f"'labkit[{extra}]'" if extra else "labkit"
        if (project.package_folder().parent / "pyproject.toml").is_file():
            target = f"-e '.[{extra}]'" if extra else "-e ."
        for name in names:
            floor = floors.get(name, ("", ""))[0]
            required = extra in ("", "notebooks")
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                yield Finding(
                    name,
                    f"not installed ({extra or 'core'})",
                    "missing" if required else "note",
                    f"{Path(sys.executable).name} -m pip install {target}",
                    required,
                )
                continue
            if floor and not _satisfies(version, floor):
                yield Finding(
                    name,
                    f"{version}, {floor} is wanted",
                    "missing",
                    f"{Path(sys.executable).name} -m pip install -U '{name}{floor}'",
                    required,
                )
            else:
                yield Finding(name, version, required=required)


def _satisfies(version: str, floor: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(floor).contains(version, prereleases=True)


def _device() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield Finding(
            "device", f"{torch.cuda.get_device_name()}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        )
    else:
        yield Finding(
            "device", "cpu: sizes smoke and laptop run here, gpu and paper need a CUDA device", "note"
        )
    import psutil

    memory = psutil.virtual_memory()
    cores = psutil.cpu_count() or 1
    text = f"{cores} cores, {memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    short = memory.available < 1.5e9
    mend = "close programs: a notebook at laptop size takes up to 1 GB" if short else ""
    yield Finding("machine", text, "note" if short else "ok", mend)


def _places() -> Iterator[Finding]:
    try:
        yield Finding("repository", str(project.root()))
    except FileNotFoundError as error:
        yield Finding("repository", "not found", "note", str(error))
    folder = cache.root()
    probe = folder
    while not probe.exists():
        probe = probe.parent
    writable = os.access(probe, os.W_OK)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    free = shutil.disk_usage(probe).free
    yield Finding(
        "cache",
        f"{folder}, {size / 1e6:.0f} MB used, {free / 1e9:.1f} GB free on the disk",
        "ok" if writable and free > 5e8 else "missing",
        "" if writable and free > 5e8 else "set LABKIT_CACHE to a writable folder with room",
        required=True,
    )
    data = os.environ.get("LABKIT_DATA")
    if data is None:
        yield Finding(
            "data", "LABKIT_DATA is not set: tests on real data are skipped", "note", "export LABKIT_DATA=..."
        )
    elif not Path(data).is_dir():
        yield Finding(
            "data", f"LABKIT_DATA={data} is no folder", "missing", "export LABKIT_DATA=an existing folder"
        )
    else:
        held = sorted(path.name for path in Path(data).iterdir() if not path.name.startswith("."))
        yield Finding("data", f"{data}: {', '.join(held[:8]) or 'empty'}{' ...' if len(held) > 8 else ''}")
    yield Finding("papers", f"{len(papers.slugs())} registered")


def _tools() -> Iterator[Finding]:
    browser = chromium()
    if browser:
        yield Finding("chromium", browser)
    else:
        install = {"Darwin": "brew install --cask chromium"}.get(
            platform.system(), "sudo apt-get install -y chromium"
        )
        yield Finding("chromium", "not found: no static figures, no browser test", "note", install)


def show(found: Sequence[Finding]) -> None:
    """Print the findings as a table, what must be mended last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    style = {"ok": "green", "missing": "bold red", "note": "yellow"}
    for item in found:
        table.add_row(Text(item.state, style=style[item.state]), item.name, item.value)
    console = Console()
    console.print(table)
    for item in found:
        if item.mend and item.state != "ok":
            console.print(f"{item.name}: {item.mend}", markup=False, highlight=False, soft_wrap=True)
