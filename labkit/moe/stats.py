"""Numbers that describe routing: entropy, balance, load, drops, and what layers know of one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from labkit.moe.routing import RoutingInfo

__all__ = ["RoutingStats", "cross_layer_information", "moe_stats", "router_entropy"]


def router_entropy(logits: Tensor, eps: float = 0.0) -> Tensor:
    r"""Entropy of the routing distribution of each token, in nats: :math:`-\sum_e p_e \ln(p_e + \text{eps})`.

    Parameters
    ----------
    logits : Tensor
        ``(..., E)`` before the softmax.
    eps : float, default 0
        Added inside the logarithm; 1e-5 is what GW-MoE's code does.

    Returns
    -------
    Tensor
        ``(...)`` float32, at most ``ln E``.

    Examples
    --------
    >>> import torch
    >>> router_entropy(torch.zeros(1, 8)).exp().round(decimals=4)
    tensor([8.])
    """
    logs = logits.float().log_softmax(-1)
    probs = logs.exp()
    if eps:
        logs = (probs + eps).log()
    return -(probs * logs).nan_to_num().sum(-1)


@dataclass(frozen=True)
class RoutingStats:
    """Statistics of one layer over its real tokens.

    Attributes
    ----------
    layer : int
    tokens : int
        Real tokens.
    entropy : float
        Mean entropy of the routing distribution in nats.
    inner_balance : float
        Median over tokens of the largest probability over the second largest (IB).
    outer_balance : float
        Median over tokens of the sum of the chosen probabilities (OB).
    load : Tensor
        ``(E,)``, share of the pairs that each expert computed; sums to 1.
    drop_rate : float
        Share of the router's choices that no expert computed.
    experts_per_token : float
        Mean number of experts that computed a token.
    """

    layer: int
    tokens: int
    entropy: float
    inner_balance: float
    outer_balance: float
    load: Tensor
    drop_rate: float
    experts_per_token: float


def moe_stats(infos: RoutingInfo | Sequence[RoutingInfo], mask: Tensor | None = None) -> list[RoutingStats]:
    """Describe the routing of each layer.

    Parameters
    ----------
    infos : RoutingInfo or sequence of RoutingInfo
        One record a layer.
    mask : Tensor, optional
        Replaces the records' masks; False at padding.

    Returns
    -------
    list of RoutingStats

    Raises
    ------
    ValueError
        Where a layer has no real token.

    Examples
    --------
    >>> import torch
    >>> [stats] = moe_stats(RoutingInfo.from_logits(torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]), top_k=1))
    >>> stats.load.tolist(), round(stats.inner_balance, 3)
    ([0.5, 0.5, 0.0], 2.718)
    """
    found = []
    with torch.no_grad():
        for info in [infos] if isinstance(infos, RoutingInfo) else infos:
            real = info.real() if mask is None else mask.reshape(-1).bool().to(info.logits.device)
            tokens = int(real.sum())
            if not tokens:
                raise ValueError(f"layer {info.layer} has no real token: the mask is False everywhere")
            probs = info.probs[real].float()
            best = probs.topk(min(2, info.num_experts), dim=-1).values
            pairs = info.csr()
            counted = real[pairs.token]
            load = torch.bincount(pairs.expert[counted], minlength=info.num_experts).float()
            # a choice is dropped where the pair (token, choice) was not computed, whoever took it away
            computed = torch.zeros(info.num_tokens, info.num_experts, dtype=torch.bool, device=real.device)
            computed[pairs.token, pairs.expert] = True
            taken = computed.gather(1, info.index)[real].float().mean()
            found.append(
                RoutingStats(
                    info.layer,
                    tokens,
                    float(router_entropy(info.logits[real]).mean()),
                    float((best[:, 0] / best[:, -1].clamp(min=1e-30)).median()),
                    float(probs.gather(1, info.index[real]).sum(-1).median()),
                    (load / load.sum().clamp(min=1.0)).cpu(),
                    1.0 - float(taken),
                    float(load.sum()) / tokens,
                )
            )
    return found


def _information(a: Tensor, b: Tensor, n_a: int, n_b: int) -> Tensor:
    """Mutual information in nats of labels ``(R, n)`` and ``(R, n)``, for each row: ``(R,)``."""
    rows, n = a.shape
    cell = (torch.arange(rows)[:, None] * n_a + a) * n_b + b
    joint = torch.bincount(cell.reshape(-1), minlength=rows * n_a * n_b).view(rows, n_a, n_b).double() / n
    independent = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log(), 0.0).sum((1, 2))


def cross_layer_information(
    infos: Sequence[RoutingInfo], mask: Tensor | None = None, *, kind: str = "experts", bins: int = 100
) -> Tensor:
    """Mutual information between the routing of every two layers, in nats.

    Parameters
    ----------
    infos : sequence of RoutingInfo
        One record a layer, of the same tokens.
    mask : Tensor, optional
        Replaces the first record's mask.
    kind : {"experts", "scores"}, default "experts"
        ``"experts"``: of the tokens' best experts, over tokens. ``"scores"``: as in RMoE's analysis, for each token the
        information between the two layers' probabilities over the E positions, each put into ``bins`` bins of [0, 1],
        then the mean over tokens.
    bins : int, default 100
        Edges of the bins of ``"scores"``, 0 and 1 included.

    Returns
    -------
    Tensor
        ``(L, L)`` float64, symmetric; the diagonal is each layer's own entropy.

    Raises
    ------
    ValueError
        For an unknown kind, or records of different numbers of tokens.

    Examples
    --------
    >>> import torch
    >>> one = RoutingInfo.from_logits(torch.eye(4).repeat(2, 1), top_k=1)
    >>> cross_layer_information([one, one]).exp().round(decimals=3)
    tensor([[4., 4.],
            [4., 4.]], dtype=torch.float64)
    """
    if kind not in ("experts", "scores"):
        raise ValueError(f"kind must be 'experts' or 'scores'; got {kind!r}")
    if len({info.num_tokens for info in infos}) > 1:
        raise ValueError(
            f"the layers must have routed the same tokens; they have {[i.num_tokens for i in infos]}"
        )
    real = (infos[0].real() if mask is None else mask.reshape(-1).bool()).cpu()
    layers = []
    for info in infos:
        probs = info.probs.detach().float().cpu()[real]
        if kind == "experts":
            layers.append((probs.argmax(-1)[None], info.num_experts))
        else:
            labels = torch.bucketize(
                probs.double(), torch.linspace(0, 1, bins, dtype=torch.float64), right=True
            )
            layers.append((labels, bins + 1))
    matrix = torch.zeros(len(infos), len(infos), dtype=torch.float64)
    for i, (a, n_a) in enumerate(layers):
        for j, (b, n_b) in enumerate(layers[: i + 1]):
            # blocks of tokens bound the joint tables, (rows, bins, bins)
            parts = [_information(x, y, n_a, n_b) for x, y in zip(a.split(256), b.split(256), strict=True)]
            matrix[i, j] = matrix[j, i] = torch.cat(parts).mean()
    return matrix
