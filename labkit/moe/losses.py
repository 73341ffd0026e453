"""Auxiliary losses of routers. Padding counts in none of them.

Each takes one :class:`~labkit.moe.RoutingInfo` or a sequence of them, one a layer, and a ``mask`` that replaces the masks
in the records (False at padding, of any shape with T entries).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from labkit.moe.routing import RoutingInfo

__all__ = ["importance_cv2", "load_balancing_loss", "load_cv2", "router_z_loss"]


def _layers(
    infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None
) -> list[tuple[RoutingInfo, Tensor | None]]:
    infos = [infos] if isinstance(infos, RoutingInfo) else list(infos)
    if not infos:
        raise ValueError("there is no routing record to take a loss of: the list is empty")
    if len({info.num_experts for info in infos}) > 1:
        raise ValueError(
            f"the records differ in their number of experts: {[info.num_experts for info in infos]}; "
            "take the loss of each group by itself"
        )
    found = []
    for info in infos:
        keep = info.mask
        if mask is not None:
            keep = mask.reshape(-1).to(info.logits.device).bool()
            if keep.shape[0] != info.num_tokens:
                raise ValueError(f"mask must have {info.num_tokens} entries; got {tuple(mask.shape)}")
        found.append((info, keep))
    return found


def _counts(info: RoutingInfo, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Choices of each expert, sum of probabilities of each expert, and tokens; over real tokens."""
    if keep is None:
        counts = torch.bincount(info.index.reshape(-1), minlength=info.num_experts).float()
        return counts, info.probs.sum(0), info.probs.new_tensor(float(info.num_tokens))
    weight = keep.to(info.probs.dtype)
    share = weight[:, None].expand_as(info.index).reshape(-1)
    counts = torch.zeros(info.num_experts, device=share.device).index_add_(0, info.index.reshape(-1), share)
    return counts, weight @ info.probs, weight.sum()


def load_balancing_loss(
    infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None = None, *, over: str = "all"
) -> Tensor:
    r"""Compute the load-balancing loss of Switch Transformer and Mixtral.

    .. math:: E \sum_e f_e P_e, \qquad f_e = \text{choices of } e \text{ per token}, \quad
              P_e = \text{mean probability of } e

    It is k at perfect balance and grows to k E when all tokens choose the same experts with certainty. The gradient flows
    through P only.

    Parameters
    ----------
    infos : RoutingInfo or sequence of RoutingInfo
        One record a layer.
    mask : Tensor, optional
        Replaces the records' masks.
    over : {"all", "layer"}, default "all"
        Means over the tokens of all layers together (Mixtral), or the mean over layers of each layer's own loss, which
        does not let one layer make up for another.

    Returns
    -------
    Tensor
        Scalar float32; 0 where there is no real token.

    Raises
    ------
    ValueError
        For no record, records of different E, a mask of another size, or an unknown ``over``.

    Examples
    --------
    >>> import torch
    >>> even = RoutingInfo.from_logits(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), top_k=1)
    >>> round(load_balancing_loss(even).item(), 4)
    1.0
    """
    if over not in ("all", "layer"):
        raise ValueError(f"over must be 'all' or 'layer'; got {over!r}")
    parts = [_counts(info, keep) for info, keep in _layers(infos, mask)]
    if over == "all":
        parts = [tuple(torch.stack(column).sum(0) for column in zip(*parts, strict=True))]  # type: ignore[list-item]
    losses = []
    for counts, probabilities, tokens in parts:
        tokens = tokens.clamp(min=1.0)
        losses.append(counts.shape[0] * ((counts / tokens) * (probabilities / tokens)).sum())
    return torch.stack(losses).mean()


def router_z_loss(infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None = None) -> Tensor:
    """Mean over tokens (and layers) of the squared logsumexp of the logits, which keeps logits small.

    Parameters
    ----------
    infos, mask
        As in :func:`load_balancing_loss`.

    Returns
    -------
    Tensor
        Scalar float32.

    Examples
    --------
    >>> import torch
    >>> info = RoutingInfo.from_logits(torch.zeros(3, 4), top_k=1)
    >>> bool(torch.isclose(router_z_loss(info), torch.tensor(4.0).log() ** 2))
    True
    """
    total: Tensor | float = 0.0
    tokens: Tensor | float = 0.0
    for info, keep in _layers(infos, mask):
        squares = torch.logsumexp(info.logits.float(), -1) ** 2
        weight = torch.ones_like(squares) if keep is None else keep.to(squares.dtype)
        total = total + (squares * weight).sum()
        tokens = tokens + weight.sum()
    return total / torch.as_tensor(tokens).clamp(min=1.0)


def _cv2(values: Tensor) -> Tensor:
    """Squared coefficient of variation, with the unbiased variance; 0 for a single expert."""
    if values.shape[0] == 1:
        return values.sum() * 0.0
    return values.var() / (values.mean() ** 2 + 1e-10)


def importance_cv2(infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the experts' importance: of the weights that each was given in all.

    Parameters
    ----------
    infos, mask
        As in :func:`load_balancing_loss`; the mean over layers is taken.

    Returns
    -------
    Tensor
        Scalar float32; ``variance / (mean^2 + 1e-10)`` over experts, 0 at balance.

    Examples
    --------
    >>> import torch
    >>> info = RoutingInfo.from_logits(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), top_k=1)
    >>> round(importance_cv2(info).item(), 3)    # all of it at one of two experts
    2.0
    """
    losses = []
    for info, keep in _layers(infos, mask):
        weights = info.weights.float()
        if keep is not None:
            weights = weights * keep[:, None]
        given = torch.zeros(info.num_experts, device=weights.device)
        losses.append(_cv2(given.index_add(0, info.index.reshape(-1), weights.reshape(-1))))
    return torch.stack(losses).mean()


def load_cv2(infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None = None) -> Tensor:
    """Squared coefficient of variation of the tokens that chose each expert; a statistic, without gradient.

    Parameters
    ----------
    infos, mask
        As in :func:`load_balancing_loss`; the mean over layers is taken.

    Returns
    -------
    Tensor
        Scalar float32.

    Examples
    --------
    >>> import torch
    >>> load_cv2(RoutingInfo.from_logits(torch.eye(3), top_k=1)).item()
    0.0
    """
    return torch.stack([_cv2(_counts(info, keep)[0]) for info, keep in _layers(infos, mask)]).mean()
