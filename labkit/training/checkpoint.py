"""Checkpoints that survive a kill in mid-write, name what is in them, and hold nothing to unpickle.

A checkpoint is a folder ``step-00000120``:

=========================  ========================================================================================
``model.safetensors``      weights under the model's own names, gathered from all shards; tied weights once
``config.json``            of a transformers model, so that ``from_pretrained(folder)`` reads the checkpoint
``optimizer.safetensors``  tensors of the optimizer's state
``optimizer.json``         everything else of it, and the parameters' names
``training.json``          step, schedule, loss scaler, what data and what else the loop was given
``rank-0.json`` ...        random generators of each process: torch, its GPU, numpy, Python
``manifest.json``          size and SHA-256 of each file, written last
=========================  ========================================================================================

It is written under another name and renamed when complete, so a folder of that name is whole unless the disk harmed
it, which the checksums show. With several processes the folder must lie on a file system that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from labkit.training.processes import OneProcess

_NAME = re.compile(r"step-(\d{8,})")
_FORMAT = 1


class Checkpoint(NamedTuple):
    """A checkpoint: the number of steps done, and its folder."""

    step: int
    path: Path


def checkpoints(directory: Path | str) -> list[Checkpoint]:
    """Checkpoints of a training folder, oldest first. They are not read."""
    found = []
    for path in Path(directory).glob("step-*"):
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append(Checkpoint(int(match.group(1)), path))
    return sorted(found)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None.

    Examples
    --------
    >>> damage(Path("nowhere/step-00000001"))
    'manifest.json is missing'
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != _FORMAT:
            return f"its format is {manifest['format']}, this version reads {_FORMAT}"
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, facts in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}"
            if _checksum(file) != facts["sha256"]:
                return f"the checksum of {name} does not match"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it can't be read ({type(error).__name__}: {error})"
    return None


def latest_checkpoint(directory: Path | str) -> Checkpoint | None:
    """Newest whole checkpoint of a training folder, with a warning for each damaged one that is passed over.

    Parameters
    ----------
    directory : Path or str
        The folder that was given to the loop.

    Returns
    -------
    Checkpoint or None
        None when there is none.

    Examples
    --------
    >>> latest_checkpoint("nowhere") is None
    True
    """
    for found in reversed(checkpoints(directory)):
        reason = damage(found.path)
        if reason is None:
            return found
        warnings.warn(
            f"checkpoint {found.path} is damaged: {reason}. The one before it is used, if there is one.",
            stacklevel=2,
        )
    return None


def set_damaged_aside(directory: Path, newer_than: int) -> None:
    """Rename the checkpoints that `latest_checkpoint` passed over, so that they count no more."""
    for found in checkpoints(directory):
        if found.step > newer_than:
            target = directory / f"damaged-{found.path.name}"
            shutil.rmtree(target, ignore_errors=True)
            os.replace(found.path, target)


def sweep(directory: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    for path in [*directory.glob(".partial-step-*"), *directory.glob(".old-step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def write(
    directory: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Any],
    own: Any,
    processes: OneProcess,
    *,
    keep: int,
    config: Any = None,
) -> Path:
    """Write a checkpoint; every process calls this.

    Parameters
    ----------
    directory : Path
        Training folder.
    step : int
        Steps done.
    tensors : mapping
        File stem to named tensors; only the main process's count.
    documents : mapping
        File stem to JSON-serialisable content; only the main process's count.
    own : JSON-serialisable
        This process's part.
    processes : OneProcess
    keep : int
        How many checkpoints stay, this one included.
    config : transformers.PreTrainedConfig, optional

    Returns
    -------
    Path
        The checkpoint's folder.

    Raises
    ------
    OSError
        When the disk is full or the folder can't be written; older checkpoints stay as they were.
    """
    name = f"step-{step:08d}"
    final, partial = directory / name, directory / f".partial-{name}"
    with _Together(processes) as task:
        if processes.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            sweep(directory)
            partial.mkdir()
    try:
        with task:
            _write_json(partial / f"rank-{processes.rank}.json", own)
            if processes.is_main:
                for stem, named in tensors.items():
                    safetensors.torch.save_file(
                        dict(named), partial / f"{stem}.safetensors", metadata={"format": "pt"}
                    )
                for stem, document in documents.items():
                    _write_json(partial / f"{stem}.json", document)
                if config is not None:
                    config.save_pretrained(partial)
        with task:
            if processes.is_main:
                files = {}
                for file in sorted(partial.iterdir()):
                    _flush(file)
                    files[file.name] = {"bytes": file.stat().st_size, "sha256": _checksum(file)}
                _write_json(partial / "manifest.json", {"format": _FORMAT, "step": step, "files": files})
                _flush(partial / "manifest.json")
                _flush(partial)
                if final.exists():
                    _remove(final)
                os.replace(partial, final)
                _flush(directory)
                for old in checkpoints(directory)[:-keep]:
                    _remove(old.path)
    except BaseException:
        if processes.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


class _Together:
    """A block that every process goes through; a failure in one is raised in all, so that none waits for ever."""

    def __init__(self, processes: OneProcess) -> None:
        self.processes = processes

    def __enter__(self) -> _Together:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, Exception):
            return  # an interrupt does not wait for the others
        if self.processes.any(error is not None) and error is None:
            raise RuntimeError("another process could not write its part of the checkpoint; see its message")


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


def _flush(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems can't sync a folder
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a kill leaves it whole or under a name that does not count."""
    hidden = path.with_name(f".old-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
