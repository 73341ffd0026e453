"""The look of labkit's figures, and what makes them small, comparable and readable as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

# Okabe and Ito's colours, strongest on white first, yellow left out (invisible on white). They differ in lightness
# as well as in hue, so they survive every common form of colour blindness and a grey printer.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5B4A9C", "#4D4D4D")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash")
QUIET = "#9AA1A9"  # baselines and references
INK, FAINT, RULE = "#24292F", "#57606A", "#E7EAED"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
MIME = "application/vnd.plotly.v1+json"
HEIGHT = 420


def mix(colour: str, other: str, share: float) -> str:
    """`share` of `other` in `colour`, both ``#rrggbb``.

    >>> mix("#000000", "#FFFFFF", 0.5)
    '#808080'
    """
    first, second = ([int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in (colour, other))
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(first, second, strict=True))


def rgba(colour: str, opacity: float) -> str:
    """``#rrggbb`` with an opacity."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def ink(colour: str) -> str:
    """The colour, darkened until text in it has a contrast of 4.5 on white.

    >>> ink("#0072B2"), ink("#E69F00") != "#E69F00"
    ('#0072B2', True)
    """

    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    share, shown = 0.0, colour
    while 1.05 / (luminance(shown) + 0.05) < 4.5:
        share += 0.05
        shown = mix(colour, "#000000", share)
    return shown


@cache
def template() -> Any:
    """The plotly template ``labkit``: white, quiet, text of 13 px and more."""
    import plotly.graph_objects as go

    axis = {
        "automargin": True,
        "gridcolor": RULE,
        "linecolor": "#B6BDC4",
        "showline": True,
        "tickcolor": "#B6BDC4",
        "tickfont": {"size": 13, "color": FAINT},
        "ticklen": 5,
        "ticks": "outside",
        "title": {"font": {"size": 14, "color": INK}, "standoff": 12},
        "zeroline": False,
    }
    layout = {
        "autosize": True,
        "bargap": 0.35,
        "colorway": list(COLOURS),
        "font": {"family": FONT, "size": 14, "color": INK},
        "height": HEIGHT,
        "hoverlabel": {
            "align": "left",
            "bgcolor": "#FFFFFF",
            "bordercolor": "#D0D7DE",
            "font": {"family": FONT, "size": 13, "color": INK},
        },
        "legend": {
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "title": {"text": ""},
        },
        "margin": {"l": 68, "r": 28, "t": 84, "b": 64},
        "paper_bgcolor": "#FFFFFF",
        "plot_bgcolor": "#FFFFFF",
        "title": {
            "font": {"size": 17, "color": INK},
            "x": 0,
            "xanchor": "left",
            "xref": "paper",
            "y": 0.965,
            "yanchor": "top",
            "yref": "container",
        },
        "xaxis": {**axis, "showgrid": False},
        "yaxis": axis,
    }
    return go.layout.Template(layout=layout)


def number(value: float, digits: int = 4) -> float | int | None:
    """A float to `digits` significant digits (whole numbers keep all of theirs); None where it is not finite.

    >>> number(0.123456), number(123456.7), number(2.0), number(float("nan"))
    (0.1235, 123457, 2, None)
    """
    if not math.isfinite(value):
        return None
    if value == int(value):
        return int(value)
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    rounded = round(value, places)
    return int(rounded) if rounded == int(rounded) else rounded


def plain(value: Any, digits: int = 4) -> Any:
    """Anything that a figure is made of as lists, dicts and rounded numbers.

    plotly stores NumPy arrays as base64, which can neither be read in a diff nor be compared within a tolerance.
    Figures become the dict that their JSON is written from.

    >>> import numpy as np
    >>> plain({"y": np.array([0.123456, 1.0])})
    {'y': [0.1235, 1]}
    """
    if hasattr(value, "to_plotly_json"):
        return plain(value.to_plotly_json(), digits)
    if isinstance(value, Mapping):
        if set(value) >= {"dtype", "bdata"}:
            return plain(_decode(value), digits)
        return {key: plain(item, digits) for key, item in value.items()}
    if isinstance(value, bool) or value is None or isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return number(value, digits)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "tolist"):  # NumPy and pandas, scalars included
        return plain(value.tolist(), digits)
    if isinstance(value, Sequence):
        return [plain(item, digits) for item in value]
    raise TypeError(f"a figure holds a {type(value).__name__}, which has no plain form: {value!r}")


def _decode(packed: Mapping[str, Any]) -> Any:
    import base64

    import numpy as np

    flat = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    shape = str(packed.get("shape", flat.size)).split(",")
    return flat.reshape([int(part) for part in shape])


