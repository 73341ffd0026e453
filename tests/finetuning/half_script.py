"""Half fine-tuning in sequence, as a script for one process or several; ``half_script.py FOLDER``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from labkit.finetuning import HalfSelector, Method, sequential_finetune
from labkit.testbeds.models import tiny
from labkit.testbeds.shipped import state
from labkit.training.processes import choose

from .sequence import shifts


class Noted(Method):
    """A selector that writes down the halves it drew, and the bytes of the optimizer's state."""

    def __init__(self) -> None:
        self.selector, self.frozen, self.bytes = HalfSelector(seed=5), [], []

    @contextmanager
    def stage(self, model: torch.nn.Module, index: int, task: Any) -> Iterator[None]:
        with self.selector.stage(model, index, task) as mask:
            self.frozen.append(mask.frozen)
            yield

    def after_step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.bytes.append(
            sum(
                value.numel() * value.element_size()
                for held in optimizer.state.values()
                for name, value in held.items()
                if name.startswith("exp_avg")
            )
        )


def main(folder: Path) -> None:
    model = tiny("llama", width=16, layers=3, heads=2, vocab=16, seed=0)
    processes, noted = choose(device="cpu", model=model), Noted()
    scores = sequential_finetune(
        model, [shifts(1), shifts(3)], noted, steps=6, lr=5e-3, processes=processes, seed=1
    )
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"world": processes.world, "frozen": noted.frozen, "bytes": noted.bytes}
    facts["scores"] = scores.scores.round(6).tolist()
    (folder / f"rank-{processes.rank}.json").write_text(json.dumps(facts))
    safetensors.torch.save_file(state(model), folder / f"rank-{processes.rank}.safetensors")
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
