r"""Segments: which tokens of a response belong together, as ids ``(B, T)``.

Token t of row b is in segment ``segments[b, t]``; ids count from 0 in order, and padding has -1. A macro action of
MA-RLHF is a segment; token PPO is the case where every token has one of its own.

Weights :math:`\sigma` of a segment :math:`\omega` of n tokens, i = 0 being its first:

=============  ==============================================================
``"equal"``    :math:`\sigma_i = 1/n`; also ``"mean"``
``"unit"``     1 for the last token, 0 for the others; also ``"last"``
``"position"`` :math:`\sigma_i \propto 1/(i+1)`; also ``"harmonic"``
=============  ==============================================================
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["sum", "mean", "equal", "unit", "last", "position", "harmonic"]
_HOW = ("sum", "equal", "unit", "position")
ALIASES = {"mean": "equal", "last": "unit", "harmonic": "position"}


def check_segments(segments: Tensor, mask: Tensor | None = None, *, allow_empty: bool = False) -> None:
    """Raise unless ids count from 0 without a gap, and -1 stands on padding and only there.

    Parameters
    ----------
    segments : Tensor
        ``(B, T)`` integer ids.
    mask : Tensor, optional
        ``(B, T)``, true on real tokens. By default what has an id is real, and must come first.
    allow_empty : bool
        Whether ids may skip: an empty segment, as in the official MA-RLHF code.

    Raises
    ------
    ValueError, TypeError
        With row and position of the first offence.

    Examples
    --------
    >>> check_segments(torch.tensor([[0, 0, 2, -1]]))
    Traceback (most recent call last):
        ...
    ValueError: segment ids of row 0 skip from 0 to 2 at position 2: number segments 0, 1, 2, ... without a gap
    """
    if segments.ndim != 2:
        raise ValueError(f"segments must be (B, T), got {tuple(segments.shape)}")
    if segments.is_floating_point() or segments.dtype == torch.bool:
        raise TypeError(f"segments must hold whole numbers, got {segments.dtype}")
    real = segments >= 0 if mask is None else mask.bool()
    if real.shape != segments.shape:
        raise ValueError(f"mask must be {tuple(segments.shape)} as the segments, got {tuple(real.shape)}")
    covered = (segments >= 0) != real
    if covered.any():
        row, place = (int(i) for i in covered.nonzero()[0])
        what = "covers padding" if segments[row, place] >= 0 else "is -1 on a real token"
        raise ValueError(f"the segment id {what} in row {row} at position {place}: give -1 to padding alone")
    gaps = ~real[:, :-1] & real[:, 1:]
    if gaps.any():
        row, place = (int(i) for i in gaps.nonzero()[0])
        raise ValueError(
            f"row {row} has padding before the real token at position {place + 1}: pad on the right"
        )
    before = torch.cat([torch.full_like(segments[:, :1], -1), segments[:, :-1]], 1)
    step = segments - before
    wrong = real & ((step < 0) | (step > 1) if not allow_empty else step < 0)
    if wrong.any():
        row, place = (int(i) for i in wrong.nonzero()[0])
        old, new = int(before[row, place]), int(segments[row, place])
        start = "start at" if place == 0 else ("decrease" if new < old else "skip") + f" from {old} to"
        raise ValueError(
            f"segment ids of row {row} {start} {new} at position {place}: number segments 0, 1, 2, ... without a gap"
        )


def token_segments(mask: Tensor) -> Tensor:
    """Every real token in a segment of its own.

    Examples
    --------
    >>> token_segments(torch.tensor([[True, True, False]])).tolist()
    [[0, 1, -1]]
    """
    place = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    return torch.where(mask.bool(), place, -1)


def from_starts(starts: Tensor, mask: Tensor) -> Tensor:
    """Ids from flags that say which tokens start a segment; the first real token always does.

    Examples
    --------
    >>> from_starts(torch.tensor([[False, False, True, True]]), torch.tensor([[True, True, True, False]])).tolist()
    [[0, 0, 1, -1]]
    """
    starts = starts.bool().clone()
    starts[:, :1] = True
    return torch.where(mask.bool(), starts.long().cumsum(1) - 1, -1)


def segment_weights(segments: Tensor, how: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weight of each token in its segment, as ``(B, T)`` of a floating dtype; 0 on padding.

    Raises
    ------
    ValueError
        For an unknown rule.

    Examples
    --------
    >>> segment_weights(torch.tensor([[0, 0, 1, -1]]), "position").tolist()
    [[0.666..., 0.333..., 1.0, 0.0]]
    """
    how = ALIASES.get(how, how)
    if how not in _HOW:
        raise ValueError(f"the rule must be one of {', '.join(map(repr, _HOW))}, got {how!r}")
    real = segments >= 0
    if how == "sum":
        return real.to(dtype)
    end = torch.full_like(segments[:, :1], -1)
    if how == "unit":
        return (real & (segments != torch.cat([segments[:, 1:], end], 1))).to(dtype)
    weights = real.to(dtype)
    if how == "position":
        place = torch.arange(segments.shape[1], device=segments.device).expand(segments.shape)
        starts = torch.where(segments != torch.cat([end, segments[:, :-1]], 1), place, 0).cummax(1).values
        weights = weights / (place - starts + 1)
    return weights / broadcast_segments(_scatter(weights, segments), segments).masked_fill(~real, 1)


