"""The doors that users have: Trainer, trl's SFTTrainer, resuming, and two processes of accelerate."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from labkit.finetuning import (
    BeamLoraConfig,
    BeamScheduler,
    BeamSearchCallback,
    load_beam_adapter,
    save_beam_adapter,
)
from labkit.testbeds.digits import DigitTask, digits_model, token_accuracy

from . import script

TASK = DigitTask("rotate")
ROOT = Path(script.__file__).parents[3]


def adapted(**config: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "beam_every": 8, "beam_p0": 0.8}
    return get_peft_model(digits_model(0), BeamLoraConfig(**settings | config))


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    common: dict[str, Any] = {
        "max_steps": 40,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(folder), **common | settings)


def test_trainer_adapts_a_model_and_stock_peft_takes_it_over(tmp_path: Path) -> None:
    model, callback = adapted(), BeamSearchCallback()
    batch = TASK.examples(128)
    before = token_accuracy(model, batch)
    Trainer(model, arguments(tmp_path), train_dataset=TASK.rows(320), callbacks=[callback]).train()
    assert [event.step for event in callback.events] == [8, 16, 24]  # p reaches 1 at two thirds of 40
    assert all(event.count for event in callback.events)
    after = token_accuracy(model, batch)
    assert after > max(0.6, before + 0.15)
    save_beam_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(digits_model(0), str(tmp_path / "adapter"))
    assert token_accuracy(stock, batch) == after


def test_the_callback_does_what_the_plain_loop_does(tmp_path: Path) -> None:
    rows = TASK.rows(320)
    model, callback = adapted(), BeamSearchCallback(seed=5)
    settings = arguments(tmp_path, lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch")
    trainer = Trainer(model, settings, train_dataset=rows, callbacks=[callback])
    order = [{k: v.clone() for k, v in batch.items()} for batch in trainer.get_train_dataloader()]
    trainer.train()
    other = adapted()
    optimizer = torch.optim.AdamW(
        [p for p in other.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0
    )
    beam = BeamScheduler(other, optimizer, 40, seed=5)
    other.train()
    for batch in order:
        other(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        beam.step()
    assert [(e.step, e.pruned, e.sources) for e in beam.events] == [
        (e.step, e.pruned, e.sources) for e in callback.events
    ]


class Stop(TrainerCallback):
    """Ends training as a kill does, from the trainer's point of view."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_resumed_trainer_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 14}  # between remembering (12) and the event at 16
    rows = TASK.rows(320)

    def train(folder: Path, *more: Any, resume: Any = None, **extra: Any) -> tuple[Any, Any]:
        model, callback = adapted(), BeamSearchCallback()
        arguments_ = arguments(folder, **settings | extra)
        trainer = Trainer(model, arguments_, train_dataset=rows, callbacks=[callback, *more])
        trainer.train(resume_from_checkpoint=resume)
        return model, callback

    whole, first = train(tmp_path / "whole")
    train(tmp_path / "cut", Stop(14))
    saved = load_file(tmp_path / "cut" / "checkpoint-14" / "adapter_model.safetensors")
    assert any(name.endswith("lora_gate") for name in saved)
    loaded = load_beam_adapter(digits_model(0), tmp_path / "cut" / "checkpoint-14")
    assert token_accuracy(loaded, TASK.examples(64)) > 0
    again, second = train(tmp_path / "cut", resume=True)
    assert second.events == first.events
    gaps = [
        (a - b).abs().max()
        for (_, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True)
    ]
    assert max(gaps) < 1e-6

    (tmp_path / "cut" / "checkpoint-14" / "beam_search.json").unlink()
    with pytest.raises(ValueError, match=r"goes on at step 14, but none of .* holds beam_search.json"):
        train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-14"))


def test_trl_makes_the_adapter_from_the_configuration(tmp_path: Path) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from labkit.testbeds.models import tiny
    from labkit.testbeds.tokenizers import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = tiny("llama", width=32, layers=1, heads=2, vocab=260, seed=0, pad_token_id=256, eos_token_id=258)
    config = BeamLoraConfig(r=4, target_modules="all-linear", beam_p0=0.8, task_type="CAUSAL_LM")
    callback = BeamSearchCallback(every=4)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=2, learning_rate=1e-2, bf16=False,
            report_to=[], use_cpu=True, max_length=32, save_strategy="no", disable_tqdm=True, logging_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_dict({"text": ["the ranks of a beam are not equal"] * 32}),
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[callback],
    )  # fmt: skip
    trainer.train()
    assert [event.step for event in callback.events] == [4, 8]
    assert any(event.count for event in callback.events)
    assert (trainer.model.base_model.model.model.layers[0].mlp.up_proj.lora_gate["default"] != 0).any()
    save_beam_adapter(trainer.model, tmp_path / "adapter")
    assert not any("lora_gate" in n for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def launch(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
def test_two_processes_draw_and_train_as_one(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    file = ROOT / "labkit" / "training" / "configs" / "ddp_cpu.yaml"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch(
        *("-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", port),
        *(str(Path(script.__file__)), str(tmp_path / "pair")),
    )
    launch(str(Path(script.__file__)), str(tmp_path / "alone"))
    ranks = [json.loads((tmp_path / "pair" / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((tmp_path / "alone" / "process-0.json").read_text())
    assert ranks[0] == ranks[1]
    assert (ranks[0]["world"], ranks[0]["model"]) == (2, "DistributedDataParallel")
    assert len(alone["events"]) >= 3
    for pair, one in zip(ranks[0]["events"], alone["events"], strict=True):
        assert (pair["step"], pair["pruned"], pair["sources"]) == (one["step"], one["pruned"], one["sources"])
    tensors = [
        load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("pair", "alone")
    ]
    assert max(float((tensors[0][name] - tensors[1][name]).abs().max()) for name in tensors[0]) < 1e-4
