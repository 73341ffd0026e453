"""Figures of a bias. plotly is imported when they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from labkit._plotly import graph_objects
from labkit.rlhf.reward_calibration.smoothers import Array

if TYPE_CHECKING:
    import plotly.graph_objects as go

_MOST = 2000


def bias_figure(
    grid: Array, bias: Array, points: tuple[Array, Array] | None = None, **layout: Any
) -> go.Figure:
    """Curve of a bias over a feature, and at most 2,000 of the answers that it was estimated on.

    Examples
    --------
    >>> figure = bias_figure(np.array([0.0, 10.0]), np.array([0.0, 1.0]), yaxis={"title": "score"})
    >>> list(figure.data[0].y), figure.layout.yaxis.title.text
    ([0.0, 1.0], 'score')
    """
    go = graph_objects()
    defaults = {
        "title": "What does the reward pay for length?",
        "xaxis": {"title": "length of the answer"},
        "yaxis": {"title": "reward"},
        "showlegend": False,
    }
    figure = go.Figure(layout={**defaults, **layout})
    title = figure.layout.title.text
    if title and not title.startswith("<b>"):
        figure.layout.title.text = f"<b>{title}</b>"
    if points is not None:
        chosen = np.linspace(0, len(points[0]) - 1, min(_MOST, len(points[0]))).astype(int)
        figure.add_scatter(
            x=points[0][chosen].tolist(),
            y=points[1][chosen].round(4).tolist(),
            mode="markers",
            marker={"size": 4, "color": "#9AA1A9", "opacity": 0.5},
            name="answers",
        )
    figure.add_scatter(
        x=grid.round(4).tolist(),
        y=bias.round(5).tolist(),
        mode="lines",
        line={"width": 3, "color": "#0072B2"},
        name="bias",
    )
    return figure


def flips_figure(
    lengths: tuple[Array, Array],
    scores: tuple[Array, Array],
    calibrator: Any,
    truth: tuple[Array, Array] | None = None,
    shown: int = 300,
    **layout: Any,
) -> go.Figure:
    """Scores over lengths with the fitted bias, and the pairs whose preference calibration turns.

    Parameters
    ----------
    lengths, scores : pair of ndarray of shape (pairs,)
        Of the chosen and of the rejected answers.
    calibrator : calibrator
        Fitted.
    truth : pair of ndarray, optional
        Lengths and true bias at them, where it is known.
    shown : int
        Pairs that are drawn, the first ones. The legend says how many.
    """
    grid = np.linspace(0, float(np.quantile(np.concatenate(lengths), 0.995)), 60)
    low, high = calibrator._range()
    bias = calibrator.alpha * (calibrator.bias_(np.clip(grid, low, high)) - calibrator.level_)
    middle = float(np.mean(np.concatenate(scores)))
    few = [part[:shown] for part in (*lengths, *scores)]
    everything = (np.concatenate(few[:2]), np.concatenate(few[2:]))
    figure = bias_figure(grid, bias + middle, everything, **layout)
    figure.data[-1].name = "what is subtracted"
    pairs, drawn = len(lengths[0]), len(few[0])
    figure.data[0].name = "answers" if drawn == pairs else f"answers ({drawn} of {pairs:,} pairs)"
    after = calibrator.margins(few[0], few[2], few[1], few[3]) > 0
    before = few[2] > few[3]
    for name, turned, colour, symbol in (
        ("wrong, now right", ~before & after, "#009E73", "triangle-up"),
        ("right, now wrong", before & ~after, "#D55E00", "x"),
    ):
        figure.add_scatter(
            x=few[0][turned].tolist(),
            y=few[2][turned].round(3).tolist(),
            mode="markers",
            marker={"size": 8, "color": colour, "symbol": symbol},
            name=name,
        )
    if truth is not None:
        order = np.argsort(truth[0])
        places = np.interp(grid, truth[0][order], truth[1][order])
        figure.add_scatter(
            x=grid.round(1).tolist(),
            y=(places + middle).round(3).tolist(),
            mode="lines",
            line={"dash": "dot", "width": 2, "color": "#24292F"},
            name="true bias",
        )
    figure.update_layout(showlegend=True)
    figure.update_xaxes(range=[0, float(grid[-1])])
    return figure
