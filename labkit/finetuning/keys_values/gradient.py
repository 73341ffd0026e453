"""Editing by gradient descent on one side of the memories."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from labkit.finetuning.keys_values.parts import train_only
from labkit.finetuning.keys_values.requests import (
    EditRequest,
    as_pair,
    check_model,
    check_requests,
    target_log_probs,
)


@dataclass(eq=False)
class EditResult:
    """What an edit did; the model holds it.

    Attributes
    ----------
    part : str
        Side of the memories that was moved.
    names : list of str
        Parameters that were moved.
    losses : list of float
        Mean -log P(new object | prompt) before each step and after the last, in nats.
    steps : int
        Updates made.
    converged : bool
        Whether the loss fell below the tolerance.
    seconds : float
        Processor time.
    """

    part: str
    names: list[str]
    losses: list[float]
    steps: int
    converged: bool
    seconds: float
    _before: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def undo(self, model: nn.Module) -> None:
        """Put the weights of before the edit back.

        Raises
        ------
        ValueError
            If the model lacks a parameter that was edited.
        """
        own = dict(model.named_parameters())
        missing = [name for name in self._before if name not in own]
        if missing:
            raise ValueError(
                f"{type(model).__name__} is not the model that was edited: it lacks {missing[0]}"
            )
        with torch.no_grad():
            for name, tensor in self._before.items():
                own[name].copy_(tensor)

    def change(self, model: nn.Module) -> float:
        """Norm of the change of the edited parameters, relative to their norm before."""
        own = dict(model.named_parameters())
        moved = sum(float((own[n].detach() - t).double().square().sum()) for n, t in self._before.items())
        whole = sum(float(t.double().square().sum()) for t in self._before.values())
        return math.sqrt(moved / whole)


def edit_by_gradient(
    model: PreTrainedModel,
    requests: EditRequest | Sequence[EditRequest],
    part: str,
    layers: Sequence[int] | None = None,
    lr: float = 1e-3,
    max_steps: int = 200,
    tol: float = 0.05,
    *,
    tokenizer: Any = None,
    biases: bool = True,
    optimizer: Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer] | None = None,
) -> EditResult:
    """Edit a model in place: Adam on the keys, or on the values, of some layers until it says the new objects.

    The loss is the mean over requests of -log P(o* | p), with all tokens of o* together. Nothing else holds the model
    back, which is what makes what else changes worth measuring.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal or encoder-decoder language model. Edited without dropout; in float32 for preference, since in
        bfloat16 steps of 1e-3 are mostly rounded away.
    requests : EditRequest or sequence of them
        One edit, or a batch of edits made at once.
    part : {"keys", "key_gate", "key_up", "values"}
        Side.
    layers : sequence of int, optional
        Layers, counted from 0; all by default.
    lr : float
        Learning rate of Adam. It decides more than the side does: compare sides at several.
    max_steps : int
        Most updates.
    tol : float
        Loss in nats below which the edit is done.
    tokenizer : transformers tokenizer, optional
        Needed for requests that are texts.
    biases : bool
        Whether keys move with their biases.
    optimizer : callable, optional
        ``optimizer(parameters, lr)`` in place of ``torch.optim.Adam``.

    Returns
    -------
    EditResult
        Its ``undo(model)`` takes the edit back.

    Raises
    ------
    ValueError
        For settings out of range and as `train_only`; nothing has been touched then.
    FloatingPointError
        When the loss stops being finite. The weights are put back.

    Examples
    --------
    >>> from labkit.testbeds.facts import FactsWorld, facts_model
    >>> model, world = facts_model(0), FactsWorld(0)
    >>> request = EditRequest(world.prompts()[7], new=[150], true=world.objects[7:8])
    >>> result = edit_by_gradient(model, request, "key_gate", layers=[1, 2], lr=3e-3)
    >>> result.converged, int(model(world.prompts()[7:8]).logits[0, -1].argmax())
    (True, 150)
    """
    check_model(model)
    listed = check_requests(requests)
    for name, value, low in (("lr", lr, 0.0), ("tol", tol, 0.0)):
        if not value > low or not math.isfinite(value):
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps!r}")
    pairs = [as_pair(one.prompt, one.new, tokenizer) for one in listed]
    start = time.process_time()
    was_training = model.training
    losses: list[float] = []
    steps = 0
    with train_only(model, part, layers, biases=biases) as trained:
        kept = [p.grad for p in trained.parameters]
        before = {name: p.detach().clone() for name, p in zip(trained.names, trained.parameters, strict=True)}
        updates = optimizer(trained.parameters, lr) if optimizer else torch.optim.Adam(trained.parameters, lr)
        result = EditResult(part, trained.names, losses, 0, False, 0.0, before)
        model.eval()
        try:
            while True:
                updates.zero_grad(set_to_none=True)
                loss = -target_log_probs(model, pairs)[0].mean()
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise FloatingPointError(f"the loss is {losses[-1]} after {steps} steps: lower lr ({lr})")
                if losses[-1] < tol or steps == max_steps:
                    break
                loss.backward()
                updates.step()
                steps += 1
        except BaseException:
            result.undo(model)
            raise
        finally:
            for p, gradient in zip(trained.parameters, kept, strict=True):
                p.grad = gradient
            model.train(was_training)
    result.steps, result.converged = steps, losses[-1] < tol
    result.seconds = time.process_time() - start
    return result
