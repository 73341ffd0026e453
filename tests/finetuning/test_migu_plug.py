"""MIGU in the loops of others: Trainer, a plain loop, accelerate, peft, sequences, and two processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from labkit.finetuning import (
    EWC,
    GEM,
    MIGU,
    IncLoRA,
    MIGUCallback,
    MIGUOptimizer,
    OLoRA,
    RandomRowMask,
    Replay,
    Task,
    combine,
    sequential_finetune,
)
from labkit.testbeds.models import tiny

from . import migu_script

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(2, 64, (24, 10), generator=torch.Generator().manual_seed(3))
]
LR, CLIP = 0.05, 0.2


class InOrder(Trainer):
    """Rows in the order of the data set."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    plain: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**plain, **settings})


def trained_by_hand(model: nn.Module, *, mask: bool = True, before_clip: bool = True) -> nn.Module:
    """Three updates of eight rows with the masks written out, by SGD."""
    rows = torch.stack([row["input_ids"] for row in ROWS])
    for ids in rows.split(8):
        sums: dict[str, torch.Tensor] = {}
        handles = [
            module.register_forward_hook(
                lambda m, i, o, name=name, sums=sums: sums.__setitem__(
                    name, o.detach().abs().flatten(0, -2).sum(0)
                )
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for handle in handles:
            handle.remove()

        def apply(sums: dict[str, torch.Tensor] = sums) -> None:
            for name, n in sums.items() if mask else ():
                model.get_submodule(name).weight.grad *= (n >= torch.quantile(n, 0.7))[:, None]

        if before_clip:
            apply()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if not before_clip:
            apply()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * p.grad
    return model


def make() -> nn.Module:
    return tiny("llama", vocab=64, width=32, tie_word_embeddings=False, seed=0)


def gap(one: nn.Module, other: nn.Module) -> float:
    return max(
        float((a - b).abs().max().detach()) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    )


# ------------------------------------------------------------------------------------------- Trainer


def test_trainer_masks_before_it_clips(tmp_path: Path) -> None:
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    args = arguments(tmp_path)
    trainer = InOrder(
        model, args, train_dataset=ROWS, optimizers=(optimizer, None), callbacks=[callback := MIGUCallback()]
    )
    trainer.train()
    assert gap(model, trained_by_hand(make())) < 1e-5
    assert gap(model, trained_by_hand(make(), before_clip=False)) > 1e-4
    assert gap(model, trained_by_hand(make(), mask=False)) > 1e-4
    assert args.max_grad_norm == CLIP
    assert not callback.migu.attached
    assert not any(module._forward_hooks for module in model.modules())


def test_trainer_leaves_the_first_task_and_evaluation_alone(tmp_path: Path) -> None:
    model = make()
    callback = MIGUCallback(first=True)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    trainer = InOrder(
        model,
        args,
        train_dataset=ROWS,
        eval_dataset=ROWS[:5],
        optimizers=(torch.optim.SGD(model.parameters(), lr=LR), None),
        callbacks=[callback],
    )
    trainer.train()
    plain = trained_by_hand(make(), mask=False)
    assert gap(model, plain) < 1e-5
    callback.on_task_begin(first=False)
    trainer.optimizer, trainer.lr_scheduler = torch.optim.SGD(model.parameters(), lr=LR), None
    trainer.train()
    assert gap(model, trained_by_hand(plain)) < 1e-5


def test_trainer_keeps_masked_rows_when_asked(tmp_path: Path) -> None:
    model = make()
    start = copy.deepcopy(model)
    migu = MIGU(mask="update", skip=("lm_head",))
    args = arguments(tmp_path, max_steps=1, weight_decay=0.1)
    Trainer(model, args, train_dataset=ROWS, callbacks=[MIGUCallback(migu)]).train()
    for name, mask in migu.masks().items():
        moved = (model.get_submodule(name).weight != start.get_submodule(name).weight).any(1)
        assert torch.equal(moved, mask), name


def test_callback_refuses_what_it_cannot_see(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="give either migu or its settings.*threshold"):
        MIGUCallback(MIGU(), threshold=0.5)
    with pytest.raises(TypeError, match="must be a MIGU or RandomRowMask, got float"):
        MIGUCallback(0.7)  # type: ignore[arg-type]
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match="under DeepSpeed"):
        MIGUCallback().on_train_begin(args, None, None, model=make())
    args.deepspeed, args._n_gpu = None, 2
    with pytest.raises(ValueError, match="DataParallel"):
        MIGUCallback().on_train_begin(args, None, None, model=make())


def test_callback_recovers_from_a_training_that_failed(tmp_path: Path) -> None:
    model, args, callback = make(), arguments(tmp_path), MIGUCallback()

    def train(rows: Any) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        InOrder(model, args, train_dataset=rows, optimizers=(optimizer, None), callbacks=[callback]).train()

    with pytest.raises(IndexError):
        train([{"input_ids": torch.full((10,), 99), "labels": torch.full((10,), 99)}] * 24)
    train(ROWS)
    assert gap(model, trained_by_hand(make())) < 1e-5
    assert args.max_grad_norm == CLIP


# ------------------------------------------------------------------------------------------- plain loops


def test_optimizer_masks_clips_and_updates() -> None:
    model = make()
    with MIGU(model) as migu:
        optimizer = MIGUOptimizer(torch.optim.SGD(model.parameters(), lr=LR), migu, clip=CLIP)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        for first in (0, 8, 16):
            for part in (ROWS[first : first + 4], ROWS[first + 4 : first + 8]):
                ids = torch.stack([row["input_ids"] for row in part])
                (model(input_ids=ids, labels=ids).loss / 2).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert gap(model, trained_by_hand(make())) < 1e-5


def test_optimizer_is_the_wrapped_one_in_all_else() -> None:
    model = nn.Linear(4, 8)
    with MIGU(model, mask="update") as migu:
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        optimizer = MIGUOptimizer(inner, migu)
        start = model.weight.detach().clone()

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4)).sum()
            loss.backward()
            return loss

        assert float(optimizer.step(closure)) == pytest.approx(
            float((start.sum(1) + model.bias).sum() * 3), rel=1
        )
        assert torch.equal((model.weight != start).any(1), migu.masks()[""])
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
        assert len(inner.param_groups) == 2
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        MIGUOptimizer(model, migu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a MIGU or RandomRowMask"):
        MIGUOptimizer(inner, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip must be positive"):
        MIGUOptimizer(inner, migu, clip=0)


def test_optimizer_in_a_loop_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make()
    with MIGU(model) as migu:
        optimizer = MIGUOptimizer(torch.optim.SGD(model.parameters(), lr=LR), migu, clip=CLIP)
        loader = torch.utils.data.DataLoader(ROWS, batch_size=4)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for batch in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert gap(model, trained_by_hand(make())) < 1e-5


# ------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
@pytest.mark.parametrize("combined", [True, False])
def test_adapters_are_masked_by_their_own_and_their_layers_outputs(family: str, combined: bool) -> None:
    peft = pytest.importorskip("peft")
    base = tiny(family, vocab=64, seed=0)
    config = peft.LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    outputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, i, o, name=name: (
                outputs.__setitem__(name, o.detach()) if isinstance(o, torch.Tensor) else None
            )
        )
    ids = torch.stack([row["input_ids"] for row in ROWS])
    with MIGU(model, combined=combined) as migu:
        model(input_ids=ids, labels=ids).loss.backward()
        masks = migu.apply()
    adapters = [name for name in masks if "lora_" in name]
    assert len(adapters) == len(masks) >= 4  # the base is frozen
    for name in adapters:
        source = name if "lora_A" in name or not combined else name.rsplit(".lora_B", 1)[0]
        n = outputs[source].double().abs().flatten(0, -2).sum(0)
        assert torch.equal(masks[name], n >= torch.quantile(n, 0.7)), name
        gradient = model.get_submodule(name).weight.grad
        assert torch.equal((gradient != 0).any(1), masks[name]), name
    with MIGU(model, skip=("lora_B",)) as migu:
        model(input_ids=ids, labels=ids).loss.backward()
        assert {name.split(".")[-2] for name in migu.apply()} == {"lora_A"}


# ------------------------------------------------------------------------------------------- sequences


def rule(by: int) -> Task:
    return migu_script.counting(by)


@pytest.mark.parametrize(
    "other", [Replay(0.2), GEM(8), EWC(1.0, rows=4), IncLoRA(dropout=0.0), OLoRA(dropout=0.0)]
)
def test_masks_fall_on_what_other_methods_leave(other: Any) -> None:
    seen = []

    class Watch:
        def before_step(self, model: nn.Module) -> None:
            for name, mask in migu.masks().items():
                gradient = model.get_submodule(name).weight.grad
                assert (gradient[~mask] == 0).all()
                seen.append(bool((gradient[mask] != 0).any()))

    migu = MIGU(threshold=0.4)
    scores = sequential_finetune(
        make(), [rule(1), rule(3)], combine(other, migu, Watch()), steps=3, lr=1e-3, seed=1
    )
    assert scores.stages == 2
    assert seen
    assert sum(seen) > 0.5 * len(seen)


def test_sequence_without_and_with_masks_differs_from_the_second_task_on() -> None:
    found = []
    for method in (None, MIGU(), RandomRowMask(seed=2)):
        model = make()
        stages: list[dict[str, torch.Tensor]] = []
        sequential_finetune(
            model,
            [rule(1), rule(3)],
            method,
            steps=3,
            seed=0,
            on_stage=lambda _, model=model, stages=stages: stages.append(copy.deepcopy(model.state_dict())),
        )
        found.append(stages)
    for stages in found[1:]:
        assert all(torch.equal(stages[0][name], value) for name, value in found[0][0].items())
        assert not torch.equal(stages[1]["lm_head.weight"], found[0][1]["lm_head.weight"])


def test_ewc_pulls_with_the_gradient_of_its_penalty() -> None:
    model, method = make(), EWC(penalty=3.0, rows=5)
    anchors: list[dict[str, torch.Tensor]] = []
    tasks = [rule(1), rule(3), rule(5)]
    sequential_finetune(
        model,
        tasks,
        method,
        steps=2,
        on_stage=lambda _: anchors.append({name: p.detach().clone() for name, p in model.named_parameters()}),
    )
    # The Fisher information of the first task, by hand: squares of gradients of single rows.
    again = make()
    sequential_finetune(again, tasks[:1], steps=2)
    again.eval()
    wanted = {name: torch.zeros_like(p) for name, p in again.named_parameters()}
    rows = next(tasks[0].batches(0))["input_ids"][:5]
    for row in rows:
        again.zero_grad()
        again(input_ids=row[None], labels=row[None]).loss.backward()
        for name, p in again.named_parameters():
            wanted[name] += p.grad.square() / 5
    fresh = EWC(penalty=3.0, rows=5)
    first = make()
    sequential_finetune(first, tasks[:1], fresh, steps=2)
    for name, value in fresh._weights.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-7)
    # Its gradient is that of the penalty over one earlier task.
    with torch.no_grad():
        for p in first.parameters():
            p += 0.1 * torch.randn_like(p)
    first.zero_grad()
    penalty = sum(
        (1.5 * fresh._weights[name] * (p - anchors[0][name]).square()).sum()
        for name, p in first.named_parameters()
    )
    penalty.backward()
    by_autograd = {name: p.grad.clone() for name, p in first.named_parameters()}
    for p in first.parameters():
        p.grad = torch.zeros_like(p)
    fresh.before_step(first)
    for name, p in first.named_parameters():
        torch.testing.assert_close(p.grad, by_autograd[name], rtol=1e-3, atol=1e-6)
    assert method._tasks == 3


