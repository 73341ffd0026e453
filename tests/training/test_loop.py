"""The loop in one process: what it computes, what it logs, how it resumes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from labkit.training import DrawnBatches, TrainingConfig, TrainingLoop, updates
from labkit.training.processes import ManyProcesses, choose

from . import script
from .runs import records, same_bits, tensors


def simple(config: TrainingConfig, optimizer=None, draw=None, **settings) -> TrainingLoop:
    torch.manual_seed(0)
    model = settings.pop("model", None) or nn.Linear(3, 1)
    made = optimizer(model.parameters()) if optimizer else torch.optim.AdamW(model.parameters(), lr=0.05)
    loss = settings.pop("loss", lambda model, x: (model(x) - x.sum(1, keepdim=True)).square().mean())
    data = settings.pop("data", None) or DrawnBatches(
        draw or (lambda rows, g: torch.randn(rows, 3, generator=g)), batch=8
    )
    return TrainingLoop(model, data, loss, made, config, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    script.main([str(folder)])
    return folder


class TestUpdate:
    def test_is_the_plain_torch_recipe(self) -> None:
        loop = simple(TrainingConfig(steps=6, clip=0.5), scheduler=lambda step: 1 / (step + 1))
        model = copy.deepcopy(loop.model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        losses = []
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.05 / (step + 1)
            x = next(loop.data.micro_batches(step))
            value = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            losses.append(value.item())
        assert [record["loss"] for record in loop.run()] == losses
        assert torch.equal(loop.model.weight, model.weight)

    @pytest.mark.parametrize("accumulate", [2, 4, 8])
    def test_accumulation_with_uneven_weights_is_the_whole_batch(self, tmp_path, accumulate: int) -> None:
        whole, cut = script.make(tmp_path / "1"), script.make(tmp_path / "2", accumulate=accumulate)
        for one, other in zip(whole.run(), cut.run(), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=2e-6)
            assert one["norm"] == pytest.approx(other["norm"], rel=1e-5)

    def test_means_of_other_numbers_are_weighted_as_the_loss(self) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        parts = [torch.ones(1, 1), 4 * torch.ones(3, 1)]
        loss = lambda m, x: (m(x).square().mean(), {"size": x.mean(), "one": 1})  # noqa: E731
        (step,) = updates(model, [parts], optimizer, loss, 1, weight=len)
        assert step.extra == {"size": pytest.approx(3.25), "one": 1.0}
        assert step.loss == pytest.approx(model(torch.cat(parts)).square().mean().item())

    def test_an_empty_micro_batch_is_refused(self) -> None:
        loop = simple(TrainingConfig(steps=1, accumulate=2), weight=lambda x: 0)
        with pytest.raises(ValueError, match="2 micro-batches of this step have weight 0"):
            loop.run()

    def test_hooks_see_the_whole_gradient_before_clipping_and_the_update(self) -> None:
        seen = []

        def before(model: nn.Module) -> None:
            seen.append(float(model.weight.grad.norm()))
            model.weight.grad[:, 0] = 0.0

        def after(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            seen.append((model.weight - start).abs().gt(0).tolist())

        loop = simple(
            TrainingConfig(steps=1, accumulate=2, clip=1e-3),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
            before_step=before,
            after_step=after,
        )
        start = loop.model.weight.detach().clone()
        loop.run()
        assert seen[0] > 0.1
        assert seen[1] == [[False, True, True]]

    def test_a_loss_that_is_not_finite_leaves_the_weights(self) -> None:
        loop = simple(TrainingConfig(steps=1), loss=lambda m, x: m(x).mean() * float("inf"))
        before = loop.model.weight.clone()
        with pytest.raises(FloatingPointError, match="at step 0"):
            loop.run()
        assert torch.equal(loop.model.weight, before)


class TestLog:
    def test_records_on_time_and_on_file(self, tmp_path) -> None:
        seen: list[dict] = []
        config = TrainingConfig(steps=10, log_every=4, evaluate_every=5)
        modes = []

        def evaluate(model: nn.Module) -> dict[str, float]:
            modes.append((model.training, torch.is_grad_enabled()))
            return {"mean": model.weight.mean()}

        loop = simple(config, evaluate=evaluate, directory=tmp_path, on_record=seen.append)
        loop.run()
        assert [record["step"] for record in seen] == [4, 5, 8, 10]
        assert ["evaluation" in record for record in seen] == [False, True, False, True]
        assert modes == [(False, False)] * 2
        assert loop.model.training
        assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == seen
        assert loop.history == seen

    def test_progress_and_single_steps(self) -> None:
        loop = simple(TrainingConfig(steps=5))
        assert next(iter(loop)).number == 0
        numbers = []
        loop.run(lambda steps: (numbers.append(step.number) or step for step in steps))
        assert numbers == [1, 2, 3, 4]
        assert loop.remaining == 0
        assert loop.run() == loop.history


class TestResume:
    @pytest.mark.parametrize("how", [["--die-at", "10"], ["--die-writing", "12"]])
    def test_a_killed_run_goes_on_to_the_bit(self, whole: Path, tmp_path, how: list[str]) -> None:
        root = Path(script.__file__).parents[2]
        words = [sys.executable, script.__file__, str(tmp_path), *how]
        done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(root)}, check=False, timeout=120)
        assert done.returncode == -signal.SIGKILL
        assert [path.name for path in sorted(tmp_path.glob("step-*"))] == ["step-00000004", "step-00000008"]
        assert bool(list(tmp_path.glob(".partial-*"))) == (how[0] == "--die-writing")
        assert records(tmp_path)[-1]["step"] > 8
        script.main([str(tmp_path)])
        same_bits(whole, tmp_path)
        assert records(tmp_path) == records(whole)
        assert not list(tmp_path.glob(".*"))

    def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(self, whole: Path, tmp_path) -> None:
        script.main([str(tmp_path), "--steps", "8"])
        before = records(tmp_path)
        script.main([str(tmp_path), "--steps", "8"])
        assert records(tmp_path) == before
        script.main([str(tmp_path), "--steps", "12"])
        assert tensors(tmp_path).keys() == tensors(whole).keys()
        assert all(torch.equal(value, tensors(whole)[name]) for name, value in tensors(tmp_path).items())

    def test_dropout_numpy_and_states_go_on(self, tmp_path) -> None:
        class Controller:
            def __init__(self) -> None:
                self.value, self.average = 1.0, torch.zeros(2)

            def state_dict(self) -> dict:
                return {"value": self.value, "average": self.average}

            def load_state_dict(self, state: dict) -> None:
                self.value, self.average = state["value"], state["average"]

        def run(folder: Path, steps: int) -> tuple[TrainingLoop, Controller]:
            held = Controller()
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))

            def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
                import random

                import numpy as np

                held.value *= 1.5
                held.average = held.average + torch.rand(2)
                return model(x).square().mean() + np.random.rand() + random.random()  # noqa: NPY002

            sgd = lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)  # noqa: E731
            config = TrainingConfig(steps=steps)
            loop = simple(config, sgd, model=model, loss=loss, directory=folder, state={"controller": held})
            loop.run()
            return loop, held

        long, first = run(tmp_path / "1", 6)
        run(tmp_path / "2", 3)
        short, second = run(tmp_path / "2", 6)
        assert [r["loss"] for r in long.history] == [r["loss"] for r in short.history]
        assert first.value == second.value
        assert torch.equal(first.average, second.average)
        assert all(map(torch.equal, long.model.state_dict().values(), short.model.state_dict().values()))

    @pytest.mark.parametrize(
        "change",
        [
            {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)},
            {"data": DrawnBatches(lambda rows, g: torch.zeros(rows, 3), batch=4)},
            {"config": TrainingConfig(steps=9, seed=1)},
            {"model": nn.Linear(4, 1)},
            {"model": nn.Linear(3, 1, bias=False)},
            {"model": nn.Linear(3, 1).double()},
            {"scheduler": lambda step: 1.0},
            {"resume": False},
        ],
    )
    def test_another_run_is_not_resumed(self, tmp_path, change: dict) -> None:
        simple(TrainingConfig(steps=2), directory=tmp_path).run()
        settings = {"config": TrainingConfig(steps=9), "directory": tmp_path} | change
        with pytest.raises(
            ValueError,
            match=r"holds the state of AdamW|another run|does not fit|without a scheduler|resume, or",
        ):
            simple(**settings)

    def test_transformers_reads_a_checkpoint(self, tmp_path) -> None:
        from transformers import AutoModelForCausalLM

        loop = script.make(tmp_path, "llama", steps=2)
        loop.run()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "step-00000002")
        assert all(map(torch.equal, model.state_dict().values(), loop.model.state_dict().values()))


class TestPrecision:
    @pytest.fixture
    def fresh_accelerate(self) -> Iterator[None]:
        """The precision of accelerate is one for the process: forget what another test, or a Trainer, has set."""
        state = pytest.importorskip("accelerate.state").AcceleratorState
        state._reset_state(True)
        yield
        state._reset_state(True)

    @pytest.mark.usefixtures("fresh_accelerate")
    def test_bfloat16_goes_through_accelerate(self) -> None:
        seen = []

        def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            seen.append(model(x).dtype)
            return (model(x) - x.sum(1, keepdim=True)).square().mean()

        config = TrainingConfig(steps=3, precision="bf16", device="cpu")
        loop = simple(config, loss=loss)
        exact = simple(TrainingConfig(steps=3))
        rounded = [record["loss"] for record in loop.run()]
        assert isinstance(loop.processes, ManyProcesses)
        assert loop.unwrapped.weight.dtype == torch.float32
        assert rounded == pytest.approx([record["loss"] for record in exact.run()], rel=0.02)
        assert rounded != [record["loss"] for record in exact.history]

    def test_without_accelerate_the_error_says_what_to_install(self, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, "accelerate", None)
        assert choose().world == 1
        with pytest.raises(
            ImportError, match=r"precision 'bf16' goes through accelerate: pip install 'labkit\[train"
        ):
            choose("bf16")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ImportError, match="2 processes goes through accelerate"):
            choose()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TrainingConfig(steps=0), "steps must be at least 1, got 0"),
        (lambda: TrainingConfig(steps=1, clip=0.0), "clip must be positive"),
        (lambda: TrainingConfig(steps=1, precision="fp8"), "precision must be"),
        (lambda: TrainingConfig(steps=1, device="gpu"), "device must be"),
        (lambda: simple(TrainingConfig(steps=1, accumulate=3)), "batch of 8 rows can't be cut evenly"),
        (lambda: simple(TrainingConfig(steps=1)).save(), "nowhere to save"),
        (
            lambda: simple(TrainingConfig(steps=1), model=nn.Linear(3, 1).requires_grad_(False)),
            "no trainable parameter",
        ),
    ],
)
def test_bad_calls_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
