"""A repository of its own for tests that write into one."""

from __future__ import annotations

import shutil

import pytest

from labkit.lab import project


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with the package's sources and an empty notebooks folder, taken for the repository."""
    top = tmp_path / "repository"
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
    shutil.copytree(project.package_folder(), top / "labkit", ignore=ignored)
    (top / "notebooks").mkdir()
    monkeypatch.setenv("LABKIT_ROOT", str(top))
    return top
