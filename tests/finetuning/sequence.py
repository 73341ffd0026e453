"""A sequence of two small tasks, as a script that can be killed; ``sequence.py FOLDER [--die-at STEP]``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from labkit.finetuning.sequential import GEM, Method, Replay, ScoreMatrix, Task, combine, sequential_finetune
from labkit.testbeds.models import tiny


def shifts(by: int, rows: int = 8, vocab: int = 16) -> Task:
    """Count on from a start in steps of `by`."""

    def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            start = torch.randint(vocab, (rows, 1), generator=generator)
            ids = (start + by * torch.arange(8)) % vocab
            yield {"input_ids": ids, "labels": ids.clone()}

    def evaluate(model: torch.nn.Module) -> float:
        ids = (torch.arange(vocab)[:, None] + by * torch.arange(8)) % vocab
        right = model(ids).logits[:, 1:-1].argmax(-1) == ids[:, 2:]
        return float(right.float().mean())

    return Task(f"by {by}", batches, evaluate)


class Dies(Method):
    """Ends the process at an update, as a power cut does."""

    def __init__(self, at: int | None) -> None:
        self.at, self.done = at, 0

    def __repr__(self) -> str:
        return "Dies()"

    def after_step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.done += 1
        if self.done == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def model(dropout: float = 0.1) -> torch.nn.Module:
    return tiny("llama", width=16, layers=2, heads=2, vocab=16, seed=0, attention_dropout=dropout)


def main(folder: Path | None, die_at: int | None = None) -> tuple[ScoreMatrix, torch.nn.Module]:
    made = model()
    method = combine(Dies(die_at), Replay(0.2), GEM(8))
    tasks = [shifts(1), shifts(3), shifts(5)]
    scores = sequential_finetune(
        made, tasks, method, steps=10, lr=5e-3, warmup=3, directory=folder, checkpoint_every=4, seed=3
    )
    return scores, made


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 2 else None)
