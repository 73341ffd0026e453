"""The collection at a glance: a table for notebooks, README and terminal, and a figure of how every claim stands.

Everything is read from the registry and from what ``labkit refresh`` recorded in the committed notebooks; nothing is
run.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import cache, claims, notebook, project

BEGIN, END = "<!-- gallery: written by `labkit refresh` -->", "<!-- end of gallery -->"
#: The notebook that shows the collection.
INDEX = "notebooks/index.ipynb"
#: Verdicts in the order in which they are counted, each with its sign.
SIGNS = {claims.REPRODUCED: "✓", claims.NOT_REPRODUCED: "✗", claims.UNTESTABLE: "–"}
_COLOUR = {claims.REPRODUCED: "#0072B2", claims.NOT_REPRODUCED: "#B3470A", claims.UNTESTABLE: "#667080"}
_ANY = "any"


@dataclass(frozen=True)
class Entry:
    """A paper and what its committed notebook recorded.

    Parameters
    ----------
    paper : Paper
        Registry entry.
    path : Path or None
        The committed notebook, if it is there.
    record : mapping
        ``metadata.labkit`` of the notebook; empty if it was never refreshed.
    """

    paper: papers.Paper
    path: Path | None
    record: Mapping[str, Any]

    @property
    def claims(self) -> list[dict[str, Any]]:
        """The recorded claims, each with its registered sentence and metric."""
        found = []
        for row in self.record.get("claims", []):
            known = next((claim for claim in self.paper.claims if claim.id == row["id"]), None)
            words = {
                "text": "sentence",
                "metric": "metric",
                "paper_figure": "paper_figure",
                "setting": "setting",
            }
            found.append({**{word: getattr(known, name, "") for word, name in words.items()}, **row})
        return found

    @property
    def counts(self) -> dict[str, int]:
        """How many claims got each verdict; verdicts that no claim got are left out."""
        given = [row["verdict"] for row in self.record.get("claims", [])]
        return {name: given.count(name) for name in SIGNS if name in given}

    @property
    def close(self) -> dict[str, int]:
        """Of each verdict, how many other seeds might turn: the interval contains the threshold."""
        given = [row["verdict"] for row in self.record.get("claims", []) if row.get("close")]
        return {name: given.count(name) for name in SIGNS if name in given}

    @property
    def state(self) -> str:
        """The verdicts in a few words.

        Examples
        --------
        >>> rows = [{"id": "a", "verdict": "reproduced"}, {"id": "b", "verdict": "not reproduced"}]
        >>> Entry(papers.load("nacl"), Path("nacl.ipynb"), {"claims": rows}).state
        '1 ✓  1 ✗'
        >>> Entry(papers.load("nacl"), None, {}).state
        'no notebook yet'
        """
        if self.path is None:
            return "no notebook yet"
        parts = [f"{count} {SIGNS[name]}" for name, count in self.counts.items()]
        return "  ".join(parts) or "not run yet"

    def link(self, base: str = "") -> str:
        """Address of the notebook, seen from the folder `base` of the repository."""
        return self.paper.notebook.removeprefix(f"{base}/" if base else "")


def entries() -> list[Entry]:
    """One entry per registered paper, by family and slug."""
    try:
        top = project.root()
    except FileNotFoundError:  # an installed package without the repository still knows its papers
        top = None
    found = []
    for slug in papers.slugs():
        paper = papers.load(slug)
        path = top / paper.notebook if top is not None else None
        path = path if path is not None and path.is_file() else None
        record = dict(notebook.read(path).metadata.get("labkit", {})) if path else {}
        found.append(Entry(paper, path, record))
    return sorted(found, key=lambda entry: (entry.paper.family, entry.paper.slug))


def chosen(found: Sequence[Entry], family: str = _ANY, verdict: str = _ANY, words: str = "") -> list[Entry]:
    """Entries of a family that have a claim with the verdict, and in whose description all words occur.

    Parameters
    ----------
    found : sequence of Entry
    family, verdict : str
        ``"any"`` chooses nothing.
    words : str
        Beginnings or parts of words, any case.

    Raises
    ------
    ValueError
        For a verdict that does not exist; the nearest one is named.
    """
    if verdict not in (_ANY, *SIGNS):
        raise ValueError(f"verdict {verdict!r} is unknown; {papers.nearest(verdict, (_ANY, *SIGNS))}")
    wanted = words.lower().split()
    kept = []
    for entry in found:
        paper = entry.paper
        text = " ".join(
            (paper.slug, paper.title, paper.authors, paper.idea, paper.drag, paper.family)
        ).lower()
        fits = family in (_ANY, paper.family) and (verdict == _ANY or verdict in entry.counts)
        if fits and all(word in text for word in wanted):
            kept.append(entry)
    return kept


@dataclass(frozen=True)
class Table:
    """Entries as a table: HTML on a page, plain text elsewhere.

    Parameters
    ----------
    rows : sequence of Entry
    base : str
        Folder of the repository that links start from.
    """

    rows: Sequence[Entry]
    base: str = "notebooks"

    def __str__(self) -> str:
        if not self.rows:
            return "no paper fits"
        widths = [max(len(text(entry)) for entry in self.rows) for text in (_family, _slug, _state)]
        lines = [
            f"{_family(entry):<{widths[0]}}  {_slug(entry):<{widths[1]}}  {_state(entry):<{widths[2]}}  "
            f"{entry.paper.drag}".rstrip()
            for entry in self.rows
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self.rows:
            return "<p>No paper fits.</p>"
        left = "style='text-align:left;vertical-align:top'"
        body = []
        for entry in self.rows:
            paper = entry.paper
            title = f"<b>{html.escape(paper.title)}</b>"
            if entry.path:
                title = f"<a href='{html.escape(entry.link(self.base), quote=True)}'>{title}</a>"
            counts = " ".join(
                f"<span style='color:{_COLOUR[name]};white-space:nowrap'><b>{count}</b> {SIGNS[name]}</span>"
                for name, count in entry.counts.items()
            )
            cost = f"{entry.record['seconds']} s" if "seconds" in entry.record else ""
            source = f"<a href='{paper.url}'>arXiv {html.escape(paper.arxiv)}</a>"
            body.append(
                f"<tr><td {left}>{html.escape(paper.family)}</td>"
                f"<td {left}>{title}<br><small>{html.escape(paper.idea)} {source}</small></td>"
                f"<td {left}>{html.escape(paper.drag)}</td>"
                f"<td {left}>{counts or html.escape(entry.state)}</td><td {left}>{cost}</td></tr>"
            )
        titles = ("family", "paper", "what you can drag", "verdicts", "time")
        widths = (8, 46, 26, 12, 8)  # in per cent: JupyterLab would give every column the same
        head = "".join(
            f"<th style='text-align:left;vertical-align:top;width:{width}%'>{title}</th>"
            for title, width in zip(titles, widths, strict=True)
        )
        return (
            f"<table style='width:100%'><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        )


def _family(entry: Entry) -> str:
    return entry.paper.family


def _slug(entry: Entry) -> str:
    return entry.paper.slug


def _state(entry: Entry) -> str:
    return entry.state


def table(family: str = _ANY, verdict: str = _ANY, words: str = "", base: str = "notebooks") -> Table:
    """The table of the papers that fit; see :func:`chosen`.

    Examples
    --------
    >>> "nacl" in str(table(family="kv"))
    True
    >>> print(table(words="no such word"))
    no paper fits
    """
    return Table(chosen(entries(), family, verdict, words), base)


def headline() -> str:
    """How many papers and claims there are, and what the committed runs decided."""
    found = entries()
    registered = sum(len(entry.paper.claims) for entry in found)
    counts = {name: sum(entry.counts.get(name, 0) for entry in found) for name in SIGNS}
    decided = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    many = f"{len(found)} paper{'s' * (len(found) != 1)}, {registered} claim{'s' * (registered != 1)}"
    return f"{many}: {decided or 'none measured yet'}"


def markdown(base: str = "") -> str:
    """The table as Markdown, for the README.

    Parameters
    ----------
    base : str
        Folder of the repository that the text stands in.
    """
    lines = ["| paper | what you can drag | claims at laptop size | open |", "| --- | --- | --- | --- |"]
    for entry in entries():
        paper = entry.paper
        title, drag = (text.replace("|", "\\|") for text in (paper.title, paper.drag))
        close = {name: f" ({count} close)" for name, count in entry.close.items()}
        counts = ", ".join(f"{count} {name}{close.get(name, '')}" for name, count in entry.counts.items())
        opened = f"[notebook]({entry.link(base)})" if entry.path else "–"
        lines.append(f"| [{title}]({paper.url}) | {drag} | {counts or entry.state} | {opened} |")
    return "\n".join(lines)


def write_readme(path: Path | None = None) -> bool:
    """Put the table between the markers of the README; returns whether the file changed.

    A README without the markers is left alone.
    """
    path = path or project.root() / "README.md"
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        return False
    block = f"{BEGIN}\n{markdown()}\n{END}"
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    fresh = re.sub(pattern, lambda _: block, text, count=1, flags=re.DOTALL)
    if fresh != text:
        cache.write_atomic(path, fresh)
    return fresh != text


# ------------------------------------------------------------------------------------ how the claims stand


def standing(claim: Mapping[str, Any]) -> tuple[float, float, float] | None:
    """How far a claim stands from its threshold: low end, mean and high end, each between -1 and 1.

    The distance of the mean from the threshold in half-widths of its 95 % interval, squeezed by ``z / (1 + abs(z))``;
    positive on the side on which the claim holds. An interval that crosses zero contains the threshold. None where
    nothing was decided.

    Examples
    --------
    >>> standing({"direction": ">=", "threshold": 0.5, "mean": 0.7, "interval": [0.6, 0.8], "verdict": "reproduced"})
    (0.5, 0.667, 0.75)
    >>> standing({"direction": "<=", "threshold": 0.5, "mean": 0.7, "interval": None, "verdict": "not reproduced"})
    (-1.0, -1.0, -1.0)
    """
    threshold, mean = claim.get("threshold"), claim.get("mean")
    if threshold is None or mean is None or claim.get("verdict") == claims.UNTESTABLE:
        return None
    distance = (mean - threshold) if claim["direction"] == ">=" else (threshold - mean)
    bounds = claim.get("interval")
    half = (bounds[1] - bounds[0]) / 2 if bounds else 0.0
    if half <= 1e-12 * max(abs(threshold), abs(mean), 1e-12):
        end = float((distance > 0) - (distance < 0))
        return end, end, end

    def squeeze(z: float) -> float:
        return round(z / (1 + abs(z)), 3)

    z = distance / half
    return squeeze(z - 1), squeeze(z), squeeze(z + 1)


def figure(found: Sequence[Entry] | None = None) -> Any:
    """Every claim of the collection against its threshold, as a plotly figure: above the line it holds.

    Parameters
    ----------
    found : sequence of Entry, optional
        All papers by default.
    """
    import plotly.graph_objects as go

    from labkit.lab.figures import look

    # Built by hand rather than by figures.lines: the columns are claims, which have no order and no common scale.
    columns = [(entry, row) for entry in (entries() if found is None else found) for row in entry.claims]
    fig = go.Figure()
    symbols = {claims.REPRODUCED: "circle", claims.NOT_REPRODUCED: "x", claims.UNTESTABLE: "line-ew-open"}
    for verdict, symbol in symbols.items():
        part = [(i, e, row, standing(row)) for i, (e, row) in enumerate(columns) if row["verdict"] == verdict]
        if not part:
            continue
        y = [place[1] if place else 0 for *_, place in part]
        error = {
            "type": "data",
            "symmetric": False,
            "array": [round(place[2] - place[1], 3) if place else 0 for *_, place in part],
            "arrayminus": [round(place[1] - place[0], 3) if place else 0 for *_, place in part],
            "thickness": 1.5,
            "width": 0,
        }
        fig.add_scatter(
            x=[i for i, *_ in part], y=y, error_y=error, mode="markers", name=verdict,
            marker={"color": _COLOUR[verdict], "symbol": symbol, "size": 10},
            customdata=[f"{e.paper.slug}: {row['text'] or row['id']}<br>{claims.measured(row)}" for _, e, row, _ in part],
            hovertemplate="%{customdata}<extra>" + verdict + "</extra>",
        )  # fmt: skip
    slugs = [entry.paper.slug for entry, _ in columns]
    middle = {slug: (slugs.index(slug) + len(slugs) - 1 - slugs[::-1].index(slug)) / 2 for slug in slugs}
    for slug in list(middle)[1:]:
        fig.add_vline(x=slugs.index(slug) - 0.5, line={"color": look.RULE, "width": 1})
    fig.add_hline(y=0, line={"color": look.INK, "width": 1})
    fig.update_layout(
        template=look.template(), title="Which claims hold, and how clearly?", height=340,
        xaxis={"tickvals": list(middle.values()), "ticktext": list(middle), "ticks": "", "zeroline": False},
        yaxis={
            "range": [-1.08, 1.08], "tickvals": [-0.75, 0, 0.75], "ticktext": ["fails", "threshold", "holds"],
            "title": {"text": "distance from the threshold,<br>in half-widths of the interval"},
        },
    )  # fmt: skip
    return fig


def panel(base: str = "notebooks") -> Any:
    """Controls that filter the table by family, verdict and words; an :func:`labkit.lab.widgets.panel`."""
    import ipywidgets as ui

    from labkit.lab import widgets

    found = entries()
    families = [_ANY, *dict.fromkeys(entry.paper.family for entry in found)]
    search = ui.Text(placeholder="a word of title, authors or idea", continuous_update=False)
    search.layout = ui.Layout(width="100%")

    def show(family: str, verdict: str, words: str) -> Table:
        return Table(chosen(found, family, verdict, words), base)

    return widgets.panel(show, family=families, verdict=[_ANY, *SIGNS], words=search)
