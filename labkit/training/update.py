"""The training step that every loop of the package goes through.

One update sees one global batch, cut into the micro-batches of `accumulate` and of the processes. With the mean
loss L_m of micro-batch m and its weight w_m (how many terms the mean is over, for example target tokens), the
gradient that the optimizer gets is that of

    sum_m w_m L_m / sum_m w_m,

the mean over the whole batch, however it was cut. Without weights all micro-batches count alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from labkit.training.processes import OneProcess

Loss = Callable[[Any, Any], torch.Tensor | tuple[torch.Tensor, Any]]
Weight = Callable[[Any], float | torch.Tensor]


class Step(NamedTuple):
    """What a training step reports: its number, loss, learning rate, what else the loss gave, gradient norm."""

    number: int
    loss: float
    lr: float
    extra: Any = None
    norm: float = math.nan


def updates(
    model: nn.Module,
    batches: Iterable[Iterable[Any]],
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    steps: int,
    *,
    start: int = 0,
    clip: float | None = 1.0,
    rate: Callable[[int], float] | None = None,
    scheduler: Any = None,
    weight: Weight | None = None,
    processes: OneProcess | None = None,
    before_step: Callable[[nn.Module], Any] | None = None,
    after_step: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
) -> Iterator[Step]:
    """Update a model once a yielded step.

    Parameters
    ----------
    model : torch.nn.Module
        As `OneProcess.prepare` or `ManyProcesses.prepare` returned it.
    batches : iterable of iterables
        For each step this process's micro-batches, on its device. They are asked for when their step begins.
    optimizer : torch.optim.Optimizer
        As prepared. What it holds is trained and clipped.
    loss : callable
        ``loss(model, batch)``: the mean over the micro-batch as a scalar, or a pair of it and anything else. A
        mapping of numbers there is averaged as the loss is, over micro-batches and processes; anything else is
        handed through from this process's last micro-batch.
    steps, start : int
        Number after the last step and of the first.
    clip : float or None
        Largest norm of the whole gradient.
    rate : callable, optional
        Learning rate of each step, for all parameter groups.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Advanced after each update.
    weight : callable, optional
        ``weight(batch)``: how many terms the micro-batch's mean is over.
    processes : OneProcess, optional
    before_step : callable, optional
        ``before_step(model)`` with the model without wrappers, when the whole gradient of the update is there, before
        it is clipped: for rules that mask or project gradients.
    after_step : callable, optional
        ``after_step(model, optimizer)``, right after the update.

    Yields
    ------
    Step
        The loss is that of the global batch, before the update; it is the same in every process.

    Raises
    ------
    FloatingPointError
        When the loss is not finite; the update is not made.
    ValueError
        When a micro-batch has weight 0.

    Examples
    --------
    >>> model = nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x = torch.linspace(-1, 1, 8)[:, None]
    >>> course = updates(model, [[x[:4], x[4:]]] * 50, optimizer, lambda m, b: (m(b) - 3 * b).square().mean(), 50)
    >>> losses = [step.loss for step in course]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """
    processes = processes or OneProcess()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    model.train()
    for number, micro in zip(range(start, steps), batches, strict=False):
        if rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = rate(number)
        lr = float(optimizer.param_groups[0]["lr"])
        parts = list(micro)
        shares = _shares(parts, weight, processes)
        optimizer.zero_grad(set_to_none=True)
        sums, extra, names = None, None, ()
        for position, (part, share) in enumerate(zip(parts, shares, strict=True), 1):
            with nullcontext() if position == len(parts) else processes.no_sync(model):
                result = loss(model, part)
                value, extra = result if isinstance(result, tuple) else (result, None)
                processes.backward(value if share == 1 else value * share)
            names = tuple(extra) if isinstance(extra, Mapping) else ()
            measured = _measured(value, extra, names) * share
            sums = measured if sums is None else sums + measured
        if sums is None:
            raise ValueError(f"step {number} has no micro-batch")
        means = (processes.total(sums) / processes.world).tolist()
        if not math.isfinite(means[0]):
            raise FloatingPointError(f"the loss is {means[0]} at step {number}: lower lr ({lr})")
        if before_step is not None:
            before_step(processes.unwrap(model))
        norm = math.nan if clip is None else float(processes.clip(trained, clip))
        optimizer.step()
        if after_step is not None:
            after_step(processes.unwrap(model), optimizer)
        if scheduler is not None and not getattr(optimizer, "step_was_skipped", False):
            scheduler.step()
        if names:
            extra = dict(zip(names, means[1:], strict=True))
        yield Step(number, means[0], lr, extra, norm)


def _shares(parts: Sequence[Any], weight: Weight | None, processes: OneProcess) -> list[float]:
    """Factor of each micro-batch's loss; gradients are then averaged over processes, as DDP and FSDP do."""
    if weight is None:
        return [1 / len(parts)] * len(parts)
    counts = [float(weight(part)) for part in parts]
    empty = sum(not count > 0 for count in counts)
    total, empties = processes.total(torch.tensor([sum(counts), empty], device=processes.device)).tolist()
    if empties:
        raise ValueError(
            f"{int(empties)} micro-batches of this step have weight 0, so their mean loss is not defined: make the "
            f"micro-batches larger (accumulate less) or drop rows without a target"
        )
    return [count * processes.world / total for count in counts]


def _measured(value: torch.Tensor, extra: Any, names: Sequence[str]) -> torch.Tensor:
    """Loss and numbers of a micro-batch in one vector."""
    value = value.detach()
    numbers = [
        torch.as_tensor(extra[name], dtype=value.dtype, device=value.device).detach() for name in names
    ]
    return torch.stack([value.reshape(()), *(number.reshape(()) for number in numbers)])
