"""Training with checkpoints, evaluation and logs, on one process or many.

A script, ``train.py``, that runs as it is under ``python``, ``torchrun`` and ``accelerate launch``::

    import torch
    from transformers import AutoModelForCausalLM
    from labkit.training import DatasetBatches, TrainingConfig, TrainingLoop

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained("my-model")
    rows = torch.load("rows.pt", weights_only=True)                                     # (N, T) token ids
    loss = lambda model, ids: model(input_ids=ids, labels=ids).loss
    loop = TrainingLoop(
        model, DatasetBatches(rows, batch=64, seed=0), loss, torch.optim.AdamW(model.parameters(), lr=1e-5),
        TrainingConfig(steps=1000, accumulate=2, checkpoint_every=100), directory="runs/first",
    )
    loop.run()
    loop.close()

Killed and started again with the same command, it goes on from the last checkpoint, on the CPU to the bit. Started
with another number of processes it sees the same batches: the loss curve is the same up to the order of additions,
unless the model draws random numbers (dropout), which each process does for itself.
"""

from __future__ import annotations

import itertools
import json
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from labkit.lab.cache import write_atomic
from labkit.training import checkpoint as files
from labkit.training import state as states
from labkit.training.data import GlobalBatches, map_tensors, mixed_seed
from labkit.training.processes import ManyProcesses, OneProcess, Precision, choose
from labkit.training.update import Loss, Step, Weight, updates

