"""Experts with a limited number of places."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Places of each expert: ``ceil(factor * k * T / E)``.

    Raises
    ------
    ValueError
        If ``factor`` is not positive.

    Examples
    --------
    >>> expert_capacity(tokens=100, num_experts=8, top_k=2, factor=1.0)
    25
    """
    if factor <= 0:
        raise ValueError(f"the capacity factor must be positive; got {factor}")
    return math.ceil(factor * top_k * tokens / num_experts)


def within_capacity(
    index: Tensor,
    num_experts: int,
    capacity: int,
    *,
    sequences: int = 1,
    order: str = "token",
    mask: Tensor | None = None,
) -> Tensor:
    """Which choices find a place, first come first served.

    Parameters
    ----------
    index : Tensor
        Choices ``(T, k)``, the tokens of ``sequences`` sequences of equal length one after the other.
    num_experts, capacity : int
        E, and the places of each expert in each sequence.
    sequences : int, default 1
        Sequences that each have places of their own (Switch); 1 shares them over the whole batch.
    order : {"token", "slot"}, default "token"
        Who comes first: the earlier token with all its choices, or all first choices before any second choice (GShard).
    mask : Tensor, optional
        ``(T,)`` bool; a padded token (False) takes no place, and has none.

    Returns
    -------
    Tensor
        ``(T, k)`` bool.

    Raises
    ------
    ValueError
        For a negative capacity, an unknown order, or T that is no multiple of ``sequences``.

    Examples
    --------
    >>> import torch
    >>> within_capacity(torch.tensor([[0], [1], [0], [0]]), num_experts=2, capacity=2).squeeze(1).tolist()
    [True, True, True, False]
    """
    tokens, k = index.shape
    if capacity < 0:
        raise ValueError(f"capacity must not be negative; got {capacity}")
    if order not in ("token", "slot"):
        raise ValueError(f"order must be 'token' or 'slot'; got {order!r}")
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"{tokens} tokens are no {sequences} sequences of equal length")
    sequence = torch.arange(tokens, device=index.device) // max(1, tokens // sequences)
    queue = sequence[:, None] * (num_experts + 1) + index
    if mask is not None:  # padding queues at an expert that does not exist
        queue = torch.where(mask[:, None], queue, sequence[:, None] * (num_experts + 1) + num_experts)
    flat = (queue.t() if order == "slot" else queue).reshape(-1)
    ordered, places = torch.sort(flat, stable=True)
    begins = torch.searchsorted(ordered, ordered)  # left: the first entry of the same queue
    rank = torch.empty_like(flat)
    rank[places] = torch.arange(len(flat), device=flat.device) - begins
    kept = rank < capacity
    kept = kept.view(k, tokens).t() if order == "slot" else kept.view(tokens, k)
    return kept.contiguous() if mask is None else kept & mask[:, None]
