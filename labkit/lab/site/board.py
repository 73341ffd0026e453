"""The recorded runs side by side: a row a claim, a column a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from labkit import papers
from labkit.lab import gallery, runner


@dataclass(frozen=True)
class Column:
    """One run of a paper: the committed one, or one that the runner recorded."""

    size: str
    seed: Any
    device: str
    date: str
    state: str  # "ok", "failed", "timeout", "died"
    claims: Mapping[str, Mapping[str, Any]]
    page: str | None = None
    committed: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Board:
    """All runs of one paper."""

    slug: str
    title: str
    family: str
    claims: Sequence[Mapping[str, str]]  # id and text
    columns: Sequence[Column]


def boards(entries: Sequence[gallery.Entry], runs: Sequence[runner.RunResult]) -> list[Board]:
    """One board per paper that has runs; unregistered notebooks come last."""
    found = []
    known = {entry.paper.slug: entry for entry in entries}
    for slug in [*known, *dict.fromkeys(run.slug for run in runs if run.slug not in known)]:
        own = [run for run in runs if run.slug == slug]
        columns = [column(run) for run in own]
        entry = known.get(slug)
        if entry is not None and entry.claims:
            columns.insert(0, _committed(entry))
        if not columns:
            continue
        texts = {claim.id: claim.text for claim in entry.paper.claims} if entry else {}
        for item in columns:
            for name, claim in item.claims.items():
                texts.setdefault(name, claim.get("text", name))
        found.append(
            Board(
                slug,
                entry.paper.title if entry else slug,
                entry.paper.family if entry else "",
                [{"id": name, "text": text} for name, text in texts.items()],
                columns,
            )
        )
    return found


def _committed(entry: gallery.Entry) -> Column:
    record = entry.record
    return Column(
        record.get("size", "laptop"),
        record.get("seed", 0),
        str(record.get("device", "")),
        str(record.get("date", "")),
        "ok",
        {row["id"]: row for row in entry.claims},
        f"papers/{entry.paper.slug}.html",
        committed=True,
    )


def column(run: runner.RunResult) -> Column:
    """The column of a recorded run."""
    record = run.verdicts or {}
    return Column(
        str(run.parameters.get("size", "–")),
        run.parameters.get("seed", "–"),
        device(run),
        day(run.finished),
        run.status,
        {row["id"]: row for row in record.get("claims", [])} if run.ok else {},
        f"runs/{run.slug}--{run.key}.html" if run.notebook.exists() else None,
        extra=changed(run),
        summary=run.summary(),
    )


def device(run: runner.RunResult) -> str:
    """Name of the GPU, or what the run was told to use."""
    record = run.verdicts or {}
    named = str(record.get("device", run.parameters.get("device", "")))
    gpu = record.get("environment", {}).get("gpu")
    return str(gpu) if gpu and named.startswith("cuda") else named


def changed(run: runner.RunResult) -> dict[str, Any]:
    """Knobs of the paper that are not at their defaults."""
    paper = papers.load(run.slug) if run.slug in papers.slugs() else None
    return {
        name: value
        for name, value in run.parameters.items()
        if name not in ("size", "seed", "device")
        and (paper is None or name not in paper.knobs or value != paper.knobs[name].default)
    }


def day(stamp: str) -> str:
    """The date of a time stamp; empty if it is none.

    >>> day("2026-11-21T03:11:11+00:00"), day("")
    ('2026-11-21', '')
    """
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d")
    except ValueError:
        return ""