Evaluate = Callable[[Any], float | Mapping[str, float]]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a `TrainingLoop`. The global batch is the data's, see `GlobalBatches`.

    Parameters
    ----------
    steps : int
        Updates in all, those before a resume included.
    accumulate : int
        Micro-batches of each process in an update.
    clip : float or None
        Largest norm of the gradient.
    precision : {"no", "bf16", "fp16"}, optional
        Of the forward pass, through accelerate; by default what the launcher says.
    device : {"auto", "cpu"}
        ``"cpu"`` keeps several processes off the GPUs. A single process trains the model where it is.
    seed : int
        Of the generators of each process (dropout); the data have a seed of their own.
    log_every, evaluate_every, checkpoint_every : int
        In steps. 0 is never; with a `directory` or an `evaluate`, the last step is always logged, evaluated and kept.
    keep : int
        Checkpoints that stay.
    find_unused_parameters : bool
        For DDP when a step may leave trained parameters without a gradient, such as experts that no token chose.

    Raises
    ------
    ValueError
        When a value is out of range.

    Examples
    --------
    >>> TrainingConfig(steps=10, accumulate=0)
    Traceback (most recent call last):
        ...
    ValueError: accumulate must be at least 1, got 0
    """

    steps: int
    accumulate: int = 1
    clip: float | None = 1.0
    precision: Precision | None = None
    device: str = "auto"
    seed: int = 0
    log_every: int = 1
    evaluate_every: int = 0
    checkpoint_every: int = 0
    keep: int = 2
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        lowest = {"steps": 1, "accumulate": 1, "keep": 1} | dict.fromkeys(
            ("log_every", "evaluate_every", "checkpoint_every"), 0
        )
        for name, least in lowest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive, or None for no clipping, got {self.clip}")
        if self.precision not in (None, "no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}")
        if self.device not in ("auto", "cpu"):
            raise ValueError(f"device must be 'auto' or 'cpu', got {self.device!r}")


class TrainingLoop:
    """Train a model, resumably, on however many processes there are.

    Iterate over it for a `Step` at a time, or call `run`.

    Parameters
    ----------
    model : torch.nn.Module
        Made alike in every process. What is in it is trained by `optimizer` and kept in the checkpoints.
    data : GlobalBatches
        `DatasetBatches`, `DrawnBatches`, or a class of yours.
    loss : callable
        ``loss(model, batch)``: mean over the batch as a scalar, or a pair of it and a mapping of other numbers to
        log. The model that it gets may be wrapped by DDP: call it, and reach attributes through `unwrapped`.
    optimizer : torch.optim.Optimizer
        Over the model's parameters.
    config : TrainingConfig
    scheduler : torch.optim.lr_scheduler.LRScheduler or callable, optional
        A callable gives for each step the factor of the learning rate. `transformers.get_scheduler` makes the usual
        ones.
    weight : callable, optional
        ``weight(batch)``: how many terms the mean is over (target tokens), where that differs between micro-batches.
    evaluate : callable, optional
        ``evaluate(model)``: a number or a mapping of numbers, in evaluation mode without gradients. All processes
        call it; the main one's result is logged.
    directory : Path or str, optional
        For ``log.jsonl`` and the checkpoints, on a file system that all processes see. Without it nothing is
        written.
    resume : bool
        Go on from the last whole checkpoint of `directory`; False refuses a directory that has one.
    state : mapping, optional
        Name to object with ``state_dict`` and ``load_state_dict`` that the checkpoint shall hold as well, such as a
        controller of the KL coefficient. The main process's counts.
    on_record : callable, optional
        Gets each record of the log, on the main process.
    processes : OneProcess, optional
        ``ManyProcesses(accelerator)`` for an `accelerate.Accelerator` of your own.
    before_step, after_step : callable, optional
        Rules on gradients and weights, see `updates`.

    Attributes
    ----------
    step : int
        Steps done.
    history : list of dict
        Records of the log: step (done), loss, lr, norm, seconds, what the loss gave, and ``evaluation``.
    model, optimizer
        As prepared for the processes.
    unwrapped : torch.nn.Module
        The model without wrappers.

    Raises
    ------
    ValueError
        When the batch can't be cut evenly, or the directory's checkpoint is of other data, seed, model or optimizer.
    ImportError
        When several processes or mixed precision are asked for and accelerate is not installed.

    Examples
    --------
    >>> from labkit.training import DrawnBatches
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Linear(4, 1)
    >>> def draw(rows, generator):
    ...     x = torch.randn(rows, 4, generator=generator)
    ...     return x, x.sum(1, keepdim=True)
    >>> loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    >>> loop = TrainingLoop(model, DrawnBatches(draw, batch=32), loss, optimizer, TrainingConfig(steps=100, accumulate=2))
    >>> history = loop.run()
    >>> history[-1]["step"], history[-1]["loss"] < 0.01 < 1 < history[0]["loss"]
    (100, True)
    """

    def __init__(
        self,
        model: nn.Module,
        data: GlobalBatches,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        config: TrainingConfig,
        *,
        scheduler: Any = None,
        weight: Weight | None = None,
        evaluate: Evaluate | None = None,
        directory: Path | str | None = None,
        resume: bool = True,
        state: Mapping[str, Any] | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        processes: OneProcess | None = None,
        before_step: Callable[[nn.Module], Any] | None = None,
        after_step: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer has no trainable parameter: every requires_grad is False")
        self.config = config
        self.data, self.loss, self.weight, self.evaluate = data, loss, weight, evaluate
        self.state = dict(state or {})
        self.on_record = on_record
        self.before_step, self.after_step = before_step, after_step
        self.directory = Path(directory) if directory is not None else None
        self.processes = processes or choose(
            config.precision,
            None if config.device == "auto" else config.device,
            config.find_unused_parameters,
            model,
        )
        self._parts = (self.processes.rank, self.processes.world, config.accumulate)
        cut = self.processes.world * config.accumulate
        if data.batch % cut:
            raise ValueError(
                f"a global batch of {data.batch} rows can't be cut evenly into {self.processes.world} processes times "
                f"{config.accumulate} micro-batches: take a multiple of {cut}"
            )
        if scheduler is not None and not hasattr(scheduler, "state_dict"):
            factor = scheduler
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(factor(step)))
        self.scheduler = scheduler
        self._plain_optimizer = optimizer
        self.model, self.optimizer = self.processes.prepare(model, optimizer)
        self.unwrapped = self.processes.unwrap(self.model)
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._started = time.perf_counter()
        _seed(config.seed, self.processes.rank, 0)
        if self.directory is not None:
            self._open(resume)

    def __iter__(self) -> Iterator[Step]:
        config, device = self.config, self.processes.device
        batches = (
            (
                map_tensors(lambda tensor: tensor.to(device), part)
                for part in self.data.micro_batches(number, *self._parts)
            )
            for number in itertools.count(self.step)
        )
        course = updates(
            self.model,
            batches,
            self.optimizer,
            self.loss,
            config.steps,
            start=self.step,
            clip=config.clip,
            scheduler=self.scheduler,
            weight=self.weight,
            processes=self.processes,
            before_step=self.before_step,
            after_step=self.after_step,
        )
        for step in course:
            self.step = step.number + 1
            due = {
                every: self.step == config.steps or bool(every and self.step % every == 0)
                for every in (config.log_every, config.evaluate_every, config.checkpoint_every)
            }
            record: dict[str, Any] = {"step": self.step, "loss": step.loss, "lr": step.lr, "norm": step.norm}
            if isinstance(step.extra, Mapping):
                record |= step.extra
            evaluated = self.evaluate is not None and due[config.evaluate_every]
            if evaluated:
                record["evaluation"] = self._evaluated()
            if evaluated or due[config.log_every]:
                self._log(record | {"seconds": round(time.perf_counter() - self._started, 3)})
            if self.directory is not None and due[config.checkpoint_every]:
                self.save()
            yield step

    def run(self, progress: Callable[[Iterable[Step]], Iterable[Step]] | None = None) -> list[dict[str, Any]]:
        """Train to the last step.

        Parameters
        ----------
        progress : callable, optional
            Wraps the iterable of steps, for example ``functools.partial(run.progress, total=loop.remaining)``. Only
            the main process calls it.

        Returns
        -------
        list of dict
            `history`.
        """
        steps: Iterable[Step] = self
        if progress is not None and self.processes.is_main:
            steps = progress(self)
        for _ in steps:
            pass
        return self.history

    @property
    def remaining(self) -> int:
        """Steps still to do."""
        return max(0, self.config.steps - self.step)

    def save(self) -> Path:
        """Write a checkpoint of the present step; all processes must call it.

        Raises
        ------
        ValueError
            When the loop has no directory.
        TypeError
            When a state can't be written without pickling.
        """
        if self.directory is None:
            raise ValueError("there is nowhere to save: give the loop a directory")
        main = self.processes.is_main
        document, moments = states.optimizer_state(self._plain_optimizer, self.unwrapped, main=main)
        beside: dict[str, torch.Tensor] = {}
        scaler = self.processes.scaler()
        training = {
            "step": self.step,
            "world": self.processes.world,
            "seed": self.config.seed,
            "config": asdict(self.config),
            "data": self.data.describe(),
            "scheduler": states.pack(self._schedule(), beside, "scheduler"),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "state": {
                name: states.pack(held.state_dict(), beside, f"state.{name}")
                for name, held in self.state.items()
            },
        }
        return files.write(
            self.directory,
            self.step,
            {"model": states.weights(self.unwrapped, main=main), "optimizer": moments, "training": beside},
            {"optimizer": document, "training": training},
            states.random_state(self.processes.device),
            self.processes,
            keep=self.config.keep,
            config=_configuration(self.unwrapped) if main else None,
        )

    def close(self) -> None:
        """Leave the process group; the last line of a script that runs in several processes.

        `unwrapped` stays, and is a whole model unless it was sharded.
        """
        self.model = self.unwrapped
        self.processes.close()

    def _schedule(self) -> Any:
        if self.scheduler is None:
            return None
        # LambdaLR keeps a place for its functions, which are the caller's to give again.
        return {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"}

    def _open(self, resume: bool) -> None:
        """Find the last whole checkpoint, on the main process, and load it in all."""
        assert self.directory is not None
        found = -1
        if self.processes.is_main:
            self.directory.mkdir(parents=True, exist_ok=True)
            files.sweep(self.directory)
            latest = files.latest_checkpoint(self.directory)
            found = latest.step if latest is not None else -1
            if resume:
                files.set_damaged_aside(self.directory, found)
        found = self.processes.from_main(found)
        if found >= 0 and not resume:
            raise ValueError(
                f"{self.directory} holds checkpoints up to step {found}: resume, or take another directory"
            )
        if found >= 0:
            self._load(self.directory / f"step-{found:08d}")
        if self.processes.is_main:
            self._cut_log()
        self.processes.any(False)

    def _load(self, path: Path) -> None:
        training = json.loads((path / "training.json").read_text())
        asked = {"seed": self.config.seed} | {f"data {n}": v for n, v in self.data.describe().items()}
        saved = {"seed": training["seed"]} | {f"data {n}": v for n, v in training["data"].items()}
        differ = [
            f"{name} {saved.get(name)!r} there, {asked.get(name)!r} here"
            for name in asked | saved
            if asked.get(name) != saved.get(name)
        ]
        if differ:
            raise ValueError(f"{path} was made by another run ({'; '.join(differ)}): take another directory")
        beside = safetensors.torch.load_file(path / "training.safetensors")
        if (training["scheduler"] is None) != (self.scheduler is None) or set(training["state"]) != set(
            self.state
        ):
            raise ValueError(
                f"{path} was made {'without' if training['scheduler'] is None else 'with'} a scheduler and with the "
                f"states {sorted(training['state'])}; give the loop the same"
            )
        states.restore_weights(self.unwrapped, path)
        states.restore_optimizer(self._plain_optimizer, self.unwrapped, path)
        if self.scheduler is not None:
            schedule = states.unpack(training["scheduler"], beside)
            if "lr_lambdas" in self.scheduler.state_dict():
                schedule["lr_lambdas"] = [None] * len(self._plain_optimizer.param_groups)
            self.scheduler.load_state_dict(schedule)
        scaler = self.processes.scaler()
        if scaler is not None and training["scaler"] is not None:
            scaler.load_state_dict(training["scaler"])
        for name, held in self.state.items():
            held.load_state_dict(states.unpack(training["state"][name], beside))
        self.step = training["step"]
        own = path / f"rank-{self.processes.rank}.json"
        if training["world"] == self.processes.world:
            states.restore_random_state(json.loads(own.read_text()), self.processes.device)
        else:
            _seed(self.config.seed, self.processes.rank, self.step)
            if self.processes.is_main:
                warnings.warn(
                    f"{path} was made by {training['world']} processes, this run has {self.processes.world}: the data "
                    f"go on where they were, random numbers (dropout) are seeded anew.",
                    stacklevel=4,
                )

    def _evaluated(self) -> dict[str, float]:
        assert self.evaluate is not None
        self.model.eval()
        try:
            with torch.no_grad():
                found = self.evaluate(self.model)
        finally:
            self.model.train()
        numbers = found if isinstance(found, Mapping) else {"value": found}
        return {name: float(value) for name, value in numbers.items()}

    def _log(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        if not self.processes.is_main:
            return
        if self.directory is not None:
            with (self.directory / "log.jsonl").open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        if self.on_record is not None:
            self.on_record(record)

    def _cut_log(self) -> None:
        """Read the log up to the present step, and drop what a killed run wrote after its last checkpoint."""
        assert self.directory is not None
        path = self.directory / "log.jsonl"
        if not path.exists():
            return
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the line that the kill cut short
            if record["step"] <= self.step:
                self.history.append(record)
        text = "".join(json.dumps(record) + "\n" for record in self.history)
        write_atomic(path, text)
        if self.history:
            self._started -= self.history[-1]["seconds"]


def _seed(*numbers: int) -> None:
    """Seed this process's generators."""
    value = mixed_seed(*numbers)
    torch.manual_seed(value)
    np.random.seed(value)  # noqa: NPY002 (the generator that others' code draws from)
    random.seed(value)


def _configuration(model: nn.Module) -> Any:
    """Configuration of a transformers model, else None."""
    config = getattr(model, "config", None)
    return config if hasattr(config, "save_pretrained") else None


__all__ = ["Evaluate", "ManyProcesses", "OneProcess", "Step", "TrainingConfig", "TrainingLoop"]
