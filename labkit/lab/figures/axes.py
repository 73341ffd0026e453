"""What figures share: titles, references, and names that do not overlap."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.lab.figures import look

if TYPE_CHECKING:
    import plotly.graph_objects as go

END = "end"  # annotations that name a curve at its end


def dress(
    fig: go.Figure, title: str, subtitle: str, x_title: str, y_title: str, height: int, legend: bool
) -> None:
    """Template, titles and margins."""
    wrapped = textwrap.wrap(title, 84) or [""]
    top = 30 + 23 * len(wrapped) + 19 * bool(subtitle) + 28 * legend
    text = "<br>".join(f"<b>{line}</b>" for line in wrapped)
    if subtitle:  # plotly's own subtitle keeps a wide gap
        text += f'<br><span style="font-size:13px;color:{look.FAINT}">{subtitle}</span>'
    heading = {"text": text, "y": 1 - (26 if "<br>" in text else 14) / height}
    fig.update_layout(
        template=look.template(), title=heading, height=height, margin={"t": top, "b": 64 if x_title else 36}
    )
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(title_text=y_title)


def reference(
    fig: go.Figure, *, y: float | None = None, x: float | None = None, label: str = ""
) -> go.Figure:
    """Add a dotted line across a figure, with its label; a fixed axis grows to hold it. Returns the figure.

    Raises
    ------
    ValueError
        Unless exactly one of `x` and `y` is given.

    Examples
    --------
    >>> from labkit.lab import figures
    >>> fig = figures.lines({"a": [1, 2]}, x=[0, 1], title="?", x_title="x", y_title="y")
    >>> fig = figures.reference(fig, y=5, label="paper")
    >>> fig.layout.shapes[0].y0, fig.layout.yaxis.range[1] > 5
    (5, True)
    """
    if (x is None) == (y is None):
        raise ValueError(f"reference: give either y or x, not x={x} and y={y}")
    across = y is not None
    value = look.number(float(y if y is not None else x))  # type: ignore[arg-type]
    if value is None:
        raise ValueError(f"reference: {label!r} lies at {y if across else x}, which is not finite")
    axis = fig.layout.yaxis if across else fig.layout.xaxis
    logged = axis.type == "log"
    place = math.log10(value) if logged else value
    if axis.range is not None:
        low, high = axis.range
        room = abs(high - low) * 0.06
        if place > max(low, high):
            axis.range = (low, place + room) if high > low else (place + room, high)
        elif place < min(low, high):
            axis.range = (place - room, high) if high > low else (low, place - room)
    style = {"color": look.FAINT, "dash": "dot", "width": 1.5}
    text = {"text": label, "showarrow": False, "font": {"size": 13, "color": look.FAINT}}
    text["bgcolor"] = "rgba(255,255,255,0.75)"
    if across:
        fig.add_shape(type="line", x0=0, x1=1, xref="paper", y0=value, y1=value, line=style, layer="below")
        fig.add_annotation(x=0, xref="paper", xanchor="left", xshift=6, y=place, yanchor="bottom", **text)
    else:
        fig.add_shape(type="line", y0=0, y1=1, yref="paper", x0=value, x1=value, line=style, layer="below")
        fig.add_annotation(y=1, yref="paper", yanchor="top", x=place, xanchor="left", xshift=3, **text)
    return fig


def settle(
    fig: go.Figure, label: str, y: float, curves: Sequence[tuple[list[float], list[float]]], log: bool
) -> None:
    """Move a reference's label along its line to where the curves leave most room."""
    import numpy as np

    note = fig.layout.annotations[-1]
    if not label or fig.layout.yaxis.type == "log":
        return
    scale: Any = np.log10 if log else np.asarray
    low, high = fig.layout.yaxis.range
    line = 20 / (fig.layout.height - fig.layout.margin.t - 64) * (high - low)
    left, right = min(scale(xs).min() for xs, _ in curves), max(scale(xs).max() for xs, _ in curves)
    width = min(0.9, 7.4 * len(label) / 760)
    best = (-1.0, 0.0, "left", "bottom")
    for anchor, start in (("left", 0.0), ("right", 1 - width), ("center", 0.5 - width / 2)):
        across = left + (right - left) * np.linspace(start, start + width, 9)
        for side, middle in (("bottom", y + line / 2), ("top", y - line / 2)):
            room = min(float(np.abs(np.interp(across, scale(xs), ys) - middle).min()) for xs, ys in curves)
            room = min(room, 1.5 * line) if low < middle < high else -1.0
            if room > best[0] + 1e-9:
                best = (room, {"left": 0.0, "right": 1.0, "center": 0.5}[anchor], anchor, side)
    note.update(x=best[1], xanchor=best[2], yanchor=best[3], xshift={"left": 6, "right": -6}.get(best[2], 0))


def logged(span: tuple[float, float], log: bool) -> list[float]:
    return [look.number(math.log10(v) if log else v, 5) or 0 for v in span]


def name_ends(
    fig: go.Figure,
    ends: Mapping[str, float],
    inks: Mapping[str, str],
    strong: set[str],
    span: tuple[float, float],
    log: bool,
) -> None:
    """Name each curve at its right end; names that would overlap are moved apart."""
    for name, value in ends.items():
        fig.add_annotation(
            x=1, xref="paper", xanchor="left", xshift=8, y=look.number(math.log10(value) if log else value),
            yanchor="middle", showarrow=False, align="left", name=END, font={"size": 13, "color": inks[name]},
            text=f"<b>{name}</b>" if name in strong else name,
        )  # fmt: skip
    fig.update_layout(margin_r=24 + round(7.4 * max(map(len, ends))))
    layout = fig.layout
    notes = [note for note in layout.annotations if note.name == END]
    pixels = layout.height - layout.margin.t - layout.margin.b
    for note, place in zip(notes, spread([n.y for n in notes], logged(span, log), pixels), strict=True):
        note.y = place


def spread(places: Sequence[float], span: Sequence[float], pixels: float) -> list[float]:
    """Heights for one line of text each at `places`, apart enough to be read on an axis of so many pixels."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = apart([places[i] for i in order], 18 / pixels * (span[1] - span[0]), *span)
    return [look.number(moved[order.index(i)]) or 0 for i in range(len(places))]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted places moved as little as needed to be `gap` apart, inside [low, high] where there is room.

    >>> apart([0.0, 0.0, 10.0], 2.0, -5.0, 20.0)
    [-1.0, 1.0, 10.0]
    """
    blocks: list[tuple[float, int]] = []  # centre and number of labels of each run of touching labels
    for place in places:
        centre, count = place, 1
        while blocks and centre - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            other, more = blocks.pop()
            centre, count = (centre * count + other * more) / (count + more), count + more
        blocks.append((centre, count))
    moved = [centre + gap * (i - (count - 1) / 2) for centre, count in blocks for i in range(count)]
    for i in range(len(moved)):
        moved[i] = max(moved[i], low + gap * i)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high - gap * (len(moved) - 1 - i))
    return moved
