"""Two processes train the same keys as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from labkit.testbeds.models import tiny

from . import keys_values_script

pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]


def test_two_processes_train_the_same_keys_as_one(tmp_path: Path) -> None:
    pair, alone = tmp_path / "pair", tmp_path / "alone"
    for folder in (pair, alone):
        folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, keys_values_script.__file__, str(pair)],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    keys_values_script.main(alone)
    facts = [json.loads((pair / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    one = json.loads((alone / "process-0.json").read_text())
    assert facts == [one | {"world": 2}] * 2
    assert one["names"] == [f"model.layers.{i}.mlp.gate_proj.weight" for i in (0, 1)]
    first, second, single = (
        load_file(path / f"process-{rank}.safetensors") for path, rank in ((pair, 0), (pair, 1), (alone, 0))
    )
    start = dict(tiny("llama", width=32, heads=2, layers=2, vocab=50, seed=0).named_parameters())
    for name, tensor in single.items():
        assert torch.equal(first[name], second[name])
        if name in one["names"]:
            assert (tensor - start[name]).abs().max() > 1e-4
            torch.testing.assert_close(first[name], tensor, atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(first[name], start[name])
            assert torch.equal(tensor, start[name])
