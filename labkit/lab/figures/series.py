"""Curves and bars with their spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from labkit.lab.figures import look
from labkit.lab.figures.axes import dress, logged, name_ends, reference, settle
from labkit.lab.figures.look import COLOURS, QUIET

if TYPE_CHECKING:
    import plotly.graph_objects as go

Band = Literal["range", "95%", "none"]
Curve = tuple[list[float], list[float], list[float], list[float], int]


def lines(
    series: Mapping[str, Any],
    x: Sequence[float] | None = None,
    *,
    title: str,
    x_title: str,
    y_title: str,
    subtitle: str | None = None,
    references: Mapping[str, float] | None = None,
    band: Band = "range",
    highlight: str | Sequence[str] = (),
    quiet: Sequence[str] = (),
    colors: Mapping[str, str] | None = None,
    labels: Literal["auto", "direct", "legend"] = "auto",
    y_format: str = ".3~g",
    y_range: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    height: int = look.HEIGHT,
) -> go.Figure:
    """Curves over x, each the mean over seeds in a band of their spread.

    Parameters
    ----------
    series : mapping of str to array
        Name to values of shape (seeds, points), or (points,) for a single run, at the common `x`. Without `x` each
        value is a tuple of its own: ``(x, values)``, or ``(x, mean, low, high)`` where the band is known already.
    x : sequence of float, optional
        Positions of the points.
    title, x_title, y_title : str
        The question that the figure answers, and the axes with their units.
    subtitle : str, optional
        Line below the title; by default it says what curve and band are.
    references : mapping of str to float, optional
        Label to height of dotted lines, such as the paper's own figures.
    band : {"range", "95%", "none"}
        Lowest to highest seed, the 95 % Student interval of the mean, or nothing.
    highlight, quiet : str or sequence of str
        Series drawn strong, and series drawn grey (baselines).
    colors : mapping of str to str, optional
        Fixed ``#rrggbb`` colours, so that a method keeps its colour over several figures.
    labels : {"auto", "direct", "legend"}
        Names at the ends of the curves, or in a legend on top; automatically direct for up to seven curves.
    y_format : str
        d3 format of the y axis and of the hover text, such as ``".0%"``.
    y_range : pair of float, optional
        By default the data with a margin, so that two figures compare only if you say so.
    log_x, log_y : bool
        Logarithmic axes.
    height : int
        Pixels; the width is that of the page.

    Raises
    ------
    ValueError
        For shapes that do not fit, or nothing to draw.

    Examples
    --------
    >>> from labkit.lab import figures
    >>> fig = figures.lines({"ours": [[1, 2, 3], [1, 3, 5]]}, x=[10, 20, 40], title="Does it grow?",
    ...                     x_title="budget (%)", y_title="score")
    >>> figures.summary(fig)
    'Does it grow? ours 1 to 4; score over budget (%)'
    """
    import plotly.graph_objects as go

    if not series:
        raise ValueError("lines: there is no series to draw")
    curves = {name: _curve(name, values, x, band) for name, values in series.items()}
    paint = _paint(list(curves), highlight, quiet, colors)
    strong = {highlight} if isinstance(highlight, str) else set(highlight)
    fig = go.Figure()
    for name, (xs, _, low, high, _) in curves.items():
        if low != high:
            outline = {"x": [*xs, *reversed(xs)], "y": [*low, *reversed(high)]}
            fill = look.rgba(paint[name], 0.16)
            fig.add_scatter(
                **outline, fill="toself", fillcolor=fill, hoverinfo="skip", legendgroup=name, mode="lines",
                line_width=0, showlegend=False,
            )  # fmt: skip
    for index, (name, (xs, mean, low, high, _)) in enumerate(curves.items()):
        spread = f"  (%{{customdata[0]:{y_format}}} to %{{customdata[1]:{y_format}}})"
        fig.add_scatter(
            x=xs,
            y=mean,
            customdata=[list(pair) for pair in zip(low, high, strict=True)] if low != high else None,
            hovertemplate=f"<b>{name}</b>  %{{y:{y_format}}}{spread if low != high else ''}<extra></extra>",
            legendgroup=name,
            line={
                "color": paint[name],
                "dash": "solid" if len(xs) <= 25 else look.DASHES[index % 8],
                "width": 3 if name in strong else 2,
            },
            marker={"size": 9 if name in strong else 7, "symbol": look.SYMBOLS[index % 8]},
            mode="lines+markers" if len(xs) <= 25 else "lines",
            name=name,
        )
    direct = labels == "direct" or (labels == "auto" and 1 < len(curves) <= 7)
    legend = not direct and len(curves) > 1
    seeds = {count for *_, count in curves.values()}
    dress(
        fig,
        title,
        _spread_note(seeds, band) if subtitle is None else subtitle,
        x_title,
        y_title,
        height,
        legend,
    )
    everything = [v for _, _, low, high, _ in curves.values() for v in (*low, *high) if v is not None]
    everything += (references or {}).values()
    span = y_range or _span(everything, log_y)
    fig.update_layout(hovermode="x unified", showlegend=legend)
    fig.update_yaxes(range=logged(span, log_y), tickformat=y_format, type="log" if log_y else "linear")
    fig.update_xaxes(type="log" if log_x else "linear")
    if log_y:
        fig.update_yaxes(dtick="D2" if span[1] < 60 * span[0] else 1)
    ticks = sorted({v for xs, *_ in curves.values() for v in xs})
    if log_x or len(ticks) <= 8:
        fig.update_xaxes(tickmode="array", tickvals=ticks, ticktext=[f"{v:g}" for v in ticks])
    for label, value in (references or {}).items():
        reference(fig, y=value, label=label)
        settle(fig, label, value, [(xs, mean) for xs, mean, *_ in curves.values()], log_x)
    if direct:
        ends = {name: mean[-1] for name, (_, mean, *_) in curves.items()}
        name_ends(fig, ends, {name: look.ink(paint[name]) for name in ends}, strong, span, log_y)
    return fig


def bars(
    values: Mapping[str, Any],
    *,
    title: str,
    value_title: str,
    category_title: str = "",
    subtitle: str | None = None,
    references: Mapping[str, float] | None = None,
    band: Band = "range",
    highlight: str | Sequence[str] = (),
    quiet: Sequence[str] = (),
    colors: Mapping[str, str] | None = None,
    horizontal: bool | None = None,
    value_format: str = ".3~g",
    value_range: tuple[float, float] | None = None,
    height: int | None = None,
) -> go.Figure:
    """Bars of the mean over seeds, with every seed as a point and a whisker for their spread.

    Parameters
    ----------
    values : mapping
        Name to values per seed; or series to (category to values per seed), drawn as groups side by side.
    title, value_title, category_title : str
        The question, and the titles of the axis of the values (with its unit) and of the categories.
    references : mapping of str to float, optional
        Label to value of dotted lines across the bars.
    horizontal : bool, optional
        Bars that grow to the right; by default when the names would not fit below upright ones.
    value_format : str
        d3 format of values, such as ``".0%"``.
    subtitle, band, highlight, quiet, colors, value_range, height
        As in :func:`lines`. With `highlight` and a single series all other bars are grey.

    Examples
    --------
    >>> from labkit.lab import figures
    >>> fig = figures.bars({"ours": [0.9, 0.92], "random": [0.4, 0.3]},
    ...                    title="Which one retrieves?", value_title="accuracy")
    >>> figures.summary(fig)
    'Which one retrieves? accuracy: ours 0.91, random 0.35'
    """
    import plotly.graph_objects as go

    if not values:
        raise ValueError("bars: there is nothing to draw")
    grouped = [isinstance(item, Mapping) for item in values.values()]
    if any(grouped) != all(grouped):
        raise ValueError("bars: either every value is a mapping of categories, or none is")
    nested: dict[str, Mapping[str, Any]] = dict(values) if grouped[0] else {value_title: values}
    categories = list(dict.fromkeys(category for items in nested.values() for category in items))
    if horizontal is None:
        horizontal = not grouped[0] and (sum(map(len, categories)) > 60 or len(categories) > 7)
    named = list(nested) if grouped[0] else categories
    strong = {highlight} if isinstance(highlight, str) else set(highlight)
    if not grouped[0] and not colors:
        plainly = dict.fromkeys(named, QUIET if strong else COLOURS[0])
        paint = plainly | dict.fromkeys(strong, COLOURS[0]) | dict.fromkeys(quiet, QUIET)
    else:
        paint = _paint(named, highlight, quiet, colors)
    main, other = ("x", "y") if horizontal else ("y", "x")
    fig, tops, counts = go.Figure(), [0.0, *(references or {}).values()], set()
    drawn: list[tuple[dict[str, Any], list[float], list[float]]] = []  # labels wait until the axis is known
    for series, items in nested.items():
        stats = {category: _column(f"{series}, {category}", v, band) for category, v in items.items()}
        shades = [paint[category if not grouped[0] else series] for category in stats]
        common = {"legendgroup": series, "offsetgroup": series, "orientation": "h" if horizontal else "v"}
        means = [mean for _, mean, _, _ in stats.values()]
        highs = [max(high, *seeds) for seeds, _, _, high in stats.values()]
        tops += [v for seeds, _, low, high in stats.values() for v in (*seeds, low, high)]
        counts |= {len(seeds) for seeds, *_ in stats.values()}
        whiskers = {
            "array": [high - mean for _, mean, _, high in stats.values()],
            "arrayminus": [mean - low for _, mean, low, _ in stats.values()],
            "color": look.FAINT,
            "thickness": 1.2,
            "width": 5,
        }
        fig.add_bar(
            **{main: means, other: list(stats), f"error_{main}": whiskers if band != "none" else None},
            hovertemplate=f"<b>%{{{other}}}</b>  %{{{main}:{value_format}}}<extra>"
            + (series if grouped[0] else "")
            + "</extra>",
            marker={"color": [look.mix(shade, "#FFFFFF", 0.55) for shade in shades], "line_width": 0},
            name=series,
            showlegend=False,
            **common,
        )
        points = [(c, v, s) for (c, (seeds, *_)), s in zip(stats.items(), shades, strict=True) for v in seeds]
        fig.add_scatter(
            **{main: [value for _, value, _ in points], other: [category for category, _, _ in points]},
            hovertemplate=f"one seed  %{{{main}:{value_format}}}<extra></extra>",
            marker={"color": [s for *_, s in points], "line": {"color": "#FFFFFF", "width": 1}, "size": 8}
            | {"symbol": look.SYMBOLS[list(nested).index(series) % 8]},
            meta="seeds",
            mode="markers",
            name=series,
            showlegend=grouped[0],
            **common,
        )
        drawn.append(({other: list(stats), **common}, highs, means))
    top, bottom = max(tops), min(tops)
    span = value_range or (bottom * 1.12, top + (top - bottom) * 0.14 or 1)
    for place, highs, means in drawn:
        fig.add_scatter(
            **place,
            **{main: [high + 0.015 * (span[1] - span[0]) for high in highs]},
            hoverinfo="skip",
            mode="text",
            showlegend=False,
            text=[_d3(mean, value_format) for mean in means],
            textfont={"size": 13, "color": look.INK},
            textposition="middle right" if horizontal else "top center",
        )
    if height is None:
        height = max(240, 150 + 44 * len(categories) * len(nested)) if horizontal else look.HEIGHT
    titles = (value_title, category_title) if horizontal else (category_title, value_title)
    note = _spread_note(counts, band, "bar", "whisker") if subtitle is None else subtitle
    dress(fig, title, note, *titles, height, legend=grouped[0])
    fig.update_layout(
        barmode="group",
        scattermode="group",
        bargap=0.35,
        scattergap=0.35,
        showlegend=grouped[0],
        hovermode="closest",
    )
    value_axis = {"range": list(span), "tickformat": value_format, "showgrid": True}
    category_axis = {"showgrid": False, "ticks": "", "type": "category"}
    if horizontal:
        fig.update_xaxes(**value_axis)
        fig.update_yaxes(**category_axis, autorange="reversed")
    else:
        fig.update_yaxes(**value_axis)
        fig.update_xaxes(**category_axis)
    for label, value in (references or {}).items():
        reference(fig, x=value, label=label) if horizontal else reference(fig, y=value, label=label)
    fig.update_shapes(layer="above")
    return fig


def _curve(name: str, values: Any, x: Sequence[float] | None, band: Band) -> Curve:
    """x, mean, low, high and the number of seeds (0 where it is not known) of one series."""
    import numpy as np

    if x is None:
        if not isinstance(values, tuple) or len(values) not in (2, 4):
            raise ValueError(f"lines: without x, series {name!r} must be (x, values) or (x, mean, low, high)")
        x, *rest = values
        if len(rest) == 3:
            given = [[whole(v) for v in column] for column in (x, *rest)]
            if len({len(column) for column in given}) != 1:
                raise ValueError(f"lines: series {name!r}: lengths {[len(c) for c in given]} differ")
            return given[0], given[1], given[2], given[3], 0
        values = rest[0]
    table = np.atleast_2d(np.asarray(values, dtype=float))
    if table.ndim != 2 or table.shape[1] != len(x):
        raise ValueError(f"lines: series {name!r} has shape {np.shape(values)}; (seeds, {len(x)}) is needed")
    stats = [_column(f"{name} at x={place}", column, band) for place, column in zip(x, table.T, strict=True)]
    mean, low, high = [s[1] for s in stats], [s[2] for s in stats], [s[3] for s in stats]
    return [whole(v) for v in x], mean, low, high, len(table) if np.ndim(values) == 2 else 0


def _column(name: str, values: Any, band: Band) -> tuple[list[float], float, float, float]:
    """Values per seed, their mean, and the ends of the band."""
    import numpy as np

    from labkit.lab.claims import interval

    seeds = [float(value) for value in np.atleast_1d(np.asarray(values, dtype=float))]
    if not seeds or not all(map(math.isfinite, seeds)):
        raise ValueError(f"{name}: {seeds or 'no value'}; finite numbers are needed, one per seed")
    mean = math.fsum(seeds) / len(seeds)
    if band == "range":
        return seeds, mean, min(seeds), max(seeds)
    if band == "95%":
        return seeds, mean, *(interval(seeds) or (mean, mean))
    if band == "none":
        return seeds, mean, mean, mean
    raise ValueError(f"band={band!r} is not allowed; one of 'range', '95%', 'none'")


def _paint(
    names: Sequence[str],
    highlight: str | Sequence[str],
    quiet: Sequence[str],
    colors: Mapping[str, str] | None,
) -> dict[str, str]:
    """A colour for each name: given ones first, grey for the quiet, the first colours for the highlighted."""
    first = [highlight] if isinstance(highlight, str) else list(highlight)
    given = dict(colors or {})
    for name in (*first, *quiet):
        if name not in names:
            raise ValueError(f"{name!r} is no series; there are {', '.join(names)}")
    order = [*first, *(name for name in names if name not in first)]
    free = [colour for colour in COLOURS if colour not in given.values()] or list(COLOURS)
    rest = [name for name in order if name not in given and name not in quiet]
    shades = {name: free[i % len(free)] for i, name in enumerate(rest)}
    return {name: given.get(name) or shades.get(name, QUIET) for name in names}


def _spread_note(seeds: set[int], band: Band, mean: str = "line", spread: str = "band") -> str:
    """What mean and spread of a figure are, in words."""
    seeds = seeds - {0}
    if not seeds or seeds == {1}:
        return "one seed" if seeds else ""
    count = f"{max(seeds)} seeds" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)} seeds"
    ends = {
        "range": f", {spread}: lowest to highest",
        "95%": f", {spread}: 95 % interval of the mean",
        "none": "",
    }
    return f"{mean}: mean of {count}{ends[band]}"


def _span(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The values' range with a margin; it starts at zero where they nearly do."""
    low, high = min(values), max(values)
    if log:
        if low <= 0:
            raise ValueError(f"a logarithmic axis cannot show {low}")
        room = max(0.05, 0.06 * math.log10(high / low))
        return low / 10**room, high * 10**room
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1
    starts_at_zero = 0 <= low <= 0.45 * high
    return (0 if starts_at_zero else low - room), high + room


def _d3(value: float, pattern: str) -> str:
    """A number in a few of d3's formats, for text that is written here.

    >>> _d3(0.4567, ".0%"), _d3(0.4567, ".2f"), _d3(1234.5, ".3~g")
    ('46%', '0.46', '1.23e+03')
    """
    return format(value, pattern.replace("~g", "g").replace("~", ""))


def whole(value: Any) -> float:
    """A plain number; whole ones stay whole."""
    number = float(value)
    return int(number) if number.is_integer() else number
