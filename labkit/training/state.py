"""What a checkpoint is made of: state as JSON and safetensors, for whole and for sharded models.

`pack` turns a ``state_dict`` into a JSON document with its tensors beside it; `weights`, `optimizer_state` and
`random_state` take the state of a run, and their ``restore`` twins put it back, to the bit.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn


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
