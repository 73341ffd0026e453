"""A training script as a user writes one; run by the tests in their own process and under the launchers.

``script.py OUT [--model plain|llama] [--accumulate N] [--steps N] [--die-at N] [--die-writing N] [--again FOLDER]``
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from labkit.training import DrawnBatches, TrainingConfig, TrainingLoop, checkpoint


class Block(nn.Module):
    """Mixes each position with the one before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        before = F.pad(y, (0, 0, 1, 0))[:, :-1]
        return x + F.gelu(self.mix(torch.cat([y, before], -1)))


class Plain(nn.Module):
    """A small language model of plain torch, with tied embeddings."""

    _no_split_modules = ("Block",)

    def __init__(self, width: int = 15, vocab: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def draw(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Counting in twelves, with as many targets left out as chance will; the first always counts."""
    starts = torch.randint(12, (rows, 1), generator=generator)
    tokens = (starts + torch.arange(17)) % 12
    targets = tokens[:, 1:].clone()
    out = torch.rand(rows, 15, generator=generator) < torch.rand(rows, 1, generator=generator)
    targets[:, 1:][out] = -100
    return tokens[:, :-1], targets


def loss(
    model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy, and a number from the process's own generator."""
    scores = model(input_ids=batch[0])
    scores = getattr(scores, "logits", scores)
    return F.cross_entropy(scores.flatten(0, 1), batch[1].flatten()), {"noise": torch.rand(())}


def make(
    out: Path, kind: str = "plain", accumulate: int = 1, steps: int = 12, every: int = 4, **settings: object
) -> TrainingLoop:
    """The loop of the script."""
    torch.manual_seed(0)
    if kind == "llama":
        from labkit.testbeds.models import tiny

        model: nn.Module = tiny("llama", width=16, layers=2, heads=2, vocab=12, seed=0)
    else:
        model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    held_out = draw(8, torch.Generator().manual_seed(9))
    config = TrainingConfig(
        steps=steps, accumulate=accumulate, device="cpu", checkpoint_every=every, evaluate_every=5, keep=3
    )
    settings = {"directory": out, "scheduler": lambda step: min(1.0, (step + 1) / 5)} | settings
    return TrainingLoop(
        model,
        DrawnBatches(draw, batch=8, block=2, seed=3),
        loss,
        optimizer,
        config,
        weight=lambda batch: (batch[1] != -100).sum(),
        evaluate=lambda model: loss(model, held_out)[0],
        **settings,
    )


def die() -> None:
    """End as a power cut does."""
    os.kill(os.getpid(), signal.SIGKILL)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="plain")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--die-writing", type=int)
    parser.add_argument("--again", type=Path)
    args = parser.parse_args(words)
    if args.die_writing is not None:
        flush = checkpoint._flush

        def dying(path: Path) -> None:
            if f"{args.die_writing:08d}" in str(path) and path.name == "optimizer.safetensors":
                die()
            flush(path)

        checkpoint._flush = dying
    loop = make(args.out, args.model, args.accumulate, args.steps)
    for step in loop:
        if step.number + 1 == args.die_at:
            die()
    processes = loop.processes
    facts = {"world": processes.world, "model": type(loop.model).__name__, "sharded": processes.sharded}
    (args.out / f"process-{processes.rank}.json").write_text(json.dumps(facts))
    if args.again is not None:
        if processes.is_main:
            shutil.copytree(args.out / "step-00000008", args.again / "step-00000008")
        processes.any(False)
        make(args.again, args.model, args.accumulate, args.steps).run()
    loop.close()


if __name__ == "__main__":
    main()
