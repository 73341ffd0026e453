"""One training loop for every tiny model, and the measures that go with it.

The settings are those that worked on models of 0.1 to 3 million parameters: AdamW with momenta (0.9, 0.95),
learning rate 3e-3, a short linear warm-up, cosine decay to a tenth, gradients clipped at norm 1, everything
in float32. `train_steps` gives them to the package's one training step, `labkit.training.updates`, as an iterator,
so that a task with its own curriculum can look at every step and stop when it likes; `train_lm` is that iterator run
to its end on a stream of tokens. For checkpoints and several processes see `labkit.training.TrainingLoop`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from labkit.testbeds.models import nearest
from labkit.training.update import Loss, Step, updates

Schedule = Literal["cosine", "constant"]
IGNORED = -100
"""Target value that carries no loss."""


@dataclass
class TrainingLog:
    """Course of a training run.

    Attributes
    ----------
    losses : list of float
        Loss of each step in nats a token, before the step's update.
    evaluations : list of (int, float)
        Steps done and held-out measure, where an evaluation was asked for.
    tokens : int
        Tokens trained on.
    cpu_seconds : float
        Processor time of this process, all threads together.
    notes : dict
        What else a task wants to keep, for example when its curriculum moved on.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    tokens: int = 0
    cpu_seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps done."""
        return len(self.losses)

    def final(self, last: int = 20) -> float:
        """Mean loss of the last steps, in nats a token."""
        tail = self.losses[-last:]
        return sum(tail) / len(tail) if tail else math.nan


def learning_rate(
    step: int, steps: int, lr: float, warmup: float | int, schedule: Schedule = "cosine"
) -> float:
    """Learning rate of a step: linear warm-up, then cosine decay to a tenth, or constant.

    Parameters
    ----------
    step, steps : int
        Number of the step, from 0, and length of the run.
    lr : float
        Peak.
    warmup : float or int
        Share of the run below 1, or number of steps.
    schedule : {"cosine", "constant"}
        What follows the warm-up.

    Examples
    --------
    >>> [round(learning_rate(i, 100, 1.0, 0.05), 2) for i in (0, 4, 5, 99)]
    [0.2, 1.0, 1.0, 0.1]
    """
    rise = round(warmup * steps) if isinstance(warmup, float) and warmup < 1 else int(warmup)
    if step < rise:
        return lr * (step + 1) / rise
    if schedule == "constant":
        return lr
    share = (step - rise) / max(1, steps - rise)
    return lr * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, share))))


def token_loss(model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of a batch, in float32, without a cache.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    batch : (tokens, targets)
        Both (B, T). ``targets[b, t]`` is what should follow ``tokens[b, t]``; ``IGNORED`` positions carry no
        loss.

    Returns
    -------
    torch.Tensor
        Scalar, nats a token.
    """
    tokens, targets = batch
    logits = model(input_ids=tokens, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def train_steps(
    model: PreTrainedModel,
    batches: Iterable[Any],
    steps: int,
    *,
    lr: float = 3e-3,
    warmup: float | int = 0.05,
    schedule: Schedule | Callable[[int], float] = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    weight_decay: float = 0.0,
    clip: float = 1.0,
    loss: Loss = token_loss,
) -> Iterator[Step]:
    """Train, one yielded step at a time.

    Stop iterating whenever enough is enough; the model is left in the state after the last yielded step.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Trained in place; parameters with ``requires_grad=False`` stay as they are.
    batches : iterable
        One batch a step, in the form that `loss` takes. It may react to what the caller learned from earlier
        steps, because a batch is asked for only when its step begins.
    steps : int
        Most steps to do; the schedule ends there.
    lr, warmup, schedule
        See `learning_rate`; a callable schedule gives the rate of each step itself and the other two are not
        used.
    betas, weight_decay, clip
        Of AdamW (fused) and of the clipped gradient norm.
    loss : callable
        ``loss(model, batch)``, a scalar or a pair of a scalar and anything else, which `Step.extra` then
        shows. The default is `token_loss`.

    Yields
    ------
    Step

    Raises
    ------
    ValueError
        When `steps` is not positive, nothing is trainable, or the schedule is unknown.
    FloatingPointError
        When the loss stops being finite.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not callable(schedule):
        nearest(schedule, ["cosine", "constant"], "schedule")
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("the model has no trainable parameter: every requires_grad is False")
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)

    def rate(index: int) -> float:
        return schedule(index) if callable(schedule) else learning_rate(index, steps, lr, warmup, schedule)

    single = ([batch] for batch in batches)
    yield from updates(model, single, optimizer, loss, steps, clip=clip, rate=rate)


def windows(
    ids: torch.Tensor | Sequence[int], batch: int, length: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random windows of a token stream, with their next tokens.

    Parameters
    ----------
    ids : (N,) tensor or sequence of int
        The stream.
    batch, length : int
        Rows B and window length T.
    generator : torch.Generator
        Draws the windows; give each arm of an experiment one of the same seed and they see the same data.

    Yields
    ------
    (tokens, targets)
        Both (B, T) int64.
    """
    stream = torch.as_tensor(ids, dtype=torch.long).flatten()
    if len(stream) <= length:
        raise ValueError(f"{len(stream)} tokens do not hold one window of {length} and its next token")
    offsets = torch.arange(length + 1)
    while True:
        starts = torch.randint(len(stream) - length, (batch,), generator=generator)
        rows = stream[starts[:, None] + offsets]  # (B, T + 1)
        yield rows[:, :-1], rows[:, 1:]


def train_lm(
    model: PreTrainedModel,
    data: torch.Tensor | Sequence[int],
    steps: int,
    batch: int = 16,
    length: int = 64,
    *,
    lr: float = 3e-3,
    warmup: float | int = 0.05,
    seed: int = 0,
    validation: torch.Tensor | Sequence[int] | None = None,
    evaluate_every: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **settings: Any,
) -> TrainingLog:
    """Train a causal language model on a stream of tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Trained in place, on its own device.
    data : (N,) tensor or sequence of int
        Token stream.
    steps, batch, length : int
        Steps, rows B and window length T.
    lr, warmup
        See `learning_rate`; the decay is a cosine to a tenth.
    seed : int
        Of the order of the data alone. Weights are seeded where the model is made.
    validation : (M,) tensor or sequence of int, optional
        Held-out stream, evaluated every `evaluate_every` steps and at the end.
    evaluate_every : int
        0 evaluates at the end only.
    progress : callable, optional
        Wraps the iterable of steps, for example ``functools.partial(run.progress, total=steps)``.
    **settings
        Passed to `train_steps`.

    Returns
    -------
    TrainingLog

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", width=16, layers=1, heads=2, vocab=8, seed=0)
    >>> log = train_lm(model, torch.arange(400) % 8, steps=60, batch=8, length=16, lr=1e-2)
    >>> log.steps, log.final() < 0.7 < 1.9 < log.losses[0]
    (60, True)
    """
    device = model.device
    generator = torch.Generator().manual_seed(seed)
    batches = (tuple(part.to(device) for part in pair) for pair in windows(data, batch, length, generator))
    log = TrainingLog()
    start = time.process_time()
    run: Iterable[Any] = train_steps(model, batches, steps, lr=lr, warmup=warmup, **settings)
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.loss)
        log.tokens += batch * length
        done = step.number + 1
        if validation is not None and (done == steps or (evaluate_every and done % evaluate_every == 0)):
            log.evaluations.append((done, lm_loss(model, validation, length=length)))
            model.train()
    log.cpu_seconds = time.process_time() - start
    model.eval()
    return log


