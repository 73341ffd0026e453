"""Attention modules as an eviction sees them: which are supported, and what their queries are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from labkit.kv._kernels import compact_kv, proxy_column_sums

SUPPORTED_ATTENTION = (
    "LlamaAttention",
    "MistralAttention",
    "MixtralAttention",
    "Phi3Attention",
    "Qwen2Attention",
    "Qwen2MoeAttention",
    "Qwen3Attention",
    "Qwen3MoeAttention",
    "DHALlamaAttention",
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


def eviction_heads(module: nn.Module, keys: Tensor) -> int:
    """Sets of heads in a layer that entries can be evicted for apart.

    A query head needs the same entries of its keys and of its values. With a cache of key-value heads that makes
    one set for each; with decoupled heads, all that are linked by any query head hold the same entries.
    """
    layout: Any = getattr(module, "layout", None)
    return keys.shape[1] if layout is None else max(layout.site_of_query) + 1


def head_scores(
    module: nn.Module,
    q: Tensor,
    keys: Tensor,
    positions: Tensor,
    *,
    causal: bool = True,
    head_reduction: str = "mean",
) -> Tensor:
    """Attention that each key gets from some queries, averaged over the query heads that keep entries together.

    Parameters
    ----------
    module : Module
        One of ``SUPPORTED_ATTENTION``.
    q : Tensor
        Queries after rotary embedding, ``(B, H, P, d)``.
    keys : Tensor
        Keys of the cache, ``(B, K, n, d)``.
    positions : Tensor
        Of the queries, ``(P,)`` or ``(B, P)``.
    causal : bool, default True
        Whether a query sees only keys up to its own position.
    head_reduction : {"mean", "head_index"}, default "mean"
        As in :func:`labkit.kv.proxy_scores`.

    Returns
    -------
    Tensor
        ``(B, K, n)``, with K as :func:`eviction_heads` counts.
    """
    scale: float = module.scaling  # type: ignore[assignment]
    layout: Any = getattr(module, "layout", None)
    if layout is None:
        how = "mean" if head_reduction == "mean" else "none"
        scores = proxy_column_sums(q, keys, positions, causal=causal, scale=scale, head_reduction=how)
        return scores[:, : keys.shape[1]] if head_reduction == "head_index" else scores
    if head_reduction == "head_index":
        raise ValueError(
            "head_reduction='head_index' takes the scores of one query head for a key-value head, and decoupled "
            "heads do not come in such pairs: use 'mean'"
        )
    total = torch.zeros(0)
    count = [layout.site_of_query.count(site) for site in range(eviction_heads(module, keys))]
    for head in range(keys.shape[1]):
        queries = [i for i, k in enumerate(layout.key_map) if k == head]
        # Query heads of one key head belong together, so that the kernel's own mean serves.
        part = proxy_column_sums(
            q[:, queries],
            keys[:, head : head + 1],
            positions,
            causal=causal,
            scale=scale,
            head_reduction="mean",
        )
        if not total.numel():
            total = part.new_zeros(part.shape[0], len(count), part.shape[2])
        site = layout.site_of_key[head]
        total[:, site] += part[:, 0] * (len(queries) / count[site])
    return total


def compacted(module: nn.Module, keys: Tensor, values: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Keep entries ``keep``, ``(B, K, S')`` with K as :func:`eviction_heads` counts, of a layer's cache."""
    layout: Any = getattr(module, "layout", None)
    if layout is None:
        return compact_kv(keys, values, keep)
    parts = []
    for x, sites in ((keys, layout.site_of_key), (values, layout.site_of_value)):
        # Of an empty second tensor, as keys and values differ in their number of heads.
        parts.append(compact_kv(x, x[..., :0], keep[:, list(sites)])[0])
    return parts[0], parts[1]


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

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of what :meth:`labkit.kv.CachePress.select` returns: B, sets of heads with entries of their own, n."""
        return self.keys.shape[0], eviction_heads(self.module, self.keys), self.n

    def scores(self, positions: Tensor) -> Tensor:
        """Attention that each key gets from the queries at ``positions``: ``(B, K, n)``."""
        return head_scores(self.module, self.queries(positions), self.keys, positions)

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
