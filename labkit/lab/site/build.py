"""Writes the site: every page, the pictures, the search index, and nothing that a former build left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.lab import cache, gallery, notebook, project, runner
from labkit.lab.site import board, pages, render, settings, speed, sweep

_OWN = ("papers", "runs", "sweeps", "assets")
#: Characters of a part of a notebook that the search looks at.
_SEARCHED = 4000


def write(
    out: str | Path, to: str | Path | None = None, *, sweeps: Sequence[str | Path] | None = None
) -> Path:
    """Write the site of the committed notebooks and of all that was recorded.

    Parameters
    ----------
    out : path
        Folder of the runs.
    to : path, optional
        Folder of the site; ``out/report`` by default. Only the site's own folders and pages in it are touched.
    sweeps : sequence of path, optional
        Folders that sweeps are looked for in; by default `out` and the folder ``sweeps`` beside it.

    Returns
    -------
    Path
        The page to open, ``index.html``.
    """
    out = Path(out)
    site = _Site(Path(to) if to is not None else out / "report")
    entries = gallery.entries()
    runs = sorted(runner.load_all(out), key=_order)
    found = sweep.find(*(map(Path, sweeps) if sweeps is not None else (out, out.parent / "sweeps")))
    site.copy_plotly()
    site.put("assets/site.css", pages.asset("site.css") + "\n" + render.highlight_css() + "\n")
    tones = json.dumps(pages.tones(), separators=(",", ":"))
    site.put("assets/site.js", f"window.labkitTones = {tones};\n" + pages.asset("site.js"))
    thumbnails: dict[str, str] = {}
    sizes: dict[str, list[dict[str, Any]]] = {}
    lines: list[dict[str, str]] = []
    for entry in entries:
        lines += _claims(entry)
        if entry.path is None:
            continue
        nb = notebook.read(entry.path)
        slug = entry.paper.slug
        shown = render.body(nb)
        site.put(f"papers/{slug}.html", pages.paper(entry, shown))
        site.put(f"papers/{slug}.ipynb", entry.path.read_text(encoding="utf-8"))
        picture = render.thumbnail(nb)
        if picture is not None:
            thumbnails[slug] = f"assets/{slug}.png"
            site.put(thumbnails[slug], picture)
        sizes[slug] = settings.table(settings.sizes(nb))
        lines += _sections(entry, shown)
    for run in runs:
        if run.notebook.exists():
            shown = render.body(notebook.read(run.notebook))
            site.put(f"runs/{run.slug}--{run.key}.html", pages.run(run, shown))
    for item in found:
        site.put(item.page, pages.one_sweep(item))
    site.put("verdicts.html", pages.verdicts(board.boards(entries, runs), runs))
    site.put("settings.html", pages.settings(entries, sizes))
    site.put("sweeps.html", pages.sweeps(found))
    site.put("benchmarks.html", pages.benchmarks(speed.groups(_results())))
    index = json.dumps(lines, ensure_ascii=False, separators=(",", ":"))
    site.put("assets/search.js", f"window.labkitSearch = {index};\n")
    first = site.put("index.html", pages.index(entries, thumbnails))
    site.tidy()
    return first


def _order(run: runner.RunResult) -> tuple[str, int, str]:
    from labkit import papers

    size = run.parameters.get("size")
    return run.slug, papers.SIZES.index(size) if size in papers.SIZES else -1, run.key


def _results() -> Path:
    try:
        return project.root() / "benchmarks" / "results"
    except FileNotFoundError:
        return Path("benchmarks") / "results"


class _Site:
    """The folder of the site, and which files of it this build has written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.written: set[Path] = set()
        for name in _OWN:
            (folder / name).mkdir(parents=True, exist_ok=True)

    def put(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        self.written.add(path)
        data = content.encode() if isinstance(content, str) else content
        if path.is_file() and path.read_bytes() == data:
            return path
        return cache.write_atomic(path, content)

    def copy_plotly(self) -> None:
        import plotly

        source = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        target = self.folder / "assets" / "plotly.min.js"
        self.written.add(target)
        if not target.exists() or target.stat().st_size != source.stat().st_size:
            temporary = target.with_name(".plotly.min.js.tmp")
            shutil.copyfile(source, temporary)
            temporary.replace(target)

    def tidy(self) -> None:
        """Remove what a former build wrote and this one did not."""
        for name in _OWN:
            for path in (self.folder / name).iterdir():
                if path.is_file() and path not in self.written:
                    path.unlink()


def _claims(entry: gallery.Entry) -> list[dict[str, str]]:
    verdicts = {row["id"]: row["verdict"] for row in entry.claims}
    page = f"papers/{entry.paper.slug}.html#verdicts" if entry.path else f"settings.html#{entry.paper.slug}"
    return [
        {
            "to": page,
            "in": entry.paper.slug,
            "title": claim.text,
            "kind": verdicts.get(claim.id, "claim"),
            "text": f"{claim.metric}. {claim.setting}. {claim.paper_figure}",
        }
        for claim in entry.paper.claims
    ]


def _sections(entry: gallery.Entry, shown: str) -> list[dict[str, str]]:
    paper = entry.paper
    found = [
        {
            "to": f"papers/{paper.slug}.html",
            "in": paper.slug,
            "title": paper.title,
            "kind": "paper",
            "text": f"{paper.idea} {paper.authors} {paper.venue} {paper.drag}",
        }
    ]
    found += [
        {
            "to": f"papers/{paper.slug}.html#{part.anchor}",
            "in": paper.slug,
            "title": part.title,
            "kind": "section",
            "text": part.text[:_SEARCHED],
        }
        for part in render.sections(shown)
        if part.text and part.level > 1
    ]
    return found
