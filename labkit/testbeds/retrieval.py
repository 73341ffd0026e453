"""Key-value recall: a task where one token in a hundred decides, and a two-layer model that solves it.

A prompt scatters key-value pairs (two neighbouring tokens each) among filler and ends with a question::

    BOS f f K7 V3 f K2 V9 f f ...  Q K2   ->  V9

A model that answers must have kept the pair that the question asks for, so the accuracy tells at once whether
a key-value cache lost it. The value's place in the cache is `RetrievalBatch.needle`.

Trained on this task from scratch, a small model stays with shortcuts for a long time. It learns at once when
it has first learned to copy: `train_retrieval` repeats random strings until the copy is right in 85 % of the
places and then turns to recall with 8, 12 and 16 pairs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from labkit.testbeds import shipped
from labkit.testbeds.models import tiny
from labkit.testbeds.training import IGNORED, TrainingLog, train_steps
from labkit.training.update import updates

SPECIAL, KEYS, VALUES, FILLERS = 8, 32, 32, 32
VOCAB = SPECIAL + KEYS + VALUES + FILLERS
PAD, BOS, QUESTION = 0, 1, 2
SHIPPED_SEEDS = (0, 1, 2, 100)
_STAGES = ((8, 24), (12, 40), (16, 64))


@dataclass(frozen=True)
class RetrievalBatch:
    """A batch of prompts and where things are in them.

    Attributes
    ----------
    context : (B, C) int64
        What may be put into a cache before any question is known.
    questions : (B, M, 2) int64
        M questions about the same context, each ``[QUESTION, key]``.
    answers : (B, M) int64
        The value that follows each question.
    needles : (B, M, 2) int64
        Positions in `context` of the asked key and its value.
    pairs : (B, pairs, 2) int64
        Positions in `context` of every key and its value.
    """

    context: torch.Tensor
    questions: torch.Tensor
    answers: torch.Tensor
    needles: torch.Tensor
    pairs: torch.Tensor

    @property
    def tokens(self) -> torch.Tensor:
        """Context and first question: the prompt as a whole, (B, C + 2)."""
        return torch.cat([self.context, self.questions[:, 0]], 1)

    @property
    def answer(self) -> torch.Tensor:
        """Answer to the first question, (B,)."""
        return self.answers[:, 0]

    @property
    def needle(self) -> torch.Tensor:
        """Positions of the first question's key and value, (B, 2)."""
        return self.needles[:, 0]

    @property
    def filler(self) -> torch.Tensor:
        """Which tokens of `context` are filler, random or text: (B, C) bool."""
        return self.context >= SPECIAL + KEYS + VALUES

    @property
    def question_start(self) -> int:
        """Position in `tokens` where the question begins: prefill up to here when it must stay unknown."""
        return self.context.shape[1]

    def to(self, device: torch.device | str) -> RetrievalBatch:
        """Copy the batch to a device."""
        return RetrievalBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class RetrievalTask:
    """Prompts with key-value pairs among filler.

    Parameters
    ----------
    pairs : int
        Pairs in a prompt, at most 32; keys differ from each other, and so do values.
    filler : int
        Filler tokens in a prompt.
    question_first : bool
        Put a copy of the (first) question right behind BOS too. The question behind the context stays, so a
        policy that looks at the end of the *context* sees no question, while the reader had one at the start.

    Raises
    ------
    ValueError
        For pairs outside 1..32 or a negative filler.

    Examples
    --------
    >>> import torch
    >>> batch = RetrievalTask().batch(3, torch.Generator().manual_seed(0))
    >>> batch.tokens.shape, batch.question_start
    (torch.Size([3, 99]), 97)
    >>> value = batch.context.gather(1, batch.needle[:, 1:])[:, 0]
    >>> bool((value == batch.answer).all())
    True
    """

    pairs: int = 16
    filler: int = 64
    question_first: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= min(KEYS, VALUES):
            raise ValueError(f"pairs must lie in 1..{min(KEYS, VALUES)}, got {self.pairs}")
        if self.filler < 0:
            raise ValueError(f"filler must not be negative, got {self.filler}")

    @property
    def context_length(self) -> int:
        """Tokens C of a context."""
        return 1 + 2 * self.question_first + 2 * self.pairs + self.filler

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt: context and one question."""
        return self.context_length + 2

    def batch(
        self, n: int, generator: torch.Generator, *, questions: int = 1, text: torch.Tensor | None = None
    ) -> RetrievalBatch:
        """Draw prompts.

        Parameters
        ----------
        n : int
            Rows B.
        generator : torch.Generator
            A CPU generator; the only source of chance.
        questions : int
            Different questions M about each context, at most `pairs`.
        text : (N,) int64 tensor, optional
            Token stream of `labkit.testbeds.language`: the filler is then a passage of it in place of random
            filler tokens.

        Returns
        -------
        RetrievalBatch
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        if not 1 <= questions <= self.pairs:
            raise ValueError(
                f"questions must lie in 1..{self.pairs} (the pairs of a prompt), got {questions}"
            )
        pairs, head = self.pairs, 1 + 2 * self.question_first
        keys = SPECIAL + _distinct(n, KEYS, pairs, generator)  # (B, pairs)
        values = SPECIAL + KEYS + _distinct(n, VALUES, pairs, generator)
        # Units (two-token pairs, single fillers) in random order; each begins behind the room taken so far.
        units = pairs + self.filler
        order = torch.rand(n, units, generator=generator).argsort(1)  # (B, units): unit at each place
        room = torch.where(order < pairs, 2, 1)
        begins = head + room.cumsum(1) - room
        key_at = begins.gather(1, order.argsort(1)[:, :pairs])  # (B, pairs)
        size = (n, self.context_length)
        context = SPECIAL + KEYS + VALUES + torch.randint(FILLERS, size, generator=generator)
        context[:, 0] = BOS
        if text is not None:
            if len(text) < self.filler:
                raise ValueError(f"text has {len(text)} tokens, fewer than the {self.filler} of a context")
            starts = torch.randint(len(text) - self.filler + 1, (n,), generator=generator)
            passages = text[starts[:, None] + torch.arange(self.filler)]  # (B, filler)
            free = torch.ones(size, dtype=torch.bool).index_fill_(1, torch.arange(head), False)
            context[free.scatter_(1, torch.cat([key_at, key_at + 1], 1), False)] = passages.flatten()
        context.scatter_(1, key_at, keys).scatter_(1, key_at + 1, values)
        asked = _distinct(n, pairs, questions, generator)  # (B, M)
        key = keys.gather(1, asked)
        question = torch.stack([torch.full_like(key, QUESTION), key], -1)  # (B, M, 2)
        if self.question_first:
            context[:, 1:3] = question[:, 0]
        places = torch.stack([key_at, key_at + 1], -1)  # (B, pairs, 2)
        needles = places.gather(1, asked[..., None].expand(-1, -1, 2))
        return RetrievalBatch(context, question, values.gather(1, asked), needles, places)

    def training_batch(
        self, n: int, generator: torch.Generator, *, questions: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw rows with several answered questions, each of whose keys has its value as target.

        Returns
        -------
        (tokens, targets)
            Both (B, C + 3 * questions), for `labkit.testbeds.training.token_loss`.
        """
        drawn = self.batch(n, generator, questions=questions)
        blocks = torch.cat([drawn.questions, drawn.answers[..., None]], -1).flatten(1)  # (B, 3M)
        tokens = torch.cat([drawn.context, blocks], 1)
        targets = torch.full_like(tokens, IGNORED)
        targets[:, self.context_length + 1 :: 3] = drawn.answers
        return tokens, targets


def _distinct(n: int, population: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `k` different numbers below `population` in each of `n` rows."""
    return torch.rand(n, population, generator=generator).argsort(1)[:, :k]


def copy_batch(
    n: int, generator: torch.Generator, *, shortest: int = 8, longest: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw ``BOS s s`` with a random string s; its second half is the target.

    Returns
    -------
    (tokens, targets)
        Both (B, 2 * length of s); the first symbol of the second half cannot be known and is no target.
    """
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    half = SPECIAL + torch.randint(VOCAB - SPECIAL, (n, length), generator=generator)
    row = torch.cat([torch.full((n, 1), BOS), half, half], 1)
    tokens, targets = row[:, :-1], row[:, 1:].clone()
    targets[:, : length + 1] = IGNORED
    return tokens, targets


@torch.no_grad()
def accuracy(
    model: PreTrainedModel,
    task: RetrievalTask | None = None,
    *,
    prompts: int = 512,
    batch: int = 128,
    seed: int = 12345,
    split_question: bool = False,
    text: torch.Tensor | None = None,
) -> float:
    """Share of right answers with the whole cache, one question a prompt.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model with the task's vocabulary.
    task : RetrievalTask, optional
        16 pairs and 64 filler tokens by default.
    prompts, batch : int
        Prompts in all and at a time.
    seed : int
        Of the prompts; training never uses the default's.
    split_question : bool
        Read the context first and the question in a second call with the cache, as in the question-agnostic
        setting.
    text : (N,) int64 tensor, optional
        Filler text, see `RetrievalTask.batch`.

    Returns
    -------
    float
        In 0..1; guessing among the context's values gives ``1 / pairs``.
    """
    task = RetrievalTask() if task is None else task
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    right = 0
    for begin in range(0, prompts, batch):
        drawn = task.batch(min(batch, prompts - begin), generator, text=text).to(model.device)
        if split_question:
            past = model(input_ids=drawn.context, use_cache=True).past_key_values
            logits = model(input_ids=drawn.questions[:, 0], past_key_values=past, use_cache=True).logits
        else:
            logits = model(input_ids=drawn.tokens, use_cache=False).logits
        right += int((logits[:, -1].argmax(-1) == drawn.answer).sum())
    return right / prompts


def retrieval_model(seed: int, *, kv_heads: int = 4, **config: Any) -> PreTrainedModel:
    """Make the untrained model: Llama, width 64, two layers, four heads, tied embeddings, 101k parameters."""
    settings: dict[str, Any] = {
        "width": 64,
        "layers": 2,
        "heads": 4,
        "init": 0.06,
        "rope_theta": 100.0,
    } | config
    return tiny("llama", kv_heads=kv_heads, vocab=VOCAB, seed=seed, **settings)


def _recall_loss(
    model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, float]:
    """Cross-entropy of the places that have a target, and the share of them that is right."""
    tokens, targets = batch
    asked = targets != IGNORED
    logits = model(input_ids=tokens, use_cache=False).logits[asked].float()  # (places, V)
    wanted = targets[asked]
    return F.cross_entropy(logits, wanted), float((logits.argmax(-1) == wanted).float().mean())


def _mixed_task(generator: torch.Generator) -> RetrievalTask:
    """A task of the last stage: half the time the full one, else smaller or with the question up front."""
    kind, pairs, filler = (int(torch.randint(bound, (), generator=generator)) for bound in (4, 3, 7))
    if kind == 0:
        return RetrievalTask(8 + 4 * pairs, 16 + 8 * filler)
    return RetrievalTask(*_STAGES[-1], question_first=kind == 1)


def train_retrieval(
    seed: int = 0,
    *,
    max_steps: int = 2500,
    final_steps: int = 400,
    batch: int = 32,
    lr: float = 3e-3,
    kv_heads: int = 4,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **config: Any,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train the retrieval model: copying first, then recall with more and more pairs.

    Parameters
    ----------
    seed : int
        Of the initial weights and of the data.
    max_steps : int
        Most steps before the last stage; one that has not been reached by then is an error.
    final_steps : int
        Steps of the last stage: 16 pairs among 64 filler tokens, now and then fewer, now and then with the
        question in front too. The learning rate falls to a twentieth in it.
    batch : int
        Rows B.
    lr : float
        Learning rate after 30 warm-up steps.
    kv_heads, **config
        See `retrieval_model`.
    progress : callable, optional
        Wraps the iterable of steps.

    Returns
    -------
    model, log
        In evaluation mode; ``log.notes["stages"]`` holds the step at which each stage began.

    Raises
    ------
    RuntimeError
        When the curriculum has not reached its last stage after `max_steps`.

    Notes
    -----
    A stage is left when the running mean of the accuracy on its own, always fresh, batches passes 85 %
    (copying) or 95 % (recall).
    """
    model = retrieval_model(seed, kv_heads=kv_heads, **config)
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    stages = [0]  # first step of each stage

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            if len(stages) == 1:
                yield copy_batch(batch, generator)
            elif len(stages) <= len(_STAGES):
                pairs, filler = _STAGES[len(stages) - 2]
                yield RetrievalTask(pairs, filler).training_batch(batch, generator, questions=pairs)
            else:
                yield _mixed_task(generator).training_batch(batch, generator, questions=8)

    def rate(step: int) -> float:
        if len(stages) <= len(_STAGES):
            return lr * min(1.0, (step + 1) / 30)
        share = (step - stages[-1]) / final_steps
        return lr * (0.05 + 0.475 * (1 + math.cos(math.pi * share)))

    log = TrainingLog()
    start = time.process_time()
    run: Iterable[Any] = train_steps(
        model, batches(), max_steps + final_steps, schedule=rate, betas=(0.9, 0.98), loss=_recall_loss
    )
    running = 0.0
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.loss)
        running = 0.8 * running + 0.2 * step.extra
        if len(stages) > len(_STAGES):
            if step.number + 1 == stages[-1] + final_steps:
                break
        elif running >= (0.85 if len(stages) == 1 else 0.95):
            stages.append(step.number + 1)
            running = 0.0
        elif step.number + 1 >= max_steps:
            raise RuntimeError(
                f"seed {seed} is still in stage {len(stages) - 1} of {len(_STAGES)} after {max_steps} steps "
                f"(running accuracy {running:.2f}): raise max_steps or take another seed"
            )
    log.cpu_seconds = time.process_time() - start
    log.notes["stages"] = stages
    return model.eval(), log


def load(
    seed: int = 0,
    *,
    kv_heads: int = 4,
    retrain: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Load the trained retrieval model of a seed.

    Parameters
    ----------
    seed : int
        `SHIPPED_SEEDS` come with the package; any other is trained once (about 45 processor seconds) and
        cached.
    kv_heads, **config
        See `retrieval_model`; anything but the default is trained once and cached.
    retrain : bool
        Train anew, whatever is shipped or cached, and renew the cache.
    progress : callable, optional
        Wraps the iterable of training steps, when there are any.

    Returns
    -------
    transformers.PreTrainedModel
        ``LlamaForCausalLM`` in evaluation mode, on the CPU. Fresh each time: change it as you like.

    Examples
    --------
    >>> model = load(0)
    >>> accuracy(model, prompts=64) > 0.9
    True
    """
    return shipped.load(
        f"retrieval-{seed}",
        retrieval_model(seed, kv_heads=kv_heads, **config),
        lambda: train_retrieval(seed, kv_heads=kv_heads, progress=progress, **config)[0],
        key=lambda: {"seed": seed, "kv_heads": kv_heads, "config": config},
        code=[RetrievalTask, copy_batch, _mixed_task, retrieval_model, train_retrieval, train_steps, updates],
        default=kv_heads == 4 and not config,
        retrain=retrain,
    )
