"""What a router decided: the record that every part of the family reads and writes.

:class:`RoutingInfo` holds the decision of one layer for T tokens over E experts. The usual decision, k experts for every
token, is the pair of ``(T, k)`` tensors ``index`` and ``weights``. Rules that give each token its own number of experts
(broadcasting uncertain tokens, thresholds, capacity) write :class:`Pairs` instead: the (token, expert, weight) triples in
compressed sparse row form. ``info.csr()`` gives the second form of either.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Pairs", "RoutingInfo"]


@dataclass
class Pairs:
    """Token-expert pairs in compressed sparse row form: any number of experts for each token.

    Pairs are in the order of their tokens. S is the number of pairs.

    Attributes
    ----------
    token : Tensor
        ``(S,)`` int64, not decreasing.
    expert : Tensor
        ``(S,)`` int64 in 0..E-1. A token may not name one expert twice.
    weight : Tensor
        ``(S,)``, what the expert's output is multiplied by; differentiable.
    num_tokens, num_experts : int
        T and E.

    Examples
    --------
    >>> import torch
    >>> pairs = Pairs(torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 0.5, 0.5]), 3, 2)
    >>> pairs.per_token().tolist(), pairs.per_expert().tolist(), pairs.offsets().tolist()
    ([1, 0, 2], [1, 2], [0, 1, 1, 3])
    """

    token: Tensor
    expert: Tensor
    weight: Tensor
    num_tokens: int
    num_experts: int

    def __post_init__(self) -> None:
        if not (self.token.ndim == 1 and self.token.shape == self.expert.shape == self.weight.shape):
            raise ValueError(
                "token, expert and weight must be vectors of one length; got shapes "
                f"{tuple(self.token.shape)}, {tuple(self.expert.shape)} and {tuple(self.weight.shape)}"
            )

    def __len__(self) -> int:
        return self.token.shape[0]

    @classmethod
    def from_dense(
        cls, index: Tensor, weights: Tensor, num_experts: int, kept: Tensor | None = None
    ) -> Pairs:
        """Write k experts a token as pairs.

        Parameters
        ----------
        index, weights : Tensor
            ``(T, k)``.
        num_experts : int
            E.
        kept : Tensor, optional
            ``(T, k)`` bool; choices with False (an expert at capacity) make no pair.
        """
        tokens, k = index.shape
        token = torch.arange(tokens, device=index.device)[:, None].expand(tokens, k)
        if kept is None:
            return cls(token.reshape(-1), index.reshape(-1), weights.reshape(-1), tokens, num_experts)
        return cls(token[kept], index[kept], weights[kept], tokens, num_experts)

    @classmethod
    def from_mask(cls, chosen: Tensor, weights: Tensor) -> Pairs:
        """Pairs where ``chosen`` ``(T, E)`` bool is True, with the weights at those places of ``(T, E)``.

        Examples
        --------
        >>> import torch
        >>> probs = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
        >>> Pairs.from_mask(probs >= 0.4, probs).per_token().tolist()
        [1, 2]
        """
        token, expert = chosen.nonzero(as_tuple=True)
        return cls(token, expert, weights[token, expert], *chosen.shape)

    def offsets(self) -> Tensor:
        """Where each token's pairs begin: ``(T+1,)`` int64, the last entry being S."""
        zero = self.token.new_zeros(1)
        return torch.cat([zero, self.per_token().cumsum(0)])

    def per_token(self) -> Tensor:
        """Experts of each token, ``(T,)`` int64."""
        return torch.bincount(self.token, minlength=self.num_tokens)

    def per_expert(self) -> Tensor:
        """Tokens of each expert, ``(E,)`` int64."""
        return torch.bincount(self.expert, minlength=self.num_experts)

    def dense_weights(self) -> Tensor:
        """The weights as a ``(T, E)`` matrix, 0 where there is no pair; differentiable."""
        dense = self.weight.new_zeros(self.num_tokens, self.num_experts)
        return dense.index_put((self.token, self.expert), self.weight)

    def to(self, device: torch.device | str) -> Pairs:
        """The same pairs on another device."""
        return dataclasses.replace(
            self, token=self.token.to(device), expert=self.expert.to(device), weight=self.weight.to(device)
        )

    def detach(self) -> Pairs:
        """The same pairs without a gradient to the weights."""
        return dataclasses.replace(self, weight=self.weight.detach())


