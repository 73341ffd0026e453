"""Two tasks with row masks, in one process or in several; ``migu_script.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from labkit.finetuning import MIGU, RandomRowMask, Task, combine, sequential_finetune
from labkit.finetuning.migu.method import RowMasking, _masks
from labkit.testbeds.models import tiny


def counting(by: int, rows: int = 8, vocab: int = 64) -> Task:
    """Count on in steps of `by`."""

    def batches(seed: int) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            start = torch.randint(vocab, (rows, 1), generator=generator)
            ids = (start + by * torch.arange(10)) % vocab
            yield {"input_ids": ids, "labels": ids.clone()}

    return Task(f"by {by}", batches, lambda model: 0.0)


class Record:
    """Notes what each process would have masked, and what it did."""

    def __init__(self, rule: RowMasking) -> None:
        self.rule, self.own, self.used = rule, {}, {}
        self.step = 0

    def before_step(self, model: torch.nn.Module) -> None:
        if isinstance(self.rule, MIGU) and self.rule.active:
            self.own = _masks(self.rule._sums, self.rule.threshold)
        self.rule.before_step(model)
        for name, mask in self.rule.masks().items():
            self.used[f"{self.step}.{name}"] = mask.clone()
        self.step += 1

    def stage(self, model: torch.nn.Module, index: int, task: Any) -> Any:
        return self.rule.stage(model, index, task)


def gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Masked gradients of one batch; two processes shard the model (FSDP2) and halve the batch."""
    model = tiny("llama", vocab=64, width=32, tie_word_embeddings=False, seed=1)
    ids = torch.randint(64, (8, 10), generator=torch.Generator().manual_seed(7))
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        ids = ids.chunk(world)[rank]
    with MIGU(model) as migu:
        model(input_ids=ids, labels=ids).loss.backward()
        migu.apply()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {name: getattr(g, "full_tensor", lambda g=g: g)().clone() for name, g in found.items()}


def main(folder: Path) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    folder.mkdir(exist_ok=True, parents=True)
    for rule in (MIGU(), RandomRowMask(seed=4)):
        model = tiny("llama", vocab=64, width=32, seed=0)
        record = Record(rule)
        sequential_finetune(
            model, [counting(1), counting(3)], combine(record), steps=4, accumulate=2, lr=1e-3, seed=5
        )
        name = type(rule).__name__
        save_file(record.used, folder / f"{name}-masks-{rank}.safetensors")
        weights = {key: value.detach().clone() for key, value in model.named_parameters()}
        save_file(weights, folder / f"{name}-weights-{rank}.safetensors")
        if record.own and rank == 0:
            last = rule.masks()
            differ = any(not torch.equal(last[key], mask) for key, mask in record.own.items())
            (folder / "facts.json").write_text(json.dumps({"world": world, "own masks differ": differ}))
    save_file(gradients(rank, world), folder / f"sharded-{rank}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