@torch.no_grad()
def loss_by_position(
    model: PreTrainedModel,
    data: torch.Tensor | Sequence[int],
    *,
    length: int = 128,
    batch: int = 16,
    rows: int = 64,
    stride: int | None = None,
) -> torch.Tensor:
    """Mean next-token loss at every position of a window.

    The curve falls as far as a model makes use of its context: a flat tail says that what stands further back
    does not help it, and that losing it from a cache cannot hurt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    data : (N,) tensor or sequence of int
        Token stream.
    length : int
        Window length T.
    batch, rows : int
        Rows a forward pass and rows in all; windows are spread evenly over the stream.
    stride : int, optional
        Distance of windows' starts. By default they cover the stream from end to end.

    Returns
    -------
    (T,) tensor
        Nats a token.
    """
    stream = torch.as_tensor(data, dtype=torch.long).flatten()
    last = len(stream) - length - 1
    if last < 0:
        raise ValueError(f"{len(stream)} tokens do not hold one window of {length} and its next token")
    rows = min(rows, last + 1)
    starts = (
        torch.linspace(0, last, rows).long() if stride is None else torch.arange(0, last + 1, stride)[:rows]
    )
    table = stream[starts[:, None] + torch.arange(length + 1)]  # (rows, T + 1)
    total = torch.zeros(length, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for part in table.split(batch):
        part = part.to(model.device)
        logits = model(input_ids=part[:, :-1], use_cache=False).logits.float()
        losses = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")  # (B, T)
        total += losses.double().sum(0).cpu()
    model.train(was_training)
    return (total / len(table)).float()


def lm_loss(
    model: PreTrainedModel,
    data: torch.Tensor | Sequence[int],
    *,
    length: int = 128,
    batch: int = 16,
    rows: int = 64,
) -> float:
    """Mean of `loss_by_position` over all positions, in nats a token."""
    return float(loss_by_position(model, data, length=length, batch=batch, rows=rows).mean())


def bits_per_byte(loss: float, tokens: int, text_bytes: int) -> float:
    """Turn a loss in nats a token into bits a byte, which compares models of different vocabularies.

    Parameters
    ----------
    loss : float
        Nats a token.
    tokens, text_bytes : int
        Size of one and the same text in tokens and in UTF-8 bytes.

    Examples
    --------
    >>> round(bits_per_byte(3.366, tokens=1000, text_bytes=2110), 2)
    2.3
    """
    if tokens < 1 or text_bytes < 1:
        raise ValueError(f"tokens ({tokens}) and text_bytes ({text_bytes}) must be positive")
    return loss / math.log(2) * tokens / text_bytes
