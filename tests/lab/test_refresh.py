"""Refreshing a committed notebook, the verdict strip, and the hygiene of a scaffolded paper once filled in."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import nbformat
import pytest

from labkit import papers
from labkit.lab import notebook, refresh, runner, scaffold

from .small import build

RECORD = {
    "size": "laptop",
    "seconds": 41,
    "peak_memory_mb": 640,
    "claims": [
        {
            "id": "first-claim",
            "verdict": "not reproduced",
            "mean": 0.25,
            "interval": [0.2, 0.3],
            "threshold": 0.5,
            "direction": ">=",
            "unit": "",
            "close": False,
            "reason": "",
        }
    ],
}


@pytest.fixture
def paper():
    """A paper with one claim."""
    claim = {
        "id": "first-claim",
        "text": "A | B.",
        "metric": "m",
        "direction": ">=",
        "threshold": {"laptop": 0.5},
    }
    words = dict.fromkeys(("title", "authors", "venue", "arxiv", "family", "idea", "drag"), "x")
    return papers.parse("made_up", {**words, "year": 2024, "sizes": {"laptop": _size()}, "claims": [claim]})


def _size():
    return {"seconds": 1, "memory_mb": 1}


def test_strip_says_claim_measure_threshold_and_verdict(paper):
    text = refresh.strip(paper, RECORD)
    assert "| A \\| B. | 0.250 [0.200, 0.300] | >= 0.500 | ✗ **not reproduced** |" in text
    assert "41 s with 640 MB" in text


def test_strip_is_written_between_its_markers_and_again():
    once = refresh.with_strip("Before.", "one")
    assert once == f"Before.\n\n{refresh.BEGIN}\none\n{refresh.END}"
    assert (
        refresh.with_strip(once + "\nAfter.", r"two \1")
        == f"Before.\n\n{refresh.BEGIN}\ntwo \\1\n{refresh.END}\nAfter."
    )


def test_noise_is_taken_out():
    nb = build("1")
    nb.metadata.papermill = {"x": 1}
    nb.metadata.widgets = {"state": {}}
    nb.metadata.language_info = {"name": "python", "version": "3.11"}
    cell = nb.cells[2]
    cell.metadata.papermill = {"duration": 1}
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "VBox()"}
    cell.outputs = [
        nbformat.v4.new_output("display_data", data=view),
        nbformat.v4.new_output("display_data", data={}),
    ]
    notebook.strip(nb)
    assert "papermill" not in nb.metadata
    assert "widgets" not in nb.metadata
    assert nb.metadata.language_info == {"name": "python"}
    assert cell.metadata == {}
    assert [output.data for output in cell.outputs] == [{"text/plain": "VBox()"}]


def test_code_hash_ignores_prose_outputs_and_injection():
    nb = build("x = 1")
    before = notebook.code_hash(nb)
    nb.cells[0].source = "# other"
    nb.cells[2].outputs = [nbformat.v4.new_output("stream", text="1")]
    nb.cells.insert(2, nbformat.v4.new_code_cell("seed = 3", metadata={"tags": ["injected-parameters"]}))
    assert notebook.code_hash(nb) == before
    nb.cells[-1].source = "x = 2"
    assert notebook.code_hash(nb) != before


def test_a_failing_notebook_is_left_as_it_was(repository, monkeypatch):
    path = repository / "notebooks" / "kv" / "nacl.ipynb"
    path.parent.mkdir()
    nbformat.write(build("1 / 0"), path)
    before = path.read_bytes()
    error = {"cell": 2, "name": "ZeroDivisionError", "message": "division by zero"}
    failed = runner.RunResult("nacl", "k", repository, "failed", {}, 1.0, 1.0, {}, error, "")
    monkeypatch.setattr(runner, "execute", lambda *_, **__: failed)
    with pytest.raises(refresh.RefreshError, match="failed in cell 2: ZeroDivisionError: division by zero"):
        refresh.refresh("nacl")
    assert path.read_bytes() == before


class TestScaffold:
    def test_refuses_bad_names_and_overwriting(self, repository):
        for slug, family in (("Bad", "kv"), ("9x", "kv"), ("class", "kv"), ("x-y", "kv"), ("fine", "lab")):
            with pytest.raises(ValueError):
                scaffold.create(slug, family)
        (repository / "tests" / "kv").mkdir(parents=True)
        (repository / "tests" / "kv" / "test_fresh.py").write_text("mine")
        with pytest.raises(FileExistsError, match=r"tests/kv/test_fresh\.py exists; nothing was written"):
            scaffold.create("fresh", "kv")
        assert not (repository / "labkit" / "papers" / "fresh.toml").exists()
        assert (repository / "tests" / "kv" / "test_fresh.py").read_text() == "mine"

    def test_a_title_with_quotes_stays_valid_toml(self, repository):
        import tomllib

        scaffold.create("quoted", "fields", title='A "quoted" \\ title')
        data = tomllib.loads((repository / "labkit" / "papers" / "quoted.toml").read_text())
        assert data["title"] == 'A "quoted" \\ title'
        assert papers.parse("quoted", data).family == "fields"

    @pytest.mark.slow
    def test_filled_in_it_runs_refreshes_and_is_clean(self, repository):
        """The path of a newcomer: new, fill in the prose, refresh, check, test."""
        environment = {**os.environ, "PYTHONPATH": str(repository), "LABKIT_ROOT": str(repository)}

        def call(*arguments):
            return subprocess.run(
                [sys.executable, *arguments],
                cwd=repository,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )

        made = call("-m", "labkit.lab.cli", "new", "fresh", "--family", "fields", "--arxiv", "2408.03675")
        assert made.returncode == 0, made.stderr
        untouched = call("-m", "labkit.lab.cli", "check-notebook", "fresh")
        assert untouched.returncode == 1
        assert "Run `labkit refresh fresh`" in untouched.stdout
        path = repository / "notebooks" / "fields" / "fresh.ipynb"
        nb = notebook.read(path)
        for cell in nb.cells:
            if cell.cell_type == "markdown" and "TODO" in cell.source:
                cell.source = cell.source.replace("TODO", "word " * 55)
        notebook.write(nb, path)
        refreshed = call("-m", "labkit.lab.cli", "refresh", "fresh", "--no-png")
        assert refreshed.returncode == 0, refreshed.stderr
        assert "1 reproduced" in refreshed.stdout
        clean = call("-m", "labkit.lab.cli", "check-notebook", "fresh", "--json")
        assert json.loads(clean.stdout) == {"fresh": []}
        tested = call("-m", "pytest", "-q", "tests/fields/test_fresh.py", "-p", "no:cacheprovider")
        assert tested.returncode == 0, tested.stdout
        listed = json.loads(call("-m", "labkit.lab.cli", "list", "--json").stdout)
        assert next(row for row in listed if row["slug"] == "fresh")["verdicts"] == {"reproduced": 1}
        again = notebook.read(path)
        notebook.tagged(again, "checks")[0].source += "\nanswer = 0.4"
        notebook.write(again, path)
        stale = call("-m", "labkit.lab.cli", "check-notebook", "fresh")
        assert "the outputs are older than the code" in stale.stdout
