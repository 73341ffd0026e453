r"""What the experts do: how alike their outputs are, and whether routers prefer large ones.

Pure functions of tensors for T tokens and E experts. Every expert is looked at on every token, on the inputs that the
layer really has: with all E experts in use but the model's own choice kept, no later layer changes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["cosine", "angular"]


def _real(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values
    if mask.shape != values.shape[:1]:
        raise ValueError(f"mask must be ({values.shape[0]},), one entry a token; got {tuple(mask.shape)}")
    return values[mask.bool()]


def token_similarity(outputs: Tensor, kind: Kind = "cosine") -> Tensor:
    r"""Similarity of every two experts' outputs, token by token (D1).

    Parameters
    ----------
    outputs : Tensor
        ``(T, E, D)``.
    kind : {"cosine", "angular"}
        Angular similarity is :math:`1 - \arccos(\cos)/\pi`, with 1 on the diagonal.

    Returns
    -------
    Tensor
        ``(T, E, E)`` float32.

    Examples
    --------
    >>> import torch
    >>> token_similarity(torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), "angular")
    tensor([[[1.0000, 0.5000],
             [0.5000, 1.0000]]])
    """
    if kind not in ("cosine", "angular"):
        raise ValueError(f"kind must be 'cosine' or 'angular', got {kind!r}")
    if outputs.ndim != 3:
        raise ValueError(f"outputs must be (T, E, D), got shape {tuple(outputs.shape)}")
    unit = torch.nn.functional.normalize(outputs.float(), dim=-1, eps=1e-30)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1, 1)
    if kind == "angular":
        cosine = 1 - torch.arccos(cosine) / math.pi
    cosine.diagonal(dim1=1, dim2=2).fill_(1)
    return cosine


def output_similarity(outputs: Tensor, kind: Kind = "cosine", mask: Tensor | None = None) -> Tensor:
    """Mean of `token_similarity` over the real tokens: ``(E, E)``.

    Raises
    ------
    ValueError
        If no token is real.
    """
    real = _real(outputs, mask)
    if not len(real):
        raise ValueError("there is no real token: the mask hides all of them")
    return token_similarity(real, kind).mean(0)


def ranks(values: Tensor) -> Tensor:
    """Rank of each expert among a token's, ascending from 0; equal values in the order of the experts.

    Examples
    --------
    >>> import torch
    >>> ranks(torch.tensor([[0.5, 0.1, 0.4]])).tolist()
    [[2, 0, 1]]
    """
    return values.argsort(dim=-1, stable=True).argsort(dim=-1)


def norm_score_counts(norms: Tensor, scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count how often the expert of a score rank has a norm rank (D2).

    Parameters
    ----------
    norms, scores : Tensor
        ``(T, E)``: L2 norm of each expert's output, and the router's softmax over all experts.
    mask : Tensor, optional
        ``(T,)`` bool, False at padding.

    Returns
    -------
    Tensor
        ``(E, E)`` int64; entry [i, j] counts tokens whose expert of score rank i has norm rank j (0 the smallest).
        Rows and columns each sum to the number of real tokens.

    Examples
    --------
    >>> import torch
    >>> norm_score_counts(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[0.2, 0.5, 0.3]])).tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    """
    if norms.ndim != 2 or norms.shape != scores.shape:
        raise ValueError(
            f"norms and scores must both be (T, E); got {tuple(norms.shape)} and {tuple(scores.shape)}"
        )
    experts = norms.shape[1]
    pairs = ranks(_real(scores, mask)) * experts + ranks(_real(norms, mask))
    return torch.bincount(pairs.flatten(), minlength=experts**2).view(experts, experts)


def top_agreement(counts: Tensor) -> float:
    """Share of tokens whose best-scored expert also has the largest norm, from `norm_score_counts`; 1/E by chance.

    Examples
    --------
    >>> import torch
    >>> top_agreement(torch.tensor([[3, 1], [1, 3]]))
    0.75
    """
    total = int(counts[-1].sum())
    if not total:
        raise ValueError("the counts are of no token")
    return int(counts[-1, -1]) / total


def active_share(states: Tensor, threshold: float = 1e-3, mask: Tensor | None = None) -> float:
    """Share of activated states whose size is above the threshold (D3).

    Parameters
    ----------
    states : Tensor
        ``(T, f)``, act(W_act x).

    Examples
    --------
    >>> import torch
    >>> active_share(torch.tensor([[0.0, -0.5], [0.0005, 2.0]]))
    0.5
    """
    real = _real(states, mask)
    return float((real.abs() > threshold).float().mean())
