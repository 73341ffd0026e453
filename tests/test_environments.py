"""The environment files install what is imported, and Binder's files do what Binder needs."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
# Imports under another name than their distribution's, or that come with another one.
BROUGHT_BY = {
    "choreographer": "kaleido",
    "huggingface_hub": "transformers",
    "IPython": "ipykernel",
    "jupyter_client": "ipykernel",
    "markupsafe": "jinja2",
    "packaging": "transformers",
    "pygments": "nbconvert",
    "sklearn": "scikit-learn",
    "traitlets": "ipykernel",
    "yaml": "pyyaml",
}
# Used where they are there, and asked for by an extra of their own.
OPTIONAL = {
    "accelerate",
    "dask",
    "datasets",
    "distributed",
    "kaleido",
    "kvpress",
    "nbval",
    "playwright",
    "triton",
    "trl",
}
CONDA_NAMES = {"pytorch-cpu": "torch", "pytorch": "torch"}


def canonical(requirement: str) -> str:
    """Distribution that a requirement names.

    >>> canonical("Foo_bar[x]>=1.0 ; python_version > '3'")
    'foo-bar'
    """
    found = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def load(name: str) -> tuple[list[str], list[str]]:
    """conda's and pip's lines of an environment file."""
    content = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert content["channels"] == ["conda-forge", "nodefaults"]
    conda = [line for line in content["dependencies"] if isinstance(line, str)]
    pip = [line for part in content["dependencies"] if isinstance(part, dict) for line in part["pip"]]
    return conda, pip


def extras(*names: str) -> set[str]:
    """Distributions that the project asks for, with some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {canonical(line) for line in project["dependencies"]}
    for name in names:
        for line in project["optional-dependencies"][name]:
            own = re.match(r"labkit\[([^\]]+)\]", line)
            found |= extras(*own[1].split(",")) if own else {canonical(line)}
    return found


def installs(name: str) -> set[str]:
    """Distributions that an environment file installs."""
    conda, pip = load(name)
    found = {CONDA_NAMES.get(n := re.split(r"[=<>]", line)[0].strip(), n) for line in conda}
    for line in pip:
        own = re.fullmatch(r"-e \.\[([^\]]+)\]", line)
        found |= extras(*own[1].split(",")) if own else {canonical(line)}
    return found


def imported() -> dict[str, str]:
    """Distribution to a place that imports it, over the package and the notebooks."""
    sources = {
        str(path.relative_to(ROOT)): path.read_text("utf-8") for path in (ROOT / "labkit").rglob("*.py")
    }
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        sources[str(path.relative_to(ROOT))] = re.sub(r"(?m)^\s*[%!].*$", "", code)
    found: dict[str, str] = {}
    for place, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.split(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name not in ("labkit", "google"):
                    found.setdefault(canonical(BROUGHT_BY.get(name, name)), f"{place} imports {name}")
    return found


@pytest.mark.parametrize("name", ["environment.yml", "binder/environment.yml"])
def test_every_import_is_installed(name):
    missing = {dist: place for dist, place in imported().items() if dist not in installs(name) | OPTIONAL}
    assert not missing, f"{name} lacks {missing}"


def test_people_get_every_tool():
    assert extras("dev") <= installs("environment.yml")


def test_the_package_asks_for_what_it_imports():
    declared = extras("notebooks", "png", "train", "finetuning", "rlhf", "dask", "gpu", "kvpress", "dev")
    missing = {dist: place for dist, place in imported().items() if dist not in declared}
    assert not missing, f"pyproject.toml lacks {missing}"


def test_binder_builds_a_cached_layer_with_cpu_torch():
    conda, pip = load("binder/environment.yml")
    assert "python=3.11" in conda
    assert any(line.startswith("pytorch-cpu") for line in conda)
    for line in pip:
        assert not re.search(r"^-|[./\\@]\s*$|^\.|file:|labkit", line), (
            f"{line!r} is local, and rebuilds torch"
        )
        assert canonical(line) != "torch", "PyPI's torch brings gigabytes of CUDA"
    # Everything that running needs; nothing that only checks need.
    assert extras("notebooks") <= installs("binder/environment.yml")


def test_binder_pins_what_the_checks_pass_with():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {canonical(line): line.split("==")[1] for line in lines if "==" in line}
    for line in load("binder/environment.yml")[1]:
        pin = re.fullmatch(r"([A-Za-z0-9_-]+)~=(\d+\.\d+)", line)
        assert pin, f"{line!r} is not pinned to a minor version, as in name~=1.2"
        assert ".".join(tested[canonical(pin[1])].split(".")[:2]) == pin[2], (
            f"{line}: tested is {tested[canonical(pin[1])]}"
        )


def test_torch_floor_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floor = next(line for line in project["dependencies"] if line.startswith("torch")).removeprefix("torch")
    for name in ("environment.yml", "binder/environment.yml"):
        assert f"pytorch-cpu{floor}" in load(name)[0]


@pytest.mark.parametrize("name", ["postBuild", "start"])
def test_scripts_run_and_stop_at_errors(name):
    path = ROOT / "binder" / name
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_start_hands_over_to_the_server():
    path = ROOT / "binder" / "start"
    assert path.read_text(encoding="utf-8").rstrip().endswith('\nexec "$@"')
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    ran = subprocess.run([path, sys.executable, "-c", show], capture_output=True, text=True, check=True)
    variables = json.loads(ran.stdout)
    assert variables["OMP_NUM_THREADS"] == "1"
    assert variables["TOKENIZERS_PARALLELISM"] == "false"
    assert variables["HF_HUB_OFFLINE"] == "1"
    folder = Path(variables["JUPYTER_CONFIG_PATH"].split(os.pathsep)[0])
    settings = json.loads((folder / "jupyter_server_config.json").read_text(encoding="utf-8"))
    assert settings["MappingKernelManager"]["cull_idle_timeout"] == 300


def test_post_build_installs_without_dependencies():
    assert "pip install --no-deps" in (ROOT / "binder" / "postBuild").read_text(encoding="utf-8")
