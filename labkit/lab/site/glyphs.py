"""Small marks for claims: the gauge of one claim, and the row of marks that stands for all of a paper's."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from labkit.lab import claims, gallery

#: Class of the page's style for each verdict.
CLASS = {claims.REPRODUCED: "yes", claims.NOT_REPRODUCED: "no", claims.UNTESTABLE: "open"}


def bound(claim: Mapping[str, Any]) -> str:
    """Direction and threshold in words.

    >>> bound({"direction": ">=", "threshold": 0.5}), bound({"direction": ">=", "threshold": None})
    ('≥ 0.500', '–')
    """
    if claim.get("threshold") is None:
        return "–"
    return f"{'≥' if claim['direction'] == '>=' else '≤'} {claims.number(claim['threshold'])}"


def gauge(claim: Mapping[str, Any]) -> str:
    """A claim's mean, interval and threshold on one small scale, as inline SVG; empty if nothing was measured."""
    from markupsafe import Markup

    threshold, mean = claim.get("threshold"), claim.get("mean")
    if threshold is None or mean is None:
        return ""
    low, high = claim.get("interval") or (mean, mean)
    left, right = min(low, threshold, mean), max(high, threshold, mean)
    span = (right - left) or abs(mean) or 1.0

    def x(value: float) -> float:
        return round(8 + 104 * (value - left) / span, 1)

    kind = CLASS.get(claim["verdict"], "open")
    begin, width = (x(threshold), 120 - x(threshold)) if claim["direction"] == ">=" else (0.0, x(threshold))
    label = f"{claims.measured(dict(claim))} against {bound(claim)}"
    return Markup(
        f'<svg class="gauge {kind}" viewBox="0 0 120 16" role="img" aria-label="{html.escape(label)}">'
        f'<rect class="zone" x="{begin}" y="2" width="{width:.1f}" height="12"/>'
        f'<line class="bar" x1="{x(low)}" x2="{x(high)}" y1="8" y2="8"/>'
        f'<line class="limit" x1="{x(threshold)}" x2="{x(threshold)}" y1="1" y2="15"/>'
        f'<circle cx="{x(mean)}" cy="8" r="3.5"/></svg>'
    )


def marks(rows: Sequence[Mapping[str, Any]], label: str = "") -> str:
    """A row of marks, one a claim, around the line of their thresholds: above it a claim holds.

    How far a mark stands from the line says how clear the verdict is (:func:`labkit.lab.gallery.standing`).

    Examples
    --------
    >>> row = {"id": "a", "direction": ">=", "threshold": 0.5, "mean": 0.7, "interval": [0.6, 0.8]}
    >>> "top:16.6%" in marks([{**row, "verdict": "reproduced"}])
    True
    """
    from markupsafe import Markup

    drawn = []
    for row in rows:
        kind = CLASS.get(row["verdict"], "open")
        place = gallery.standing(row)
        words = html.escape(f"{row.get('text') or row['id']}: {row['verdict']}", quote=True)
        if place is None:
            drawn.append(f'<span class="mark {kind}" title="{words}"><i></i></span>')
            continue
        low, mean, high = (round(50 - 50 * value, 1) for value in place)
        whisker = f'<s style="top:{high}%;bottom:{round(100 - low, 1)}%"></s>'
        drawn.append(f'<span class="mark {kind}" title="{words}">{whisker}<i style="top:{mean}%"></i></span>')
    said = html.escape(label or tally(rows), quote=True)
    return Markup(f'<span class="marks" role="img" aria-label="{said}">{"".join(drawn)}</span>')


def tally(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many claims got which verdict, in words.

    >>> tally([{"verdict": "reproduced"}, {"verdict": "reproduced"}, {"verdict": "not reproduced"}])
    '2 reproduced, 1 not reproduced'
    """
    given = [row["verdict"] for row in rows]
    return ", ".join(f"{given.count(name)} {name}" for name in CLASS if name in given) or "no verdicts yet"
