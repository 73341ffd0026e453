"""Fine-tune a model on one task after the other."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labkit.finetuning.sequential.data import Batch, Task
from labkit.finetuning.sequential.methods import GEM, Course, Replay, check_method, combine
from labkit.finetuning.sequential.scores import ScoreMatrix
from labkit.lab.cache import write_atomic
from labkit.training import state as states
from labkit.training.checkpoint import latest_checkpoint
from labkit.training.data import mixed_seed
from labkit.training.loop import TrainingConfig, TrainingLoop
from labkit.training.processes import OneProcess, choose
from labkit.training.update import Loss, Weight

Factory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def model_loss(model: Any, batch: Batch) -> torch.Tensor:
    """The loss that a transformers model computes from its labels."""
    loss: torch.Tensor | None = model(**batch).loss
    if loss is None:
        raise ValueError(
            f"the model gives no loss for the fields {sorted(batch)}: add labels, or pass loss=..., a function of "
            f"model and batch"
        )
    return loss


def sequential_finetune(
    model: nn.Module,
    tasks: Sequence[Task],
    method: Any = None,
    *,
    steps: int | None = None,
    optimizer: Factory | None = None,
    lr: float = 1e-3,
    warmup: int = 0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    seed: int = 0,
    replay: float = 0.0,
    gem: int = 0,
    loss: Loss = model_loss,
    weight: Weight | None = None,
    evaluate_all: bool = True,
    directory: Path | str | None = None,
    checkpoint_every: int = 0,
    on_stage: Callable[[ScoreMatrix], Any] | None = None,
    processes: OneProcess | None = None,
) -> ScoreMatrix:
    """Train on one task after the other, a stage each, and score all tasks after every stage.

    Parameters
    ----------
    model : torch.nn.Module
        Trained in place.
    tasks : sequence of Task
        In the order of training.
    method : object, optional
        What is added to plain fine-tuning, an object with some of the hooks of `Method`. None is plain.
    steps : int, optional
        Updates of the stages whose task does not say.
    optimizer : callable, optional
        ``optimizer(parameters)``, called at the start of each stage with those that require a gradient; by default
        AdamW with `lr` and no weight decay.
    lr : float
        Of the default optimizer.
    warmup : int
        Steps of linear warm-up at the start of each stage; the rate is constant after it.
    clip : float or None
        Largest norm of the gradient.
    accumulate : int
        Micro-batches an update.
    seed : int
        Of the data's order and of dropout.
    replay : float
        Short for ``combine(method, Replay(replay))``; 0 is none.
    gem : int
        Short for ``combine(method, GEM(gem))``; 0 is none.
    loss : callable
        ``loss(model, batch)``, a mean; by default the model's own.
    weight : callable, optional
        Terms of a micro-batch's mean; by default its labels that count.
    evaluate_all : bool
        False leaves out the tasks that are still to come (NaN).
    directory : Path or str, optional
        For checkpoints. A run that was killed goes on from there, on the CPU to the bit.
    checkpoint_every : int
        Steps between checkpoints within a stage; 0 keeps the ends of stages only.
    on_stage : callable, optional
        Gets the matrix so far after each stage.
    processes : OneProcess, optional
        As for `labkit.training.TrainingLoop`; under a launcher it is found by itself.

    Returns
    -------
    ScoreMatrix

    Raises
    ------
    ValueError
        When a setting is out of range, nothing is trainable, an optimizer holds a frozen parameter, or the directory
        is of another run.
    TypeError
        When the method has no hook.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", width=16, layers=1, heads=2, vocab=16, seed=0)
    >>> def counting(start):
    ...     ids = torch.arange(start, start + 6).repeat(4, 1)
    ...     right = lambda m: float((m(ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean())
    ...     return Task(f"from {start}", [{"input_ids": row, "labels": row} for row in ids], right, batch=4)
    >>> scores = sequential_finetune(model, [counting(0), counting(8)], steps=40, lr=1e-2)
    >>> scores.learned() > 0.9
    True
    """
    tasks = list(tasks)
    matrix = ScoreMatrix([task.name for task in tasks])
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    if method is not None:
        check_method(method)
    asked = [task.steps if task.steps is not None else steps for task in tasks]
    missing = [task.name for task, count in zip(tasks, asked, strict=True) if count is None]
    if missing:
        raise ValueError(f"no number of steps for {', '.join(missing)}: give steps=... or each task its own")
    if warmup < 0:
        raise ValueError(f"warmup must be a number of steps of at least 0, got {warmup}")
    whole = combine(method, Replay(replay) if replay else None, GEM(gem) if gem else None)
    processes = processes or choose(model=model)
    if processes.sharded:
        raise ValueError(
            "a sharded model can't be given a new optimizer stage by stage here: launch with DDP instead of FSDP"
        )
    course = Course(
        model, tasks, [task.data(seed) for task in tasks], [int(c or 0) for c in asked], loss, seed
    )
    whole.begin(course)
    folder = Path(directory) if directory is not None else None
    facts = {
        "tasks": matrix.names,
        "steps": list(course.steps),
        "data": [data.describe() for data in course.data],
        "seed": seed,
        "method": re.sub(r" (object )?at 0x[0-9a-f]+", "", repr(whole)),
        "settings": {
            "lr": lr if optimizer is None else None,
            "warmup": warmup,
            "clip": clip,
            "accumulate": accumulate,
        },
    }
    if folder is not None:
        matrix = _reopened(folder, facts, matrix, model, processes)
    make = optimizer or (lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0))
    was_training = model.training
    for index in range(matrix.stages, len(tasks)):
        with whole.stage(model, index, tasks[index]):
            loop = TrainingLoop(
                model,
                whole.data(index, course.data[index]),
                loss,
                _optimizer(make, model),
                TrainingConfig(
                    steps=course.steps[index],
                    accumulate=accumulate,
                    clip=clip,
                    seed=mixed_seed(seed, index),
                    log_every=0,
                    checkpoint_every=checkpoint_every,
                    keep=1,
                ),
                scheduler=(lambda step: min(1.0, (step + 1) / warmup)) if warmup else None,
                weight=weight or target_count(model),
                directory=_stage(folder, index) if folder is not None else None,
                state=_stateful(method),
                processes=processes,
                before_step=whole.before_step,
                after_step=whole.after_step,
            )
            loop.run()
        if hasattr(processes, "accelerator"):
            processes.accelerator.free_memory()  # or DDP would hold on to this stage's wrapper
        upto = len(tasks) if evaluate_all else index + 1
        scores = [_score(task, model) for task in tasks[:upto]]
        matrix.append(scores + [float("nan")] * (len(tasks) - upto))
        if folder is not None and processes.is_main:
            matrix.save(folder / "scores.json")
            if index:
                shutil.rmtree(_stage(folder, index - 1), ignore_errors=True)
        if on_stage is not None:
            on_stage(matrix)
    model.train(was_training)
    return matrix


def target_count(model: Any) -> Weight:
    """How many labels of a batch count, as the model's own loss counts them."""
    shifted = getattr(model, "loss_type", None) == "ForCausalLM"

    def count(batch: Mapping[str, torch.Tensor]) -> float:
        labels = batch.get("labels")
        if labels is None:
            return float(len(next(iter(batch.values()))))
        if labels.is_floating_point() or labels.ndim < 2:
            return float(len(labels))
        return float((labels[:, 1:] if shifted else labels).ne(-100).sum())

    return count


def _stage(folder: Path, index: int) -> Path:
    return folder / f"stage-{index:02d}"


def _stateful(method: Any) -> dict[str, Any]:
    keeps = hasattr(method, "state_dict") and hasattr(method, "load_state_dict")
    return {"method": method} if keeps else {}


def _optimizer(make: Factory, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the method left nothing to train: every requires_grad is False")
    made = make(trained)
    held = [p for group in made.param_groups for p in group["params"]]
    if any(not p.requires_grad for p in held):
        raise ValueError(
            "the optimizer holds frozen parameters, which weight decay would move: make it from the parameters that "
            "it is given"
        )
    return made


def _score(task: Task, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return float(task.evaluate(model))


def _reopened(
    folder: Path, facts: Mapping[str, Any], matrix: ScoreMatrix, model: nn.Module, processes: OneProcess
) -> ScoreMatrix:
    """Scores of the stages that are done, and the weights after the last of them."""
    note, scores = folder / "sequence.json", folder / "scores.json"
    if note.is_file():
        found = json.loads(note.read_text())
        differing = [name for name in facts if found.get(name) != json.loads(json.dumps(facts[name]))]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{folder} holds a run with other {', '.join(differing)} ({name}: {found.get(name)} there, "
                f"{facts[name]} here): give the same, or another directory"
            )
    elif processes.is_main:
        write_atomic(note, json.dumps(facts, indent=1) + "\n")
    if scores.is_file():
        matrix = ScoreMatrix.load(scores)
    if matrix.stages:
        last = latest_checkpoint(_stage(folder, matrix.stages - 1))
        if last is None:
            raise ValueError(
                f"{folder} has the scores of {matrix.stages} stages but no whole checkpoint of the last: start anew "
                f"in another directory"
            )
        states.restore_weights(model, last.path)
    processes.any(False)  # nobody writes before all have read
    return matrix
