"""Training of one side of the memories that one process or several run alike."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments

from labkit.finetuning import KeysOrValues
from labkit.testbeds.models import tiny


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 50, (24, 6), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def main(folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = tiny("llama", width=32, heads=2, layers=2, vocab=50, seed=0)
    callback = KeysOrValues("key_gate")
    settings = {"max_steps": 3, "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), per_device_train_batch_size=8 // world, **settings)
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=[callback])
    trainer.train()
    rank = trainer.args.process_index
    facts = {
        "world": trainer.args.world_size,
        "names": callback.trained.names,
        "count": callback.trained.count,
    }
    (folder / f"process-{rank}.json").write_text(json.dumps(facts))
    save_file(
        {n: p.detach().clone() for n, p in model.named_parameters()}, folder / f"process-{rank}.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
