"""The same training in one process and in two, under the launchers that users have."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from . import script
from .runs import gap, records, same_bits, tensors

pytest.importorskip("accelerate")
SCRIPT = str(Path(script.__file__))
ROOT = Path(SCRIPT).parents[2]
# Two processes add the same numbers in another order: what is allowed to differ, against what was seen (2e-7, 6e-7).
LOSSES, WEIGHTS = 2e-6, 1e-5


def launch(*words: str, kill: bool = False) -> None:
    """Run a launcher with one thread a process; killed runs must fail, others must not."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode != 0) == kill, done.stderr[-4000:]


def torchrun(*words: str, kill: bool = False) -> None:
    launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, *words, kill=kill)


def accelerate(config: str, *words: str) -> None:
    file = ROOT / "labkit" / "training" / "configs" / f"{config}.yaml"
    port = str(20000 + os.getpid() % 20000)
    launch(
        *("-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", port),
        *(SCRIPT, *words),
    )


def facts(folder: Path) -> list[dict[str, object]]:
    return [json.loads((folder / f"process-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    script.main([str(folder)])
    assert records(folder)[-1]["loss"] < 0.7 * records(folder)[0]["loss"]
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    torchrun(str(folder))
    return folder


def test_two_processes_of_torchrun_train_as_one(alone: Path, pair: Path) -> None:
    assert facts(pair) == [{"world": 2, "model": "DistributedDataParallel", "sharded": False}] * 2
    losses, weights = gap(pair, alone)
    assert losses < LOSSES
    assert weights < WEIGHTS


def test_two_processes_of_accelerate_train_a_transformers_model_as_one(tmp_path: Path) -> None:
    accelerate("ddp_cpu", str(tmp_path / "pair"), "--model", "llama", "--accumulate", "2")
    assert facts(tmp_path / "pair")[1] == {"world": 2, "model": "DistributedDataParallel", "sharded": False}
    script.main([str(tmp_path / "alone"), "--model", "llama"])
    losses, weights = gap(tmp_path / "pair", tmp_path / "alone")
    assert losses < LOSSES
    assert weights < WEIGHTS


def test_two_shards_train_as_one_and_resume_to_the_bit(alone: Path, tmp_path: Path) -> None:
    accelerate("fsdp2_cpu", str(tmp_path / "pair"), "--again", str(tmp_path / "again"), "--accumulate", "2")
    assert facts(tmp_path / "pair") == [{"world": 2, "model": "FSDPPlain", "sharded": True}] * 2
    losses, weights = gap(tmp_path / "pair", alone)
    assert losses < LOSSES
    assert weights < WEIGHTS
    same_bits(tmp_path / "pair", tmp_path / "again")
    # What the shards wrote is a whole model, which one process goes on with.
    shutil.copytree(tmp_path / "pair" / "step-00000008", tmp_path / "one" / "step-00000008")
    with pytest.warns(UserWarning, match="made by 2 processes, this run has 1"):
        loop = script.make(tmp_path / "one")
    loop.run()
    assert (
        max(abs(a["loss"] - b["loss"]) for a, b in zip(loop.history, records(alone)[8:], strict=True)) < 1e-5
    )
    assert tensors(tmp_path / "one").keys() == tensors(alone).keys()


@pytest.mark.slow
def test_two_killed_processes_resume_to_the_bit(pair: Path, tmp_path: Path) -> None:
    torchrun(str(tmp_path), "--die-at", "10", kill=True)
    assert not (tmp_path / "step-00000012").exists()
    torchrun(str(tmp_path))
    same_bits(pair, tmp_path)
    assert [r["step"] for r in records(tmp_path)] == list(range(1, 13))
