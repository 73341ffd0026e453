"""The wheel holds all that the package needs, and works away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from .test_readme import example

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(out.glob("labkit-*.whl"))


def test_the_wheel_holds_every_file_of_the_package(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("labkit/")}
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "labkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == ours
    assert "labkit/py.typed" in packed
    assert wheel.stat().st_size < 20e6


def test_the_readme_example_runs_from_the_wheel_alone(wheel, tmp_path):
    # The dependencies are those of this environment; labkit itself is the wheel's, in an environment of its own.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    query = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(
        subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    code, expected = example()
    code += "\nimport labkit; print(labkit.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -P keeps the working directory, and with it this repository, off the path.
    done = subprocess.run(
        [python, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *printed, where = done.stdout.splitlines(keepends=True)
    assert "".join(printed) == expected
    assert Path(where.strip()).is_relative_to(tmp_path)