@dataclass
class RoutingInfo:
    """Decision of one router for T tokens over E experts.

    Attributes
    ----------
    logits : Tensor
        ``(T, E)`` float32, before any softmax.
    probs : Tensor
        ``(T, E)`` float32, softmax over all experts.
    index : Tensor
        ``(T, k)`` int64, the chosen experts, best first.
    weights : Tensor
        ``(T, k)``, what the experts' outputs are multiplied by.
    mask : Tensor or None
        ``(T,)`` bool, False at padding; None where all tokens are real. Padded tokens are routed like others, but count
        in no loss and no statistic.
    layer : int
        Index of the decoder layer; -1 where it is not known.
    kept : Tensor or None
        ``(T, k)`` bool, False where the expert was full and dropped the token; None without a capacity.
    pairs : Pairs or None
        Set by rules with a variable number of experts a token. Where set, it is what the experts compute, and ``index``
        and ``weights`` remain the router's own choice.
    sequences : int
        Sequences of equal length that the T tokens make up, one after the other; 1 where it is not known.

    Examples
    --------
    >>> import torch
    >>> info = RoutingInfo.from_logits(torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 3.1]]), top_k=2)
    >>> info.index.tolist()
    [[0, 2], [2, 1]]
    >>> info.csr().per_expert().tolist()
    [1, 1, 2]
    """

    logits: Tensor
    probs: Tensor
    index: Tensor
    weights: Tensor
    mask: Tensor | None = None
    layer: int = -1
    kept: Tensor | None = None
    pairs: Pairs | None = field(default=None, repr=False)
    sequences: int = 1

    def __post_init__(self) -> None:
        tokens, experts = self.logits.shape if self.logits.ndim == 2 else (-1, -1)
        if tokens < 0 or self.probs.shape != self.logits.shape:
            raise ValueError(
                "logits and probs must both be (T, E); got "
                f"{tuple(self.logits.shape)} and {tuple(self.probs.shape)}"
            )
        if (
            self.index.ndim != 2
            or self.index.shape != self.weights.shape
            or self.index.shape[0] != tokens
            or self.index.shape[1] > experts
        ):
            raise ValueError(
                f"index and weights must both be ({tokens}, k) with k <= {experts}; got "
                f"{tuple(self.index.shape)} and {tuple(self.weights.shape)}"
            )
        if self.mask is not None:
            if self.mask.dtype != torch.bool:
                raise TypeError(
                    f"mask must be bool with False at padding; got {self.mask.dtype} (use mask.bool())"
                )
            if self.mask.shape != (tokens,):
                raise ValueError(
                    f"mask must be ({tokens},), one entry a token; got {tuple(self.mask.shape)} "
                    "(flatten an attention mask with mask.reshape(-1))"
                )
        if self.kept is not None and self.kept.shape != self.index.shape:
            raise ValueError(f"kept must be {tuple(self.index.shape)}; got {tuple(self.kept.shape)}")

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        top_k: int,
        *,
        renormalize: bool = True,
        mask: Tensor | None = None,
        layer: int = -1,
    ) -> RoutingInfo:
        """Softmax over all experts in float32, then the k largest.

        Parameters
        ----------
        logits : Tensor
            ``(T, E)``.
        top_k : int
            k, at most E.
        renormalize : bool, default True
            Divide a token's k weights by their sum (Mixtral); False leaves the probabilities (OLMoE's default).
        mask, layer
            As the attributes.

        Raises
        ------
        ValueError
            If ``top_k`` is not in 1..E.
        """
        if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
            raise ValueError(
                f"logits must be (T, E) and top_k in 1..E; got shape {tuple(logits.shape)} and top_k={top_k}"
            )
        logits = logits.float()
        probs = logits.softmax(-1)
        weights, index = probs.topk(top_k, dim=-1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return cls(logits, probs, index, weights, mask, layer)

    @property
    def num_tokens(self) -> int:
        """T, padding included."""
        return self.logits.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[1]

    @property
    def top_k(self) -> int:
        """k of the router's own choice."""
        return self.index.shape[1]

    def csr(self) -> Pairs:
        """What the experts compute, as pairs: ``pairs`` where set, else the kept choices."""
        if self.pairs is not None:
            return self.pairs
        return Pairs.from_dense(self.index, self.weights, self.num_experts, self.kept)

    def real(self) -> Tensor:
        """``(T,)`` bool, True at real tokens."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.num_tokens, dtype=torch.bool, device=self.logits.device)

    def replace(self, **changes: object) -> RoutingInfo:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> RoutingInfo:
        """The same decision on another device."""

        def moved(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        return RoutingInfo(
            self.logits.to(device),
            self.probs.to(device),
            self.index.to(device),
            self.weights.to(device),
            moved(self.mask),
            self.layer,
            moved(self.kept),
            None if self.pairs is None else self.pairs.to(device),
            self.sequences,
        )

    def detach(self) -> RoutingInfo:
        """The same decision without gradients."""
        return self.replace(
            logits=self.logits.detach(),
            probs=self.probs.detach(),
            weights=self.weights.detach(),
            pairs=None if self.pairs is None else self.pairs.detach(),
        )
