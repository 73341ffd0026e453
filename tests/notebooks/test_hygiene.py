"""Every committed notebook: anatomy, claims, budgets, fresh and clean outputs."""

from __future__ import annotations

import pytest

from labkit import papers
from labkit.lab import hygiene, project, refresh

SLUGS = refresh.all_slugs()


@pytest.mark.parametrize("slug", SLUGS)
def test_notebook_is_clean(slug):
    findings = hygiene.check(papers.load(slug))
    assert not findings, "\n" + "\n".join(f"- {item}" for item in findings)


def test_every_registered_paper_has_its_notebook():
    missing = [slug for slug in papers.slugs() if slug not in SLUGS]
    assert not missing, f"registered without a notebook: {', '.join(missing)}; `labkit new SLUG` makes one"


def test_every_notebook_is_registered_or_the_index():
    known = {project.root() / papers.load(slug).notebook for slug in papers.slugs()}
    index = project.root() / "notebooks" / "index.ipynb"
    for path in project.committed():
        assert path in known or path == index, f"{path} belongs to no paper of labkit/papers"
        problems = list(hygiene.check_index(path) if path == index else hygiene.file_findings(path))
        assert not problems, "\n".join(map(str, problems))
