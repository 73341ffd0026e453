"""A model that knows something, facts of it to change, and text to see what else changes: one call for any size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from labkit.testbeds.facts import FAMILIES, FactsWorld, facts_model, word
from labkit.testbeds.signatures import Signature, signature_edits, signature_facts


@dataclass(frozen=True, eq=False)
class EditingWorld:
    """What an experiment with edits needs.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        In evaluation mode.
    edits : list of dict
        Arguments of ``labkit.finetuning.EditRequest``.
    texts : list of (1, T) or (B, T) int64 tensors
        What the model knows, as token ids, for statistics of its hidden vectors.
    tokenizer : transformers tokenizer or None
        None where edits are token ids.
    word : callable
        Token id to what is shown for it.
    """

    model: PreTrainedModel
    edits: list[dict[str, Any]]
    texts: list[torch.Tensor]
    tokenizer: Any
    word: Callable[[int], str]

    def show(self, text: str | Sequence[int]) -> str:
        """A text as it is, or token ids as words."""
        return text if isinstance(text, str) else " ".join(map(self.word, text))


def editing_world(
    model: str = "llama", seed: int = 0, edits: int = 20, device: torch.device | str = "cpu"
) -> EditingWorld:
    """Load a model and draw facts to change.

    Parameters
    ----------
    model : str
        A family of `labkit.testbeds.facts` (a tiny model that knows 400 facts in two wordings), or the hub id or
        folder of a causal language model, whose facts are then first parameters of Python's functions.
    seed : int
        Of the edits, and of a tiny model and its world.
    edits : int
        Facts to change.
    device : torch.device or str
        Where the model goes.

    Returns
    -------
    EditingWorld

    Examples
    --------
    >>> world = editing_world("gpt_neox", seed=1, edits=3)
    >>> len(world.edits), world.show([1, 40, 21, 2])
    (3, 'BOS entity10 relation1 SEP')
    """
    if model in FAMILIES:
        facts = FactsWorld(seed, templates=2)
        trained: Any = facts_model(seed, family=model, templates=2)
        texts = [facts.prompts(template) for template in (0, 1)]
        return EditingWorld(trained.to(device), facts.edits(edits), texts, None, word)
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    lines = [_line(fact) for fact in signature_facts()]
    texts = [tokenizer(line, return_tensors="pt")["input_ids"] for line in lines]
    return EditingWorld(
        loaded.to(device),
        signature_edits(edits, seed),
        texts,
        tokenizer,
        lambda token: repr(tokenizer.decode([token])),
    )


def _line(fact: Signature) -> str:
    return f"In Python, the first parameter of {fact.module}.{fact.function} is called {fact.parameter}"
