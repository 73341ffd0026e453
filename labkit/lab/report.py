"""Verdicts of recorded runs: a table for the terminal, and pages that open from a folder without a network.

The pages are static: an index with the verdict of every claim of every run, and each executed notebook with live
Plotly figures. Nothing is fetched from elsewhere: ``plotly.min.js`` is copied from the installed package, formulas
are turned into MathML, remote images become their alternative text.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache as memo
from importlib import resources
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import cache, claims, notebook, project, runner

_PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_STYLE = {"reproduced": "green", "not reproduced": "red", "untestable here": "dim"}
_CLASS = {"reproduced": "yes", "not reproduced": "no", "untestable here": "open"}


def show(runs: Sequence[runner.RunResult]) -> None:
    """Print the verdict on each claim of each run, and what went wrong with failed ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=140)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("run", "claim", "measured", "threshold", "verdict"):
        table.add_column(title, no_wrap=title in ("threshold", "verdict"))
    rows = 0
    for run in runs:
        for index, claim in enumerate((run.verdicts or {}).get("claims", []) if run.ok else []):
            name = f"{run.slug} {run.key}" if index == 0 else ""
            style = _STYLE.get(claim["verdict"], "")
            table.add_row(
                name, claim["id"], claims.measured(claim), _bound(claim), Text(claim["verdict"], style=style)
            )
            rows += 1
    if rows:
        console.print()
        console.print(table)
    for run in runs:
        if run.ok:
            continue
        error = run.error or {}
        console.print(
            f"\n{run.slug} {run.key}: {run.summary()}", style="bold red", markup=False, highlight=False
        )
        for line in error.get("traceback", [])[-8:] or [error.get("message", "")]:
            console.print(f"  {line}", markup=False, highlight=False)
        console.print(f"  log: {run.directory / 'log.txt'}", markup=False, highlight=False, soft_wrap=True)


def _bound(claim: Mapping[str, Any]) -> str:
    if claim["threshold"] is None:
        return "–"
    return f"{claim['direction']} {claims.number(claim['threshold'])}"


def write(out: str | Path, to: str | Path | None = None) -> Path:
    """Write the report of all runs recorded under a folder.

    Parameters
    ----------
    out : path
        Folder of the runs.
    to : path, optional
        Folder of the pages; ``out/report`` by default.

    Returns
    -------
    Path
        The index page.
    """
    import plotly

    out = Path(out)
    target = Path(to) if to is not None else out / "report"
    target.mkdir(parents=True, exist_ok=True)
    runs = sorted(runner.load_all(out), key=_order)
    source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    script = target / "plotly.min.js"
    if not script.exists() or script.stat().st_size != source.stat().st_size:
        temporary = target / ".plotly.min.js.tmp"
        shutil.copyfile(source, temporary)
        temporary.replace(script)
    pages = {page_name(run) for run in runs if run.notebook.exists()}
    for old in target.glob("*--*.html"):
        if old.name not in pages:
            old.unlink()
    for run in runs:
        if run.notebook.exists():
            cache.write_atomic(target / page_name(run), render_run(run))
    return cache.write_atomic(target / "index.html", render_index(runs))


def _order(run: runner.RunResult) -> tuple[str, int, str]:
    size = run.parameters.get("size")
    return run.slug, papers.SIZES.index(size) if size in papers.SIZES else -1, run.key


def page_name(run: runner.RunResult) -> str:
    """File name of a run's page."""
    return f"{run.slug}--{run.key}.html"


@memo
def _templates() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"measured": claims.measured, "bound": _bound, "gauge": gauge}
    environment.globals |= {"css": _template("style.css"), "verdict_class": _CLASS}
    return environment


def _template(name: str) -> str:
    return (resources.files("labkit.lab") / "templates" / name).read_text(encoding="utf-8")


def _facts(run: runner.RunResult) -> dict[str, Any]:
    """What a page says about a run."""
    paper = papers.load(run.slug) if run.slug in papers.slugs() else None
    record = run.verdicts or {}
    environment = record.get("environment", {})
    extra = {
        name: value
        for name, value in run.parameters.items()
        if name not in ("size", "seed", "device") and paper and value != paper.knobs[name].default
    }
    return {
        "run": run,
        "paper": paper,
        "page": page_name(run) if run.notebook.exists() else None,
        "claims": record.get("claims", []) if run.ok else [],
        "metrics": record.get("metrics", {}),
        "device": record.get("device", run.parameters.get("device", "")),
        "environment": environment,
        "extra": extra,
        "when": _date(run.finished),
    }


def _date(stamp: str) -> str:
    try:
        return datetime.fromisoformat(stamp).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return ""


def render_index(runs: Sequence[runner.RunResult]) -> str:
    """The index page as HTML."""
    counts = dict.fromkeys(_CLASS, 0)
    for run in runs:
        for name, number in run.counts.items() if run.ok else []:
            counts[name] += number
    page: str = (
        _templates()
        .get_template("index.html.j2")
        .render(items=[_facts(run) for run in runs], counts=counts, failed=sum(not run.ok for run in runs))
    )
    return page


