"""Maps of rows by columns, of numbers or of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.lab.figures import look
from labkit.lab.figures.axes import dress
from labkit.lab.figures.look import COLOURS, QUIET, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

#: What a cell of a token map can be, and its colour: for a categorical :func:`heatmap`.
KEPT = {
    "evicted": "#EDEFF2",
    "sink": "#5B4A9C",
    "recent": "#56B4E9",
    "kept by score": "#0072B2",
    "kept by luck": "#E69F00",
}
_SEQUENTIAL = [[0, "#F4F7FA"], [0.25, "#BFD9EC"], [0.5, "#6FAAD6"], [0.75, "#0072B2"], [1, "#08305A"]]
_DIVERGING = [[0, "#08519C"], [0.25, "#6BAED6"], [0.5, "#F7F7F7"], [0.75, "#F0A35E"], [1, "#B34700"]]


def heatmap(
    values: Any,
    *,
    title: str,
    x_title: str,
    y_title: str,
    subtitle: str = "",
    classes: Mapping[str, str] | Sequence[str] | None = None,
    x: Sequence[Any] | None = None,
    y: Sequence[Any] | None = None,
    highlight: Mapping[str, int | Sequence[int]] | None = None,
    value_title: str = "",
    value_format: str = ".3~g",
    span: tuple[float, float] | None = None,
    diverging: bool = False,
    hover: bool = True,
    height: int | None = None,
) -> go.Figure:
    """A map of rows by columns, of numbers or of classes.

    Parameters
    ----------
    values : array of shape (rows, columns)
        Numbers; with `classes`, whole numbers that count them from 0.
    classes : mapping of str to colour, or sequence of str, optional
        What the numbers mean. ``KEPT`` is the set for tokens kept in a cache.
    x, y : sequence, optional
        Names of the columns and rows; by default they are counted from 0.
    highlight : mapping of str to int or sequence of int, optional
        Label to columns that are framed and labelled above the map, such as ``{"needle": [41, 42]}``. The columns
        of one label should be neighbours.
    value_title : str
        What the numbers are, beside the colour bar.
    span : pair of float, optional
        Numbers of the lightest and darkest colour.
    diverging : bool
        Two hues around zero (blue below, orange above).
    hover : bool
        Whether each cell of a class map names its class in the hover text: about 12 bytes a cell, so switch it off
        in figures of many frames.
    title, x_title, y_title, subtitle, value_format, height
        As in :func:`lines`.

    Raises
    ------
    ValueError
        For a map that is not rectangular, a class without a name, or a column that is not there.

    Examples
    --------
    >>> from labkit.lab import figures
    >>> fig = figures.heatmap([[0, 1, 1], [0, 0, 1]], classes=["evicted", "kept"], title="What stays?",
    ...                       x_title="position", y_title="head", highlight={"needle": 1})
    >>> figures.summary(fig)
    'What stays? 2 × 3 cells, evicted 50%, kept 50%; head over position'
    """
    import plotly.graph_objects as go

    rows = plain(values)
    if not rows or not isinstance(rows[0], list) or len({len(row) for row in rows}) != 1:
        raise ValueError("heatmap: values must have shape (rows, columns), all rows of one length")
    n_rows, n_columns = len(rows), len(rows[0])
    for name, given, wanted in (("x", x, n_columns), ("y", y, n_rows)):
        if given is not None and len(given) != wanted:
            what = "columns" if name == "x" else "rows"
            raise ValueError(f"heatmap: {len(given)} names in {name} for {wanted} {what}")
    columns: list[Any] = list(range(n_columns))
    ticks: list[str] | None = None
    if x is not None:
        ticks = [str(item) for item in x]
        columns = (
            [f"{i} {name}" for i, name in enumerate(ticks)] if len(set(ticks)) < n_columns else list(ticks)
        )
    gap = 1 if n_columns <= 160 else 0
    trace = {
        "x": columns,
        "y": [str(item) for item in y] if y is not None else list(range(n_rows)),
        "z": rows,
        "xgap": gap,
        "ygap": 2,
    }
    fig = go.Figure()
    where = f"{x_title or 'column'} %{{x}}, {y_title or 'row'} %{{y}}"
    if classes is not None:
        shades = _shades(classes)
        odd = sorted({cell for row in rows for cell in row if cell not in range(len(shades))}, key=str)
        if odd:
            known = f"{len(shades)}: {', '.join(shades)}"
            raise ValueError(f"heatmap: value {odd[0]!r} names no class; there are {known}")
        steps = [(i / len(shades), colour) for i, colour in enumerate(shades.values())]
        scale = [[edge, colour] for low, colour in steps for edge in (low, low + 1 / len(shades))]
        names = list(shades)
        fig.add_heatmap(
            **trace,
            colorscale=scale,
            hovertemplate=f"{where}<br><b>%{{text}}</b><extra></extra>"
            if hover
            else f"{where}<extra></extra>",
            meta=names,
            showscale=False,
            text=[[names[cell] for cell in row] for row in rows] if hover else None,
            texttemplate="",
            zmax=len(shades) - 0.5,
            zmin=-0.5,
        )
        for name, colour in shades.items():
            border = {"color": look.mix(colour, "#000000", 0.15), "width": 1}
            marker = {"color": colour, "line": border, "size": 13, "symbol": "square"}
            fig.add_scatter(x=[None], y=[None], hoverinfo="skip", marker=marker, mode="markers", name=name)
    else:
        cells = [cell for row in rows for cell in row if cell is not None]
        low, high = span or (min(cells), max(cells))
        if diverging:
            high = max(abs(low), abs(high))
            low = -high
        fig.add_heatmap(
            **trace,
            colorbar={"outlinewidth": 0, "thickness": 14, "tickformat": value_format, "title": value_title}
            | {"title": {"text": value_title, "side": "right", "font": {"size": 13}}},
            colorscale=_DIVERGING if diverging else _SEQUENTIAL,
            hovertemplate=f"{where}<br><b>%{{z:{value_format}}}</b><extra></extra>",
            zmax=high,
            zmin=low,
        )
    if height is None:
        height = min(640, max(260, 190 + 26 * n_rows))
    dress(fig, title, subtitle, x_title, y_title, height, legend=classes is not None)
    labelled = highlight or {}
    fig.update_layout(hovermode="closest", legend={"itemclick": False, "itemdoubleclick": False})
    bare = {"showgrid": False, "showline": False, "ticks": "", "ticklabelstandoff": 4}
    fig.update_xaxes(**bare, range=[-0.5, n_columns - 0.5])
    fig.update_yaxes(**bare, range=[n_rows - 0.5, -0.5])
    if ticks is not None:
        each = max(1, math.ceil(n_columns * max(map(len, ticks)) / 110)) if n_columns > 12 else 1
        fig.update_xaxes(type="category", tickmode="array", tickvals=columns[::each], ticktext=ticks[::each])
    elif n_columns <= 24:
        fig.update_xaxes(dtick=1)
    if y is not None or n_rows <= 12:
        fig.update_yaxes(
            tickmode="array", tickvals=trace["y"], type="category" if y is not None else "linear"
        )
    if labelled:
        fig.update_layout(margin_t=fig.layout.margin.t + 16)
        fig.update_layout(legend={"y": 1 + 24 / (height - fig.layout.margin.t - fig.layout.margin.b)})
    for label, which in labelled.items():
        chosen = [which] if isinstance(which, int) else sorted(int(column) for column in which)
        if not chosen or chosen[0] < 0 or chosen[-1] >= n_columns:
            raise ValueError(f"heatmap: highlight {label!r} at column {which} of {n_columns}")
        left, right = chosen[0] - 0.5, chosen[-1] + 0.5
        frame = {"color": look.INK, "width": 2}
        fig.add_shape(
            type="rect", x0=left, x1=right, y0=0, y1=1, yref="paper", line=frame, fillcolor="rgba(0,0,0,0)"
        )
        fig.add_annotation(
            x=(left + right) / 2, y=1, yref="paper", yanchor="bottom", text=f"<b>{label}</b>", showarrow=False,
            font={"size": 13, "color": look.INK},
        )  # fmt: skip
    return fig


def cache_map(
    stats: Mapping[int, Any],
    row: int = 0,
    *,
    title: str,
    highlight: Mapping[str, int | Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    height: int | None = None,
) -> go.Figure:
    """What each head of each layer keeps of one prompt, token by token, and why.

    Parameters
    ----------
    stats : mapping of layer to object
        The ``stats`` of a press of :mod:`labkit.kv`: ``reason`` counts :data:`KEPT`, shape (B, heads, tokens).
    row : int
        Prompt of the batch.
    layers : sequence of int, optional
        Layers to show; all by default.
    title, highlight, height
        As in :func:`heatmap`.

    Raises
    ------
    ValueError
        If nothing was evicted yet, or a layer is not there.
    """
    if not stats:
        raise ValueError("cache_map: stats are empty; run a model under the press first")
    shown = sorted(stats) if layers is None else list(layers)
    if odd := set(shown) - set(stats):
        raise ValueError(f"cache_map: layer {sorted(odd)[0]} is not among {sorted(stats)}")
    reasons = [stats[layer].reason[row].tolist() for layer in shown]
    return heatmap(
        [head for layer in reasons for head in layer],
        classes=KEPT,
        y=[
            f"layer {layer}, head {i}"
            for layer, heads in zip(shown, reasons, strict=True)
            for i in range(len(heads))
        ],
        highlight=highlight,
        title=title,
        x_title="position in the prompt (token)",
        y_title="",
        hover=False,
        height=height,
    )


def _shades(classes: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Colours of classes; names that :data:`KEPT` knows keep its colours."""
    if isinstance(classes, Mapping):
        return dict(classes)
    free = iter([colour for colour in COLOURS if not (set(classes) & set(KEPT) and colour in KEPT.values())])
    return {name: KEPT.get(name) or next(free, QUIET) for name in classes}
