"""What becomes of a trained adapter: looked at, folded into a plain LoRA, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from labkit.finetuning.beamlora.config import BeamLoraConfig
from labkit.finetuning.beamlora.rule import beam_scores
from labkit.finetuning.beamlora.schedule import beam_layers, plain_name
from labkit.lab.cache import write_atomic

if TYPE_CHECKING:
    import pandas as pd

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@torch.no_grad()
def fold_(model: nn.Module, adapter: str = "default") -> nn.Module:
    """Turn a BeamLoRA adapter into a plain LoRA, in place: A <- diag(s) A, g <- 0. The outputs stay as they are.

    Parameters
    ----------
    model : torch.nn.Module
        As ``get_peft_model`` made it.
    adapter : str

    Returns
    -------
    torch.nn.Module
        The same model.

    Raises
    ------
    ValueError
        If the adapter has no gates.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from labkit.testbeds.models import tiny
    >>> model = get_peft_model(tiny("llama", seed=0), BeamLoraConfig(r=4, target_modules=["q_proj"]))
    >>> layer = model.base_model.model.model.layers[0].self_attn.q_proj
    >>> _ = nn.init.normal_(layer.lora_gate["default"])
    >>> update = layer.get_delta_weight("default")
    >>> _ = fold_(model)
    >>> layer.scores(), torch.allclose(layer.get_delta_weight("default"), update)
    (tensor([1., 1., 1., 1.], grad_fn=<MulBackward0>), True)
    """
    for layer in _gated(model, adapter).values():
        weight = layer.lora_A[adapter].weight
        weight.copy_(weight * layer.scores(adapter)[:, None].to(weight.dtype))
        layer.lora_gate[adapter].zero_()
    return model


def save_beam_adapter(model: Any, folder: str | Path, *, fold: bool = True, adapter: str = "default") -> Path:
    """Save an adapter; by default folded, as a plain LoRA that stock peft loads. The model stays as it is.

    Parameters
    ----------
    model : peft.PeftModel
    folder : str or Path
        Gets ``adapter_model.safetensors`` and ``adapter_config.json``.
    fold : bool
        False keeps gates, for training on: such a folder needs `load_beam_adapter`. Stock peft would leave the gates
        out and compute something else.
    adapter : str

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If the adapter has no gates, or `folder` is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder")
    _gated(model, adapter)
    config = model.peft_config[adapter]
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    values = config.to_dict()
    if fold:
        for name in [n for n in tensors if n.endswith("lora_gate")]:
            scores = beam_scores(tensors.pop(name).float(), config.beam_temperature)
            weight = name.removesuffix("lora_gate") + "lora_A.weight"
            tensors[weight] = (tensors[weight] * scores[:, None]).to(tensors[weight].dtype)
        beams = {item.name for item in fields(BeamLoraConfig)} - {item.name for item in fields(LoraConfig)}
        values = {name: value for name, value in values.items() if name not in beams}
    values["inference_mode"] = True
    values["base_model_name_or_path"] = values.get("base_model_name_or_path") or getattr(
        model.get_base_model(), "name_or_path", None
    )
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    write_atomic(folder / _WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / _CONFIG, json.dumps(values, indent=2, sort_keys=True))
    return folder


