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

import base64
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import nn

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


# What a state is made of: a JSON document whose tensors lie beside it.


def pack(value: Any, tensors: dict[str, torch.Tensor], path: str = "", *, main: bool = True) -> Any:
    """Turn nested dicts, lists, tuples, numbers, strings and tensors into JSON, and put the tensors beside it.

    Parameters
    ----------
    value : Any
        A ``state_dict()``.
    tensors : dict
        Gets the tensors, under names made of their keys; sharded ones are gathered, so every process must call.
    path : str
        Name so far.
    main : bool
        False keeps no tensors.

    Raises
    ------
    TypeError
        When something else is in it, which could only be pickled.

    Examples
    --------
    >>> beside = {}
    >>> pack({0: {"m": torch.ones(2), "betas": (0.9, 0.95)}}, beside)
    {'$items': [[0, {'m': {'$tensor': '0.m'}, 'betas': {'$tuple': [0.9, 0.95]}}]]}
    >>> beside
    {'0.m': tensor([1., 1.])}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        full = whole(value)
        if main:
            tensors[path] = full.clone() if full.data_ptr() == value.data_ptr() else full
        return {"$tensor": path}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        items = [
            [key, pack(part, tensors, f"{path}.{key}".lstrip("."), main=main)] for key, part in value.items()
        ]
        if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
            return dict(items)
        if all(isinstance(key, (str, int)) for key, _ in items):
            return {"$items": items}
    if isinstance(value, (list, tuple)):
        parts = [pack(part, tensors, f"{path}.{i}".lstrip("."), main=main) for i, part in enumerate(value)]
        return parts if isinstance(value, list) else {"$tuple": parts}
    raise TypeError(
        f"{path or 'a state'} is a {type(value).__name__}, which a checkpoint can't hold: make state_dict() return "
        f"tensors, numbers, strings, lists and mappings of them"
    )


def unpack(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Turn what `pack` made back.

    Examples
    --------
    >>> beside = {}
    >>> unpack(pack({0: (1, 2.5)}, beside), beside)
    {0: (1, 2.5)}
    """
    if isinstance(document, list):
        return [unpack(part, tensors) for part in document]
    if not isinstance(document, dict):
        return document
    if "$tensor" in document:
        return tensors[document["$tensor"]].clone()
    if "$tuple" in document:
        return tuple(unpack(part, tensors) for part in document["$tuple"])
    if "$items" in document:
        return {key: unpack(part, tensors) for key, part in document["$items"]}
    return {key: unpack(part, tensors) for key, part in document.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor gathered from its shards, on the CPU, contiguous."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def _sharded_like(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's shard of a whole tensor, split as another one is."""
    if not hasattr(like, "device_mesh"):
        return full
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    return distribute_tensor(full.to(like.device), target.device_mesh, target.placements, src_data_rank=None)


def weights(model: nn.Module, *, main: bool = True) -> dict[str, torch.Tensor]:
    """A model's whole weights and buffers on the CPU, tied ones once; every process of a sharded model calls this.

    Examples
    --------
    >>> sorted(weights(nn.Linear(2, 1)))
    ['bias', 'weight']
    """
    tied = _tied(model)
    found = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} of {type(model).__name__}.state_dict() is a {type(value).__name__}, not a tensor"
            )
        if name not in tied:
            full = whole(value)
            if main:
                found[name] = full
    return found


def _tied(model: nn.Module) -> set[str]:
    """Names under which a tensor appears again."""
    seen: set[int] = set()
    again = set()
    both: Iterable[tuple[str, torch.Tensor]] = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in both:
        if id(tensor) in seen:
            again.add(name)
        seen.add(id(tensor))
    return again


