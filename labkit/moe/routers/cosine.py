"""Routers that compare directions: cosine scores, and XMoE's cosine in a small space."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.moe.routers.base import Router


class CosineRouter(Router):
    r"""``logits_e = cos(z, c_e) / τ`` with learned centres and temperature; z is x, or its projection (XMoE).

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    reduce : int, optional
        Project tokens to this width first, as XMoE does (16 in its comparison with RMoE).
    temperature : float, default 0.3
        Initial τ; its logarithm is what is trained, so that it stays positive.

    Examples
    --------
    >>> import torch
    >>> router = CosineRouter(8, 4, 2, reduce=4)
    >>> x = torch.randn(5, 8)
    >>> torch.allclose(router.scores(x), router.scores(3 * x), atol=1e-5)   # lengths do not matter
    True
    """

    kind = "cosine"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        reduce: int | None = None,
        temperature: float = 0.3,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if reduce is not None and reduce < 1:
            raise ValueError(f"reduce must be at least 1, or None for no projection; got {reduce}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive; got {temperature}")
        self.reduce = reduce
        self.projection = None if reduce is None else nn.Linear(hidden_size, reduce, bias=False)
        self.centres = nn.Parameter(torch.randn(num_experts, reduce or hidden_size))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    def options(self) -> dict[str, Any]:
        return {**super().options(), "reduce": self.reduce}

    def scores(self, hidden: Tensor) -> Tensor:
        projected = hidden if self.projection is None else self.projection(hidden)
        cosines = F.linear(F.normalize(projected.float(), dim=-1), F.normalize(self.centres.float(), dim=-1))
        return cosines.float() * torch.exp(-self.log_temperature.float())
