"""What a checkpoint must be like for its heads to be merged; all of it is checked before any work."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def attention_layers(model: Any) -> list[Any]:
    """Attention modules of a model whose heads can be merged, in order.

    Raises
    ------
    ValueError
        For an attention class other than Llama's, quantised or adapted projections, projections that share
        their weights with another module, or weights that are not in memory. Tied embeddings are no obstacle:
        no head is in them.
    TypeError
        For something that is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a LlamaForCausalLM; got {type(model).__name__}")
    found: list[Any] = [
        m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")
    ]
    unknown = sorted({type(m).__name__ for m in found} - {"LlamaAttention"})
    if unknown or not found or not hasattr(model, "lm_head"):
        fused = next((m for m in found if hasattr(m, "query_key_value") or hasattr(m, "qkv_proj")), None)
        what = f"attention of class {', '.join(unknown)}" if unknown else "no attention layers with a head"
        hint = ": its query, key and value projections are one matrix" if fused is not None else ""
        raise ValueError(
            f"{type(model).__name__} has {what}{hint}; head fusion supports LlamaAttention in a LlamaForCausalLM"
        )
    config: Any = model.config
    quantised = getattr(config, "quantization_config", None) is not None
    for module in found:
        for name in PROJECTIONS:
            linear = getattr(module, name)
            where = f"layer {module.layer_idx}, {name}"
            if type(linear) is not nn.Linear or quantised or not linear.weight.is_floating_point():
                raise ValueError(
                    f"{where} is a {type(linear).__name__} in {linear.weight.dtype}"
                    f"{' of a quantised model' if quantised else ''}, and head fusion needs plain nn.Linear: load "
                    "the model without quantization_config, and merge adapters first (merge_and_unload())"
                )
            if linear.weight.is_meta:
                raise ValueError(
                    f"{where} has no weights in memory (meta device): load without offloading, device_map=None"
                )
    _check_tied(model, found)
    return found


def _check_tied(model: nn.Module, found: list[Any]) -> None:
    # The embedding may be tied to the head. A projection that another module uses too may not: to merge its
    # heads here would change it there.
    uses = Counter(p.data_ptr() for _, p in _parameters(model))
    names = {
        p.data_ptr(): [n for n, q in _parameters(model) if _same(p, q)]
        for m in found
        for name in PROJECTIONS
        for p in [getattr(m, name).weight]
        if uses[p.data_ptr()] > 1
    }
    if names:
        shared = next(iter(names.values()))
        raise ValueError(
            f"{' and '.join(shared[:2])} are tied (one tensor), so their heads cannot be merged apart: give each "
            "its own copy, module.weight = nn.Parameter(module.weight.detach().clone())"
        )


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _same(p: torch.Tensor, q: torch.Tensor) -> bool:
    return p.data_ptr() == q.data_ptr()


def check_fits(groups: Any, layers: list[Any]) -> None:
    """Check that groups are those of this model's layers and heads."""
    config = layers[0].config
    if groups.layers != len(layers) or groups.heads != config.num_key_value_heads:
        raise ValueError(
            f"groups are of {groups.layers} layers with {groups.heads} key-value heads; the model has {len(layers)} "
            f"layers with num_key_value_heads={config.num_key_value_heads}: search groups on this model"
        )
