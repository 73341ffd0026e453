"""A training script as a user writes one; run by the tests under python, torchrun and accelerate launch.

``script.py OUT [--accumulate N] [--precision P] [--steps N] [--die-at N] [--dropout P] [--ragged] [--checkpoint-every N]``
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path

import torch

from labkit.testbeds.models import tiny
from labkit.testbeds.training import IGNORED, token_loss
from labkit.training import DrawnBatches, TrainingConfig, TrainingLoop


def draw(rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Counting in twelves, with targets left out at random; the first always counts."""
    starts = torch.randint(12, (rows, 1), generator=generator)
    tokens = (starts + torch.arange(17)) % 12
    targets = tokens[:, 1:].clone()
    targets[:, 1:][torch.rand(rows, 15, generator=generator) < torch.rand(rows, 1, generator=generator)] = (
        IGNORED
    )
    return tokens[:, :-1], targets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--precision")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--checkpoint-every", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    model = tiny("llama", width=16, layers=2, heads=2, vocab=12, seed=0, attention_dropout=args.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    config = TrainingConfig(
        steps=args.steps,
        accumulate=args.accumulate,
        precision=args.precision,
        device="cpu",
        checkpoint_every=args.checkpoint_every,
        evaluate_every=5,
    )
    held_out = draw(8, torch.Generator().manual_seed(9))
    loop = TrainingLoop(
        model,
        DrawnBatches(draw, batch=8, block=2, seed=3),
        lambda model, batch: (token_loss(model, batch), {"noise": torch.rand(())}),
        optimizer,
        config,
        scheduler=lambda step: min(1.0, (step + 1) / 5),
        weight=lambda batch: (batch[1] != IGNORED).sum(),
        evaluate=lambda model: token_loss(model, held_out),
        directory=args.out,
    )
    for step in loop:
        if args.die_at is not None and step.number + 1 == args.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    kind = type(loop.model).__name__
    (args.out / f"process-{loop.processes.rank}.json").write_text(
        json.dumps({"world": loop.processes.world, "model": kind, "sharded": loop.processes.sharded})
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
