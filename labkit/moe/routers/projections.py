"""Routers that read one token's hidden state through a matrix: learned, deep, frozen, or generated."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.moe.routers.base import Router


class LinearRouter(Router):
    """The usual router: ``logits = x W^T (+ b)``.

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    bias : bool, default False
    std : float, default 0.02
        Standard deviation of the initial weights.

    Examples
    --------
    >>> import torch
    >>> logits, weights, index = LinearRouter(8, 4, 2)(torch.randn(3, 5, 8))
    >>> logits.shape, weights.shape, index.shape
    (torch.Size([15, 4]), torch.Size([15, 2]), torch.Size([15, 2]))
    """

    kind = "linear"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        bias: bool = False,
        std: float = 0.02,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size).normal_(0.0, std))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def options(self) -> dict[str, Any]:
        return {**super().options(), "bias": self.bias is not None}

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight, self.bias)


class FrozenRandomRouter(Router):
    """A linear router that stays as it was drawn: the weight is a buffer, saved but never trained.

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    std : float, default 0.02
        Standard deviation of the weights.
    seed : int, optional
        Seed of the weights; the global generator draws them by default.

    Examples
    --------
    >>> router = FrozenRandomRouter(8, 4, 2, seed=0)
    >>> list(router.parameters()), list(router.state_dict())
    ([], ['weight'])
    """

    kind = "random"
    weight: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        std: float = 0.02,
        seed: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        weight = torch.empty(num_experts, hidden_size).normal_(0.0, std, generator=generator)
        self.register_buffer("weight", weight)

    def scores(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class MLPRouter(Router):
    """Two layers with a GELU between: ``logits = W_2 gelu(W_1 x + b_1) + b_2`` (SMoE-MLP).

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    width : int, default 256
        Hidden units.

    Examples
    --------
    >>> sum(p.numel() for p in MLPRouter(8, 4, 2, width=16).parameters())
    212
    """

    kind = "mlp"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, width: int = 256, **common: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        self.width = width
        self.inner = nn.Linear(hidden_size, width)
        self.outer = nn.Linear(width, num_experts)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "width": self.width}

    def scores(self, hidden: Tensor) -> Tensor:
        return self.outer(F.gelu(self.inner(hidden)))


class HyperRouter(Router):
    """A frozen hypernetwork turns one learned vector into the router's weight and bias (HyperRouter, Do et al. 2023).

    Weight and bias are ``(A_2 relu(A_1 v))`` cut and reshaped, with the frozen ``A_1`` (D to ``width``) and ``A_2``
    (``width`` to ``E D + E``), and v of width D the only thing trained. Not to be confused with HyperMoE, whose
    hypernetwork makes experts.

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    width : int, default 256
        Hidden units of the hypernetwork.

    Examples
    --------
    >>> router = HyperRouter(8, 4, 2, width=16)
    >>> [name for name, p in router.named_parameters() if p.requires_grad]
    ['vector']
    """

    kind = "hyper"

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, *, width: int = 256, **common: Any
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if width < 1:
            raise ValueError(f"width must be at least 1; got {width}")
        self.width = width
        self.vector = nn.Parameter(torch.randn(hidden_size))
        self.inner = nn.Linear(hidden_size, width).requires_grad_(False)
        self.outer = nn.Linear(width, num_experts * (hidden_size + 1)).requires_grad_(False)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "width": self.width}

    def generated(self) -> tuple[Tensor, Tensor]:
        """The router's weight ``(E, D)`` and bias ``(E,)`` of now."""
        flat = self.outer(torch.relu(self.inner(self.vector)))
        weight, bias = flat.split([self.num_experts * self.hidden_size, self.num_experts])
        return weight.view(self.num_experts, self.hidden_size), bias

    def scores(self, hidden: Tensor) -> Tensor:
        weight, bias = self.generated()
        return F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))


class SwitchRouter(Router):
    """The linear router of Switch Transformers: top-1, in float32, weighted by its probability.

    Parameters
    ----------
    hidden_size, num_experts : int
        D and E.
    top_k : int, default 1
    bias : bool, default False
    jitter : float, default 0.01
        See :class:`~labkit.moe.Router`.

    Examples
    --------
    >>> import torch
    >>> logits, weights, index = SwitchRouter(8, 4)(torch.randn(2, 3, 8))
    >>> torch.equal(weights[:, 0], logits.softmax(-1).max(-1).values)
    True
    """

    kind = "switch"

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 1,
        *,
        bias: bool = False,
        jitter: float = 0.01,
        renormalize: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, renormalize=renormalize, jitter=jitter)
        self.classifier = nn.Linear(hidden_size, num_experts, bias=bias)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "bias": self.classifier.bias is not None}

    def scores(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            bias = self.classifier.bias
            return F.linear(
                hidden.float(), self.classifier.weight.float(), None if bias is None else bias.float()
            )
