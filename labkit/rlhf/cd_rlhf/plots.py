"""Figures of curiosity. plotly is imported when the first one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from labkit._plotly import graph_objects

if TYPE_CHECKING:
    import plotly.graph_objects as go


def paid_map(
    answers: Sequence[Sequence[str]],
    paid: Any,
    *,
    limit: float | None = None,
    title: str = "Which words does curiosity pay?",
    height: int = 420,
) -> go.Figure:
    """Answers as rows of words, each coloured by the reward that it got.

    Parameters
    ----------
    answers : sequence of sequences of str
        Words or tokens of B answers.
    paid : array or Tensor
        ``(B, T)`` rewards of tokens; what lies beyond an answer's end is left out.
    limit : float, optional
        Reward of the strongest colour; the largest one by default.
    title : str
    height : int
        In pixels.

    Returns
    -------
    plotly.graph_objects.Figure
        Blue is paid, red is charged, white is neither.

    Examples
    --------
    >>> figure = paid_map([["good", "day"], ["hello"]], [[0.1, -0.1], [0.0, 0.0]])
    >>> list(figure.data[0].text[0]), figure.layout.title.text
    (['good', 'day'], '<b>Which words does curiosity pay?</b>')
    """
    go = graph_objects()
    values = np.asarray(paid.detach().float().cpu() if hasattr(paid, "detach") else paid, dtype=float)
    width = values.shape[1]
    if len(values) != len(answers):
        raise ValueError(f"paid has {len(values)} rows for {len(answers)} answers")
    words = [[*answer[:width], *[""] * (width - len(answer))] for answer in answers]
    shown = [
        [round(float(v), 4) if word else None for v, word in zip(row, line, strict=True)]
        for row, line in zip(values, words, strict=True)
    ]
    top = limit or max((abs(v) for row in shown for v in row if v is not None), default=0) or 1.0
    names = [str(i + 1) for i in range(len(words))]
    figure = go.Figure(layout={"title": f"<b>{title}</b>", "height": height})
    figure.add_heatmap(
        z=shown,
        x=list(range(1, width + 1)),
        y=names,
        text=words,
        texttemplate="%{text}",
        colorscale="RdBu",
        zmid=0,
        zmin=-top,
        zmax=top,
        xgap=1,
        ygap=2,
        colorbar={"title": {"text": "paid"}},
        hovertemplate="answer %{y}, word %{x}: %{text}<br>paid %{z}<extra></extra>",
    )
    figure.update_yaxes(title="answer", autorange="reversed", type="category", showgrid=False)
    figure.update_xaxes(title="word", dtick=1, showgrid=False)
    return figure
