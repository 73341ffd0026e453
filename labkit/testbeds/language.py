"""A tiny language model that also recalls: key-value pairs as needles in real text, one vocabulary for both.

Perplexity and recall can be read off the same prompt. The text (Python's language reference) is predicted
from its neighbourhood of a few dozen tokens; the answer to ``<question> <key7>`` hangs on one token pair
somewhere in the 512 before. A policy that keeps the neighbourhood and loses the pair looks well by the first
measure and fails by the second.

The vocabulary is the recall task's 104 tokens, by name (``<key0>``, ``<value0>``, ...), then 512 of
byte-level BPE. The model is the trained retrieval model of the same seed with embeddings for the text tokens
added, trained on both losses at once.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from labkit.testbeds import retrieval, shipped
from labkit.testbeds.corpus import split, stdlib_text
from labkit.testbeds.models import tiny
from labkit.testbeds.retrieval import FILLERS, KEYS, SPECIAL, VALUES, RetrievalTask
from labkit.testbeds.tokenizers import BOS, PAD, encode, from_json, train_bpe
from labkit.testbeds.training import IGNORED, TrainingLog, train_steps
from labkit.training.update import updates

TEXT_VOCAB = 512
VOCAB = retrieval.VOCAB + TEXT_VOCAB
SHIPPED_SEEDS = (0, 1, 2)
TASK = RetrievalTask(pairs=16, filler=479)
"""The full task: a context of 512 tokens."""
_TOKENIZER = "language-tokenizer.json"


def _names() -> list[str]:
    """The recall task's tokens by name, in the order of their ids."""
    special = [PAD, BOS, "<question>", *(f"<special{i}>" for i in range(3, SPECIAL))]
    counts = {"key": KEYS, "value": VALUES, "filler": FILLERS}
    return special + [f"<{kind}{i}>" for kind, count in counts.items() for i in range(count)]


def text_tokenizer() -> PreTrainedTokenizerFast:
    """Read the tokenizer that goes with the model; it ships with the package.

    Examples
    --------
    >>> tokenizer = text_tokenizer()
    >>> len(tokenizer), tokenizer("<question><key0>")["input_ids"]
    (616, [2, 8])
    """
    return from_json((shipped.FOLDER / _TOKENIZER).read_text(encoding="utf-8"))


def train_text_tokenizer() -> str:
    """Train that tokenizer on this Python's language reference; returns its JSON, for maintainers to ship."""
    training, _ = split(stdlib_text("docs"))
    made = train_bpe(training, VOCAB, special_tokens=_names())
    return str(made.backend_tokenizer.to_str())


@functools.lru_cache(maxsize=1)
def streams() -> tuple[torch.Tensor, torch.Tensor]:
    """Encode this Python's language reference: training and held-out token ids, all of them text tokens.

    Examples
    --------
    >>> training, held_out = streams()
    >>> int(held_out.min()) >= 104, len(training) > 10 * len(held_out)
    (True, True)
    """
    tokenizer = text_tokenizer()
    training, held_out = (encode(tokenizer, part) for part in split(stdlib_text("docs")))
    return training[training >= retrieval.VOCAB], held_out[held_out >= retrieval.VOCAB]


def text_fingerprint() -> list[int]:
    """Tell the text of one Python version from another's, for the keys of cached models."""
    text, _ = streams()
    return [len(text), int(text.sum())]


def untrained(seed: int) -> PreTrainedModel:
    """Make the model that training begins with: the seed's retrieval model and random text embeddings."""
    source = retrieval.load(seed)
    model = tiny("llama", width=64, layers=2, heads=4, vocab=VOCAB, rope_theta=1000.0, seed=seed)
    known = source.model.embed_tokens.weight
    with torch.no_grad():
        rows = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(seed)) * known[SPECIAL:].std()
        rows[: retrieval.VOCAB] = known
        weights = shipped.state(source) | {"model.embed_tokens.weight": rows}
    return shipped.restore(model, weights)


