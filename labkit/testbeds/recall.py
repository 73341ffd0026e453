"""One recall experiment on any causal language model: tiny trained ones, or a real checkpoint with text needles.

A *world* holds a model and prompts of equal length: a context with many facts, a question about one of them, and its
answer. ``"retrieval"`` is :mod:`labkit.testbeds.retrieval`, facts among random tokens; ``"language"`` is
:mod:`labkit.testbeds.language`, facts in real text. Any other name is a checkpoint (a local folder or a hub id): its
contexts are Python's documentation with lines such as ``The code of marble is 4713.`` scattered in it, the question
is ``The code of marble is``, and the answer the four digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labkit.testbeds import corpus, language, retrieval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Words of one or a few tokens in most vocabularies; no word is the beginning of another.
WORDS = tuple(
    """
    marble copper violet anchor lantern harbor saddle pepper velvet tunnel meadow candle falcon ribbon hammer island
    pocket silver basket garden window bottle jacket mirror needle orange pencil rocket shadow ticket valley walnut
    """.split()  # noqa: SIM905 - a list literal of 32 strings is no easier to read
)


@dataclass(frozen=True)
class RecallWorld:
    """A model, and prompts that ask it for one fact of many.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode.
    context : Tensor
        ``(B, n)`` token ids, all rows of one length.
    question : Tensor
        ``(B, T)`` token ids.
    answer : Tensor
        ``(B, A)`` token ids that follow the question.
    needle : Tensor
        ``(B, 2)``: first position of the asked fact in the context, and the position behind its last token.
    is_text : Tensor
        ``(B, n)`` bool: the tokens of the context that are natural text, and so can be predicted.
    """

    model: PreTrainedModel
    context: torch.Tensor
    question: torch.Tensor
    answer: torch.Tensor
    needle: torch.Tensor
    is_text: torch.Tensor

    @property
    def asked(self) -> torch.Tensor:
        """Context with the question at its end: the prompt of a reader who knows what will be asked."""
        return torch.cat([self.context, self.question], dim=1)


def load(
    name: str = "retrieval",
    *,
    seed: int = 0,
    prompts: int = 128,
    length: int | None = None,
    facts: int = 16,
    train: bool = True,
    device: torch.device | str = "cpu",
) -> RecallWorld:
    """Make a world.

    Parameters
    ----------
    name : str
        ``"retrieval"`` or ``"language"`` for the tiny trained model of `seed`, or a folder or hub id of a causal
        language model.
    seed : int
        Of the prompts, and of the tiny model.
    prompts : int
        Rows B.
    length : int, optional
        Tokens of a checkpoint's contexts; 2048 by default. The tiny models' have 97 and 512.
    facts : int
        Facts in a context, at most 32.
    train : bool
        Whether a tiny model that is not shipped for `seed` is trained (about a minute, once) or one of the shipped
        ones takes its place.
    device : str or torch.device

    Raises
    ------
    ValueError
        For too many facts, contexts that do not hold them, or a length for a tiny model, which has its own.
    OSError
        If a checkpoint is neither a local folder nor to be had from the hub.

    Examples
    --------
    >>> world = load("retrieval", seed=0, prompts=4)
    >>> world.asked.shape, world.answer.shape
    (torch.Size([4, 99]), torch.Size([4, 1]))
    """
    if not 1 <= facts <= len(WORDS):
        raise ValueError(f"facts={facts} must lie in 1..{len(WORDS)}")
    generator = torch.Generator().manual_seed(5_000_000 + seed)
    if name in ("retrieval", "language"):
        if length is not None:
            raise ValueError(
                f"length={length}: contexts of the tiny model {name!r} have their own; leave length out"
            )
        which = seed if train or seed in language.SHIPPED_SEEDS else seed % len(language.SHIPPED_SEEDS)
        if name == "retrieval":
            tiny: Any = retrieval.load(which)
            batch = retrieval.RetrievalTask(pairs=facts).batch(prompts, generator)
            is_text = torch.zeros_like(batch.context, dtype=torch.bool)
        else:
            tiny, _ = language.language_model(which)
            held_out = language.streams()[1]
            task = retrieval.RetrievalTask(pairs=facts, filler=language.TASK.context_length - 1 - 2 * facts)
            batch = task.batch(prompts, generator, text=held_out)
            is_text = batch.context >= retrieval.VOCAB
        tiny.to(device)
        batch = batch.to(device)
        needle = torch.stack([batch.needle[:, 0], batch.needle[:, 1] + 1], dim=1)
        question, answer = batch.questions[:, 0], batch.answer[:, None]
        return RecallWorld(tiny, batch.context, question, answer, needle, is_text.to(device))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    tokenizer = AutoTokenizer.from_pretrained(source)
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.to(device).eval()
    rows = [_needle_prompt(tokenizer, length or 2048, facts, generator) for _ in range(prompts)]
    # The few prompts whose digits or words split differently are cut to the rows that share the common lengths.
    shapes = [(len(question), len(answer)) for _, question, answer, _ in rows]
    common = max(set(shapes), key=shapes.count)
    kept = [row for row, shape in zip(rows, shapes, strict=True) if shape == common]
    context, question, answer, needle = (
        torch.tensor([row[part] for row in kept], device=device) for part in range(4)
    )
    return RecallWorld(model, context, question, answer, needle, torch.ones_like(context, dtype=torch.bool))


def _needle_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, facts: int, generator: torch.Generator
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Token ids of context, question and answer, and the place of the asked fact."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    words = [WORDS[i] for i in torch.randperm(len(WORDS), generator=generator)[:facts]]
    codes = [int(code) for code in torch.randint(1000, 10_000, (facts,), generator=generator)]
    needles = [ids(f"\nThe code of {word} is {code}.\n") for word, code in zip(words, codes, strict=True)]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = length - len(start) - sum(map(len, needles))
    text = corpus.stdlib_text("docs", max_bytes=400_000)
    begin = int(torch.randint(max(1, len(text) - 12 * length), (), generator=generator))
    filler = ids(text[begin : begin + 12 * max(length, 1)])[: max(room, 0)]
    if room < facts or len(filler) < room:
        raise ValueError(
            f"a context of {length} tokens does not hold {facts} facts; raise length or lower facts"
        )
    cuts = sorted(int(cut) for cut in torch.randint(room + 1, (facts,), generator=generator))
    asked = int(torch.randint(facts, (), generator=generator))
    context, before, place = list(start), 0, [0, 0]
    for index, (cut, needle) in enumerate(zip(cuts, needles, strict=True)):
        context += filler[before:cut]
        if index == asked:
            place = [len(context), len(context) + len(needle)]
        context += needle
        before = cut
    context += filler[before:]
    question = ids(f"\nThe code of {words[asked]} is")
    answer = ids(f"\nThe code of {words[asked]} is {codes[asked]}")[len(question) :]
    return context, question, answer, place
