"""Fills the templates: one function a page, each returning HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache as memo
from importlib import resources
from typing import Any

from labkit import __version__, papers
from labkit.lab import claims, gallery, runner
from labkit.lab.site import board, glyphs, render, speed, sweep

NAV = (
    ("papers", "index.html", "Papers"),
    ("verdicts", "verdicts.html", "Verdicts"),
    ("settings", "settings.html", "Settings"),
    ("sweeps", "sweeps.html", "Sweeps"),
    ("benchmarks", "benchmarks.html", "Benchmarks"),
)


def asset(name: str) -> str:
    """Text of a file among the templates."""
    return (resources.files("labkit.lab") / "templates" / "site" / name).read_text(encoding="utf-8")


@memo
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined,
    )
    environment.filters |= {
        "bound": glyphs.bound,
        "bysetting": _by_setting,
        "day": board.day,
        "duration": duration,
        "gauge": glyphs.gauge,
        "machine": speed.machine,
        "marks": glyphs.marks,
        "mb": speed.megabytes,
        "measured": claims.measured,
        "ms": speed.milliseconds,
        "short": _short,
        "speed": speed.bar,
        "tally": glyphs.tally,
    }
    environment.globals |= {"nav": NAV, "verdict_class": glyphs.CLASS, "version": __version__}
    return environment


def tones() -> dict[str, str]:
    """What the figures' colours become on a dark page: neutrals change places, colours grow lighter.

    >>> tones()["#24292f"], tones()["#0072b2"] != "#0072b2"
    ('#e6ebf1', True)
    """
    from labkit.lab.figures import look

    lighter = {colour: look.mix(colour, "#FFFFFF", 0.3) for colour in look.COLOURS}
    lighter |= {"#5B4A9C": "#A99BE0", "#4D4D4D": "#B9C2CC", "#0072B2": "#56B4E9", "#56B4E9": "#9AD2F5"}
    found = {look.ink(colour): light for colour, light in lighter.items()} | lighter
    # Bars are their colour in pale, which on a dark page is their colour in dim.
    found |= {
        look.mix(colour, "#FFFFFF", 0.55): look.mix(light, "#11161D", 0.5)
        for colour, light in lighter.items()
    }
    found |= {
        look.INK: "#E6EBF1", look.FAINT: "#9AA8B8", look.RULE: "#2B3542", look.QUIET: "#8A96A5",
        "#B6BDC4": "#465260", "#D0D7DE": "#3A4654", "#FFFFFF": "#11161D",
        "#EDEFF2": "#232C38", "#F4F7FA": "#161D27", "#F7F7F7": "#1C2430", "#B3470A": "#F0935A", "#667080": "#8A96A5",
    }  # fmt: skip
    return {name.lower(): value.lower() for name, value in found.items()}


def _fill(template: str, here: str, root: str, **values: Any) -> str:
    written = datetime.now(UTC).strftime("%Y-%m-%d")
    text: str = _templates().get_template(template).render(here=here, root=root, written=written, **values)
    return text


def _short(claim: Mapping[str, Any]) -> str:
    """Only the mean: the interval stands on the run's own page."""
    return "" if claim.get("mean") is None else claims.number(claim["mean"])


