"""Digit strings to transform: six tasks that share one format, and a tiny model that has learned some of them.

A sequence is ``bos task d1 .. dn sep y1 .. yn``; the task's token says what to do with the digits, and only the answer
carries loss. Every answer is exact, data never run out, and a new task is new indeed: its token is untrained. That
makes the tasks a bed for adapting a model to something it cannot do yet, and for what it forgets meanwhile.

=============  ====================================  ==================
kind           answer                                of 3 1 4 1
=============  ====================================  ==================
reverse        the digits backwards                  1 4 1 3
sort           in ascending order                    1 1 3 4
add            each plus 3, modulo 10                6 4 7 4
running_sum    sums up to each place, modulo 10      3 4 8 9
rotate         each one place to the left            1 4 1 3
max_minus      the largest minus each                1 3 0 3
=============  ====================================  ==================

Ids leave room for other worlds in the same vocabulary: 0 pad, 1 bos, 2 sep, 3 to 8 the tasks in the table's order,
10 to 19 the digits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from labkit.testbeds import shipped
from labkit.testbeds.models import nearest, tiny
from labkit.testbeds.training import IGNORED, learning_rate, train_steps
from labkit.training.update import Step, updates

PAD, BOS, SEP, FIRST_TASK, FIRST_DIGIT = 0, 1, 2, 3, 10
VOCAB = 20
SHIPPED_SEEDS = (0, 1, 2)
PRETRAINED = ("reverse", "add", "running_sum")
"""Kinds that the shipped models have learned."""

Batch = dict[str, torch.Tensor]

_ANSWERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "reverse": lambda d: d.flip(1),
    "sort": lambda d: d.sort(1).values,
    "add": lambda d: (d + 3) % 10,
    "running_sum": lambda d: d.cumsum(1) % 10,
    "rotate": lambda d: d.roll(-1, 1),
    "max_minus": lambda d: d.amax(1, keepdim=True) - d,
}
KINDS: tuple[str, ...] = tuple(_ANSWERS)
"""The six kinds, in the order of their task tokens."""


@dataclass(frozen=True)
class DigitTask:
    """Batches of one kind.

    Parameters
    ----------
    kind : str
        One of `KINDS`.
    length : int
        Digits n of a string.

    Raises
    ------
    ValueError
        For an unknown kind (the nearest one is named) or a length below 1.

    Examples
    --------
    >>> import torch
    >>> task = DigitTask("add")
    >>> batch = task.batch(2, torch.Generator().manual_seed(0))
    >>> batch["input_ids"].shape, batch["labels"][0, :7].tolist()
    (torch.Size([2, 11]), [-100, -100, -100, -100, -100, -100, -100])
    >>> task.answer(torch.tensor([[3, 1, 4, 9]])).tolist()
    [[6, 4, 7, 2]]
    """

    kind: str
    length: int = 4

    def __post_init__(self) -> None:
        nearest(self.kind, KINDS, "digit task")
        if not isinstance(self.length, int) or self.length < 1:
            raise ValueError(f"length must be a positive whole number of digits, got {self.length!r}")

    @property
    def token(self) -> int:
        """Id of the task's token."""
        return FIRST_TASK + KINDS.index(self.kind)

    @property
    def tokens(self) -> int:
        """Tokens T of a sequence."""
        return 2 * self.length + 3

    def answer(self, digits: torch.Tensor) -> torch.Tensor:
        """Answers to digits 0 to 9, both (B, n) int64."""
        return _ANSWERS[self.kind](digits)

    def batch(self, n: int, generator: torch.Generator) -> Batch:
        """Draw fresh examples.

        Parameters
        ----------
        n : int
            Rows B.
        generator : torch.Generator

        Returns
        -------
        dict
            ``input_ids`` and ``labels``, both (B, T) int64. Labels stand at the place of their own token, as
            transformers expects them (the model shifts), and are -100 outside the answer.
        """
        digits = torch.randint(10, (n, self.length), generator=generator)
        head = torch.tensor([[BOS, self.token]]).expand(n, 2)
        separator = torch.full((n, 1), SEP)
        answer = self.answer(digits) + FIRST_DIGIT
        ids = torch.cat([head, digits + FIRST_DIGIT, separator, answer], 1)  # (B, T)
        labels = ids.clone()
        labels[:, : -self.length] = IGNORED
        return {"input_ids": ids, "labels": labels}

    def batches(self, n: int, seed: int) -> Iterator[Batch]:
        """Fresh batches of `n` rows without end; equal for equal seeds."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(n, generator)

    def examples(self, n: int = 256, seed: int = 0) -> Batch:
        """Fixed examples to evaluate on, drawn apart from those of `batches`."""
        return self.batch(n, torch.Generator().manual_seed(7_000_000 + seed))

    def rows(self, n: int, seed: int = 0) -> list[Batch]:
        """`n` examples one by one, each value (T,): a data set as ``transformers.Trainer`` takes it."""
        batch = self.batch(n, torch.Generator().manual_seed(seed))
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@torch.no_grad()
def token_accuracy(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    """Share of the answers' tokens that are the most likely token of the whole vocabulary.

    Each is predicted from the right tokens before it. The model's mode (training or evaluation) is restored.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model of transformers, wrapped by peft or not.
    batch : mapping
        ``input_ids`` and ``labels``, both (B, T); labels of -100 do not count.

    Returns
    -------
    float

    Examples
    --------
    >>> batch = DigitTask("reverse").examples(64)
    >>> token_accuracy(digits_model(0), batch) > 0.97
    True
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    targets = batch["labels"][:, 1:].to(device)
    guesses = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits[:, :-1].argmax(-1)
    model.train(was_training)
    counted = targets != IGNORED
    return float((guesses == targets)[counted].float().mean())