def load_beam_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, adapter: str = "default"
) -> PeftModel:
    """Put a saved adapter on a base model, with its gates if it has any.

    Parameters
    ----------
    model : torch.nn.Module
        The base model, without an adapter.
    folder : str or Path
        What `save_beam_adapter`, ``model.save_pretrained`` or a Trainer wrote.
    trainable : bool
    adapter : str
        Name that it gets.

    Returns
    -------
    peft.PeftModel

    Raises
    ------
    ValueError
        If `folder` has no adapter, or one whose gates are missing.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{folder} has no {_CONFIG}: give the folder of a saved adapter")
    saved = json.loads((folder / _CONFIG).read_text())
    if "beam_temperature" not in saved:
        return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter, is_trainable=trainable)
    if (folder / _WEIGHTS).is_file():
        with safetensors.safe_open(folder / _WEIGHTS, "pt") as tensors:
            if not any(name.endswith("lora_gate") for name in tensors.keys()):  # noqa: SIM118
                raise ValueError(
                    f"{folder / _WEIGHTS} has no gates, though {_CONFIG} is that of a BeamLoRA adapter"
                )
    config = BeamLoraConfig.from_peft_type(**saved)
    return PeftModel.from_pretrained(
        model, str(folder), adapter_name=adapter, is_trainable=trainable, config=config
    )


def importances(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Scores s (r,) of every gated module by name, float32 on the CPU; those of the BeamLoRA layers alone."""
    return {name: layer.scores(adapter).detach().cpu() for name, layer in beam_layers(model, adapter)}


def rank_importance(model: nn.Module, adapter: str = "default") -> pd.DataFrame:
    """How much each rank of each module matters.

    Parameters
    ----------
    model : torch.nn.Module
        With LoRA layers of peft, gated or not.
    adapter : str

    Returns
    -------
    pandas.DataFrame
        A row per rank: ``module``, ``rank``, ``s`` (learned score, 1 without gates) and ``frob``, the Frobenius norm
        ||b_i|| ||a_i|| of its piece b_i a_i. Its part in the update is ``s * frob`` times alpha / r.

    Raises
    ------
    ValueError
        If the model has no LoRA of that name.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from labkit.testbeds.models import tiny
    >>> model = get_peft_model(tiny("llama", layers=1, seed=0), LoraConfig(r=2, target_modules=["q_proj"]))
    >>> rank_importance(model)
                            module  rank    s  frob
    0  model.layers.0.self_attn.q_proj     0  1.0   0.0
    1  model.layers.0.self_attn.q_proj     1  1.0   0.0
    """
    import pandas as pd

    rows = []
    for name, layer in _lora_layers(model, adapter).items():
        a, b = layer.lora_A[adapter].weight.detach().float(), layer.lora_B[adapter].weight.detach().float()
        norms = (a.norm(dim=1) * b.norm(dim=0)).cpu().tolist()
        scores = layer.scores(adapter).tolist() if hasattr(layer, "lora_gate") else [1.0] * len(norms)
        rows += [
            {"module": name, "rank": i, "s": s, "frob": norm}
            for i, (s, norm) in enumerate(zip(scores, norms, strict=True))
        ]
    return pd.DataFrame(rows)


@contextmanager
def silenced(
    model: nn.Module, ranks: Mapping[str, Sequence[int]], adapter: str = "default"
) -> Iterator[nn.Module]:
    """Switch ranks of a LoRA off for a while: what does the model lose without them?

    Parameters
    ----------
    model : torch.nn.Module
        With LoRA layers of peft, gated or not, unmerged.
    ranks : mapping of str to sequence of int
        Ranks to switch off by module, as `rank_importance` names them.
    adapter : str

    Raises
    ------
    ValueError
        For an unknown module.
    """
    layers = _lora_layers(model, adapter)
    if odd := set(ranks) - set(layers):
        raise ValueError(
            f"no LoRA module is called {sorted(odd)[0]!r}; there are {', '.join(sorted(layers)[:4])}, ..."
        )
    weights = {name: layers[name].lora_B[adapter].weight for name in ranks}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.data[:, list(ranks[name])] = 0
        yield model
    finally:
        for name, weight in weights.items():
            weight.data.copy_(before[name])


def _gated(model: nn.Module, adapter: str) -> dict[str, Any]:
    layers = dict(beam_layers(model, adapter))
    if not layers:
        raise ValueError(f"the model has no BeamLoRA adapter called {adapter!r}")
    return layers


def _lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }
    if not layers:
        raise ValueError(f"the model has no LoRA adapter called {adapter!r}")
    return layers
