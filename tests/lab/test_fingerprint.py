"""What a run depends on."""

from __future__ import annotations

import pytest

from labkit import papers
from labkit.lab import fingerprint

from .small import build


@pytest.fixture
def package(tmp_path):
    """A made-up labkit: a family of two modules over a kernel, and the lab with one tool."""
    files = {
        "__init__.py": "",
        "_lazy.py": "",
        "kv/__init__.py": "from labkit._lazy import attach",
        "kv/nacl.py": "def f():\n    from labkit.kernels import op\n",
        "kv/other.py": "",
        "moe/__init__.py": "",
        "kernels/__init__.py": "",
        "kernels/op/__init__.py": "from .reference import g",
        "kernels/op/reference.py": "",
        "kernels/unused.py": "",
        "lab/__init__.py": "",
        "lab/session.py": "from labkit import papers\nfrom . import cache",
        "lab/cache.py": "",
        "lab/runner.py": "",
        "papers/__init__.py": "",
        "papers/nacl.toml": "",
        "testbeds/__init__.py": "",
        "testbeds/weights.safetensors": "",
    }
    for name, text in files.items():
        path = tmp_path / "labkit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "labkit"


def reached(package, *sources):
    return {str(path.relative_to(package)) for path in fingerprint.closure(sources, package)}


def test_a_module_reaches_itself_and_what_it_imports(package):
    assert reached(package, "from labkit.kv.nacl import f") == {
        "__init__.py",
        "kv/__init__.py",
        "_lazy.py",
        "kv/nacl.py",
        "kernels/__init__.py",
        "kernels/op/__init__.py",
        "kernels/op/reference.py",
    }


def test_a_lazy_package_reaches_the_whole_family(package):
    found = reached(package, "from labkit.kv import NACLPress")
    assert {"kv/nacl.py", "kv/other.py", "kernels/op/reference.py"} <= found
    assert "moe/__init__.py" not in found
    assert "kernels/unused.py" not in found


def test_a_submodule_named_by_from_is_that_module(package):
    assert "kv/other.py" not in reached(package, "from labkit.kv import nacl")


def test_the_lab_counts_without_its_tools(package):
    found = reached(package, "from labkit import lab")
    assert {"lab/session.py", "lab/cache.py", "papers/__init__.py"} <= found
    assert "lab/runner.py" not in found
    assert "papers/nacl.toml" not in found


def test_data_beside_the_code_counts(package):
    assert "testbeds/weights.safetensors" in reached(package, "import labkit.testbeds as t")


def test_everything_for_the_bare_package(package):
    assert "moe/__init__.py" in reached(package, "import labkit\nlabkit.moe")


def test_nothing_for_other_libraries_and_magic(package):
    assert reached(package, "%matplotlib inline\nimport numpy\n!ls") == set()


def test_tools_are_not_imported_by_what_a_notebook_uses():
    from labkit.lab import project

    names = {
        ".".join(path.relative_to(project.package_folder().parent).with_suffix("").parts)
        for path in fingerprint.closure(["from labkit import lab", "from labkit.lab import figures, widgets"])
    }
    assert "labkit.lab.session" in names
    assert not names & fingerprint.TOOLS


def test_changes_with_code_parameters_and_versions(monkeypatch):
    paper = papers.load("nacl")
    nb = build("from labkit import lab")
    base = fingerprint.of_run(nb, {"seed": 0}, paper)
    assert fingerprint.of_run(nb, {"seed": 0}, paper) == base
    nb.cells[0].source = "# other prose"
    assert fingerprint.of_run(nb, {"seed": 0}, paper) == base
    assert fingerprint.of_run(nb, {"seed": 1}, paper) != base
    assert fingerprint.of_run(nb, {"seed": 0}, None) != base
    assert fingerprint.of_run(build("from labkit import lab  "), {"seed": 0}, paper) == base
    assert fingerprint.of_run(build("from labkit import kv"), {"seed": 0}, paper) != base
    monkeypatch.setattr(fingerprint, "versions", lambda: {"torch": "1"})
    assert fingerprint.of_run(nb, {"seed": 0}, paper) != base


def test_broken_code_does_not_stop_the_planning():
    assert fingerprint.of_run(build("this is no Python"), {}, None)