def restore_weights(model: nn.Module, path: Path) -> None:
    """Put a checkpoint's weights into a model of the same form, sharded or not.

    Raises
    ------
    ValueError
        When names, shapes or number formats differ.
    """
    saved = safetensors.torch.load_file(path / "model.safetensors")
    own = model.state_dict()
    tied = _tied(model)
    wrong = sorted(set(saved) ^ (set(own) - tied))
    wrong += [n for n, t in saved.items() if n in own and (own[n].shape, own[n].dtype) != (t.shape, t.dtype)]
    if wrong:
        raise ValueError(
            f"the checkpoint {path} does not fit {type(model).__name__}: {', '.join(wrong[:5])} missing, unknown, "
            f"misshaped or of another number format. Build the model as the run that wrote it did."
        )
    shards = {name: _sharded_like(tensor, own[name]) for name, tensor in saved.items()}
    model.load_state_dict(shards, strict=False)


def optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, main: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An optimizer's state as a JSON document and tensors; every process of a sharded model calls this."""
    tensors: dict[str, torch.Tensor] = {}
    document = pack(optimizer.state_dict(), tensors, main=main)
    return {
        "optimizer": type(optimizer).__name__,
        "names": _names(optimizer, model),
        "state": document,
    }, tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, path: Path) -> None:
    """Put a checkpoint's optimizer state back.

    Raises
    ------
    ValueError
        When it is of another optimizer or of other parameters.
    """
    document = json.loads((path / "optimizer.json").read_text())
    names = _names(optimizer, model)
    if document["optimizer"] != type(optimizer).__name__:
        raise ValueError(
            f"the checkpoint {path} holds the state of {document['optimizer']}, not of {type(optimizer).__name__}"
        )
    if document["names"] != names:
        differ = sorted({n for g in document["names"] for n in g} ^ {n for g in names for n in g})
        raise ValueError(
            f"the optimizer of {path} trained other parameters, or in other groups or order: "
            f"{', '.join(differ[:5]) or 'same names, other order'}"
        )
    state = unpack(document["state"], safetensors.torch.load_file(path / "optimizer.safetensors"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    slots = state.get("state", {})
    for index, slot in slots.items():
        if isinstance(index, int) and isinstance(slot, dict):
            for key, value in slot.items():
                if isinstance(value, torch.Tensor) and value.shape == parameters[index].shape:
                    slot[key] = _sharded_like(value, parameters[index])
    optimizer.load_state_dict(state)
    # torch casts state to the parameter's number format, which would lose float32 moments of bfloat16 weights.
    for index, slot in slots.items():
        if isinstance(index, int) and isinstance(slot, dict) and parameters[index] in optimizer.state:
            loaded = optimizer.state[parameters[index]]
            for key, value in slot.items():
                if isinstance(value, torch.Tensor) and loaded[key].dtype != value.dtype:
                    loaded[key] = value.to(loaded[key].device)


def _names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """The parameters' names, group by group."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        [known.get(id(parameter), f"outside the model: {i}") for i, parameter in enumerate(group["params"])]
        for group in optimizer.param_groups
    ]


def random_state(device: torch.device) -> dict[str, Any]:
    """State of this process's random generators, as JSON: torch, its device's, numpy's and Python's.

    Examples
    --------
    >>> state = random_state(torch.device("cpu"))
    >>> first = torch.rand(3), random.random(), np.random.rand()
    >>> restore_random_state(state, torch.device("cpu"))
    >>> torch.equal(torch.rand(3), first[0]), (random.random(), np.random.rand()) == first[1:]
    (True, True)
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 (numpy's global generator, which others' code draws from)
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _text(torch.get_rng_state()),
        "numpy": [kind, base64.b64encode(np.asarray(keys, "<u4").tobytes()).decode(), *rest],
        "python": [version, list(words), gauss],
    }
    if device.type in ("cuda", "mps"):
        get = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.mps.get_rng_state()
        state[device.type] = _text(get)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(_bytes(state["torch"]))
    kind, keys, *rest = state["numpy"]
    words_of_numpy = np.frombuffer(base64.b64decode(keys), "<u4").astype(np.uint32)
    np.random.set_state((kind, words_of_numpy, *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(_bytes(state["mps"]))


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