def _two_losses(
    model: PreTrainedModel, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Loss of the text plus a fifth of the answers' loss; also the text's part, and the answers' accuracy."""
    tokens, text, answers = batch
    logits = model(input_ids=tokens, use_cache=False).logits  # (B, T, V)
    of_text = F.cross_entropy(logits.flatten(0, 1), text.flatten(), ignore_index=IGNORED)
    asked = answers != IGNORED
    of_answers = F.cross_entropy(logits[asked], answers[asked])
    right = float((logits[asked].argmax(-1) == answers[asked]).float().mean())
    return of_text + 0.2 * of_answers, (float(of_text.detach()), right)


def training_batch(
    task: RetrievalTask, n: int, text: torch.Tensor, generator: torch.Generator, *, questions: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw rows of text with pairs in it and answered questions behind it.

    Returns
    -------
    (tokens, text targets, answer targets)
        Each (B, C + 3 * questions). A text token is a target wherever it comes next; pairs cannot be
        predicted and are no targets.
    """
    drawn = task.batch(n, generator, questions=questions, text=text)
    blocks = torch.cat([drawn.questions, drawn.answers[..., None]], -1).flatten(1)
    tokens = torch.cat([drawn.context, blocks], 1)
    length = task.context_length
    of_text = torch.full_like(tokens, IGNORED)
    of_text[:, : length - 1] = torch.where(drawn.filler[:, 1:], drawn.context[:, 1:], IGNORED)
    of_answers = torch.full_like(tokens, IGNORED)
    of_answers[:, length + 1 :: 3] = drawn.answers
    return tokens, of_text, of_answers


def train_language_model(
    seed: int = 0,
    *,
    steps: int = 650,
    lr: float = 3e-3,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> tuple[PreTrainedModel, TrainingLog]:
    """Train the language model, starting from the retrieval model of the same seed.

    Parameters
    ----------
    seed : int
        Of the data and the new embeddings.
    steps : int
        Steps of 4 rows with a context of 512 tokens, or, a third of them, 8 rows of 129.
    lr : float
        Peak learning rate; the decay is a cosine to a tenth.
    progress : callable, optional
        Wraps the iterable of steps.

    Returns
    -------
    model, log
        In evaluation mode; ``log.losses`` is the text's and ``log.notes["answers"]`` the accuracy of each
        step's answers.
    """
    model = untrained(seed)
    text, _ = streams()
    generator = torch.Generator().manual_seed(2_000_000 + seed)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        while True:
            if int(torch.randint(3, (), generator=generator)):
                yield training_batch(TASK, 4, text, generator)
            else:
                yield training_batch(RetrievalTask(16, 96), 8, text, generator)

    log = TrainingLog(notes={"answers": []})
    start = time.process_time()
    run: Iterable[Any] = train_steps(model, batches(), steps, lr=lr, warmup=0.02, loss=_two_losses)
    for step in progress(run) if progress is not None else run:
        log.losses.append(step.extra[0])
        log.notes["answers"].append(step.extra[1])
    log.cpu_seconds = time.process_time() - start
    return model.eval(), log


def language_model(
    seed: int = 0,
    *,
    retrain: bool = False,
    progress: Callable[[Iterable[Any]], Iterable[Any]] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load the tiny language model of a seed, and its tokenizer.

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
    model, tokenizer
        ``LlamaForCausalLM`` in evaluation mode, on the CPU, and a ``PreTrainedTokenizerFast``.

    Notes
    -----
    The shipped weights were trained on the language reference of the Python version in their recipe
    (`labkit.testbeds.shipped.recipe`); on another version's text their loss differs a little.

    Examples
    --------
    >>> model, tokenizer = language_model(0)
    >>> prompt = tokenizer("<bos>The value <key5><value9> is an object.<question><key5>", return_tensors="pt")
    >>> tokenizer.decode(model(prompt["input_ids"]).logits[0, -1].argmax())
    '<value9>'
    """
    model = shipped.load(
        f"language-{seed}",
        tiny("llama", width=64, layers=2, heads=4, vocab=VOCAB, rope_theta=1000.0, seed=seed),
        lambda: train_language_model(seed, progress=progress)[0],
        key=lambda: {"seed": seed, "text": text_fingerprint()},
        code=[
            RetrievalTask,
            untrained,
            training_batch,
            _two_losses,
            train_language_model,
            train_steps,
            updates,
        ],
        retrain=retrain,
    )
    return model, text_tokenizer()
