"""Proxy tokens, and how they score the keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.kv._kernels import proxy_column_sums
from labkit.kv.budget import round_half_up

HEAD_REDUCTIONS = ("mean", "head_index", "none")


@dataclass(frozen=True)
class TruncatedShare:
    """Proxies as the authors count them: the last ``int(share * n)`` tokens, at least one."""

    share: float


Proxies = int | float | TruncatedShare | Tensor | Callable[[Tensor], Tensor]


def resolve_proxies(proxies: Proxies, n: int, input_ids: Tensor | None = None) -> Tensor:
    """Positions of the proxy tokens in a prompt of n tokens.

    Parameters
    ----------
    proxies : int, float, Tensor or callable
        An int: the last so many (all, where the prompt is shorter). A float in (0, 1]: the last share of n, at
        least one. A tensor of integers, ``(P,)`` or ``(B, P)``: these positions. A callable: is given
        ``input_ids`` ``(B, n)`` and returns such a tensor.
    n : int
        Length of the prompt.
    input_ids : Tensor, optional
        Needed by a callable.

    Returns
    -------
    Tensor
        int64, ``(P,)`` or ``(B, P)``.

    Raises
    ------
    ValueError
        If there are none, or one lies outside the prompt.
    TypeError
        For anything else.

    Examples
    --------
    >>> resolve_proxies(3, 10), resolve_proxies(0.25, 8)
    (tensor([7, 8, 9]), tensor([6, 7]))
    """
    if isinstance(proxies, bool):
        raise TypeError(
            f"proxies must be an int, a float, a tensor of positions or a callable; got {proxies!r}"
        )
    if isinstance(proxies, int):
        if proxies < 1:
            raise ValueError(f"proxies are empty: the last {proxies} tokens; give at least 1")
        return torch.arange(max(0, n - proxies), n)
    if isinstance(proxies, float):
        if not 0 < proxies <= 1:
            raise ValueError(f"proxies as a share of the prompt must lie in (0, 1]; got {proxies}")
        return torch.arange(n - max(1, round_half_up(proxies * n)), n)
    if isinstance(proxies, TruncatedShare):
        return torch.arange(n - max(1, int(proxies.share * n)), n)
    if callable(proxies) and not isinstance(proxies, Tensor):
        if input_ids is None:
            raise ValueError("proxies given as a callable need input_ids, and the model was called without")
        proxies = proxies(input_ids)
    if not isinstance(proxies, Tensor):
        raise TypeError(
            f"proxies must be an int, a float, a tensor of positions or a callable that returns one; got {proxies!r}"
        )
    if proxies.is_floating_point() or proxies.is_complex() or proxies.dtype == torch.bool:
        raise TypeError(f"proxy positions must be integers; got {proxies.dtype} (for a mask, mask.nonzero())")
    if proxies.numel() == 0 or proxies.ndim not in (1, 2):
        raise ValueError(
            f"proxies must be (P,) or (B, P) with at least one position; got shape {tuple(proxies.shape)}"
        )
    low, high = (int(x) for x in proxies.aminmax())
    if low < 0 or high >= n:
        raise ValueError(
            f"proxy positions must lie in 0..{n - 1} for a prompt of {n} tokens; got {low if low < 0 else high}"
        )
    return proxies.long()


def proxy_scores(
    q: Tensor,
    k: Tensor,
    proxies: Proxies,
    causal: bool = True,
    *,
    head_reduction: str = "mean",
    scale: float | None = None,
    input_ids: Tensor | None = None,
) -> Tensor:
    r"""Score every key by the attention that the proxy tokens pay to it: F of the paper.

    .. math:: F_{hj} = \sum_{p \in P} \mathrm{softmax}_j(Q_{hp} \cdot K_{hj} / \sqrt d)

    A plain sum over the proxies. With all tokens as proxies it is the score of H2O, with the last one alone that
    of TOVA and MSRNN.

    Parameters
    ----------
    q : Tensor
        Queries after rotary embedding: of all tokens, ``(B, H, n, d)``, or of the proxies, ``(B, H, P, d)``.
    k : Tensor
        Keys after rotary embedding, ``(B, K, n, d)``; H is a multiple of K.
    proxies : int, float, Tensor or callable
        As in :func:`resolve_proxies`.
    causal : bool, default True
        Whether a proxy sees only keys up to its own position. False is the authors' code.
    head_reduction : {"mean", "head_index", "none"}, default "mean"
        ``"mean"``: a KV head gets the mean over its query heads. ``"head_index"``: KV head h gets the score of
        query head h, as in the authors' code. ``"none"``: one score for every query head.
    scale : float, optional
        Factor of the logits, ``d ** -0.5`` by default.
    input_ids : Tensor, optional
        Needed where ``proxies`` is a callable, ``(B, n)``.

    Returns
    -------
    Tensor
        float32 (float64 for float64 inputs), ``(B, K, n)``; ``(B, H, n)`` with ``"none"``. Sums to P in a head.

    Raises
    ------
    ValueError
        If the proxies are empty or outside the prompt, shapes do not fit, or for an unknown ``head_reduction``.

    Examples
    --------
    >>> q, k = torch.zeros(1, 2, 4, 8), torch.randn(1, 1, 4, 8)   # zero queries attend evenly
    >>> proxy_scores(q, k, proxies=2)
    tensor([[[0.5833, 0.5833, 0.5833, 0.2500]]])
    """
    if head_reduction not in HEAD_REDUCTIONS:
        raise ValueError(
            f"head_reduction must be one of {', '.join(HEAD_REDUCTIONS)}; got {head_reduction!r}"
        )
    positions = resolve_proxies(proxies, k.shape[2], input_ids).to(k.device)
    if q.shape[2] == k.shape[2]:
        index = positions.expand(q.shape[0], -1)[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
        q = q.gather(2, index)
    elif q.shape[2] != positions.shape[-1]:
        raise ValueError(
            f"q must hold the queries of all {k.shape[2]} tokens or of the {positions.shape[-1]} proxies; "
            f"got {q.shape[2]}"
        )
    return scores_of(q, k, positions, causal, head_reduction, scale)


def scores_of(
    q: Tensor, k: Tensor, positions: Tensor, causal: bool, head_reduction: str, scale: float | None
) -> Tensor:
    """Score with the queries of the proxies at hand, (B, H, P, d)."""
    how = "mean" if head_reduction == "mean" else "none"
    scores = proxy_column_sums(q, k, positions.to(k.device), causal=causal, scale=scale, head_reduction=how)
    return scores[:, : k.shape[1]] if head_reduction == "head_index" else scores
