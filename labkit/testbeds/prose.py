"""A tiny language model with many heads: a multi-head Llama on Python's language reference.

Eight heads of 8 dimensions in each of four layers, one key and one value head for each query head: enough heads to
merge. It is trained until more of the same training gains next to nothing, as a checkpoint should be: on a model that
is still learning fast, the steps after a conversion repair any damage.

A *world* holds a model, this one or a checkpoint, with text to train on and text to measure on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from labkit.testbeds import corpus, shipped
from labkit.testbeds.language import VOCAB, streams, text_fingerprint
from labkit.testbeds.models import tiny
from labkit.testbeds.training import TrainingLog, lm_loss, train_steps, windows
from labkit.training.update import updates

SHIPPED_SEEDS = (0, 1, 2)
LENGTH = 64
"""Length of the windows that the model is trained and measured on, in tokens."""


def untrained(seed: int) -> PreTrainedModel:
    """Make the model before its training: 240,704 parameters."""
    return tiny("llama", width=64, layers=4, heads=8, vocab=VOCAB, intermediate_size=176, seed=seed)


def train_prose_model(
    seed: int = 0,
    *,
    steps: int = 1500,
    lr: float = 3e-3,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train the model on windows of the language reference.

    Parameters
    ----------
    seed : int
        Of the initial weights and of the windows.
    steps : int
        Steps of 16 windows of 64 tokens.
    lr : float
        Peak learning rate; the decay is a cosine to a tenth.
    progress : callable, optional
        Wraps the iterable of steps.

    Returns
    -------
    model, log
        In evaluation mode.
    """
    model = untrained(seed)
    batches = windows(streams()[0], 16, LENGTH, torch.Generator().manual_seed(3_000_000 + seed))
    log = TrainingLog(tokens=steps * 16 * LENGTH)
    start = time.process_time()
    run: Iterable[Any] = train_steps(model, batches, steps, lr=lr)
    log.losses = [step.loss for step in (progress(run) if progress is not None else run)]
    log.cpu_seconds = time.process_time() - start
    return model.eval(), log


def held_out_loss(model: PreTrainedModel) -> float:
    """Cross-entropy on the held-out end of the language reference (about 10,000 tokens), in nats a token."""
    return lm_loss(model, streams()[1], length=LENGTH, rows=158)


def prose_model(
    seed: int = 0,
    *,
    retrain: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> PreTrainedModel:
    """Load the tiny many-headed language model of a seed.

    Parameters
    ----------
    seed : int
        `SHIPPED_SEEDS` come with the package; any other is trained once (about a minute) and cached.
    retrain : bool
        Train anew, whatever is shipped or cached, and renew the cache.
    progress : callable, optional
        Wraps the iterable of training steps, when there are any.

    Returns
    -------
    transformers.LlamaForCausalLM
        In evaluation mode, on the CPU, float32.

    Examples
    --------
    >>> model = prose_model(0)
    >>> model.config.num_attention_heads, model.config.num_key_value_heads, held_out_loss(model) < 2.5
    (8, 8, True)
    """
    return shipped.load(
        f"prose-{seed}",
        untrained(seed),
        lambda: train_prose_model(seed, progress=progress)[0],
        key=lambda: {"seed": seed, "text": text_fingerprint()},
        code=[untrained, train_prose_model, train_steps, updates],
        retrain=retrain,
    )


@dataclass(frozen=True)
class ProseWorld:
    """A language model, and text.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    training, held_out : Tensor
        Token ids, ``(N,)`` and ``(M,)``.
    length : int
        Length T of the windows.
    """

    model: PreTrainedModel
    training: torch.Tensor
    held_out: torch.Tensor
    length: int

    def batches(self, rows: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless random windows of the training text, (tokens, targets), both ``(rows, T)``; one order a seed."""
        generator = torch.Generator().manual_seed(4_000_000 + seed)
        for batch in windows(self.training, rows, self.length, generator):
            yield batch[0].to(self.model.device), batch[1].to(self.model.device)

    def loss(self, model: PreTrainedModel | None = None, *, rows: int = 158) -> float:
        """Held-out loss of the world's model or of another one, in nats a token, on at most ``rows`` windows.

        The model's mode, training or evaluation, is left as it was.
        """
        measured = self.model if model is None else model
        mode = measured.training
        value = lm_loss(measured, self.held_out, length=self.length, rows=rows)
        measured.train(mode)
        return value


def world(
    name: str = "prose",
    *,
    seed: int = 0,
    length: int = LENGTH,
    train: bool = True,
    device: torch.device | str = "cpu",
) -> ProseWorld:
    """Make a world.

    Parameters
    ----------
    name : str
        ``"prose"``, or a folder or hub id of a causal language model, with Python's documentation in its own tokens.
    seed : int
        Of the tiny model.
    length : int
        Length T of the windows.
    train : bool
        Whether a tiny model that is not shipped for `seed` is trained (about a minute, once) or one of the shipped
        ones takes its place.
    device : str or torch.device

    Raises
    ------
    OSError
        If a checkpoint is neither a local folder nor to be had from the hub.

    Examples
    --------
    >>> small = world(seed=1)
    >>> next(small.batches(4))[0].shape, small.loss(rows=8) < 3
    (torch.Size([4, 64]), True)
    """
    if name == "prose":
        which = seed if train or seed in SHIPPED_SEEDS else seed % len(SHIPPED_SEEDS)
        model: Any = prose_model(which)
        return ProseWorld(model.to(device), *streams(), length)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    training, held_out = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
        for part in corpus.split(corpus.stdlib_text("docs"))
    )
    return ProseWorld(model.to(device).eval(), training, held_out, length)