def answer_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens, as transformers computes it; a scalar in nats."""
    device = next(model.parameters()).device
    loss: torch.Tensor = model(
        **{name: value.to(device) for name, value in batch.items()}, use_cache=False
    ).loss
    return loss


@torch.no_grad()
def held_out_loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    """Mean cross-entropy of the answers' tokens in nats, of the logits alone: without a wrapper's regulariser.

    The model's mode is restored.

    Examples
    --------
    >>> batch = DigitTask("reverse").examples(64)
    >>> held_out_loss(digits_model(0), batch) < 0.1
    True
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits[:, :-1]  # (B, T - 1, V)
    model.train(was_training)
    targets = batch["labels"][:, 1:].to(device)
    return float(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED))


def adapt(
    model: nn.Module,
    task: DigitTask,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    lr: float,
    batch: int = 16,
    seed: int = 0,
    warmup: float = 0.03,
) -> Iterator[Step]:
    """Train what the optimizer holds on a task, one yielded update at a time.

    Gradients are clipped at norm 1; the learning rate warms up and falls to a tenth along a cosine.

    Parameters
    ----------
    model : torch.nn.Module
        A causal language model with an adapter, or without.
    task : DigitTask
    optimizer : torch.optim.Optimizer
    steps, batch, seed : int
        Updates, rows of each, and seed of the data.
    lr, warmup : float
        Peak, and share of the run before it.

    Yields
    ------
    Step
        After the update; what the caller does then comes before the next one.

    Examples
    --------
    >>> model = digits_model(0)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> losses = [step.loss for step in adapt(model, DigitTask("rotate"), optimizer, 30, lr=1e-3)]
    >>> losses[-1] < losses[0]
    True
    """

    def rate(step: int) -> float:
        return learning_rate(step, steps, lr, warmup)

    batches = ([rows] for rows in task.batches(batch, seed))
    yield from updates(model, batches, optimizer, answer_loss, steps, rate=rate)
    model.eval()


def train_digits_model(
    seed: int = 0,
    kinds: Sequence[str] = PRETRAINED,
    *,
    width: int = 64,
    layers: int = 2,
    steps: int = 400,
    batch: int = 96,
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, dict[str, object]]:
    """Train a small Llama on several kinds at once, rows shared equally.

    Parameters
    ----------
    seed : int
        Of weights and data.
    kinds : sequence of str
        Among `KINDS`.
    width, layers : int
        Size of the model.
    steps, batch : int
        Updates, and rows of each. The learning rate is 3e-3 at width 64 and falls as the width grows.
    device : str or torch.device

    Returns
    -------
    model, recipe
        The model in evaluation mode; seed, steps, processor seconds and token accuracy by kind on 512 examples.

    Raises
    ------
    ValueError
        Without kinds, with an unknown or a repeated one.
    """
    tasks = _tasks(kinds)
    model: Any = _blank(seed, width, layers)
    model.to(device)
    generator = torch.Generator().manual_seed(3_000_000 + seed)

    def mixed() -> Batch:
        parts = [task.batch(max(1, batch // len(tasks)), generator) for task in tasks]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    started = time.process_time()
    for _ in train_steps(model, iter(mixed, None), steps, lr=3e-3 * 64 / width, loss=answer_loss):
        pass
    seconds = time.process_time() - started
    accuracy = {task.kind: round(token_accuracy(model, task.examples(512, seed)), 4) for task in tasks}
    recipe: dict[str, object] = {
        "task": f"digit strings of length {tasks[0].length}: {', '.join(kinds)}",
        "function": "labkit.testbeds.digits.train_digits_model",
        "seed": seed,
        "kinds": list(kinds),
        "steps": steps,
        "batch": batch,
        "accuracy": accuracy,
        "examples": 512,
        "cpu_seconds": round(seconds, 1),
    }
    return model.eval(), recipe


def digits_model(
    seed: int = 0,
    kinds: Sequence[str] = PRETRAINED,
    *,
    width: int = 64,
    layers: int = 2,
    retrain: bool = False,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Model that has learned `kinds`: shipped for seeds 0 to 2 and the kinds of `PRETRAINED`, else trained once.

    Parameters
    ----------
    seed : int
    kinds : sequence of str
        Among `KINDS`; the model knows nothing of the others.
    width, layers : int
        Other sizes than 64 and 2 are trained once.
    retrain : bool
        Train anew (about 7 processor seconds), whatever is shipped or cached, and renew the cache.

    Returns
    -------
    transformers.LlamaForCausalLM
        In evaluation mode on `device`, a fresh copy at each call.

    Raises
    ------
    ValueError
        As `train_digits_model`.

    Examples
    --------
    >>> model = digits_model(0)
    >>> token_accuracy(model, DigitTask("rotate").examples(64)) < 0.5
    True
    """
    kinds = tuple(task.kind for task in _tasks(kinds))
    model: Any = shipped.load(
        f"digits-{seed}",
        _blank(seed, width, layers),
        lambda: train_digits_model(seed, kinds, width=width, layers=layers, device=device)[0],
        key=lambda: {"seed": seed, "kinds": kinds, "width": width, "layers": layers},
        code=[DigitTask, train_digits_model, train_steps, updates],
        default=kinds == PRETRAINED and (width, layers) == (64, 2),
        retrain=retrain,
    )
    return model.to(device)  # type: ignore[no-any-return]


def _blank(seed: int, width: int, layers: int) -> PreTrainedModel:
    config: dict[str, Any] = {"vocab": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS}
    return tiny("llama", width=width, layers=layers, heads=4, seed=seed, **config)


def _tasks(kinds: Sequence[str]) -> list[DigitTask]:
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must be one or more different ones of {', '.join(KINDS)}; got {kinds!r}")
    return [DigitTask(kind) for kind in kinds]
