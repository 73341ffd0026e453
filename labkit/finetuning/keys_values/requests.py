"""Requests to edit a model, and the probability of an object after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

Text = str | Sequence[int] | torch.Tensor
"""A text, for which a tokenizer is needed, or its token ids."""


@dataclass(frozen=True, eq=False)
class EditRequest:
    """What a model should say from now on.

    Parameters
    ----------
    prompt : str or token ids
        Text that the object follows. Texts are tokenized one by one and never padded, so a tokenizer's padding side
        does not matter.
    new : str or token ids
        New object o*, of one token or several.
    true : str or token ids, optional
        Old object o, needed to measure.
    subject : str or token ids, optional
        Part of the prompt that the fact is about, needed by `rome_edit`.
    paraphrases : sequence
        Other prompts for the same fact.
    neighbours : sequence
        Prompts of other facts with the same true object, which should stay; or pairs (prompt, object).

    Raises
    ------
    ValueError
        If a text is empty, or old and new object are equal.

    Examples
    --------
    >>> EditRequest([1, 30, 20, 2], new=[150], true=[141], subject=[30]).new
    [150]
    """

    prompt: Text
    new: Text
    true: Text | None = None
    subject: Text | None = None
    paraphrases: Sequence[Text] = ()
    neighbours: Sequence[Text | tuple[Text, Text]] = ()

    def __post_init__(self) -> None:
        for name in ("prompt", "new", "true", "subject"):
            text = getattr(self, name)
            if text is None and name in ("true", "subject"):
                continue
            if text is None or len(text) == 0:
                raise ValueError(f"{name} is empty: give a text or at least one token id")
        if self.true is not None and _same(self.new, self.true):
            raise ValueError(f"new and true object are the same ({self.new!r}): there is nothing to edit")


def _same(one: Text, other: Text) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return list(map(int, one)) == list(map(int, other))


class Pair(NamedTuple):
    """A prompt and an object that may follow it, as token ids."""

    prompt: list[int]
    target: list[int]


def as_pair(prompt: Text, target: Text, tokenizer: Any = None) -> Pair:
    """Turn a prompt and an object into token ids.

    A text and an object after it are tokenized together and cut where they first differ from the text alone, because
    many tokenizers write the space between them as part of the next word.

    Parameters
    ----------
    prompt, target : str or token ids
        Both texts or both ids.
    tokenizer : transformers tokenizer, optional
        Needed for texts.

    Returns
    -------
    Pair
        ``prompt`` and ``target``, lists of ids.

    Raises
    ------
    TypeError, ValueError
        For a text beside ids, or a text without a tokenizer.

    Examples
    --------
    >>> as_pair([1, 2], [3])
    Pair(prompt=[1, 2], target=[3])
    """
    if isinstance(prompt, str) != isinstance(target, str):
        raise TypeError("give prompt and object both as texts or both as token ids")
    if not isinstance(prompt, str) or not isinstance(target, str):
        return Pair(list(map(int, prompt)), list(map(int, target)))
    alone = token_ids(prompt, tokenizer)
    whole = token_ids(f"{prompt.rstrip()} {target.strip()}", tokenizer)
    shared = 0
    while shared < min(len(alone), len(whole)) and alone[shared] == whole[shared]:
        shared += 1
    if shared == 0 or shared == len(whole):
        raise ValueError(f"the tokenizer leaves nothing of the object {target!r} after {prompt!r}")
    return Pair(whole[:shared], whole[shared:])


def token_ids(text: Text, tokenizer: Any = None, *, special: bool = True) -> list[int]:
    """Token ids of a text, without a closing end-of-sequence token; ids are handed through.

    Raises
    ------
    ValueError
        For a text without a tokenizer.

    Examples
    --------
    >>> token_ids([1, 2])
    [1, 2]
    """
    if not isinstance(text, str):
        return list(map(int, text))
    if tokenizer is None:
        raise ValueError(f"{text!r} is a text: give the model's tokenizer, or token ids")
    ids: list[int] = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        ids.pop()
    return ids


def target_log_probs(
    model: PreTrainedModel, pairs: Sequence[Pair | tuple[Sequence[int], Sequence[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each object after its prompt, all its tokens together.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, or one with encoder and decoder: the prompt then goes into the encoder.
    pairs : sequence of (prompt, object)
        Token ids, of any lengths. Rows are padded on the right here, where neither attention nor positions of real
        tokens are touched.

    Returns
    -------
    log_probs : (B,) tensor
        log P(object | prompt), the sum over the object's tokens; with a gradient where the model has one.
    right : (B,) bool tensor
        Whether every token of the object is the most probable one after those before it.

    Raises
    ------
    ValueError
        For a model that does not generate, or token ids outside its vocabulary.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> logp, right = target_log_probs(tiny("llama", seed=0), [([1, 2], [3]), ([1, 2, 3], [4, 5])])
    >>> logp.shape, bool((logp < 0).all())
    (torch.Size([2]), True)
    """
    config = model.config
    vocabulary = config.get_text_config().vocab_size
    highest = max(max([*prompt, *target]) for prompt, target in pairs)
    if highest >= vocabulary:
        raise ValueError(f"token id {highest} lies outside the model's vocabulary of {vocabulary}")
    device = model.device
    targets, wanted = _padded([list(target) for _, target in pairs], device)  # (B, O)
    if config.is_encoder_decoder:
        prompts, seen = _padded([list(prompt) for prompt, _ in pairs], device)
        start = torch.full_like(targets[:, :1], config.decoder_start_token_id)
        shifted = torch.cat([start, targets[:, :-1]], 1)
        logits = model(
            input_ids=prompts, attention_mask=seen, decoder_input_ids=shifted, use_cache=False
        ).logits  # (B, O, V)
    elif model.can_generate():
        rows, seen = _padded([[*prompt, *target] for prompt, target in pairs], device)
        logits = model(input_ids=rows, attention_mask=seen, use_cache=False).logits
        first = torch.tensor([len(prompt) - 1 for prompt, _ in pairs], device=device)
        at = (first[:, None] + torch.arange(targets.shape[1], device=device)).clamp(max=rows.shape[1] - 1)
        logits = logits.gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))  # (B, O, V)
    else:
        raise ValueError(
            f"{type(model).__name__} does not generate, so no object follows a prompt: editing needs a causal or an "
            f"encoder-decoder language model. train_only works with any loss"
        )
    logits = logits.float()
    log_probs = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]  # (B, O)
    right = (logits.argmax(-1) == targets) | ~wanted.bool()
    return (log_probs * wanted).sum(1), right.all(1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows filled up with token 0, and 1 where a token is real."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return ids, mask


def check_requests(requests: EditRequest | Sequence[EditRequest]) -> list[EditRequest]:
    """One request or several as a list.

    Raises
    ------
    TypeError, ValueError
        For anything else, and for none.
    """
    listed = [requests] if isinstance(requests, EditRequest) else requests
    if isinstance(listed, str | Mapping) or not isinstance(listed, Sequence):
        raise TypeError(
            f"requests must be an EditRequest or a sequence of them, got {type(requests).__name__}"
        )
    if not listed:
        raise ValueError("there are no requests")
    for one in listed:
        if not isinstance(one, EditRequest):
            raise TypeError(f"requests must hold EditRequest, got {type(one).__name__}")
    return list(listed)


def check_model(model: nn.Module) -> None:
    """Raise unless it is a transformers model, which knows its configuration."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}. Unwrap it (model.module under "
            f"DDP, model.get_base_model() under peft)"
        )