def fold(notebook: str) -> str:
    """The JSON of a notebook with every list of numbers or short words on one line: the same content, half the size.

    Jupyter writes one number per line, so that figures are mostly indentation. Sources and printed lines stay one
    per line, as they are what a reviewer reads in a diff.

    >>> print(fold('{\\n "y": [\\n  1,\\n  null,\\n  2.5\\n ],\\n "source": [\\n  "a"\\n ]\\n}'))
    {
     "y": [1, null, 2.5],
     "source": [
      "a"
     ]
    }
    """
    import re

    number = r"-?\d[\d.eE+-]*|null|true|false"
    word = r'"(?:[^"\\\n]|\\[^n\n])*"'
    item = rf"\s*(?:{number}|{word})"
    pattern = re.compile(
        rf'(?m)^(\s*(?:"(?!source"|traceback")[^"\n]*": )?)\[\n({item}(?:,\n{item})*)\n\s*\]'
    )

    def on_one_line(found: re.Match[str]) -> str:
        items = re.split(r",\n *", found[2].strip())
        return f"{found[1]}[{', '.join(items)}]"

    return pattern.sub(on_one_line, notebook)


def renderer() -> Any:
    """plotly's mimetype renderer, with rounded lists, a responsive width and a line of text beside the figure."""
    from plotly.io._base_renderers import PlotlyRenderer

    class Labkit(PlotlyRenderer):  # type: ignore[misc,no-any-unimported,unused-ignore]
        """Figures as plain JSON, with a one-line text twin."""

        def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
            tidy = plain(fig_dict)
            bundle: dict[str, Any] = super().to_mimebundle(tidy)
            # plotly adds its own server's address, which no figure here talks to.
            bundle[MIME].get("config", {}).pop("plotlyServerURL", None)
            return {**bundle, "text/plain": summary(tidy)}

    return Labkit(
        {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    )


def text_of(value: Any) -> str:
    """A title without its markup and subtitle."""
    import html
    import re

    while isinstance(value, Mapping):
        value = value.get("text")
    words = re.sub(r"<span[^>]*>.*?</span>", "", str(value or ""), flags=re.DOTALL)
    return html.unescape(re.sub(r"</?b>", "", re.sub(r"<br\s*/?>", " ", words))).strip()


def summary(fig: Any) -> str:
    """One line that says what a figure shows: title, then each trace from its first to its last value."""
    content = plain(fig)
    layout = content.get("layout", {})
    parts = [part for trace in content.get("data", []) if (part := _trace_text(trace))]
    ends = text_of(layout.get("title"))
    ends += "" if not ends or ends[-1] in "?.!:" else ":"
    axes = [text_of(layout.get(axis, {}).get("title")) for axis in ("yaxis", "xaxis")]
    if all(axes):
        parts.append(f"{axes[0]} over {axes[1]}")
    for slider in layout.get("sliders", []):
        steps = [step.get("label", "") for step in slider.get("steps", [])]
        if steps:
            name = str(slider.get("currentvalue", {}).get("prefix", "slider")).strip().rstrip(":")
            parts.append(f"slider {name} {steps[0]} to {steps[-1]} ({len(steps)} steps)")
    return " ".join(filter(None, [ends, "; ".join(parts)])) or "empty figure"


def _trace_text(trace: Mapping[str, Any]) -> str:
    name, kind = text_of(trace.get("name")), trace.get("type", "scatter")
    if kind == "heatmap":
        rows = trace.get("z") or [[]]
        shape = f"{len(rows)} × {len(rows[0])} cells"
        cells = [cell for row in rows for cell in row if cell is not None]
        classes = trace.get("meta")
        if isinstance(classes, list) and cells:
            shares = (
                f"{label} {cells.count(i) / len(cells):.0%}" for i, label in enumerate(classes) if i in cells
            )
            return f"{shape}, " + ", ".join(shares)
        return f"{shape}, {min(cells):.3g} to {max(cells):.3g}" if cells else shape
    if trace.get("hoverinfo") == "skip" or trace.get("meta") == "seeds" or not name:
        return ""
    across = kind == "bar" and trace.get("orientation") == "h"
    values = [v for v in trace.get("x" if across else "y") or [] if isinstance(v, int | float)]
    if not values:
        return ""
    if kind == "bar":
        labels = trace.get("y" if across else "x") or []
        return f"{name}: " * bool(labels != [name]) + ", ".join(
            f"{label} {value:.3g}" for label, value in zip(labels, values, strict=False)
        )
    first, last = f"{values[0]:.3g}", f"{values[-1]:.3g}"
    return f"{name} {first}" if len(values) == 1 else f"{name} {first} to {last}"