def test_incremental_adapters_keep_the_function_and_train_alone() -> None:
    model, method = make(), IncLoRA(dropout=0.0)
    ids = torch.stack([row["input_ids"] for row in ROWS[:4]])
    after: list[torch.Tensor] = []
    bases: list[torch.Tensor] = []

    class Watch:
        def stage(self, model: nn.Module, index: int, task: Task) -> Any:
            with torch.no_grad():
                after.append(model.eval()(input_ids=ids).logits)
            bases.append(model.model.layers[0].self_attn.q_proj.base_layer.weight.detach().clone())
            return nullcontext()

    def note(_: Any) -> None:
        with torch.no_grad():
            after.append(model.eval()(input_ids=ids).logits)

    sequential_finetune(model, [rule(1), rule(3)], combine(method, Watch()), steps=3, lr=1e-2, on_stage=note)
    # start, after task 1, start of task 2 (adapter folded), after task 2
    assert (after[1] - after[0]).abs().max() > 1e-3
    torch.testing.assert_close(after[2], after[1], rtol=1e-4, atol=1e-5)
    assert not torch.equal(bases[0], bases[1])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


def test_orthogonality_is_the_gradient_of_its_penalty() -> None:
    model, method = make(), OLoRA(dropout=0.0, orthogonality=0.3)
    sequential_finetune(model, [rule(1)], method, steps=2)
    assert method.penalty(model) > 0
    model.zero_grad()
    (0.3 * method.penalty(model)).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if "lora_A" in name}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    method.before_step(model)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-6)
        else:
            assert (p.grad == 0).all()


