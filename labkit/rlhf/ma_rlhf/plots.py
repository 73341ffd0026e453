"""Figures of macro actions. plotly is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from labkit._plotly import graph_objects
from labkit.rlhf.advantages import macro_gae
from labkit.rlhf.segments import token_segments

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PALE = ("#BBD7EE", "#FAD7A8", "#C8E6C9", "#E3CCE8", "#F6C6C6", "#E2DFB0")


def credit_at_end(segments: Tensor, lam: float = 0.95, gamma: float = 1.0) -> Tensor:
    r"""What a score of 1 at the end of each answer is worth to its tokens, before anything is learned.

    The advantage of a token in action :math:`\tau` of K where all values are 0 and nothing else is paid:
    :math:`(\gamma\lambda)^{K-1-\tau}`.

    Parameters
    ----------
    segments : Tensor
        ``(B, T)`` group ids, -1 on padding.
    lam, gamma : float

    Returns
    -------
    Tensor
        ``(B, T)``, 0 on padding.

    Examples
    --------
    >>> credit_at_end(torch.tensor([[0, 0, 1, 2], [0, 0, 0, -1]]), lam=0.5).tolist()
    [[0.25, 0.25, 0.5, 1.0], [1.0, 1.0, 1.0, 0.0]]
    """
    reward = torch.zeros(segments.shape)
    last = (segments >= 0).sum(1, keepdim=True) - 1
    reward.scatter_(1, last.clamp(min=0), (last >= 0).float())
    return macro_gae(reward, torch.zeros_like(reward), segments, gamma=gamma, lam=lam)[0]


def credit_map(
    words: Sequence[str],
    segments: Tensor,
    lam: float = 0.95,
    *,
    columns: int = 12,
    title: str = "Who gets the credit?",
    height: int = 430,
) -> go.Figure:
    """An answer as blocks of tokens, one colour a group, and how much of a score at its end reaches each token.

    Parameters
    ----------
    words : sequence of str
        Text of T tokens.
    segments : Tensor
        ``(T,)`` group ids.
    lam : float
    columns : int
        Tokens in a line.
    title : str
    height : int
        In pixels.

    Returns
    -------
    plotly.graph_objects.Figure
        Above the blocks, below two strips: the credit of each token with these groups, and without.

    Raises
    ------
    ValueError
        When words and ids are not equally many.

    Examples
    --------
    >>> figure = credit_map(["Yes", ",", " it", " is"], torch.tensor([0, 0, 1, 1]), lam=0.5)
    >>> figure.data[1].z
    ([0.125, 0.25, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0])
    """
    go = graph_objects()
    if segments.shape != (len(words),) or not len(words):
        raise ValueError(
            f"segments must be ({len(words)},), one id for each word; got {tuple(segments.shape)}"
        )
    count = len(words)
    shades = [int(i) % len(_PALE) for i in segments]
    seen = [word.replace("\n", "⏎").replace(" ", "·") for word in words]
    scale = [[(i + end) / len(_PALE), colour] for i, colour in enumerate(_PALE) for end in (0, 1)]
    single = token_segments(torch.ones(1, count, dtype=torch.bool))
    strips = [credit_at_end(ids, lam)[0] for ids in (single, segments[None])]
    figure = go.Figure(layout={"title": f"<b>{title}</b>", "height": height, "showlegend": False})
    figure.add_heatmap(
        z=_lines(shades, columns, None),
        text=_lines(seen, columns, ""),
        customdata=_lines([int(i) + 1 for i in segments], columns, None),
        texttemplate="%{text}",
        textfont={"size": 13, "color": "#222222"},
        colorscale=scale,
        zmin=-0.5,
        zmax=len(_PALE) - 0.5,
        showscale=False,
        xgap=1,
        ygap=5,
        hovertemplate="%{text}: action %{customdata}<extra></extra>",
    )
    figure.add_heatmap(
        z=[[round(float(v), 4) for v in strip] for strip in strips],
        x=list(range(1, count + 1)),
        y=["tokens", "these groups"],
        xaxis="x2",
        yaxis="y2",
        colorscale="Blues",
        zmin=0,
        zmax=1,
        colorbar={"title": {"text": "credit"}, "len": 0.9},
        hovertemplate="token %{x}: %{z:.3f}<extra>%{y}</extra>",
    )
    figure.update_layout(
        xaxis={"visible": False},
        yaxis={"visible": False, "autorange": "reversed", "domain": [0.44, 1.0]},
        xaxis2={"title": "token", "anchor": "y2", "showgrid": False},
        yaxis2={"domain": [0.0, 0.3], "anchor": "x2", "showgrid": False, "type": "category"},
    )
    return figure


def _lines(cells: Sequence[Any], columns: int, empty: Any) -> list[list[Any]]:
    found = [list(cells[i : i + columns]) for i in range(0, len(cells), columns)]
    found[-1] += [empty] * (columns - len(found[-1]))
    return found
