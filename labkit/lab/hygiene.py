"""Checks of a committed notebook that need no kernel: anatomy, claims, budgets, stale or noisy outputs.

What a notebook must hold, in this order (headings may carry more words than the ones looked for):

==============================  ==================================================================
title cell                      ``# Title``, the link to the paper
cell tagged ``verdict-strip``   written by ``labkit refresh``
cell tagged ``parameters``      names and defaults as registered
``lab.start(...)``              the first call
headings                        question or idea · method · data · runs, baselines or experiment ·
                                results · drag or explore · claims · own model · limits ·
                                exercises · references
==============================  ==================================================================

Further tags: ``widget`` (the panel), ``claims`` (``run.claim`` calls and ``run.verdicts()``), ``checks`` (cells that
check an exercise), ``nbval-check-output`` (at least three). ``run.claim`` takes the claim's id as a literal.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import papers
from labkit.lab import gallery, notebook, project
from labkit.lab.refresh import BEGIN, END, strip, with_strip

MAX_CELLS, MAX_LINES, MAX_CELL_LINES = 40, 200, 25
WORDS = (500, 1100)
MAX_FILE, MAX_OUTPUT = 500_000, 100_000
MIN_CHECKS = 3

#: Headings in order: what is called so in messages, and the pattern that finds it.
SECTIONS: tuple[tuple[str, str], ...] = (
    ("the question and the idea", r"\b(question|idea)\b"),
    ("the method", r"\bmethod\b"),
    ("data", r"\bdata\b"),
    ("runs: baselines and method", r"\b(baselines?|runs?|experiment|training)\b"),
    ("results", r"\bresults?\b"),
    ("something to drag", r"\b(drag|explore|turn)\b"),
    ("claims", r"\b(claims?|verdicts?)\b"),
    ("on your own model", r"\bown (model|data|network|graph)s?\b"),
    ("limits", r"\blimits?\b"),
    ("exercises", r"\bexercises?\b"),
    ("references", r"\breferences?\b"),
)
_HEADING = re.compile(r"^#{2,3}\s+(.+)$", re.MULTILINE)
_PRIVATE = re.compile(r"(/home/\w|/Users/\w|/root/|/tmp/\w|[A-Z]:\\\\?Users)")
_DATA_FILE = re.compile(
    r"^[\w./\\~-]+\.(csv|tsv|jsonl?|txt|npz?|pt|pth|bin|parquet|safetensors|pkl|arrow|zip|gz)$"
)
_PATH = re.compile(r"^(~/|\.{1,2}/|/(?=\w+/)|[A-Za-z]:[\\/])\S+$")


@dataclass(frozen=True)
class Finding:
    """Something wrong with a notebook, and what mends it."""

    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.what}. {self.mend}"


def check(paper: papers.Paper, path: Path | None = None) -> list[Finding]:
    """All findings about a paper's notebook.

    Parameters
    ----------
    paper : Paper
        Registry entry.
    path : Path, optional
        The notebook; the committed one by default.

    Returns
    -------
    list of Finding
        Empty if the notebook is clean.
    """
    path = path or project.root() / paper.notebook
    if not path.is_file():
        return [Finding(f"{paper.notebook} is missing", f"`labkit new {paper.slug}` makes an empty one")]
    nb = notebook.read(path)
    found = list(file_findings(path))
    for rule in (_parameters, _anatomy, _sections, _outputs, _claims, _strip, _budgets, _code, _kernel):
        found.extend(rule(nb, paper))
    found.extend(_places(paper))
    return found


def file_findings(path: Path) -> Iterator[Finding]:
    """What can be said about any notebook file, registered or not."""
    import nbformat

    if path.stat().st_size > MAX_FILE:
        yield Finding(
            f"the file has {path.stat().st_size // 1000} kB, {MAX_FILE // 1000} are allowed",
            "Round the figures' data, use fewer frames, then `labkit refresh`",
        )
    raw = json.loads(path.read_text(encoding="utf-8"))
    ids = [cell.get("id") for cell in raw.get("cells", [])]
    if (
        (raw.get("nbformat"), raw.get("nbformat_minor", 0)) < (4, 5)
        or None in ids
        or len(set(ids)) < len(ids)
    ):
        yield Finding("cell ids are missing or not unique", "Run `labkit refresh`, which writes format 4.5")
    try:
        nbformat.validate(raw)
    except nbformat.ValidationError as error:
        yield Finding(
            f"the file is no valid notebook: {str(error).splitlines()[0]}", "Repair the JSON by hand"
        )


def check_index(path: Path) -> list[Finding]:
    """All findings about the notebook that shows the collection; it is no paper and has lighter rules.

    Parameters
    ----------
    path : Path
        The notebook.
    """
    mend = "Run `labkit refresh index`"
    nb = notebook.read(path)
    found = list(file_findings(path))
    if nb.metadata.get("labkit", {}).get("code_hash") != notebook.code_hash(nb):
        found.append(Finding("the outputs are older than the code", mend))
    if "widgets" in nb.metadata or "papermill" in nb.metadata:
        found.append(Finding("widget state or papermill's timings are stored", mend))
    for index, output in notebook.errors(nb):
        found.append(Finding(f"cell {index} holds the error {output.ename}", mend))
    checked = notebook.tagged(nb, "nbval-check-output")
    if not checked or any(not cell.get("execution_count") or not cell.get("outputs") for cell in checked):
        found.append(Finding("a check cell has no execution count or no output", mend))
    shown = "".join(
        str(output.get("data", {}).get("text/plain", ""))
        for cell in nb.cells
        for output in cell.get("outputs", [])
    )
    if str(gallery.table()) not in shown:
        found.append(Finding("the table is not that of the committed notebooks", mend))
    return found


def _refresh(paper: papers.Paper) -> str:
    return f"Run `labkit refresh {paper.slug}`"


def _parameters(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    cells = notebook.tagged(nb, "parameters")
    mend = f"Make the cell tagged 'parameters' say what labkit/papers/{paper.slug}.toml says"
    if len(cells) != 1:
        yield Finding(f"{len(cells)} cells are tagged 'parameters'; there must be one", mend)
        return
    have = notebook.parameters(nb)
    want = paper.check({})
    for name in want:
        if name not in have:
            yield Finding(f"the parameters cell lacks {name!r}", mend)
        elif have[name] != want[name] or type(have[name]) is not type(want[name]):
            yield Finding(
                f"{name} is {have[name]!r} in the parameters cell and {want[name]!r} registered", mend
            )
    for name in have:
        if name not in want:
            yield Finding(f"the parameters cell sets {name!r}, which is not registered", mend)
    for node in ast.parse(cells[0].source).body:
        if not isinstance(node, ast.AnnAssign):
            yield Finding(
                f"parameters line {ast.unparse(node)!r} has no type",
                "Write `name: type = value  # choices`: papermill shows it to users",
            )


def _anatomy(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    first = nb.cells[0] if nb.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.lstrip().startswith("# "):
        yield Finding("the first cell is no title", "Begin with a Markdown cell `# Title`")
    elif paper.arxiv not in first.source:
        yield Finding(
            "the title cell does not link the paper",
            f"Add [arXiv {paper.arxiv}]({paper.url}) to the title cell",
        )
    order: list[tuple[str, int | None]] = [
        ("a cell tagged 'verdict-strip'", _index(nb, lambda cell: "verdict-strip" in notebook.tags(cell))),
        ("a cell tagged 'parameters'", _index(nb, lambda cell: "parameters" in notebook.tags(cell))),
        (
            f'a cell that calls lab.start("{paper.slug}", ...)',
            _index(nb, lambda cell: cell.cell_type == "code" and _starts(cell.source, paper.slug)),
        ),
        ("the first section heading", _index(nb, lambda cell: bool(_headings(cell)))),
    ]
    last = 0
    for what, index in order:
        if index is None:
            yield Finding(
                f"{what} is missing", f"`labkit new` writes the frame; compare {paper.notebook} with it"
            )
        elif index < last:
            yield Finding(
                f"{what} comes too early", "Order: title, verdict strip, parameters, start, sections"
            )
        else:
            last = index
    for tag, what in (
        ("widget", "the panel to drag"),
        ("claims", "the claims"),
        ("checks", "the check of an exercise"),
    ):
        if not notebook.tagged(nb, tag):
            yield Finding(f"no cell is tagged {tag!r} ({what})", f"Tag that cell {tag!r}")
    calls = {name for cell in notebook.code_cells(nb) for name in _calls(cell.source)}
    if "framed" not in calls and "sliders" not in "".join(cell.source for cell in nb.cells):
        yield Finding("no figure works without a kernel", "Add one made with `figures.framed(...)`")


def _starts(source: str, slug: str) -> bool:
    return any(
        isinstance(node, ast.Call)
        and _name(node.func) == "start"
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == slug
        for node in _nodes(source)
    )


def _index(nb: Any, holds: Callable[[Any], bool]) -> int | None:
    return next((index for index, cell in enumerate(nb.cells) if holds(cell)), None)


def _headings(cell: Any) -> list[str]:
    return _HEADING.findall(cell.source) if cell.cell_type == "markdown" else []


def _sections(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    headings = [text for cell in nb.cells for text in _headings(cell)]
    at = 0
    for title, pattern in SECTIONS:
        place = next(
            (i for i in range(at, len(headings)) if re.search(pattern, headings[i], re.IGNORECASE)), None
        )
        if place is None:
            early = any(re.search(pattern, text, re.IGNORECASE) for text in headings[:at])
            state = "comes too early" if early else "is missing"
            yield Finding(
                f"the section '{title}' {state}",
                f"Give it a heading `## ...` that matches /{pattern}/, in the order of labkit/lab/hygiene.py",
            )
        else:
            at = place + 1


def _outputs(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    mend = _refresh(paper)
    record = nb.metadata.get("labkit", {})
    if record.get("code_hash") != notebook.code_hash(nb):
        yield Finding("the outputs are older than the code", mend)
    checked = notebook.tagged(nb, "nbval-check-output")
    if len(checked) < MIN_CHECKS:
        yield Finding(
            f"{len(checked)} cells are tagged 'nbval-check-output', at least {MIN_CHECKS} must be",
            "Tag the parameters echo, an exact result and the verdicts",
        )
    for cell in checked:
        if not cell.get("execution_count") or not cell.get("outputs"):
            yield Finding(
                f"check cell {cell.id} has no execution count or no output, so nbval would compare nothing",
                mend,
            )
    for index, output in notebook.errors(nb):
        yield Finding(f"cell {index} holds the error {output.ename}", mend)
    counts = [cell.execution_count for cell in notebook.code_cells(nb) if cell.source.strip()]
    if None in counts or counts != sorted(counts):
        yield Finding("cells were not executed, or not from top to bottom", mend)
    if "widgets" in nb.metadata:
        yield Finding("widget state is stored", mend)
    if "papermill" in nb.metadata or any("papermill" in cell.metadata for cell in nb.cells):
        yield Finding("papermill's timings are stored", mend)
    if notebook.tagged(nb, "injected-parameters"):
        yield Finding("the notebook was saved by papermill with injected parameters", mend)
    for index, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            text = json.dumps(output)
            images = sum(len(v) for k, v in output.get("data", {}).items() if k.startswith("image/"))
            if len(text) - images > MAX_OUTPUT:
                yield Finding(
                    f"an output of cell {index} has {len(text) // 1000} kB, {MAX_OUTPUT // 1000} are allowed",
                    "Round its data or show less, then `labkit refresh`",
                )
            words = "".join(output.get("text", "")) + "".join(
                map(str, output.get("data", {}).get("text/plain", ""))
            )
            private = _PRIVATE.search(words)
            if private:
                yield Finding(
                    f"an output of cell {index} shows a path ({private[0]}...)", "Print no paths; " + mend
                )


def _claims(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    mend = f"Call run.claim(id, values) once for each claim of labkit/papers/{paper.slug}.toml"
    made: list[str] = []
    for cell in notebook.code_cells(nb):
        for node in _nodes(cell.source):
            if (
                isinstance(node, ast.Call)
                and _name(node.func) == "claim"
                and isinstance(node.func, ast.Attribute)
            ):
                literal = node.args[0] if node.args else None
                if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                    made.append(literal.value)
                else:
                    yield Finding(f"`{ast.unparse(node)[:60]}` does not name its claim literally", mend)
    registered = [claim.id for claim in paper.claims]
    for name in registered:
        if made.count(name) != 1:
            yield Finding(f"claim {name!r} is made {made.count(name)} times", mend)
    for name in made:
        if name not in registered:
            yield Finding(f"claim {name!r} is not registered; {papers.nearest(name, registered)}", mend)
    recorded = [row.get("id") for row in nb.metadata.get("labkit", {}).get("claims", [])]
    if recorded != registered:
        yield Finding("the recorded verdicts are not those of the registered claims", _refresh(paper))
    if not any("verdicts" in _calls(cell.source) for cell in notebook.tagged(nb, "claims")):
        yield Finding(
            "no cell tagged 'claims' calls run.verdicts()", "End the claims cell with `run.verdicts()`"
        )


def _strip(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    for cell in notebook.tagged(nb, "verdict-strip"):
        if BEGIN not in cell.source or END not in cell.source:
            yield Finding("the verdict strip was never written", _refresh(paper))
            continue
        try:
            wanted = with_strip(cell.source, strip(paper, nb.metadata.get("labkit", {})))
        except (KeyError, ValueError):
            wanted = ""
        if wanted != cell.source:
            yield Finding("the verdict strip differs from the recorded verdicts", _refresh(paper))


def words(nb: Any) -> int:
    """Words of prose: Markdown cells without generated parts, code fences, formulas and link targets."""
    total = 0
    for cell in nb.cells:
        if cell.cell_type == "markdown" and "verdict-strip" not in notebook.tags(cell):
            text = re.sub(
                r"```.*?```|\$\$.*?\$\$|\$[^$\n]+\$|<[^>]+>|\]\([^)]*\)", " ", cell.source, flags=re.DOTALL
            )
            total += len(re.findall(r"[^\W_][\w'’-]*", text))
    return total


def code_lines(source: str) -> int:
    """Lines of a cell that are neither blank nor only a comment."""
    return sum(1 for line in source.splitlines() if line.strip() and not line.strip().startswith("#"))


def _budgets(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    mend = "Move code into the package, or say it shorter"
    if len(nb.cells) > MAX_CELLS:
        yield Finding(f"{len(nb.cells)} cells, {MAX_CELLS} are allowed", mend)
    counts = [code_lines(cell.source) for cell in notebook.code_cells(nb)]
    if sum(counts) > MAX_LINES:
        yield Finding(f"{sum(counts)} lines of code, {MAX_LINES} are allowed", mend)
    for index, count in enumerate(counts):
        if count > MAX_CELL_LINES:
            yield Finding(f"code cell {index} has {count} lines, {MAX_CELL_LINES} are allowed", mend)
    number = words(nb)
    if not WORDS[0] <= number <= WORDS[1]:
        yield Finding(f"{number} words of prose, {WORDS[0]} to {WORDS[1]} are wanted", "Write more, or less")


def _code(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        for line in cell.source.splitlines():
            if re.match(r"\s*[!%]\s*(pip|conda|uv|apt)\b|\s*!", line):
                yield Finding(
                    f"cell {index} runs `{line.strip()}`",
                    "Notebooks install nothing: say it in pyproject.toml",
                )
        try:
            nodes = list(_nodes(cell.source, strict=True))
        except SyntaxError as error:
            yield Finding(f"cell {index} is not plain Python ({error.msg})", "Leave magics out")
            continue
        for node in nodes:
            if isinstance(node, ast.Name | ast.Attribute) and _name(node) == "FigureWidget":
                yield Finding(
                    f"cell {index} makes a FigureWidget", "Use labkit.lab.figures and widgets.panel"
                )
            if (
                isinstance(node, ast.Call)
                and _name(node.func) == "cuda"
                and isinstance(node.func, ast.Attribute)
            ):
                yield Finding(f"cell {index} calls .cuda()", "Use run.device")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                if re.fullmatch(r"cuda(:\d+)?|mps", text):
                    yield Finding(f"cell {index} names the device {text!r}", "Use run.device")
                elif _PATH.match(text) or _DATA_FILE.match(text):
                    yield Finding(
                        f"cell {index} holds the path {text!r}", "Find data by name: labkit.testbeds.data"
                    )


def _kernel(nb: Any, paper: papers.Paper) -> Iterator[Finding]:
    if dict(nb.metadata.get("kernelspec", {})) != notebook.KERNELSPEC:
        yield Finding("the kernel is not python3", _refresh(paper))
    if "version" in nb.metadata.get("language_info", {}):
        yield Finding("the Python version is stored", _refresh(paper))


def _places(paper: papers.Paper) -> Iterator[Finding]:
    """One name, five places; the benchmark only where there is a hot path."""
    top = project.root()
    module = top.joinpath(*paper.module.split("."))
    wanted = {
        f"labkit/papers/{paper.slug}.toml": (top / "labkit" / "papers" / f"{paper.slug}.toml").is_file(),
        f"{module.relative_to(top)}.py": module.with_suffix(".py").is_file()
        or (module / "__init__.py").is_file(),
        f"tests/{paper.family}/test_{paper.slug}.py": any(
            (top / "tests" / paper.family).glob(f"test_{paper.slug}*.py")
        )
        or any((top / "tests" / paper.family / paper.slug).glob("test_*.py")),
    }
    for name, there in wanted.items():
        if not there:
            yield Finding(
                f"{name} is missing", f"`labkit new {paper.slug} --family {paper.family}` writes a frame"
            )


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _nodes(source: str, strict: bool = False) -> Iterator[ast.AST]:
    try:
        yield from ast.walk(ast.parse(source))
    except SyntaxError:
        if strict:
            raise


def _calls(source: str) -> set[str]:
    return {_name(node.func) for node in _nodes(source) if isinstance(node, ast.Call)}
