"""The arithmetic of BeamLoRA as pure functions: scores, threshold, how many ranks fall, and what takes their place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

Scope = Literal["global", "module"]


def beam_scores(gate: torch.Tensor, temperature: float = 0.05) -> torch.Tensor:
    """Importance s = r softmax(g / tau) of a module's ranks.

    Parameters
    ----------
    gate : (r,) tensor
    temperature : float
        tau.

    Returns
    -------
    (r,) tensor
        Sums to r; all 1 for an untrained gate.

    Examples
    --------
    >>> beam_scores(torch.tensor([0.0, 0.05]), temperature=0.05)
    tensor([0.5379, 1.4621])
    """
    return gate.numel() * torch.softmax(gate / temperature, 0)


def beam_threshold(step: int, p0: float = 0.95, end: int = 100) -> float:
    """Share p of the scores' sum that survives an event: from p0 up to 1, along half a cosine.

    Parameters
    ----------
    step : int
        k, finished steps minus one.
    p0 : float
        Share at the start, within (0, 1].
    end : int
        T_end, from where on nothing is pruned.

    Returns
    -------
    float

    Examples
    --------
    >>> [round(beam_threshold(k, 0.9, 100), 3) for k in (0, 50, 100, 101)]
    [0.9, 0.95, 1.0, 1.0]
    """
    if step >= end:
        return 1.0
    return 1 - (1 - p0) * (1 + math.cos(math.pi * step / end)) / 2


def prune_counts(
    scores: Sequence[torch.Tensor], p: float, scope: Scope = "global", cap: float | None = 0.5
) -> list[int]:
    """How many ranks each module loses, by a top-p rule over the scores.

    Sorted downwards and summed, the first score at which the sum exceeds a share p of the whole, and all after it, are
    pruned.

    Parameters
    ----------
    scores : sequence of (r,) tensors
        s of each module.
    p : float
        See `beam_threshold`; at 1 nothing is pruned.
    scope : {"global", "module"}
        One sum over all modules, so that those with unequal ranks lose many and the others none, or a sum for each.
    cap : float, optional
        Largest share of a module's ranks that may fall, rounded down; None for no limit.

    Returns
    -------
    list of int
        K of each module.

    Examples
    --------
    >>> peaked, flat = torch.tensor([3.7, 0.1, 0.1, 0.1]), torch.ones(4)
    >>> prune_counts([peaked, flat], p=0.97), prune_counts([peaked, flat], p=0.97, cap=None)
    ([2, 0], [3, 0])
    """
    if p >= 1:
        return [0] * len(scores)
    groups = [list(range(len(scores)))] if scope == "global" else [[i] for i in range(len(scores))]
    counts = [0] * len(scores)
    for group in groups:
        owner = torch.cat([torch.full((scores[i].numel(),), i) for i in group])
        ordered, order = torch.cat([scores[i].detach().cpu() for i in group]).sort(
            descending=True, stable=True
        )
        # the sum of all scores is known: r a module
        fallen = owner[order][ordered.cumsum(0) > p * len(owner)]
        for i in group:
            counts[i] = int((fallen == i).sum())
    if cap is not None:
        counts = [min(k, int(cap * s.numel())) for k, s in zip(counts, scores, strict=True)]
    return counts


def pruned_and_top(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest and the highest ranks of a module.

    Parameters
    ----------
    scores : (r,) tensor
    count : int
        K.

    Returns
    -------
    pruned, top : (K,) int64 tensors
        The K lowest by increasing index, and the K highest, best first. Of equal scores the lower index counts more.

    Examples
    --------
    >>> pruned_and_top(torch.tensor([0.1, 2.0, 0.4, 1.5]), 2)
    (tensor([0, 2]), tensor([1, 3]))
    """
    order = scores.detach().cpu().sort(descending=True, stable=True).indices
    return order[len(order) - count :].sort().values, order[:count]


def expand(
    a: torch.Tensor,
    b: torch.Tensor,
    gate: torch.Tensor,
    cached_a: torch.Tensor,
    cached_b: torch.Tensor,
    pruned: torch.Tensor,
    top: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give pruned slots to remembered values of other ranks, and share the gates between both.

    Parameters
    ----------
    a, b, gate : (r, D_in), (D_out, r) and (r,) tensors
        Current values.
    cached_a, cached_b : (r, D_in) and (D_out, r) tensors
        Values to copy from; the current ones give exact copies.
    pruned, top : (K,) int64 tensors
        Slot ``pruned[i]`` is filled from rank ``top[i]``.

    Returns
    -------
    a, b, gate
        New tensors. Of the gates each pair gets its mean.

    Examples
    --------
    >>> a, b, g = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 1.0])
    >>> expand(a, b, g, 10 * a, 10 * b, torch.tensor([0]), torch.tensor([1]))
    (tensor([[20.], [ 2.]]), tensor([[40.,  4.]]), tensor([0.5000, 0.5000]))
    """
    pruned, top = pruned.to(a.device), top.to(a.device)
    new_a, new_b, new_gate = a.clone(), b.clone(), gate.clone()
    new_a[pruned] = cached_a[top]
    new_b[:, pruned] = cached_b[:, top]
    mean = (gate[pruned] + gate[top]) / 2
    new_gate[pruned] = mean
    new_gate[top] = mean
    return new_a, new_b, new_gate
