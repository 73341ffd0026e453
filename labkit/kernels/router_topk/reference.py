"""The router's softmax, choice and statistics in plain PyTorch: the definition. Differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def router_topk_reference(
    logits: Tensor, top_k: int, *, renormalize: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute weights, index, logsumexp, probability sums and counts, as :func:`labkit.kernels.router_topk.router_topk`."""
    logits = logits.float()
    # chosen by logit: probabilities that underflow to 0 would tie
    best, index = logits.topk(top_k, dim=-1)
    lse = torch.logsumexp(logits, -1)
    weights = best.softmax(-1) if renormalize else torch.exp(best - lse[:, None])
    probs = torch.exp(logits - lse[:, None])
    share = torch.ones_like(lse) if mask is None else mask.to(lse.dtype)
    counts = torch.zeros_like(probs[0]) if len(probs) else logits.new_zeros(logits.shape[1])
    counts = counts.index_add(0, index.reshape(-1), share[:, None].expand_as(index).reshape(-1).detach())
    return weights, index, lse, share @ probs, counts.detach()
