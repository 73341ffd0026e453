"""Which entries are kept, from the scores: protected, best by score, drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from labkit.kv.budget import round_half_up
from labkit.kv.nacl.split import Split
from labkit.kv.state import BY_LUCK, BY_SCORE, RECENT, SINK

SAMPLINGS = ("probability", "uniform")


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Standard Gumbel noise in float32, drawn on the generator's device."""
    source = generator.device if generator is not None else device
    # -log of an exponential variate; the smallest float keeps a drawn 0 finite.
    noise = torch.empty(shape, dtype=torch.float32, device=source).exponential_(generator=generator)
    return -noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(device)


def _first(values: Tensor, count: int) -> Tensor:
    """Mark the ``count`` largest of the last axis, the lower index first among equals."""
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter_(-1, order, True)


def nacl_reasons(
    scores: Tensor,
    split: Split,
    *,
    random_temperature: float = 1.0,
    sampling: str = "probability",
    shared_heads: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Decide what is kept, and why: the selection of NACL as a map of reasons.

    Parameters are those of :func:`nacl_select`, with the budget divided beforehand. Where candidates are fewer
    than asked for, all are kept.

    Returns
    -------
    Tensor
        ``(B, K, n)`` int8: 0 evicted, 1 sink, 2 recent, 3 by score, 4 by chance. The sinks win where they meet
        the recent ones.
    """
    batch, heads, n = scores.shape
    scores = scores.float()
    if shared_heads:
        scores = scores.mean(1, keepdim=True)
    places = torch.arange(n, device=scores.device)
    candidate = (places >= split.sink) & (places < n - split.recent)
    chosen = _first(scores.masked_fill(~candidate, -math.inf), split.by_score) & candidate
    reason = torch.where(places < split.sink, SINK, torch.where(places >= n - split.recent, RECENT, 0))
    reason = reason.to(torch.int8).expand(scores.shape).masked_fill(chosen, BY_SCORE)
    if split.by_random:
        noise = gumbel_noise(tuple(scores.shape), generator, scores.device)
        weight = torch.zeros_like(scores) if sampling == "uniform" else scores / random_temperature
        rest = candidate & ~chosen
        lucky = _first((weight + noise).masked_fill(~rest, -math.inf), split.by_random) & rest
        reason = reason.masked_fill(lucky, BY_LUCK)
    return reason.expand(batch, heads, n)


def nacl_select(
    scores: Tensor,
    budget: int,
    *,
    sink: int = 4,
    recent: int = 1,
    random_share: float = 0.6,
    by_random: int | None = None,
    random_temperature: float = 1.0,
    sampling: str = "probability",
    shared_heads: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the entries to keep: sinks, recent, the best by score, and a random draw from the rest.

    Parameters
    ----------
    scores : Tensor
        F, ``(B, K, n)``, finite.
    budget : int
        Entries to keep per KV head. All, where n is not larger.
    sink, recent : int
        Kept for sure at the beginning and at the end.
    random_share : float, default 0.6
        Share of the rest of the budget that is drawn, in [0, 1].
    by_random : int, optional
        The number drawn, instead of a share.
    random_temperature : float, default 1.0
        τ of the weights softmax(F/τ) of the draw; they change with what is left.
    sampling : {"probability", "uniform"}, default "probability"
        ``"uniform"`` draws with equal weights.
    shared_heads : bool, default False
        One set for all heads, from the scores averaged over heads.
    generator : torch.Generator, optional
        Source of the draw, on any device; torch's own by default.

    Returns
    -------
    Tensor
        Positions, int64, ``(B, K, min(budget, n))``, ascending. Among equal scores the lower index is kept.

    Raises
    ------
    ValueError
        For arguments outside their range, or a budget below ``sink + recent``.

    Examples
    --------
    >>> scores = torch.tensor([[[0.0, 0.1, 0.9, 0.2, 0.8, 0.0, 0.0, 0.0]]])
    >>> nacl_select(scores, budget=4, sink=1, recent=1, random_share=0.0)
    tensor([[[0, 2, 4, 7]]])
    """
    if scores.ndim != 3 or not scores.is_floating_point():
        raise ValueError(
            f"scores must be floating, (B, K, n); got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    check_draw(random_share, random_temperature, sampling)
    if sink < 0 or recent < 0:
        raise ValueError(f"sink and recent must not be negative; got sink={sink} and recent={recent}")
    n = scores.shape[-1]
    if budget >= n:
        return torch.arange(n, device=scores.device).expand(*scores.shape).contiguous()
    middle = budget - sink - recent
    if middle < 0:
        raise ValueError(
            f"budget must be at least sink + recent; got budget={budget}, sink={sink}, recent={recent}"
        )
    drawn = round_half_up(random_share * middle) if by_random is None else by_random
    if not 0 <= drawn <= middle:
        raise ValueError(f"by_random must lie in 0..{middle} (budget - sink - recent); got {by_random}")
    reason = nacl_reasons(
        scores,
        Split(sink, recent, middle - drawn, drawn),
        random_temperature=random_temperature,
        sampling=sampling,
        shared_heads=shared_heads,
        generator=generator,
    )
    return (reason > 0).nonzero()[:, -1].view(*scores.shape[:2], budget)


def nacl_priorities(
    scores: Tensor,
    split: Split,
    *,
    random_temperature: float = 1.0,
    sampling: str = "probability",
    shared_heads: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scores whose plain top-K *is* NACL's selection, for frameworks that can only take the top K.

    Protected entries get 3e4, the best by score 2e4, all others F/τ plus Gumbel noise.

    Parameters
    ----------
    scores : Tensor
        F, ``(B, K, n)``.
    split : Split
        The budget; ``split.budget`` is the K whose top is meant.
    random_temperature, sampling, shared_heads, generator
        As in :func:`nacl_select`.

    Returns
    -------
    Tensor
        float32, ``(B, K, n)``; a lower precision could not tell the noise apart.

    Examples
    --------
    >>> nacl_priorities(torch.zeros(1, 1, 4), Split(1, 1, 1, 0))[0, 0, [0, 1, 3]]
    tensor([30000., 20000., 30000.])
    """
    reason = nacl_reasons(scores, Split(split.sink, split.recent, split.by_score, 0))
    averaged = scores.float().mean(1, keepdim=True) if shared_heads else scores.float()
    if shared_heads:
        reason = nacl_reasons(averaged, Split(split.sink, split.recent, split.by_score, 0))
    weight = torch.zeros_like(averaged) if sampling == "uniform" else averaged / random_temperature
    if split.by_random:
        weight = weight + gumbel_noise(tuple(averaged.shape), generator, averaged.device)
    protected = (reason == SINK) | (reason == RECENT)
    weight = weight.masked_fill(reason == BY_SCORE, 2e4).masked_fill(protected, 3e4)
    return weight.expand(scores.shape)


def check_draw(random_share: float, random_temperature: float, sampling: str) -> None:
    if not 0 <= random_share <= 1:
        raise ValueError(f"random_share must lie in [0, 1]; got {random_share!r}")
    if not random_temperature > 0:
        raise ValueError(f"random_temperature must be positive; got {random_temperature!r}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling must be one of {', '.join(SAMPLINGS)}; got {sampling!r}")
