"""Each rule of notebook hygiene finds its fault and names what mends it."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from labkit import papers
from labkit.lab import hygiene, notebook, refresh, scaffold


@pytest.fixture
def clean(repository, monkeypatch):
    """A clean notebook, its paper, and a function that writes it and collects the findings."""
    import tomllib

    scaffold.create("fresh", "fields", arxiv="2408.03675")
    data = tomllib.loads((repository / "labkit" / "papers" / "fresh.toml").read_text())
    paper = papers.parse("fresh", data)
    path = repository / paper.notebook
    nb = notebook.read(path)
    for number, cell in enumerate(notebook.code_cells(nb)):
        cell.execution_count = number + 1
        cell.outputs = [new_output("stream", text="fine\n")]
    for cell in nb.cells:
        if cell.cell_type == "markdown" and "TODO" in cell.source:
            cell.source = cell.source.replace("TODO", "word " * 55)
    record = {"claims": [{"id": "first-claim", "verdict": "reproduced", "mean": 0.5, "interval": [0.4, 0.6]}]}
    record["claims"][0] |= {"threshold": 0.0, "direction": ">=", "unit": "", "close": False, "reason": ""}
    nb.metadata.labkit = record | {"size": "laptop", "seconds": 1, "peak_memory_mb": 1}

    def findings(fresh=True):
        if fresh:
            nb.metadata.labkit["code_hash"] = notebook.code_hash(nb)
            for cell in notebook.tagged(nb, "verdict-strip"):
                cell.source = refresh.with_strip(cell.source, refresh.strip(paper, nb.metadata.labkit))
        nbformat.write(nb, path)
        return [str(item) for item in hygiene.check(paper, path)]

    return nb, findings


def code(nb, tag):
    return notebook.tagged(nb, tag)[0]


def test_nothing_is_found_in_a_clean_notebook(clean):
    _, findings = clean
    assert findings() == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("!pip install x", "runs `!pip install x`"),
        ("%pip install x", r"%pip install x"),
        ('x = "cuda:0"', "names the device 'cuda:0'"),
        ("model.cuda()", r"calls .cuda()"),
        ('open("../data/x.txt")', "holds the path '../data/x.txt'"),
        ('open("/srv/data/x")', "holds the path '/srv/data/x'"),
        ('read("points.csv")', "holds the path 'points.csv'"),
        ("go.FigureWidget()", "makes a FigureWidget"),
        ('run.claim("frist-claim", [1])', "did you mean 'first-claim'?"),
        ('run.claim("first-claim", [1])', "made 2 times"),
        ("run.claim(name, [1])", "does not name its claim literally"),
        ("\n".join(f"x{i} = 1" for i in range(30)), "25 are allowed"),
    ],
)
def test_code_that_does_not_belong(clean, line, what):
    nb, findings = clean
    code(nb, "checks").source += "\n" + line
    assert any(what in item for item in findings()), findings()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda nb: code(nb, "parameters").update(source='size: str = "smoke"\nsead = 0'), "sets 'sead'"),
        (
            lambda nb: code(nb, "parameters").update(source='size: str = "smoke"'),
            "size is 'smoke' in the parameters",
        ),
        (lambda nb: code(nb, "parameters").update(source="size = 'laptop'"), "has no type"),
        (lambda nb: nb.cells[0].update(source="no title"), "the first cell is no title"),
        (lambda nb: nb.cells[0].update(source="# Title"), "does not link the paper"),
        (lambda nb: nb.cells.insert(1, nb.cells.pop(3)), "comes too early"),
        (lambda nb: code(nb, "widget").metadata.update(tags=[]), "no cell is tagged 'widget'"),
        (lambda nb: nb.cells[-1].update(source="## Refs"), "section 'references' is missing"),
        (lambda nb: nb.cells.insert(5, nb.cells.pop(-1)), "section 'references' comes too early"),
        (lambda nb: nb.metadata.update(widgets={}), "widget state is stored"),
        (
            lambda nb: nb.metadata.update(kernelspec={"name": "other", "display_name": "x"}),
            "kernel is not python3",
        ),
        (lambda nb: code(nb, "claims").update(outputs=[]), "nbval would compare nothing"),
        (
            lambda nb: code(nb, "claims").update(execution_count=None),
            "not executed, or not from top to bottom",
        ),
        (
            lambda nb: code(nb, "claims").metadata.update(tags=["claims"]),
            "2 cells are tagged 'nbval-check-output'",
        ),
        (
            lambda nb: code(nb, "checks").update(
                outputs=[new_output("error", ename="E", evalue="", traceback=[])]
            ),
            "holds the error E",
        ),
        (
            lambda nb: code(nb, "checks").update(outputs=[new_output("stream", text="/home/someone/x")]),
            "shows a path",
        ),
        (
            lambda nb: code(nb, "checks").update(outputs=[new_output("stream", text="x" * 200_000)]),
            "200 kB, 100 are allowed",
        ),
        (lambda nb: nb.cells.extend(new_code_cell("1") for _ in range(30)), "cells, 40 are allowed"),
        (lambda nb: nb.cells.append(new_markdown_cell("word " * 1200)), "words of prose"),
        (lambda nb: nb.metadata.labkit.update(claims=[]), "recorded verdicts are not those"),
        (
            lambda nb: nb.cells.insert(
                4, new_code_cell("seed = 1", metadata={"tags": ["injected-parameters"]})
            ),
            "injected parameters",
        ),
    ],
)
def test_faults_of_the_notebook(clean, change, what):
    nb, findings = clean
    change(nb)
    found = findings()
    assert any(what in item for item in found), found


def test_stale_outputs_and_an_edited_strip(clean):
    nb, findings = clean
    assert findings() == []
    code(nb, "checks").source += "\nx = 1"
    assert any(
        "older than the code" in item and "labkit refresh fresh" in item for item in findings(fresh=False)
    )
    strip = notebook.tagged(nb, "verdict-strip")[0]
    strip.source = strip.source.replace("reproduced", "reproduced twice")
    assert any("differs from the recorded verdicts" in item for item in findings(fresh=False))


def test_duplicate_cell_ids(clean, repository):
    import json

    _, findings = clean
    findings()
    path = repository / "notebooks" / "fields" / "fresh.ipynb"
    raw = json.loads(path.read_text())
    raw["cells"][1]["id"] = raw["cells"][0]["id"]
    path.write_text(json.dumps(raw))
    assert any("ids are missing or not unique" in str(item) for item in hygiene.file_findings(path))


def test_five_places(clean, repository):
    _, findings = clean
    (repository / "tests" / "fields" / "test_fresh.py").unlink()
    assert any("tests/fields/test_fresh.py is missing" in item for item in findings())


def test_words_leave_generated_parts_and_formulas_out():
    nb = nbformat.v4.new_notebook()
    nb.cells = [new_markdown_cell("two words $x + y$ and [a link](https://x.org/y)\n```\ncode here\n```")]
    nb.cells.append(new_markdown_cell("not counted", metadata={"tags": ["verdict-strip"]}))
    assert hygiene.words(nb) == 5
