r"""Credit: generalised advantage estimation over tokens and over macro actions, and whitening.

For actions :math:`\tau = 1..K` with rewards R and values V (0 after the end),

.. math:: \delta_\tau = R_\tau + \gamma V_{\tau+1} - V_\tau, \qquad
          A_\tau = \delta_\tau + \gamma\lambda A_{\tau+1}, \qquad G_\tau = A_\tau + V_\tau.

In token PPO an action is a token. In MA-RLHF it is a segment of tokens with
:math:`V_\tau = \sum_{t \in \omega_\tau} \sigma_t v_t`, and :math:`R_\tau = \sum_{t \in \omega_\tau} r_t`
(``macro_reward="sum"``); every token of a segment gets the segment's advantage and return. One discount applies per
action, not per token.

The authors' code averages rewards with the same weights as values (``macro_reward="mean"``). Both agree about the
score, because the last token has a segment of its own there, but the average makes the per-token KL penalty about n
times weaker for segments of n tokens. The code's empty segments are there with ``allow_empty=True``: they have value
and reward 0, and cost a factor :math:`\gamma\lambda`.

Every function here is pure and batched, and knows nothing of a trainer: a GRPO trainer can call them too. The sums are made
in `labkit.kernels.macro_gae`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from labkit.kernels import macro_gae as kernels
from labkit.rlhf.segments import ALIASES, check_segments


def check_mask(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as bool, when it fits and has no padding before a real token.

    Raises
    ------
    ValueError
        Otherwise, with the row.
    """
    if mask.shape != like.shape or like.ndim != 2:
        raise ValueError(
            f"mask and numbers must both be (B, T); got {tuple(mask.shape)}, {tuple(like.shape)}"
        )
    mask = mask.bool()
    gaps = (~mask[:, :-1] & mask[:, 1:]).any(1)
    if gaps.any():
        raise ValueError(
            f"row {int(gaps.nonzero()[0])} has padding before a real token: responses are padded on the right"
        )
    return mask


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens.

    Parameters
    ----------
    rewards, values : Tensor
        ``(B, T)``; the value is that of the state before the token.
    mask : Tensor
        ``(B, T)``, true on real tokens, which come first.
    gamma, lam : float

    Returns
    -------
    advantages, returns : Tensor
        ``(B, T)``, 0 on padding.

    Raises
    ------
    ValueError
        When shapes differ or a row has padding before a real token.

    Examples
    --------
    >>> reward, value = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3)
    >>> gae(reward, value, torch.ones(1, 3), lam=0.5)[0].tolist()
    [[0.25, 0.5, 1.0]]
    """
    mask = check_mask(mask, rewards)
    if values.shape != rewards.shape:
        raise ValueError(f"values must be {tuple(rewards.shape)} as the rewards, got {tuple(values.shape)}")
    return kernels.macro_gae(rewards, values, None, mask, gamma=gamma, lam=lam)


@torch.no_grad()
def macro_gae(
    rewards: Tensor,
    values: Tensor,
    segments: Tensor,
    mask: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_pooling: str = "equal",
    macro_reward: str = "sum",
    allow_empty: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of macro actions, given to each of their tokens.

    Parameters
    ----------
    rewards, values : Tensor
        ``(B, T)`` of tokens.
    segments : Tensor
        ``(B, T)`` ids, -1 on padding, see `labkit.rlhf.segments`.
    mask : Tensor, optional
        ``(B, T)``; by default what has an id.
    gamma, lam : float
        Per macro action.
    value_pooling : {"equal", "unit", "position"}
        Weights of the tokens' values; also by the names ``"mean"``, ``"last"``, ``"harmonic"``.
    macro_reward : {"sum", "mean"}
        Sum of the tokens' rewards, or their average with the values' weights.
    allow_empty : bool
        Take a skipped id for a segment without tokens, value and reward, as the official code has them.

    Returns
    -------
    advantages, returns : Tensor
        ``(B, T)``, 0 on padding.

    Raises
    ------
    ValueError
        For segments that do not fit the mask, or an unknown rule.

    Examples
    --------
    >>> reward, value = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1, 4)
    >>> macro_gae(reward, value, torch.tensor([[0, 0, 1, 1]]), lam=0.5)[0].tolist()
    [[0.5, 0.5, 1.0, 1.0]]
    """
    value_pooling = ALIASES.get(value_pooling, value_pooling)
    if value_pooling not in ("equal", "unit", "position"):
        raise ValueError(f"value_pooling must be 'equal', 'unit' or 'position', got {value_pooling!r}")
    if macro_reward not in ("sum", "mean"):
        raise ValueError(f"macro_reward must be 'sum' or 'mean', got {macro_reward!r}")
    check_segments(segments, mask, allow_empty=allow_empty)
    return kernels.macro_gae(
        rewards,
        values,
        segments,
        segments >= 0,
        gamma=gamma,
        lam=lam,
        value_pooling=value_pooling,
        macro_reward=macro_reward,
        allow_empty=allow_empty,
        check=False,
    )


def masked_mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over real tokens; 0 when there is none.

    Examples
    --------
    >>> float(masked_mean(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False])))
    2.0
    """
    if mask is None:
        return x.mean()
    return torch.where(mask.bool(), x, 0).sum() / mask.sum().clamp(min=1)


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    *,
    reduce: Callable[[Tensor], Tensor] | None = None,
    eps: float = 1e-8,
) -> Tensor:
    """Scale to variance 1 over the real tokens, and shift to mean 0.

    Parameters
    ----------
    x : Tensor
        Any shape.
    mask : Tensor, optional
        Same shape; True counts. The rest of the result is 0.
    shift_mean : bool
        False scales about the mean and leaves it.
    reduce : callable, optional
        Sums a tensor over all processes, such as ``RolloutBatch.reduce``, so that statistics are those of all rows.
    eps : float
        Added to the (biased) variance: a constant becomes 0.

    Examples
    --------
    >>> whiten(torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])).tolist()
    [-1.0, 1.0, 0.0]
    """
    kept = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.bool()
    total = reduce or (lambda sums: sums)
    first = total(torch.stack([torch.where(kept, x, 0).sum(), kept.sum().to(x.dtype)]))
    count = first[1].clamp(min=1)
    mean = first[0] / count
    centred = torch.where(kept, x - mean, 0)
    variance = total(centred.square().sum()) / count
    scaled = centred * torch.rsqrt(variance + eps)
    return scaled if shift_mean else torch.where(kept, scaled + mean, 0)
