"""Kernels started at the same moment sometimes never answer: this spaces the starts, between processes too."""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from pathlib import Path


def wait_turn(seconds: float = 1.0, folder: Path | None = None) -> float:
    """Return once at least `seconds` have passed since the last caller on this machine returned.

    Parameters
    ----------
    seconds : float
        Least distance between two starts.
    folder : Path, optional
        Where the lock lies; one folder a user under the temporary folder by default.

    Returns
    -------
    float
        How long the caller waited.
    """
    from filelock import FileLock

    started = time.monotonic()
    folder = folder or Path(tempfile.gettempdir()) / f"labkit-{_user()}"
    folder.mkdir(parents=True, exist_ok=True)
    stamp = folder / "kernel-start"
    with FileLock(folder / "kernel-start.lock"):
        # A clock set back must not make anybody wait for hours.
        since = time.time() - stamp.stat().st_mtime if stamp.exists() else seconds
        if 0 <= since < seconds:
            time.sleep(seconds - since)
        stamp.touch()
        os.utime(stamp)
    return time.monotonic() - started


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number without a name
        return str(os.getuid())
