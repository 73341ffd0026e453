"""What learning a new task costs in old facts: a model that knows a table of facts learns to transform digits.

Methods that protect knowledge also tend to learn less, and a model that learned nothing has forgotten nothing. So they
are compared at equal skill: training stops at the first check at which the new task is learned.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.testbeds.digits import DigitTask, answer_loss, token_accuracy
from labkit.testbeds.facts import FactsWorld
from labkit.testbeds.training import train_steps
from labkit.training.update import updates


@dataclass
class Lesson:
    """The course of learning a new task.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        As it was at the last check.
    course : list of (int, float, float)
        At each check: steps done, token accuracy in the new task, share of the facts kept.
    """

    model: PreTrainedModel = field(repr=False)
    course: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Steps done."""
        return self.course[-1][0]

    @property
    def skill(self) -> float:
        """Token accuracy in the new task."""
        return self.course[-1][1]

    @property
    def kept(self) -> float:
        """Share of the facts that are still recalled."""
        return self.course[-1][2]

    def kept_at(self, skill: float) -> float | None:
        """Share of the facts at the first check with this skill; None when it was never reached."""
        return next((kept for _, reached, kept in self.course if reached >= skill), None)


def learn(
    model: PreTrainedModel,
    world: FactsWorld,
    task: DigitTask,
    *,
    seed: int = 0,
    lr: float = 1e-3,
    batch: int = 16,
    warmup: int = 20,
    goal: float | None = 0.97,
    most: int = 500,
    every: int = 20,
) -> Lesson:
    """Train a model on a digit task until it masters it, watching what becomes of its facts.

    AdamW without weight decay on the parameters that require a gradient; the rate is constant after its warm-up.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Knows the facts of `world`; trained in place.
    world : FactsWorld
    task : DigitTask
    seed : int
        Of the examples.
    lr, batch, warmup
        Learning rate, rows of a step, steps of linear warm-up.
    goal : float or None
        Token accuracy that ends the training; None trains `most` steps.
    most, every : int
        Most steps, and steps between checks.

    Returns
    -------
    Lesson

    Raises
    ------
    ValueError
        When `most` or `every` is below 1.

    Examples
    --------
    >>> from labkit.testbeds.facts import facts_model
    >>> lesson = learn(facts_model(0), FactsWorld(0), DigitTask("reverse"), most=20)
    >>> lesson.steps, lesson.skill < 0.3 < lesson.kept
    (20, True)
    """
    if most < 1 or every < 1:
        raise ValueError(f"most and every must be at least 1, got {most} and {every}")
    lesson, examples = Lesson(model), task.examples(128, seed)

    def rate(step: int) -> float:
        return lr * min(1.0, (step + 1) / max(1, warmup))

    batches = task.batches(batch, seed)
    course = train_steps(model, batches, most, schedule=rate, betas=(0.9, 0.999), loss=answer_loss)
    for step in course:
        done = step.number + 1
        if done % every == 0 or done == most:
            kept = float(world.recalled(model).float().mean())
            lesson.course.append((done, token_accuracy(model, examples), kept))
            if goal is not None and lesson.skill >= goal:
                break
    model.eval()
    return lesson


def step_costs(
    model: PreTrainedModel,
    arms: Mapping[str, Callable[[PreTrainedModel], AbstractContextManager[Any]]],
    task: DigitTask,
    *,
    batch: int = 64,
    rounds: int = 12,
    steps: int = 4,
) -> dict[str, tuple[float, int]]:
    """Processor time of a training step, and the numbers in AdamW's moments, of several methods side by side.

    Rounds are interleaved, and the time is the smallest of a round's means, so that what else the machine does falls
    on all alike.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Left as it is.
    arms : mapping
        Name to a function of a copy of the model that gives a context, in which only what is to be trained requires
        a gradient.
    task : DigitTask
    batch, rounds, steps : int
        Rows, rounds, and steps of each arm in a round.

    Returns
    -------
    dict of str to (float, int)
        Seconds a step, numbers held by the optimizer.
    """
    best: dict[str, float] = {}
    state: dict[str, Any] = {}
    for name, context in arms.items():
        own = copy.deepcopy(model)
        with context(own):
            trained = [p for p in own.parameters() if p.requires_grad]
        for p in own.parameters():
            p.requires_grad_(any(p is q for q in trained))
        state[name] = own, torch.optim.AdamW(trained, lr=1e-4, fused=True), task.batches(batch, 0)
    for number in range(rounds + 1):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            own, optimizer, batches = state[name]
            start = time.process_time()
            for _ in updates(own, ([b] for b in batches), optimizer, answer_loss, steps):
                pass
            spent = (time.process_time() - start) / steps
            if number:  # the first round warms up
                best[name] = min(spent, best.get(name, spent))
    held = {
        name: sum(
            moment.numel()
            for moments in optimizer.state.values()
            for key, moment in moments.items()
            if key.startswith("exp_avg")
        )
        for name, (_, optimizer, _) in state.items()
    }
    return {name: (best[name], held[name]) for name in arms}
