"""The definition of the experts' layer: a loop over the experts that were chosen. Differentiable, any number of times."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels.grouped_experts.activations import ACTIVATIONS


def grouped_experts_reference(
    x: Tensor,
    token: Tensor,
    expert: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """Compute each expert on its tokens, one expert after the other.

    Arguments are those of :func:`labkit.kernels.grouped_experts.grouped_experts`, in pairs: ``token``, ``expert`` and
    ``weight`` are ``(S,)``.
    """
    act = ACTIVATIONS[activation].value
    inner = down.shape[2]
    out = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    for e in torch.unique(expert).tolist():
        chosen = (expert == e).nonzero()[:, 0]
        rows = token[chosen]
        pre = torch.nn.functional.linear(x[rows], up[e], None if up_bias is None else up_bias[e])
        h = act(pre[:, :inner]) * pre[:, inner:] if gated else act(pre)
        y = torch.nn.functional.linear(h, down[e], None if down_bias is None else down_bias[e])
        out = out.index_add(0, rows, (y * weight[chosen, None]).to(out.dtype))
    return out.to(x.dtype)