def render_run(run: runner.RunResult) -> str:
    """The page of one executed notebook as HTML."""
    page: str = (
        _templates()
        .get_template("run.html.j2")
        .render(
            **_facts(run), body=notebook_html(notebook.read(run.notebook)), highlight_css=_highlight_css()
        )
    )
    return page


def gauge(claim: Mapping[str, Any]) -> str:
    """A claim's mean, interval and threshold on one small scale, as inline SVG; empty if nothing was measured."""
    from markupsafe import Markup

    threshold, mean = claim["threshold"], claim["mean"]
    if threshold is None or mean is None:
        return ""
    low, high = claim["interval"] or (mean, mean)
    left, right = min(low, threshold, mean), max(high, threshold, mean)
    span = (right - left) or abs(mean) or 1.0

    def x(value: float) -> float:
        return round(8 + 104 * (value - left) / span, 1)

    kind = _CLASS.get(claim["verdict"], "open")
    begin, width = (x(threshold), 120 - x(threshold)) if claim["direction"] == ">=" else (0.0, x(threshold))
    label = f"{claims.measured(dict(claim))} against {_bound(claim)}"
    return Markup(
        f'<svg class="gauge {kind}" viewBox="0 0 120 16" role="img" aria-label="{html.escape(label)}">'
        f'<rect class="zone" x="{begin}" y="2" width="{width:.1f}" height="12"/>'
        f'<line class="bar" x1="{x(low)}" x2="{x(high)}" y1="8" y2="8"/>'
        f'<line class="limit" x1="{x(threshold)}" x2="{x(threshold)}" y1="1" y2="15"/>'
        f'<circle cx="{x(mean)}" cy="8" r="3.5"/></svg>'
    )


def notebook_html(nb: Any) -> str:
    """The cells of a notebook as an HTML fragment without outside references."""
    nb = _portable(nb)
    body, _ = _exporter().from_notebook_node(nb)
    return _no_remote(body)


def _portable(nb: Any) -> Any:
    """A copy whose figures and widgets are HTML."""
    from copy import deepcopy

    from nbformat import NotebookNode

    nb = deepcopy(nb)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _PLOTLY in data:
                figure = data[_PLOTLY]
                kept = {
                    name: figure[name] for name in ("data", "layout", "frames", "config") if name in figure
                }
                # `</` inside a script element would end it.
                text = json.dumps(kept, separators=(",", ":")).replace("</", "<\\/")
                output["data"] = NotebookNode(
                    {
                        "text/html": f'<figure class="plot"><script type="application/json">{text}</script></figure>'
                    }
                )
            elif _WIDGET in data or data.get("text/plain", "").startswith("VBox("):
                output["data"] = NotebookNode(
                    {
                        "text/html": '<p class="panel">A panel to drag stands here when the notebook is open.</p>'
                    }
                )
    return nb


@memo
def _exporter() -> Any:
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            return mathml(body, "inline")

        def block_math(self, body: str) -> str:
            return mathml(body, "block")

        def latex_environment(self, name: str, body: str) -> str:
            return mathml(f"\\begin{{{name}}}{body}\\end{{{name}}}", "block")

        def image(self, text: str, url: str, title: str | None = None) -> str:
            if re.match(r"(https?:)?//", url):
                return f'<span class="badge">{html.escape(text)}</span>'
            shown: str = super().image(text, url, title)
            return shown

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            attachments = context.get("cell", {}).get("attachments", {})
            renderer = Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
            shown: str = MarkdownWithMath(renderer=renderer).render(source)
            return shown

    return Exporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)


def mathml(source: str, display: str) -> str:
    """A formula as MathML, which browsers draw by themselves; its TeX source where it can't be converted.

    Examples
    --------
    >>> mathml("x^2", "inline").startswith("<math")
    True
    """
    try:
        from latex2mathml.converter import convert

        shown: str = convert(source.strip(), display=display)
        return shown
    except Exception:  # an unknown macro must not cost the page
        mark = "$$" if display == "block" else "$"
        return f'<code class="tex">{html.escape(mark + source + mark)}</code>'


def _no_remote(body: str) -> str:
    """Take out what would be fetched from elsewhere; links stay."""
    body = re.sub(r"<script[^>]*\ssrc=[^>]*>.*?</script>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"<link\b[^>]*>", "", body, flags=re.IGNORECASE)

    def image(match: re.Match[str]) -> str:
        alt = re.search(r'alt="([^"]*)"', match[0])
        return f'<span class="badge">{alt[1] if alt else ""}</span>'

    return re.sub(r'<img\b[^>]*\ssrc="(?:https?:)?//[^>]*>', image, body, flags=re.IGNORECASE)


@memo
def _highlight_css() -> str:
    from pygments.formatters import HtmlFormatter

    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}"


def default_report() -> Path:
    """Where the report of the default runs lies."""
    return project.default_out() / "report" / "index.html"
