"""Re-executes a committed notebook at its default parameters and writes it back clean."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from pathlib import Path
from typing import Any

from labkit import __version__, papers
from labkit.lab import claims, gallery, notebook, project, runner

BEGIN, END = "<!-- verdicts: written by `labkit refresh` -->", "<!-- end of verdicts -->"
_SYMBOL = {"reproduced": "✓", "not reproduced": "✗", "untestable here": "–"}


class RefreshError(RuntimeError):
    """The notebook did not run to its end; the committed one was left as it was."""


def refresh(slug: str, *, timeout: float | None = None, png: bool = True) -> runner.RunResult:
    """Execute a paper's notebook at default parameters, and rewrite the committed file.

    The outputs are replaced, noise is taken out, the verdict strip is generated anew, each Plotly figure gets a
    static twin where kaleido and Chromium are found, and ``metadata.labkit`` records what ran. The file is
    replaced in one step.

    Parameters
    ----------
    slug : str
        Registered paper.
    timeout : float, optional
        Seconds before the run is stopped.
    png : bool
        Whether to draw the static twins.

    Returns
    -------
    RunResult

    Raises
    ------
    RefreshError
        If the notebook raises, dies, or records no verdicts.
    ValueError, FileNotFoundError
        If there is no such paper, or no notebook.
    """
    paper = papers.load(slug)
    path = project.notebook_path(slug)
    with tempfile.TemporaryDirectory(prefix="labkit-refresh-") as folder:
        result = runner.execute(slug, folder, {}, timeout=timeout, fresh=True)
        if not result.ok:
            error = result.error or {}
            raise RefreshError(
                f"{slug}: {result.summary()}: {error.get('message', '')}. {paper.notebook} was left as it was"
            )
        if result.verdicts is None:
            raise RefreshError(f"{slug}: no verdicts were recorded; the notebook must end in run.verdicts()")
        nb = notebook.read(result.notebook)
    settle(nb, paper, result)
    _draw(nb, png)
    notebook.write(nb, path)
    return result


def refresh_index(*, timeout: float | None = None, png: bool = True) -> runner.RunResult | None:
    """Execute the notebook that shows the collection, and write it back clean.

    Parameters
    ----------
    timeout, png
        As for :func:`refresh`.

    Returns
    -------
    RunResult, or None if there is no such notebook.

    Raises
    ------
    RefreshError
        If the notebook raises or dies; the committed one is left as it was.
    """
    path = project.root() / gallery.INDEX
    if not path.is_file():
        return None
    with tempfile.TemporaryDirectory(prefix="labkit-refresh-") as folder:
        result = runner.execute(path, folder, {}, timeout=timeout, fresh=True)
        if not result.ok:
            message = (result.error or {}).get("message", "")
            raise RefreshError(f"{gallery.INDEX}: {result.summary()}: {message}. It was left as it was")
        nb = notebook.read(result.notebook)
    notebook.strip(nb)
    nb.metadata.kernelspec = dict(notebook.KERNELSPEC)
    nb.metadata.labkit = {"slug": "index", "version": __version__, "code_hash": notebook.code_hash(nb)}
    _draw(nb, png)
    notebook.write(nb, path)
    return result


def _draw(nb: Any, png: bool) -> None:
    """Put still twins beside the figures where that is wanted and can be done."""
    if png and importlib.util.find_spec("kaleido") and importlib.util.find_spec("plotly"):
        from labkit.lab import figures

        figures.attach_png(nb)


def settle(nb: Any, paper: papers.Paper, result: runner.RunResult) -> None:
    """Give an executed notebook, in place, its kernelspec, its record and its verdict strip."""
    notebook.strip(nb)
    nb.metadata.kernelspec = dict(notebook.KERNELSPEC)
    verdicts = result.verdicts or {"claims": []}
    kept = ("id", "verdict", "mean", "interval", "threshold", "direction", "unit", "close", "reason")
    nb.metadata.labkit = {
        "slug": paper.slug,
        "version": __version__,
        "code_hash": notebook.code_hash(nb),
        "size": result.parameters["size"],
        "seconds": round(result.seconds),
        "peak_memory_mb": round(result.peak_memory_mb),
        "seed": result.parameters["seed"],
        "device": verdicts.get("device", "cpu"),
        "date": result.finished[:10],
        "claims": [{name: _rounded(claim.get(name)) for name in kept} for claim in verdicts["claims"]],
    }
    for cell in notebook.tagged(nb, "verdict-strip"):
        cell.source = with_strip(cell.source, strip(paper, nb.metadata.labkit))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def strip(paper: papers.Paper, record: dict[str, Any]) -> str:
    """The verdict strip as Markdown, from the record in ``metadata.labkit``.

    Parameters
    ----------
    paper : Paper
        For the sentences of the claims.
    record : mapping
        ``size``, ``seconds``, ``peak_memory_mb`` and ``claims``.
    """
    lines = ["| claim | measured | threshold | verdict |", "| --- | --- | --- | --- |"]
    for row in record["claims"]:
        bound = (
            f"{row['direction']} {claims.number(row['threshold'])}" if row["threshold"] is not None else "–"
        )
        note = f" ({row['reason']})" if row["reason"] else ""
        close = ", close" if row.get("close") else ""
        lines.append(
            f"| {_cell(paper.claim(row['id']).sentence)} | {_cell(claims.measured(row))} | {bound} "
            f"| {_SYMBOL[row['verdict']]} **{row['verdict']}**{close}{_cell(note)} |"
        )
    lines.append("")
    lines.append(
        f"Measured at size `{record['size']}` in {record['seconds']} s with {record['peak_memory_mb']} MB; "
        "mean over seeds with 95 % interval. Thresholds were fixed before the run."
    )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def with_strip(source: str, text: str) -> str:
    """Replace what stands between the markers; add the markers where they are missing."""
    block = f"{BEGIN}\n{text}\n{END}"
    if BEGIN in source and END in source:
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        return re.sub(pattern, lambda _: block, source, count=1, flags=re.DOTALL)
    return f"{source.rstrip()}\n\n{block}".lstrip()


def stale(path: Path) -> bool:
    """Whether the code of a notebook changed since it was last refreshed."""
    nb = notebook.read(path)
    return bool(nb.metadata.get("labkit", {}).get("code_hash") != notebook.code_hash(nb))


def all_slugs() -> list[str]:
    """Registered papers whose notebook exists."""
    return [slug for slug in papers.slugs() if (project.root() / papers.load(slug).notebook).is_file()]
