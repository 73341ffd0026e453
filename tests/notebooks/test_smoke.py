"""Every notebook through papermill at smoke size, with a seed that is not the committed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from labkit import papers
from labkit.lab import project, refresh, runner

SLUGS = refresh.all_slugs()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All smoke runs, two at a time."""
    out = tmp_path_factory.mktemp("smoke")
    found = runner.run_many(SLUGS, "smoke", jobs=2, out=out, parameters={"seed": 1}, table=False)
    return {result.slug: result for result in found}


@pytest.mark.parametrize("slug", SLUGS)
def test_runs_to_its_end(results, slug):
    result = results[slug]
    assert result.ok, json.dumps(result.error, indent=1)


@pytest.mark.parametrize("slug", SLUGS)
def test_judges_every_registered_claim(results, slug):
    assert results[slug].verdicts is not None
    judged = [claim["id"] for claim in results[slug].verdicts["claims"]]
    assert judged == [claim.id for claim in papers.load(slug).claims]
    assert results[slug].verdicts["seed"] == 1


@pytest.mark.parametrize("slug", SLUGS)
def test_keeps_its_memory_budget(results, slug):
    assert results[slug].peak_memory_mb < 1000, "a notebook may hold 1 GB"


@pytest.mark.skipif(not SLUGS, reason="no notebook is there yet")
def test_plain_papermill_runs_from_any_folder(tmp_path):
    """Without labkit's runner, with nothing but what papermill's own documentation says."""
    slug = SLUGS[0]
    source = project.root() / papers.load(slug).notebook
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LABKIT_") or name == "LABKIT_CACHE"
    }
    environment["PYTHONPATH"] = str(project.package_folder().parent)
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(source),
        "out.ipynb",
        "-p",
        "size",
        "smoke",
        "-p",
        "seed",
        "3",
    ]
    command += ["-k", "python3", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    executed = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", []))
    assert "seed 3" in printed
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == ["out.ipynb"]
