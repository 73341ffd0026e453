"""What the collection holds, and what its committed notebooks measured."""

from __future__ import annotations

from typing import Any

from labkit import papers
from labkit.lab import notebook, project


def rows() -> list[dict[str, Any]]:
    """One JSON-serialisable mapping per registered paper."""
    found = []
    try:
        top = project.root()
    except FileNotFoundError:  # an installed package without the repository still knows its papers
        top = None
    for slug in papers.slugs():
        paper = papers.load(slug)
        path = top / paper.notebook if top else None
        exists = path is not None and path.is_file()
        record = dict(notebook.read(path).metadata.get("labkit", {})) if exists and path else {}
        verdicts: dict[str, int] = {}
        for claim in record.get("claims", []):
            verdicts[claim["verdict"]] = verdicts.get(claim["verdict"], 0) + 1
        found.append(
            {
                "slug": slug,
                "family": paper.family,
                "title": paper.title,
                "arxiv": paper.arxiv,
                "drag": paper.drag,
                "notebook": paper.notebook if exists else None,
                "claims": len(paper.claims),
                "verdicts": verdicts,
                "seconds": record.get("seconds"),
                "peak_memory_mb": record.get("peak_memory_mb"),
                "sizes": list(paper.sizes),
                "knobs": {name: knob.default for name, knob in paper.knobs.items()},
            }
        )
    return found


def show(found: list[dict[str, Any]]) -> None:
    """Print the list as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("paper", "family", "what you can drag", "claims", "committed run"):
        table.add_column(title, no_wrap=title in ("paper", "family"))
    for row in found:
        parts = [f"{count} {name}" for name, count in row["verdicts"].items()]
        if row["notebook"] is None:
            state = "no notebook yet"
        else:
            state = ", ".join(parts) + f", {row['seconds']} s" if parts else "never refreshed"
        table.add_row(row["slug"], row["family"], row["drag"], str(row["claims"]), state)
    Console(soft_wrap=False).print(table)
