"""A slider over precomputed figures, inside one figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from labkit.lab.figures import look
from labkit.lab.figures.axes import END, spread
from labkit.lab.figures.look import COLOURS, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_FRAMES = 60
_SLIDER = 86  # pixels that the slider takes below the figure


def framed(
    frames: Mapping[Any, go.Figure],
    slider: str = "frame",
    *,
    start: Any = None,
    digits: int = 4,
    limit_kb: int = 150,
) -> go.Figure:
    """One figure with a slider over precomputed figures; it works on any page, without a kernel.

    Parameters
    ----------
    frames : mapping of label to figure
        Figures of the same traces, in the slider's order; at most 60. What is the same in all of them is stored
        once, and axes are given one common range so that heights can be compared.
    slider : str
        What the labels are, such as ``"budget"``.
    start : optional
        Label that is shown first.
    digits : int
        Significant digits that are stored.
    limit_kb : int
        Greatest size of the figure's JSON, in kB, without the indentation that Jupyter adds.

    Raises
    ------
    ValueError
        For no frames or more than 60, frames of different traces, an unknown `start`, or a figure that is too large.

    Examples
    --------
    >>> from labkit.lab import figures
    >>> def one(budget):
    ...     return figures.lines({"ours": [0, budget]}, x=[0, 1], title="?", x_title="x", y_title="y")
    >>> fig = figures.framed({budget: one(budget) for budget in (10, 20)}, slider="budget")
    >>> figures.summary(fig)
    '? ours 0 to 10; y over x; slider budget 10 to 20 (2 steps)'
    """
    import plotly.graph_objects as go

    labels = [str(label) for label in frames]
    if not labels or len(labels) > MAX_FRAMES:
        raise ValueError(f"framed: {len(labels)} frames; from 1 to {MAX_FRAMES} fit into a notebook")
    if len(set(labels)) < len(labels):
        raise ValueError(f"framed: two frames have the same label: {', '.join(labels)}")
    if start is not None and str(start) not in labels:
        raise ValueError(f"framed: start={start!r} is no frame; there are {', '.join(labels)}")
    shown = labels.index(str(start)) if start is not None else 0
    contents = [plain(figure, digits) for figure in frames.values()]
    kinds = [[trace.get("type") for trace in content["data"]] for content in contents]
    for label, kind in zip(labels, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(f"framed: frame {label!r} has the traces {kind}, the first one {kinds[0]}")
    _share_ranges(contents)
    changing = [
        (index, keys)
        for index in range(len(kinds[0]))
        if (keys := _differing([content["data"][index] for content in contents]))
    ]
    fixed = {"template": None, "height": None, "margin": None}
    layout_keys = _differing([{**content["layout"], **fixed} for content in contents])
    base = contents[shown]
    still = {"transition": {"duration": 0}}
    steps = [
        {
            "args": [[label], {"frame": {"duration": 0, "redraw": True}, "mode": "immediate", **still}],
            "label": label,
            "method": "animate",
        }
        for label in labels
    ]
    layout = dict(base["layout"])
    margin = {**look.template().layout.margin.to_plotly_json(), **layout.get("margin", {})}
    layout["margin"] = {**margin, "b": margin["b"] + _SLIDER}
    height = layout.get("height", look.HEIGHT)
    layout["height"] = height + _SLIDER
    title = layout.get("title")
    if isinstance(title, dict) and "y" in title:  # as far from the top as before
        layout["title"] = {**title, "y": 1 - (1 - title["y"]) * height / layout["height"]}
    layout["sliders"] = [
        {
            "active": shown,
            "activebgcolor": COLOURS[0],
            "bgcolor": "#D7E6F2",
            "bordercolor": "#8DB4D3",
            "borderwidth": 1,
            "currentvalue": {"font": {"size": 15, "color": look.INK}, "offset": 14, "prefix": f"{slider}: "},
            "font": {"size": 13, "color": look.FAINT},
            "len": 1,
            "pad": {"t": 62, "b": 8},
            "steps": steps,
            "ticklen": 5,
            "tickcolor": "#B6BDC4",
            "x": 0,
        }
    ]
    stored: list[dict[str, Any]] = []
    for label, content in zip(labels, contents, strict=True):
        traces = [
            {"type": content["data"][index].get("type", "scatter")}
            | {key: content["data"][index].get(key) for key in keys}
            for index, keys in changing
        ]
        frame: dict[str, Any] = {"data": traces, "name": label, "traces": [index for index, _ in changing]}
        if layout_keys:
            frame["layout"] = {key: content["layout"].get(key) for key in layout_keys}
            if "title" in layout_keys and "y" in layout["title"]:
                frame["layout"]["title"] = {**content["layout"]["title"], "y": layout["title"]["y"]}
        stored.append(frame)
    whole = {"data": base["data"], "layout": layout, "frames": stored}
    size = len(json.dumps(whole, separators=(",", ":"))) / 1000
    if size > limit_kb:
        raise ValueError(
            f"framed: {size:.0f} kB of JSON, more than {limit_kb} kB; use fewer frames or points, fewer digits, "
            "or hover=False in heatmaps"
        )
    return go.Figure(whole)


def _share_ranges(contents: Sequence[dict[str, Any]]) -> None:
    """Give the linear and logarithmic axes that every figure fixes one range over all of them."""
    names = {key for content in contents for key in content["layout"] if key.startswith(("xaxis", "yaxis"))}
    for name in names:
        ranges = [content["layout"].get(name, {}).get("range") for content in contents]
        if all(
            isinstance(ends, list) and all(isinstance(end, int | float) for end in ends) for ends in ranges
        ):
            falling = ranges[0][0] > ranges[0][1]
            ends = [min(map(min, ranges)), max(map(max, ranges))]
            for content in contents:
                content["layout"][name]["range"] = ends[::-1] if falling else ends
    for content in contents:
        _move_ends(content)


def _move_ends(content: dict[str, Any]) -> None:
    """Set the names at the curves' ends apart anew, for a range that has changed."""
    layout = content["layout"]
    notes = [note for note in layout.get("annotations", []) if note.get("name") == END]
    if not notes:
        return
    axis, margin = layout["yaxis"], layout["margin"]
    ends = {trace["name"]: trace["y"][-1] for trace in content["data"] if trace.get("name")}
    places = [ends[look.text_of(note["text"])] for note in notes]
    places = [math.log10(v) for v in places] if axis.get("type") == "log" else places
    pixels = layout["height"] - margin["t"] - margin["b"]
    for note, place in zip(notes, spread(places, axis["range"], pixels), strict=True):
        note["y"] = place


def _differing(items: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all items."""
    keys = dict.fromkeys(key for item in items for key in item)
    return [key for key in keys if any(item.get(key) != items[0].get(key) for item in items)]
