r"""Turning the heads of a group into a common basis, without changing what the model computes.

A value head may be turned by any rotation R, when the output projection of its query heads is turned back:
:math:`(A V R)(W_O R)^\top = A V W_O^\top`. A key head may be turned by rotations that commute with the rotary
embedding, one angle for each of its planes (j, j + d/2), when its query heads are turned alike: the scores
:math:`(q R)(k R)^\top` stay. R is the orthogonal Procrustes solution towards the first head of the group,

.. math:: \max_R \; \mathrm{tr}(R^\top X_i^\top X_1), \qquad
          R = U V^\top \text{ of the SVD } X_i^\top X_1 = U S V^\top,

for keys the maximum over each plane's angle. X are the heads' outputs on calibration tokens or, without these, their
weights, which stand for inputs without correlation. "Align Attention Heads Before Merging Them", arXiv 2412.20677,
does so for grouped-query attention.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from labkit.kv.dha.checks import attention_layers, check_fits
from labkit.kv.dha.groups import HeadGroups
from labkit.kv.dha.similarity import HeadMoments


def procrustes(cross: Tensor) -> Tensor:
    """Orthogonal R, ``(d, d)``, with the largest tr(R^T cross), cross being X^T Y: X R is closest to Y."""
    u, _, vh = torch.linalg.svd(cross)
    return u @ vh


def plane_rotation(cross: Tensor) -> Tensor:
    """Best R among those that commute with the rotary embedding: one angle for each plane (j, j + d/2)."""
    width = cross.shape[0]
    j = torch.arange(width // 2, device=cross.device)
    k = j + width // 2
    angle = torch.atan2(cross[k, j] - cross[j, k], cross[j, j] + cross[k, k])
    turn = torch.zeros_like(cross)
    turn[j, j] = turn[k, k] = angle.cos()
    turn[k, j], turn[j, k] = angle.sin(), -angle.sin()
    return turn


@torch.no_grad()
def aligned_weights(
    model: Any, groups: HeadGroups, moments: list[HeadMoments] | None = None
) -> list[dict[str, Tensor]]:
    """Attention weights of every layer after the alignment, by name; the model is left as it is."""
    layers = attention_layers(model)
    check_fits(groups, layers)
    if moments is not None and (len(moments) != len(layers) or moments[0].heads != groups.heads):
        raise ValueError("moments are of another model: collect them with head_moments on this one")
    made = []
    for index, layer in enumerate(layers):
        state = {name: x.detach().clone() for name, x in layer.state_dict().items()}
        width: int = layer.head_dim
        per_query = layer.config.num_attention_heads // groups.heads
        for kind in ("k", "v"):
            weight = state[f"{kind}_proj.weight"]
            blocks = None if moments is None else moments[index].blocks(kind, centred=False)
            turns = torch.eye(width, dtype=torch.float64, device=weight.device).repeat(groups.heads, 1, 1)
            heads = weight.double().view(groups.heads, width, -1)
            for members in groups.of(kind)[index]:
                first = members[0]
                for head in members[1:]:
                    cross = heads[head] @ heads[first].T if blocks is None else blocks[head, first].double()
                    turns[head] = (plane_rotation if kind == "k" else procrustes)(cross.to(turns))
            # Outputs y become y R: the rows of a head, (d, D), become R^T times themselves.
            for part in ("weight", "bias"):
                _turn(state, f"{kind}_proj.{part}", turns)
            queries = turns.repeat_interleave(per_query, 0)
            if kind == "k":
                for part in ("weight", "bias"):
                    _turn(state, f"q_proj.{part}", queries)
            else:
                out = state["o_proj.weight"].double().unflatten(1, (-1, width))  # (D, H, d)
                turned = torch.einsum("xhd,hde->xhe", out, queries)
                state["o_proj.weight"] = turned.flatten(1).to(weight.dtype)
        made.append(state)
    return made


def _turn(state: dict[str, Tensor], name: str, turns: Tensor) -> None:
    if name in state:
        x = state[name]
        heads = x.double().view(turns.shape[0], turns.shape[1], -1)
        state[name] = torch.bmm(turns.transpose(1, 2), heads).view(x.shape).to(x.dtype)


def align_heads(model: Any, groups: HeadGroups, moments: list[HeadMoments] | None = None) -> Any:
    """Copy a model with the heads of every group turned into the basis of the group's first head.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint; left as it is.
    groups : HeadGroups
        Heads to be merged later.
    moments : list of HeadMoments, optional
        From :func:`head_moments`; without, the weights decide.

    Returns
    -------
    LlamaForCausalLM
        The same function, up to rounding.

    Raises
    ------
    ValueError
        For an unsupported model, or groups or moments of another one.
    """
    weights = aligned_weights(model, groups, moments)
    made = copy.deepcopy(model)
    for layer, state in zip(attention_layers(made), weights, strict=True):
        layer.load_state_dict(state)
    return made
