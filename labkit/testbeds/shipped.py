"""Weights that ship with the package, each beside its recipe, and weights that were trained once and cached.

A shipped model is two files of the folder ``weights``: ``<name>.safetensors`` and ``<name>.json``, the recipe
(seed, steps, metric reached, versions). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from labkit.lab.cache import cached

FOLDER = Path(str(resources.files("labkit.testbeds"))) / "weights"


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copy a model's weights to the CPU, each shared tensor (tied embeddings) once.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> sorted(n for n in state(tiny(layers=1)) if "embed" in n or "head" in n)
    ['model.embed_tokens.weight']
    """
    kept: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        kept[name] = tensor.detach().cpu().clone()
    return kept


def restore(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """Put weights made by `state` into a model of the same configuration; returns it in evaluation mode.

    Raises
    ------
    ValueError
        When names or shapes do not fit the model.
    """
    own = model.state_dict()
    needed = set(state(model))
    wrong = sorted(
        (needed ^ set(tensors)) | {n for n in needed & set(tensors) if own[n].shape != tensors[n].shape}
    )
    if wrong:
        raise ValueError(
            f"weights do not fit {type(model).__name__}: {', '.join(wrong[:5])} missing, unknown or misshaped"
        )
    model.load_state_dict(
        {name: tensor.to(own[name].dtype) for name, tensor in tensors.items()}, strict=False
    )
    model.tie_weights()
    return model.eval()


def has(name: str) -> bool:
    """Whether the package ships weights of this name."""
    return (FOLDER / f"{name}.safetensors").is_file()


def recipe(name: str) -> dict[str, Any]:
    """Read the recipe of shipped weights: seed, steps, metric reached, versions.

    Examples
    --------
    >>> recipe("retrieval-0")["accuracy"] > 0.95
    True
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in FOLDER.glob("*.safetensors")))
        raise ValueError(f"no shipped weights are called {name!r}. There are: {names}")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def read(name: str) -> dict[str, torch.Tensor]:
    """Read shipped weights."""
    recipe(name)
    return safetensors.torch.load_file(FOLDER / f"{name}.safetensors")


def load(
    name: str,
    blank: PreTrainedModel,
    train: Callable[[], PreTrainedModel],
    *,
    key: Callable[[], Mapping[str, Any]],
    code: Sequence[Any],
    default: bool = True,
    retrain: bool = False,
) -> PreTrainedModel:
    """Load shipped weights; where there are none, train once and cache.

    Parameters
    ----------
    name : str
        Stem of the shipped files, ``<kind>-<seed>``.
    blank : transformers.PreTrainedModel
        Gets the weights.
    train : callable
        Makes the trained model.
    key : callable
        What the cached weights depend on, beside the version of torch; not called for shipped ones.
    code : sequence
        Functions and classes that the training is made of: cached weights of other code are not used.
    default : bool
        Whether the settings are those of the shipped weights.
    retrain : bool
        Train anew, whatever is shipped or cached, and renew the cache.

    Returns
    -------
    transformers.PreTrainedModel
        ``blank``, in evaluation mode.
    """
    if default and not retrain and has(name):
        return restore(blank, read(name))
    about = {**key(), "torch": torch.__version__}
    kind = name.rsplit("-", 1)[0]
    weights = cached(kind, about, lambda: state(train()), kind="tensors", code=code, rebuild=retrain)
    return restore(blank, weights)


def write(name: str, model: PreTrainedModel, facts: Mapping[str, Any], *, half: bool = False) -> Path:
    """Store a model's weights and recipe among the shipped ones; how the maintainers renew them.

    Parameters
    ----------
    name : str
        Stem of the two files.
    model : transformers.PreTrainedModel
        Its weights are stored in float32.
    facts : mapping
        The recipe; versions are added.
    half : bool
        Store float16 instead.
    """
    import transformers

    FOLDER.mkdir(exist_ok=True)
    tensors = {key: value.half() if half else value for key, value in state(model).items()}
    (FOLDER / f"{name}.safetensors").write_bytes(safetensors.torch.save(tensors))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    stored = dict(facts) | {"parameters": model.num_parameters(), "versions": versions}
    (FOLDER / f"{name}.json").write_text(json.dumps(stored, indent=1) + "\n")
    return FOLDER / f"{name}.safetensors"
