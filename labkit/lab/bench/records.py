"""What is written down of a measurement: machine, versions, JSON lines, tables of text."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.lab.session import environment as _run_environment


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a timing was taken with, and the commit where there is one."""
    found = _run_environment()
    for package in ("triton", "kvpress", "peft", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if hasattr(os, "getloadavg"):
        found["load"] = [round(x, 2) for x in os.getloadavg()]
    found["commit"] = _commit()
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


@functools.cache
def _commit() -> str | None:
    """Commit of this checkout, with ``+`` where tracked files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10)
        sha = run(["git", "rev-parse", "--short=12", "HEAD"])
        if sha.returncode:
            return None
        status = run(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return sha.stdout.strip() + ("+" if status.stdout.strip() else "")


def append(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Add records to a file of JSON lines in one write, so that two processes do not mix their lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        data = lines.encode()
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)
    return path


def read(path: str | Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines, oldest first."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"
