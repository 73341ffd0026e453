"""A notebook as HTML that fetches nothing: figures stay live, formulas become MathML, remote images their text."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from functools import cache as memo
from typing import Any

from labkit.lab import notebook

_PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_HEADING = re.compile(r"<h([1-4])>(.*?)</h\1>", re.DOTALL)
CLAIMS = "<!--claims of the committed run-->"


@dataclass(frozen=True)
class Section:
    """A part of a notebook under one heading, for the table of contents and the search.

    Parameters
    ----------
    anchor, title : str
        Id of the heading on the page, and its text.
    level : int
        1 for the title.
    text : str
        Prose and code of the part without markup.
    """

    anchor: str
    title: str
    level: int
    text: str


def body(nb: Any) -> str:
    """The cells of a notebook as an HTML fragment without outside references, each heading with an id.

    A cell tagged ``verdict-strip`` is left out; :data:`CLAIMS` stands in its place.
    """
    shown, _ = _exporter().from_notebook_node(_portable(nb))
    return _anchored(no_remote(shown))


def plain(markup: str) -> str:
    """The words of a piece of HTML.

    >>> plain("<b>a</b> &lt; b<script>x</script>")
    'a < b'
    """
    text = re.sub(r"<(script|style|math)\b.*?</\1>", " ", markup, flags=re.DOTALL)
    # Code is one span a token: without the tags alone it stays as it is written.
    text = re.sub(
        r"<pre\b.*?</pre>", lambda found: re.sub(r"<[^>]+>", "", found[0]) + " ", text, flags=re.DOTALL
    )
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def sections(shown: str) -> list[Section]:
    """The parts of a page made by :func:`body`."""
    parts = re.split(r'<h([1-4]) id="([^"]+)">(.*?)</h\1>', shown, flags=re.DOTALL)
    found = []
    for at in range(1, len(parts) - 3, 4):
        level, anchor, title, text = parts[at : at + 4]
        found.append(Section(anchor, plain(title), int(level), plain(text)))
    return found


def _anchored(shown: str) -> str:
    used: dict[str, int] = {}

    def heading(match: re.Match[str]) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", plain(match[2]).lower()).strip("-") or "part"
        used[name] = used.get(name, 0) + 1
        anchor = name if used[name] == 1 else f"{name}-{used[name]}"
        return f'<h{match[1]} id="{anchor}">{match[2]}</h{match[1]}>'

    return _HEADING.sub(heading, shown)


def figure_tag(figure: Any, label: str = "") -> str:
    """A plotly figure as an element that the page's script draws when it comes into view."""
    kept = {name: figure[name] for name in ("data", "layout", "frames", "config") if name in figure}
    # `</` inside a script element would end it.
    text = json.dumps(kept, separators=(",", ":")).replace("</", "<\\/")
    name = f' role="group" aria-label="{html.escape(label, quote=True)}"' if label else ""
    return f'<figure class="plot"{name}><script type="application/json">{text}</script></figure>'


def _portable(nb: Any) -> Any:
    """A copy whose figures and widgets are HTML."""
    from copy import deepcopy

    from nbformat import NotebookNode

    nb = deepcopy(nb)
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if "verdict-strip" in notebook.tags(cell):
            cell.source = CLAIMS
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _PLOTLY in data:
                tag = figure_tag(data[_PLOTLY], _line(data.get("text/plain", "")))
                output["data"] = NotebookNode({"text/html": tag})
            elif _WIDGET in data or data.get("text/plain", "").startswith(("VBox(", "Panel(")):
                note = "A panel to drag stands here when the notebook is open."
                output["data"] = NotebookNode({"text/html": f'<p class="panel">{note}</p>'})
    return nb


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


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


def no_remote(shown: str) -> str:
    """Take out what would be fetched from elsewhere; links stay."""
    shown = re.sub(r"<script[^>]*\ssrc=[^>]*>.*?</script>", "", shown, flags=re.DOTALL | re.IGNORECASE)
    shown = re.sub(r"<link\b[^>]*>", "", shown, flags=re.IGNORECASE)

    def image(match: re.Match[str]) -> str:
        alt = re.search(r'alt="([^"]*)"', match[0])
        return f'<span class="badge">{alt[1] if alt else ""}</span>'

    return re.sub(r'<img\b[^>]*\ssrc="(?:https?:)?//[^>]*>', image, shown, flags=re.IGNORECASE)


@memo
def highlight_css() -> str:
    """Colours of code, each for a light and a dark page."""
    from pygments.formatters import HtmlFormatter
    from pygments.styles import get_style_by_name
    from pygments.token import STANDARD_TYPES

    light, dark = (get_style_by_name(name) for name in ("friendly", "github-dark"))
    rules = []
    for token, name in STANDARD_TYPES.items():
        if not name or token not in HtmlFormatter(style="friendly").style.styles:
            continue
        day, night = light.style_for_token(token), dark.style_for_token(token)
        parts = []
        if day["color"] or night["color"]:
            first, second = (
                f"#{style['color']}" if style["color"] else "currentColor" for style in (day, night)
            )
            parts.append(f"color:light-dark({first},{second})")
        parts += ["font-style:italic"] if day["italic"] else []
        if parts:
            rules.append(f".highlight .{name}{{{';'.join(parts)}}}")
    return "\n".join(rules)


def thumbnail(nb: Any) -> bytes | None:
    """The picture that stands for a notebook: PNG bytes of a figure's still twin, or None if it has none.

    That of the cell tagged ``thumbnail``; else the first one under a heading that says "results"; else the first.
    """
    import base64

    first: str | None = None
    below_results: str | None = None
    in_results = False
    for cell in nb.cells:
        if cell.cell_type == "markdown" and (found := re.findall(r"(?m)^#{2,3}\s+(.+)$", cell.source)):
            in_results = "result" in found[-1].lower()
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if not picture:
                continue
            if "thumbnail" in notebook.tags(cell):
                return base64.b64decode(picture)
            first = first or picture
            below_results = below_results or (picture if in_results else None)
    picked = below_results or first
    return base64.b64decode(picked) if picked else None
