"""Saving models of transformers that have recurrent routers put in.

A checkpoint of transformers holds what the class knows. The routers' settings lie beside the weights, in
``labkit_rmoe.json``; :func:`load_recurrent` puts the routers back before it reads the weights. The shared cell is saved
once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel

from labkit.lab.cache import write_atomic
from labkit.moe.adapters import moe_blocks
from labkit.moe.rmoe.attach import PLACE, attach_recurrent_router
from labkit.moe.rmoe.shared import RecurrentGate

DESCRIPTION = "labkit_rmoe.json"
WEIGHTS = "model.safetensors"


def save_recurrent(model: PreTrainedModel, folder: str | Path) -> Path:
    """Save a model with recurrent routers of `attach_recurrent_router`.

    Parameters
    ----------
    model : PreTrainedModel
    folder : path
        Gets config.json, labkit_rmoe.json and model.safetensors, each written whole or not at all.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the model has no such routers.

    Examples
    --------
    >>> import tempfile
    >>> from labkit.moe import attach_recurrent_router
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("mixtral", width=16, heads=2)
    >>> routing = attach_recurrent_router(model, state_size=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     again = load_recurrent(save_recurrent(model, folder))
    >>> type(again.model.layers[1].mlp.gate).__name__
    'RecurrentGate'
    """
    shared = getattr(getattr(model, "base_model", None), PLACE, None)
    if shared is None or shared.records_logits:
        raise ValueError(
            f"{type(model).__name__} has no routers of attach_recurrent_router: save it with model.save_pretrained"
        )
    gates = [block.router for block in moe_blocks(model)]
    if not all(isinstance(gate, RecurrentGate) for gate in gates):
        raise ValueError(
            "some routers were swapped after the recurrent ones were put in; undo that swap first"
        )
    gate: Any = gates[0]
    settings = {name: value for name, value in gate.options().items() if name in _SETTINGS}
    settings["shared_projector"] = shared.projector is not None
    document = {
        "format": 1,
        "architecture": type(model).__name__,
        "settings": settings,
        "top_k": gate.top_k,
        "renormalize": gate.renormalize,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    temporary = folder / f".{WEIGHTS}.tmp"
    safetensors.torch.save_model(model, str(temporary), metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    write_atomic(folder / DESCRIPTION, json.dumps(document, indent=1))
    return folder


_SETTINGS = frozenset(
    (
        "state_size",
        "cell",
        "passing",
        "logit_residual",
        "residual_of",
        "detach_logits",
        "bias",
        "head",
        "jitter",
    )
)


def load_recurrent(folder: str | Path, *, dtype: Any = None) -> Any:
    """Load what :func:`save_recurrent` saved.

    Parameters
    ----------
    folder : path
    dtype : torch.dtype, optional
        Of the model's parameters; by default as saved.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, with its recurrent routers.

    Raises
    ------
    FileNotFoundError
        If the folder has no labkit_rmoe.json.
    ValueError
        If its format or its class is not known here.
    RuntimeError
        If weights are missing, left over, or of another shape.
    """
    import transformers

    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: {folder} was not written by save_recurrent (load other models with from_pretrained)"
        )
    document = json.loads(path.read_text())
    if document.get("format") != 1:
        raise ValueError(
            f"{path} has format {document.get('format')!r}; this version reads format 1: update labkit"
        )
    architecture = getattr(transformers, document["architecture"], None)
    if not (isinstance(architecture, type) and issubclass(architecture, PreTrainedModel)):
        raise ValueError(f"transformers {transformers.__version__} has no model {document['architecture']!r}")
    config = transformers.AutoConfig.from_pretrained(folder)
    model = architecture(config)
    attach_recurrent_router(
        model, top_k=document["top_k"], renormalize=document["renormalize"], **document["settings"]
    )
    model = model.to(dtype or getattr(torch, document["dtype"]))
    safetensors.torch.load_model(model, str(folder / WEIGHTS))
    return model.eval()
