"""What taking a bias out does to a leaderboard, as a figure. plotly is imported when it is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, spearmanr

from labkit._plotly import graph_objects
from labkit.rlhf.reward_calibration.judge import calibrate_leaderboard

if TYPE_CHECKING:
    import plotly.graph_objects as go

_THIRDS = (
    ("shortest answers", "#0072B2", "circle"),
    ("middle", "#9AA1A9", "square"),
    ("longest answers", "#D55E00", "diamond"),
)
_LINES = (("#009E73", "solid"), ("#5B4A9C", "dash"), ("#CC79A7", "dot"), ("#24292F", "dashdot"))
_STRENGTHS = tuple(round(0.1 * step, 1) for step in range(16))


def leaderboard_figure(
    names: Sequence[str],
    win_rates: npt.ArrayLike,
    lengths: npt.ArrayLike,
    references: Mapping[str, npt.ArrayLike],
    *,
    alpha: float = 0.5,
    frac: float = 0.7,
    it: int = 0,
    shown: int = 24,
    title: str = "Who rises when length is no longer paid for?",
    height: int = 620,
) -> go.Figure:
    """A leaderboard before and after calibration, beside a reference, and the agreement with all references by strength.

    Parameters
    ----------
    names : sequence of str
        Models.
    win_rates, lengths : array_like of shape (models,)
        In (0, 1), and mean length of the answers.
    references : mapping of str to array_like of shape (models,)
        What a ranking should agree with, higher is better, NaN where a model is not known. The first ranks the column on
        the right and must know the models that are shown.
    alpha, frac, it : float, float, int
        As for `calibrate_leaderboard`.
    shown : int
        Models on the left, the best by the raw win rate, ranked among themselves. Curves are over all models.
    title : str
    height : int
        In pixels.

    Returns
    -------
    plotly.graph_objects.Figure
        Left, a line a model through its three ranks, coloured by the third that its length is in. Right, Spearman's
        correlation with each reference over the strength, and a mark at `alpha`.

    Raises
    ------
    ValueError
        Without a reference, for one of another size, or what `calibrate_leaderboard` refuses.

    Examples
    --------
    >>> skill, lengths = np.sin(np.arange(20)), 500 + 300 * np.cos(1.7 * np.arange(20))
    >>> rates = 1 / (1 + np.exp(2 - skill - lengths / 200))
    >>> board = ([f"m{i}" for i in range(20)], rates, lengths, {"skill": skill})
    >>> raw, half = (leaderboard_figure(*board, alpha=a).data[-1].y[0] for a in (0.0, 0.5))
    >>> raw < half
    True
    """
    go = graph_objects()
    rates, c = np.asarray(win_rates, dtype=float), np.asarray(lengths, dtype=float)
    known = {name: np.asarray(values, dtype=float) for name, values in references.items()}
    if not known:
        raise ValueError("references is empty: give at least one, such as {'true quality': quality}")
    for name, values in {"names": np.asarray(names), **known}.items():
        if values.shape != rates.shape:
            raise ValueError(f"{name!r} has shape {values.shape}; one entry a model is needed, {rates.shape}")
    after = calibrate_leaderboard(rates, c, frac=frac, it=it, alpha=alpha)
    first = next(iter(known))
    top = np.argsort(-rates, kind="stable")[:shown]
    columns = ["raw", f"alpha {alpha:g}", first]
    ranks = np.stack([rankdata(-values[top], method="ordinal") for values in (rates, after, known[first])])
    group = np.searchsorted(np.quantile(c[top], [1 / 3, 2 / 3]), c[top])

    figure = go.Figure(layout={"title": f"<b>{title}</b>", "height": height})
    for number, (name, colour, symbol) in enumerate(_THIRDS):
        x: list[float | None] = []
        y: list[float | None] = []
        about: list[str] = []
        for row in np.flatnonzero(group == number):
            x += [0, 1, 2, None]
            y += [*ranks[:, row].astype(int).tolist(), None]
            model = top[row]
            text = (
                f"{names[model]}: length {c[model]:.0f}, win rate {rates[model]:.3f}, now {after[model]:.3f}"
            )
            about += [text] * 4
        figure.add_scatter(
            x=x,
            y=y,
            text=about,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 8, "symbol": symbol},
            name=name,
            hovertemplate="%{text}<extra></extra>",
        )
    sweep = np.array([calibrate_leaderboard(rates, c, frac=frac, it=it, alpha=each) for each in _STRENGTHS])
    agree: list[float] = []
    for (name, values), (colour, dash) in zip(known.items(), _LINES * len(known), strict=False):
        there = np.isfinite(values)
        now, raw, *course = (
            round(float(spearmanr(row[there], values[there]).statistic), 4) for row in (after, rates, *sweep)
        )
        agree.append(now)
        figure.add_scatter(
            x=list(_STRENGTHS),
            y=course,
            mode="lines",
            line={"color": colour, "dash": dash, "width": 2.5},
            name=f"{name} ({now:.2f}, raw {raw:.2f})",
            xaxis="x2",
            yaxis="y2",
        )
    figure.add_scatter(
        x=[alpha] * len(agree),
        y=agree,
        mode="markers",
        marker={"size": 9, "color": "#24292F"},
        showlegend=False,
        hoverinfo="skip",
        xaxis="x2",
        yaxis="y2",
    )
    order = np.argsort(ranks[0])
    labels = [name if len(name) <= 24 else name[:23] + "…" for name in (names[model] for model in top[order])]
    figure.update_layout(
        xaxis={"domain": [0, 0.55], "range": [-0.1, 2.1], "tickvals": [0, 1, 2], "ticktext": columns},
        yaxis={"range": [len(top) + 0.7, 0.3], "tickvals": list(range(1, len(top) + 1)), "ticktext": labels},
        xaxis2={"domain": [0.68, 1], "anchor": "y2", "title": "strength alpha", "range": [-0.05, 1.55]},
        yaxis2={"anchor": "x2", "title": "Spearman correlation"},
        legend={"y": -0.08, "yanchor": "top"},
        margin={"t": 64, "b": 110},
        shapes=[
            {
                "type": "line",
                "xref": "x2",
                "yref": "y2 domain",
                "x0": alpha,
                "x1": alpha,
                "y0": 0,
                "y1": 1,
                "line": {"color": "#9AA1A9", "width": 1, "dash": "dot"},
            }
        ],
    )
    return figure