def segment_reduce(x: Tensor, segments: Tensor, how: str = "sum") -> Tensor:
    """One number a segment.

    Parameters
    ----------
    x : Tensor
        ``(B, T)``.
    segments : Tensor
        ``(B, T)`` ids, -1 on padding.
    how : {"sum", "equal", "unit", "position"}
        Or another name of the last three: ``"mean"``, ``"last"``, ``"harmonic"``.

    Returns
    -------
    Tensor
        ``(B, K)`` with K the largest number of segments; 0 where a row has fewer. Differentiable.

    Examples
    --------
    >>> segment_reduce(torch.tensor([[1.0, 3.0, 5.0, 9.0]]), torch.tensor([[0, 0, 1, -1]]), "mean").tolist()
    [[2.0, 5.0]]
    """
    if x.shape != segments.shape:
        raise ValueError(f"x must be {tuple(segments.shape)} as the segments, got {tuple(x.shape)}")
    return _scatter(
        torch.where(segments >= 0, x, 0)
        * segment_weights(segments, how, torch.promote_types(x.dtype, torch.float32)),
        segments,
    )


def _scatter(x: Tensor, segments: Tensor) -> Tensor:
    groups = int(segments.max()) + 1 if segments.numel() else 0
    out = x.new_zeros(len(x), groups + 1)  # the last column takes the padding
    return out.scatter_add(1, torch.where(segments >= 0, segments, groups), x)[:, :groups]


def broadcast_segments(y: Tensor, segments: Tensor) -> Tensor:
    """Give each token its segment's number; 0 on padding.

    Parameters
    ----------
    y : Tensor
        ``(B, K)``.
    segments : Tensor
        ``(B, T)``.

    Returns
    -------
    Tensor
        ``(B, T)``.

    Examples
    --------
    >>> broadcast_segments(torch.tensor([[2.0, 5.0]]), torch.tensor([[0, 0, 1, -1]])).tolist()
    [[2.0, 2.0, 5.0, 0.0]]
    """
    if not y.shape[1]:
        return y.new_zeros(segments.shape)
    return y.gather(1, segments.clamp(min=0)).masked_fill(segments < 0, 0)


def count_segments(segments: Tensor) -> Tensor:
    """Segments of each row that have a token, ``(B,)``.

    Examples
    --------
    >>> count_segments(torch.tensor([[0, 0, 2], [-1, -1, -1]])).tolist()
    [2, 0]
    """
    before = torch.cat([torch.full_like(segments[:, :1], -1), segments[:, :-1]], 1)
    return ((segments >= 0) & (segments != before)).sum(1)


def boundaries(segments: Tensor, start: int = 0) -> list[list[int]]:
    """Where each segment of each row starts; an empty segment starts where the next one does.

    Parameters
    ----------
    segments : Tensor
        ``(B, T)`` ids.
    start : int
        Added to each position, such as the prompt's length minus 1.

    Examples
    --------
    >>> boundaries(torch.tensor([[0, 0, 1, 3]]), start=5)
    [[5, 7, 8, 8]]
    """
    found = []
    for row in segments.tolist():
        starts: list[int] = []
        for place, segment in enumerate(row):
            starts += [start + place] * (segment + 1 - len(starts))
        found.append(starts)
    return found
