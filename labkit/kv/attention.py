"""Attention modules as an eviction sees them: which are supported, and what their queries are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

SUPPORTED_ATTENTION = (
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Phi3Attention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
)


def query_states(module: nn.Module, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Compute the queries of an attention module, with query norm and rotary embedding.

    Parameters
    ----------
    module : Module
        One of ``SUPPORTED_ATTENTION``.
    hidden_states : Tensor
        Inputs of the module, ``(B, P, D)``.
    cos, sin : Tensor
        Rotary tables of these tokens, ``(B, P, r)``.

    Returns
    -------
    Tensor
        ``(B, H, P, d)``.
    """
    config: Any = module.config
    width: int = module.head_dim  # type: ignore[assignment]
    heads: int = config.num_attention_heads
    project: Any = module.qkv_proj if hasattr(module, "qkv_proj") else module.q_proj
    q = project(hidden_states)[..., : heads * width]  # the fused projection gives queries first
    q = q.view(*hidden_states.shape[:2], heads, width)
    if hasattr(module, "q_norm"):
        q = module.q_norm(q)  # type: ignore[operator]
    q = q.transpose(1, 2)  # (B, H, P, d)
    rotated, rest = q[..., : cos.shape[-1]], q[..., cos.shape[-1] :]
    left, right = rotated.chunk(2, dim=-1)
    rotated = rotated * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None]
    return torch.cat((rotated, rest), dim=-1).to(q.dtype)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Attention layers of a model, in order.

    Raises
    ------
    ValueError
        If there are none, or of a class whose queries labkit does not know how to compute.
    """
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
    unknown = sorted({type(m).__name__ for m in found} - set(SUPPORTED_ATTENTION))
    if unknown or not found:
        what = (
            f"attention of class {', '.join(unknown)}" if unknown else "no attention layers with a layer_idx"
        )
        raise ValueError(
            f"{type(model).__name__} has {what}; cache eviction supports {', '.join(SUPPORTED_ATTENTION)}"
        )
    return found


@dataclass
class LayerContext:
    """One attention layer at the end of a prompt, for prompts of equal length and no padding.

    ``hidden_states`` is (B, n, D), ``keys`` and ``values`` are (B, K, n, d), ``cos`` and ``sin`` (B, n, r) with r
    the rotated part of d, ``input_ids`` (B, n) or None where the model was called with embeddings.
    """

    module: nn.Module
    layer: int
    hidden_states: Tensor
    keys: Tensor
    values: Tensor
    cos: Tensor
    sin: Tensor
    input_ids: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return self.keys.shape[2]

    def queries(self, positions: Tensor) -> Tensor:
        """Queries at ``positions``, ``(P,)`` or ``(B, P)``, after rotary embedding: ``(B, H, P, d)``."""
        rows = torch.arange(self.keys.shape[0], device=self.keys.device)[:, None]
        where = positions.to(self.keys.device).expand(self.keys.shape[0], -1)
        return query_states(
            self.module, self.hidden_states[rows, where], self.cos[rows, where], self.sin[rows, where]
        )


def left_alone(module: nn.Module, layer: Any) -> bool:
    """Whether a cache layer is of a kind that is left alone: sliding-window, static, quantized."""
    config: Any = module.config
    window = (
        module.sliding_window
        if hasattr(module, "sliding_window")
        else getattr(config, "sliding_window", None)
    )
    return type(layer) is not DynamicLayer or window is not None
