"""Checkpoints that were damaged, cut short, or can't be written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from labkit.training import checkpoint, checkpoints, latest_checkpoint
from labkit.training.state import optimizer_state, pack, restore_optimizer, unpack

from . import script
from .runs import records, same_bits


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    script.make(folder).run()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path) -> Path:
    """A finished run whose last checkpoint is to be harmed."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 1
    path.write_bytes(blob)


HARM = {
    "a flipped bit": (lambda p: flip(p / "model.safetensors"), "checksum of model.safetensors"),
    "a short file": (lambda p: (p / "optimizer.safetensors").write_bytes(b"12"), "has 2 bytes instead of"),
    "a missing file": (lambda p: (p / "rank-0.json").unlink(), "rank-0.json is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "a cut manifest": (lambda p: (p / "manifest.json").write_text('{"format": 1, "fi'), "can't be read"),
    "a strange manifest": (lambda p: (p / "manifest.json").write_text("[]"), "can't be read"),
    "a later format": (lambda p: (p / "manifest.json").write_text('{"format": 9}'), "format is 9"),
}


@pytest.mark.parametrize("harm", HARM, ids=list(HARM))
def test_damage_is_named_and_the_one_before_is_used(whole: Path, run: Path, harm: str) -> None:
    do, message = HARM[harm]
    do(run / "step-00000012")
    with pytest.warns(UserWarning, match=message):
        loop = script.make(run)
    assert loop.step == 8
    assert [c.step for c in checkpoints(run)] == [4, 8]
    assert (run / "damaged-step-00000012").is_dir()
    loop.run()
    same_bits(whole, run)
    assert records(run) == records(whole)


def test_when_all_are_damaged_the_run_begins_anew(run: Path) -> None:
    for found in checkpoints(run):
        (found.path / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"model.safetensors is missing"):
        assert latest_checkpoint(run) is None
    with pytest.warns(UserWarning, match=r"model.safetensors is missing"):
        loop = script.make(run)
    assert loop.step == 0
    assert loop.history == []


def test_only_the_last_stay_and_nothing_else_is_left(tmp_path) -> None:
    loop = script.make(tmp_path, steps=7, every=1)
    loop.run()
    assert [c.step for c in checkpoints(tmp_path)] == [5, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "log.jsonl",
        "step-00000005",
        "step-00000006",
        "step-00000007",
    ]
    kinds = {path.suffix for path in (tmp_path / "step-00000007").iterdir()}
    assert kinds == {".safetensors", ".json"}


def test_a_full_disk_stops_the_run_and_leaves_the_older_ones(run: Path, monkeypatch) -> None:
    shutil.rmtree(run / "step-00000012")
    loop = script.make(run)
    assert loop.step == 8

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        loop.run()
    monkeypatch.undo()
    assert [c.step for c in checkpoints(run)] == [4, 8]
    assert not list(run.glob(".partial*"))
    assert latest_checkpoint(run).step == 8


def test_saving_again_replaces(run: Path) -> None:
    loop = script.make(run)
    assert loop.step == 12
    (run / "step-00000012" / "extra").write_text("")
    loop.save()
    assert not (run / "step-00000012" / "extra").exists()
    assert latest_checkpoint(run).step == 12


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True, fused=True),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.Adafactor(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
        lambda p: torch.optim.NAdam(p, lr=0.1),
    ],
)
def test_any_optimizer_comes_back_to_the_bit(tmp_path, make) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            optimizer.zero_grad()
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
            optimizer.step()

    def groups(model: nn.Module) -> list[dict]:
        return [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]

    model = nn.Linear(3, 2)
    optimizer = make(groups(model))
    run(model, optimizer, range(3))
    document, moments = optimizer_state(optimizer, model)
    (tmp_path / "optimizer.json").write_text(json.dumps(document))
    checkpoint.safetensors.torch.save_file(moments, tmp_path / "optimizer.safetensors")
    other = nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    again = make(groups(other))
    restore_optimizer(again, other, tmp_path)
    run(model, optimizer, range(3, 6))
    run(other, again, range(3, 6))
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)
    swapped = make(groups(other)[::-1])
    with pytest.raises(ValueError, match="other groups or order"):
        restore_optimizer(swapped, other, tmp_path)


def test_float32_moments_of_bfloat16_weights_keep_their_bits(tmp_path) -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight] = {"master": torch.rand(2, 3)}
    document, moments = optimizer_state(optimizer, model)
    (tmp_path / "optimizer.json").write_text(json.dumps(document))
    checkpoint.safetensors.torch.save_file(moments, tmp_path / "optimizer.safetensors")
    again = torch.optim.SGD(model.parameters(), lr=0.1)
    restore_optimizer(again, model, tmp_path)
    assert torch.equal(again.state[model.weight]["master"], optimizer.state[model.weight]["master"])


def test_schedules_of_torch_come_back(tmp_path) -> None:
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR, SequentialLR

    def sequence(optimizer: torch.optim.Optimizer) -> SequentialLR:
        parts = [LinearLR(optimizer, 0.1, 1.0, 3), CosineAnnealingLR(optimizer, 9)]
        return SequentialLR(optimizer, parts, [3])

    for make in (sequence, lambda o: MultiStepLR(o, [2, 5]), lambda o: OneCycleLR(o, 0.1, total_steps=12)):
        rates = []
        for stops in ([12], [5, 12]):
            folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
            for stop in stops:
                torch.manual_seed(0)
                model = script.Plain()
                optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
                loop = script.TrainingLoop(
                    model,
                    script.DrawnBatches(script.draw, batch=2),
                    script.loss,
                    optimizer,
                    script.TrainingConfig(steps=stop),
                    scheduler=make(optimizer),
                    directory=folder,
                )
                loop.run()
            rates.append([(record["lr"], record["loss"]) for record in loop.history])
        assert rates[0] == rates[1]
        assert len({rate for rate, _ in rates[0]}) > 2


def test_pack_and_unpack_are_inverse() -> None:
    state = {"a": [1, 2.5, None, True, "x"], "b": {3: (torch.arange(3), {"$odd": 1})}, "empty": {}}
    tensors: dict[str, torch.Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(state, tensors))), tensors)
    assert torch.equal(back["b"][3][0], torch.arange(3))
    assert back["b"][3][1] == {"$odd": 1}
    assert back["a"] == state["a"]
    assert back["empty"] == {}
    with pytest.raises(TypeError, match=r"hook\.0 is a function, which a checkpoint can't hold"):
        pack({"hook": [lambda: None]}, {})
