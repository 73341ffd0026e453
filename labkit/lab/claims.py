"""From values per seed to verdicts: interval, verdict, and a table that a person and a test can both read."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from labkit.papers import Claim

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
UNTESTABLE = "untestable here"


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean over seeds.

    Parameters
    ----------
    values : sequence of float
        One value per seed.
    confidence : float
        Coverage, between 0 and 1.

    Returns
    -------
    (low, high), or None for fewer than two values.

    Examples
    --------
    >>> low, high = interval([0.58, 0.60, 0.62])
    >>> round(low, 2), round(high, 2)
    (0.55, 0.65)
    """
    n = len(values)
    if n < 2:
        return None
    from scipy import stats

    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * spread / math.sqrt(n)
    return mean - half, mean + half


@dataclass(frozen=True)
class Verdict:
    """What a run found out about one claim.

    Parameters
    ----------
    verdict : {"reproduced", "not reproduced", "untestable here"}
        Decided by the mean over seeds against the registered threshold.
    close : bool
        Whether the 95 % interval of the mean contains the threshold, so that other seeds might decide
        otherwise. Never so where all seeds agree to the bit.
    reason : str
        Why the claim is untestable here; empty otherwise.
    """

    id: str
    text: str
    metric: str
    unit: str
    direction: str
    threshold: float | None
    values: tuple[float, ...]
    mean: float | None
    interval: tuple[float, float] | None
    verdict: str
    close: bool
    reason: str
    paper_figure: str
    setting: str


def judge(claim: Claim, size: str, values: Sequence[float] | None) -> Verdict:
    """Decide a claim from its values per seed.

    Parameters
    ----------
    claim : Claim
        Registered claim.
    size : str
        Size that was run; selects the threshold.
    values : sequence of float, or None
        One finite number per seed. None is allowed only where the claim is untestable, or is about data that is not
        shipped.

    Raises
    ------
    ValueError
        If values are missing where the claim can be tested, or not finite.
    """
    reason = claim.untestable.get(size, "")
    numbers = tuple(float(value) for value in values) if values is not None else ()
    if any(not math.isfinite(value) for value in numbers):
        raise ValueError(
            f"claim {claim.id!r}: values {numbers} are not all finite; a failed seed must be repeated"
        )
    if not reason and not numbers and claim.without_data:
        reason = claim.without_data
    if not reason and not numbers:
        raise ValueError(
            f"claim {claim.id!r} can be tested at size {size!r}: give one value per seed, not {values!r}"
        )
    if not reason and len(numbers) < claim.min_seeds:
        reason = f"{len(numbers)} seed{'s' * (len(numbers) > 1)}; a verdict takes {claim.min_seeds}"
    mean = math.fsum(numbers) / len(numbers) if numbers else None
    bounds = interval(numbers)
    threshold = claim.threshold.get(size)
    verdict, close = UNTESTABLE, False
    if not reason and mean is not None and threshold is not None:
        verdict = REPRODUCED if claim.passes(mean, size) else NOT_REPRODUCED
        close = bounds is not None and bounds[0] < bounds[1] and bounds[0] <= threshold <= bounds[1]
    return Verdict(
        id=claim.id,
        text=claim.sentence,
        metric=claim.metric,
        unit=claim.unit,
        direction=claim.direction,
        threshold=threshold,
        values=numbers,
        mean=mean,
        interval=bounds,
        verdict=verdict,
        close=close,
        reason=reason,
        paper_figure=claim.paper_figure,
        setting=claim.setting,
    )


def number(value: float | None, unit: str = "") -> str:
    """A number as a table shows it: three significant digits, no exponent for ordinary sizes.

    Examples
    --------
    >>> number(0.58312), number(1234.5), number(None), number(12.34, "%"), number(1e-6)
    ('0.583', '1234', '–', '12.3 %', '1e-06')
    """
    if value is None:
        return "–"
    if 0 < abs(value) < 0.0005:
        return f"{value:.1g}" + (f" {unit}" if unit else "")
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}" + (f" {unit}" if unit else "")


def measured(row: dict[str, Any]) -> str:
    """Mean and interval of a verdict row, as text."""
    if row["mean"] is None:
        return "–"
    bounds = row["interval"]
    spread = f" [{number(bounds[0])}, {number(bounds[1])}]" if bounds else ""
    return number(row["mean"]) + spread + (f" {row['unit']}" if row["unit"] else "")


_SYMBOL = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", UNTESTABLE: "–"}
# Blue, vermilion, grey: told apart with any colour vision, and the words stand beside them.
_COLOUR = {REPRODUCED: "#0072B2", NOT_REPRODUCED: "#B3470A", UNTESTABLE: "#6B7280"}


@dataclass(frozen=True)
class Verdicts:
    """All verdicts of a run. Displays as a table in a notebook; its text form holds only decisive words.

    Parameters
    ----------
    changed : mapping of name to (value, registered value)
        Knobs that differ from the setting for which the thresholds were registered. Such a run explores.
    """

    slug: str
    size: str
    rows: tuple[Verdict, ...]
    changed: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def caution(self) -> str:
        """One sentence on knobs that were changed; empty for the registered setting."""
        if not self.changed:
            return ""
        turned = ", ".join(
            f"{name}={value!r} (registered: {default!r})" for name, (value, default) in self.changed.items()
        )
        return f"Exploratory, not the registered setting: {turned}."

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-serialisable mapping per claim."""
        records = [asdict(row) for row in self.rows]
        for record in records:
            record["values"] = list(record["values"])
            record["interval"] = list(record["interval"]) if record["interval"] else None
        return records

    def __str__(self) -> str:
        # No measured figure: its last digit may differ between processors, the verdict should not.
        width = max((len(row.id) for row in self.rows), default=0)
        lines = [f"Claims of {self.slug} at size {self.size}"]
        for row in self.rows:
            bound = f"{row.direction} {number(row.threshold)}" if row.threshold is not None else ""
            why = f"  ({row.reason})" if row.reason else ""
            lines.append(f"  {_SYMBOL[row.verdict]} {row.id:<{width}}  {bound:<9}  {row.verdict}{why}")
        if self.caution:
            lines.append(f"  {self.caution}")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = []
        for row, record in zip(self.rows, self.to_records(), strict=True):
            note = row.reason or ("the interval contains the threshold" if row.close else "")
            bound = f"{row.direction} {number(row.threshold)}" if row.threshold is not None else "–"
            cells.append(
                "<tr style='vertical-align:top'>"
                f"<td style='text-align:left'><b>{html.escape(row.text)}</b><br>"
                f"<small>{html.escape(row.metric)}</small></td>"
                f"<td style='text-align:left;white-space:nowrap'>{measured(record)}</td>"
                f"<td style='text-align:left;white-space:nowrap'>{html.escape(bound)}</td>"
                f"<td style='text-align:left'><small>{html.escape(row.paper_figure)}</small></td>"
                f"<td style='text-align:left'><b style='color:{_COLOUR[row.verdict]};white-space:nowrap'>"
                f"{_SYMBOL[row.verdict]} {row.verdict}</b><br><small>{html.escape(note)}</small></td></tr>"
            )
        widths = {
            "claim": 40,
            "measured, 95 % interval": 17,
            "threshold": 9,
            "in the paper": 16,
            "verdict": 18,
        }
        head = "".join(
            f"<th style='text-align:left;width:{share}%'>{title}</th>" for title, share in widths.items()
        )
        caution = f"<p><b>{html.escape(self.caution)}</b></p>" if self.caution else ""
        body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(cells)}</tbody>"
        return f"{caution}<table style='width:100%'>{body}</table>"
