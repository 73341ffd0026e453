"""The launch files for ``accelerate launch --config_file`` that ship with the package."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

_FOLDER = Path(str(resources.files("labkit.training"))) / "configs"


def launch_configs() -> list[str]:
    """Names of the launch files.

    Examples
    --------
    >>> launch_configs()
    ['ddp', 'ddp_cpu', 'fsdp2', 'fsdp2_cpu']
    """
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def launch_config(name: str) -> Path:
    """Path of a launch file, for ``accelerate launch --config_file``.

    Parameters
    ----------
    name : str
        ``"ddp"`` and ``"fsdp2"`` for the GPUs of one machine in bfloat16 (``--num_processes`` says how many);
        ``"ddp_cpu"`` and ``"fsdp2_cpu"`` for two processes on the CPU in float32, to try a script out.

    Raises
    ------
    ValueError
        When there is no such file.

    Examples
    --------
    >>> launch_config("fsdp2").name
    'fsdp2.yaml'
    """
    known = launch_configs()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no launch file is called {name!r}{hint}; there are: {', '.join(known)}")
    return _FOLDER / f"{name}.yaml"