def test_methods_refuse_what_they_cannot_do() -> None:
    for settings, message in (
        ({"penalty": -1}, "penalty must not be negative"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"importance": "hessian"}, 'importance must be "fisher" or "none"'),
    ):
        with pytest.raises(ValueError, match=message):
            EWC(**settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="r must be at least 1"):
        IncLoRA(r=0)
    with pytest.raises(ValueError, match="orthogonality must not be negative"):
        OLoRA(orthogonality=-1)
    method = EWC()
    method.begin(None)  # type: ignore[arg-type]
    with (
        pytest.raises(RuntimeError, match=r"starts at task 3 and remembers 0.*resumed"),
        method.stage(make(), 2, rule(1)),
    ):
        pass


# ------------------------------------------------------------------------------------------- processes


def test_two_processes_mask_and_train_as_one(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [
            sys.executable,
            *words,
            str(ROOT / "tests" / "finetuning" / "migu_script.py"),
            str(tmp_path / "pair"),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    migu_script.main(tmp_path / "alone")
    for rule_name in ("MIGU", "RandomRowMask"):
        alone = load_file(tmp_path / "alone" / f"{rule_name}-masks-0.safetensors")
        pair = [load_file(tmp_path / "pair" / f"{rule_name}-masks-{rank}.safetensors") for rank in (0, 1)]
        assert alone
        assert all(torch.equal(mask, other[name]) for other in pair for name, mask in alone.items())
        weights = [
            load_file(tmp_path / where / f"{rule_name}-weights-0.safetensors") for where in ("alone", "pair")
        ]
        for name, value in weights[0].items():
            torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-5)
    whole, *shards = (
        load_file(tmp_path / where / f"sharded-{rank}.safetensors")
        for where, rank in (("alone", 0), ("pair", 0), ("pair", 1))
    )
    for shard in shards:
        for name, value in whole.items():
            assert torch.equal(shard[name] == 0, value == 0), name
            torch.testing.assert_close(shard[name], value, rtol=1e-3, atol=1e-6)
    facts = json.loads((tmp_path / "pair" / "facts.json").read_text())
    # each process saw half of the rows, and alone would have chosen other rows
    assert facts["world"] == 2
    assert facts["own masks differ"]
