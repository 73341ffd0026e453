r"""PPO's clipped losses, per token or per macro action.

With the ratio :math:`\rho_t = \pi(y_t)/\pi_{old}(y_t)` and advantages A,

.. math:: L_\pi = \mathrm{mean}\,\max\big(-A\rho,\; -A\,\mathrm{clip}(\rho, 1-\epsilon, 1+\epsilon)\big), \qquad
          L_V = \tfrac12\,\mathrm{mean}\,\max\big((v-G)^2,\; (\mathrm{clip}(v, v_{old} \pm \epsilon_v)-G)^2\big).

``ratio="token"`` has one term a token (the official MA-RLHF code: a group of n tokens counts n times);
``ratio="joint"`` takes the product of the ratios in a macro action (the paper's equation) and has one term a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from labkit.rlhf.advantages import masked_mean
from labkit.rlhf.segments import segment_reduce


class Terms(NamedTuple):
    """Terms of a loss before their mean.

    Attributes
    ----------
    loss : Tensor
        ``(B, X)`` with X tokens or macro actions; 0 where `kept` is False.
    kept : Tensor
        ``(B, X)`` bool: which terms count.
    clipped : Tensor
        ``(B, X)`` bool: where clipping decides, so that no gradient flows.
    ratio : Tensor
        ``(B, X)`` detached ratios (of the policy; for values the clipped value).
    """

    loss: Tensor
    kept: Tensor
    clipped: Tensor
    ratio: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean over what counts."""
        return masked_mean(self.loss, self.kept)


def policy_terms(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    *,
    ratio: str = "token",
    segments: Tensor | None = None,
) -> Terms:
    """Terms of the clipped policy loss; see `policy_loss`."""
    if ratio not in ("token", "joint"):
        raise ValueError(f"ratio must be 'token' or 'joint', got {ratio!r}")
    mask = mask.bool()
    logratio = torch.where(mask, logprobs - old, 0)
    if ratio == "joint":
        if segments is None:
            raise ValueError("ratio='joint' needs segments, the macro actions' ids")
        logratio = segment_reduce(logratio, segments, "sum")
        advantages = segment_reduce(advantages, segments, "unit")
        mask = segment_reduce(mask.to(logratio.dtype), segments, "sum") > 0
    rho = logratio.exp()
    free, bound = -advantages * rho, -advantages * rho.clamp(1 - clip, 1 + clip)
    loss = torch.where(mask, torch.maximum(free, bound), 0)
    return Terms(loss, mask, mask & (bound > free), rho.detach())


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    *,
    ratio: str = "token",
    segments: Tensor | None = None,
) -> Tensor:
    """Clipped policy loss.

    Parameters
    ----------
    logprobs, old : Tensor
        ``(B, T)`` log-probabilities of the sampled tokens under the present and the sampling policy.
    advantages : Tensor
        ``(B, T)``; with ``ratio="joint"`` that of a macro action is its last token's.
    mask : Tensor
        ``(B, T)``, true on real tokens.
    clip : float
        epsilon.
    ratio : {"token", "joint"}
    segments : Tensor, optional
        ``(B, T)`` ids, for ``ratio="joint"``.

    Returns
    -------
    Tensor
        Scalar: the mean over tokens, or over macro actions.

    Raises
    ------
    ValueError
        For an unknown ratio, ``"joint"`` without segments, or a `clip` that is not positive.

    Examples
    --------
    >>> new, old = torch.tensor([[0.5, 0.0]]), torch.zeros(1, 2)
    >>> float(policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2), clip=0.2))  # mean of -1.2 (clipped) and -1
    -1.1...
    """
    _check_clip(clip)
    return policy_terms(logprobs, old, advantages, mask, clip, ratio=ratio, segments=segments).mean


def value_terms(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> Terms:
    """Terms of the clipped value loss; see `value_loss`."""
    mask = mask.bool()
    free = (values - returns).square()
    near = values if clip is None else torch.minimum(torch.maximum(values, old - clip), old + clip)
    bound = (near - returns).square()
    loss = torch.where(mask, 0.5 * torch.maximum(free, bound), 0)
    return Terms(loss, mask, mask & (bound > free), near.detach())


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> Tensor:
    """Clipped value loss: every token's value is regressed on the return of its action.

    Parameters
    ----------
    values, old, returns : Tensor
        ``(B, T)``.
    mask : Tensor
        ``(B, T)``, true on real tokens.
    clip : float, optional
        How far a value may move from its old one before the gradient stops.

    Returns
    -------
    Tensor
        Scalar, with the factor 1/2.

    Raises
    ------
    ValueError
        For a `clip` that is not positive.

    Examples
    --------
    >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    >>> float(value_loss(one, zero, one, one, clip=0.2)), float(value_loss(one, zero, one, one, clip=None))
    (0.32..., 0.0)
    """
    if clip is not None:
        _check_clip(clip)
    return value_terms(values, old, returns, mask, clip).mean


def _check_clip(clip: float) -> None:
    if not clip > 0:
        raise ValueError(f"clip must be positive, for example 0.2, got {clip}")