def _by_setting(found: Iterable[papers.Claim]) -> list[tuple[str, list[papers.Claim]]]:
    """Claims by the setting that the paper reports them for."""
    groups: dict[str, list[papers.Claim]] = {}
    for claim in found:
        groups.setdefault(claim.setting or "not said", []).append(claim)
    return list(groups.items())


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(60), duration(600), duration(7200), duration(90)
    ('60 s', '10 min', '2 h', '90 s')
    """
    if seconds <= 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def count(number: int, word: str) -> str:
    """A number and its noun.

    >>> count(1, "paper"), count(2, "claim")
    ('One paper', '2 claims')
    """
    return f"One {word}" if number == 1 else f"{number} {word}s"


def index(entries: Sequence[gallery.Entry], thumbnails: Mapping[str, str]) -> str:
    """The gallery."""
    families: dict[str, int] = {}
    for entry in entries:
        families[entry.paper.family] = families.get(entry.paper.family, 0) + 1
    registered = sum(len(entry.paper.claims) for entry in entries)
    having = {name: sum(name in entry.counts for entry in entries) for name in glyphs.CLASS}
    return _fill(
        "index.html.j2",
        "papers",
        "",
        entries=entries,
        thumbnails=thumbnails,
        families=list(families.items()),
        having=having,
        total=sum(len(entry.claims) for entry in entries),
        counted=f"{count(len(entries), 'paper')}, {count(registered, 'claim').lower()}",
    )


def paper(entry: gallery.Entry, shown: str) -> str:
    """A committed notebook."""
    table = _templates().get_template("claims.html.j2").render(claims=entry.claims) if entry.claims else ""
    body = shown.replace(render.CLAIMS, table)
    parts = render.sections(shown)
    return _fill(
        "paper.html.j2", "papers", "../", paper=entry.paper, record=entry.record, body=body, sections=parts
    )


def run(found: runner.RunResult, shown: str) -> str:
    """The executed notebook of one run."""
    record = found.verdicts or {}
    facts = [
        ("size", found.parameters.get("size")),
        ("seed", str(found.parameters.get("seed", ""))),
        *board.changed(found).items(),
        ("device", board.device(found)),
        ("time", f"{found.seconds:.0f} s"),
        ("peak memory", f"{found.peak_memory_mb:.0f} MB"),
        ("finished", board.day(found.finished)),
    ]
    own = record.get("claims", []) if found.ok else []
    body = shown.replace(render.CLAIMS, "")
    return _fill(
        "run.html.j2",
        "verdicts",
        "../",
        run=found,
        facts=facts,
        claims=own,
        body=body,
        sections=render.sections(shown),
    )


def verdicts(boards: Sequence[board.Board], runs: Sequence[runner.RunResult]) -> str:
    """The verdict board."""
    counts = dict.fromkeys(glyphs.CLASS, 0)
    for found in boards:
        for column in found.columns:
            for row in column.claims.values():
                counts[row["verdict"]] = counts.get(row["verdict"], 0) + 1
    failed = [item for item in runs if not item.ok]
    return _fill("verdicts.html.j2", "verdicts", "", boards=boards, counts=counts, failed=failed)


def settings(entries: Sequence[gallery.Entry], rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What each paper ran and what we run."""
    return _fill("settings.html.j2", "settings", "", entries=entries, settings=rows)


def sweeps(found: Sequence[sweep.Sweep]) -> str:
    """The list of sweeps."""
    return _fill("sweeps.html.j2", "sweeps", "", sweeps=found)


def one_sweep(found: sweep.Sweep) -> str:
    """The page of one sweep."""
    # `<` in a script element could end it.
    data = json.dumps(sweep.payload(found), separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    fixed = {name: value for name, value in found.fixed.items() if name != "device"}
    facts = [("runs", len(found.table)), *fixed.items(), *found.machines.items()]
    facts.append(("made", board.day(found.created)))
    facts += [(state, number) for state, number in found.states.items() if state != "ok"]
    return _fill(
        "sweep.html.j2",
        "sweeps",
        "../",
        sweep=found,
        payload=data,
        facts=facts,
        summaries=sweep.summaries(found),
        runs=sweep.runs(found),
        exploratory=found.exploratory,
    )


def benchmarks(groups: Sequence[speed.Group]) -> str:
    """The benchmark tables."""
    timed = [group for group in groups if group.kind != "memory"]
    rows = [row for group in timed for row in group.rows if row.state != "baseline"]
    return _fill(
        "benchmarks.html.j2",
        "benchmarks",
        "",
        groups=groups,
        total=len(rows),
        losing=sum(group.losing for group in timed),
    )
