"""How well a model does once its cache has been evicted: answers after a prompt, and loss on a continuation.

Both measures let the press see the prompt in one prefill and then feed every later token on its own, as
generation does. The logits of the prefill itself are never scored: they were computed with the whole prompt in
view, before anything was evicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from labkit.kv.press import CachePress
from labkit.kv.state import cache_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _check(model: nn.Module, prompt: Tensor, following: Tensor, name: str, least: int) -> None:
    if prompt.ndim != 2 or following.ndim != 2 or prompt.shape[0] != following.shape[0]:
        shapes = f"{tuple(prompt.shape)} and {tuple(following.shape)}"
        raise ValueError(f"prompt and {name} must be (B, T) with the same B; got {shapes}")
    if following.shape[1] < least:
        raise ValueError(f"{name} needs at least {least} tokens per row; got {following.shape[1]}")
    if model.training:
        raise RuntimeError("the model is in training mode; call model.eval() first")


@torch.no_grad()
def decode_logits(
    model: PreTrainedModel,
    press: CachePress,
    prompt: Tensor,
    following: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """Prefill and evict, then feed `following` one token at a time.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model in evaluation mode.
    press : CachePress
        What to keep; :class:`labkit.kv.FullCache` for everything.
    prompt : Tensor
        Token ids, ``(B, n)``.
    following : Tensor
        Token ids fed after the eviction, ``(B, T)``.
    attention_mask : Tensor, optional
        ``(B, n)``, zero at left padding.

    Yields
    ------
    (logits, cache)
        Logits ``(B, V)`` that follow each fed token, in float32, and the cache as it is then.
    """
    _check(model, prompt, following, "following", 1)
    mask = attention_mask
    with press(model):
        cache = model(input_ids=prompt, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
        for column in range(following.shape[1]):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(
                input_ids=following[:, column : column + 1],
                attention_mask=mask,
                past_key_values=cache,
                position_ids=None if mask is not None else _position(prompt, column),
                use_cache=True,
            )
            cache = output.past_key_values
            yield output.logits[:, -1].float(), cache


def _position(prompt: Tensor, column: int) -> Tensor:
    # Keys keep the rotary position that they had in the prompt, so the next token stands at n, not at K.
    return torch.full((prompt.shape[0], 1), prompt.shape[1] + column, device=prompt.device)


def answers(
    model: PreTrainedModel,
    press: CachePress,
    prompt: Tensor,
    question: Tensor,
    answer: Tensor,
    *,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Whether the model answers a question after its cache was evicted.

    The prompt is prefilled and evicted, the question is fed, and the answer is compared with the model's most
    likely tokens, which for one or more tokens is the same as greedy decoding. Put the question at the end of
    the prompt too, and the press can take it into account; leave it out, and the press must keep what *any*
    question may need.

    Parameters
    ----------
    model, press, prompt, attention_mask
        See :func:`decode_logits`.
    question : Tensor
        ``(B, T)``, at least one token.
    answer : Tensor
        ``(B,)`` or ``(B, A)`` token ids.

    Returns
    -------
    Tensor
        Bool, ``(B,)``: all tokens of the answer are right.

    Examples
    --------
    >>> import torch
    >>> from labkit.kv import FullCache, answers
    >>> from labkit.testbeds import retrieval
    >>> model, batch = retrieval.load(0), retrieval.RetrievalTask().batch(64, torch.Generator().manual_seed(1))
    >>> right = answers(model, FullCache(), batch.context, batch.questions[:, 0], batch.answer)
    >>> bool(right.float().mean() > 0.9)
    True
    """
    wanted = answer[:, None] if answer.ndim == 1 else answer
    _check(model, prompt, question, "question", 1)
    _check(model, prompt, wanted, "answer", 1)
    fed = torch.cat([question, wanted[:, :-1]], dim=1)
    right = torch.ones(len(prompt), dtype=torch.bool, device=prompt.device)
    first = question.shape[1] - 1
    for column, (logits, _) in enumerate(
        decode_logits(model, press, prompt, fed, attention_mask=attention_mask)
    ):
        if column >= first:
            right &= logits.argmax(-1) == wanted[:, column - first]
    return right


def continuation_loss(
    model: PreTrainedModel, press: CachePress, prompt: Tensor, continuation: Tensor
) -> tuple[Tensor, int]:
    """Cross-entropy of a text that goes on after its beginning was evicted from the cache.

    Parameters
    ----------
    model, press, prompt
        See :func:`decode_logits`.
    continuation : Tensor
        ``(B, T)`` with T >= 2. Its first token is fed and not scored, since the prefill saw the whole prompt.

    Returns
    -------
    loss : Tensor
        ``(B, T - 1)`` nats per token.
    size : int
        Bytes of the cache after the last token.
    """
    _check(model, prompt, continuation, "continuation", 2)
    losses, size = [], 0
    for column, (logits, cache) in enumerate(decode_logits(model, press, prompt, continuation[:, :-1])):
        losses.append(nn.functional.cross_entropy(logits, continuation[:, column + 1], reduction="none"))
        size = cache_bytes(cache)
    return torch.stack(losses, dim=1), size


class World(Protocol):
    """What the measures below need; :class:`labkit.testbeds.recall.RecallWorld` is one."""

    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def context(self) -> Tensor: ...
    @property
    def asked(self) -> Tensor: ...
    @property
    def question(self) -> Tensor: ...
    @property
    def answer(self) -> Tensor: ...
    @property
    def is_text(self) -> Tensor: ...


def recall_accuracy(world: World, press: CachePress, *, asked: bool = True) -> float:
    """Share of facts that a model still finds after the eviction, between 0 and 1.

    Parameters
    ----------
    world : World
        Model, prompts, questions and answers.
    press : CachePress
    asked : bool
        Whether the press saw the question at the end of the prompt. The question is fed after the eviction in
        either case.

    Examples
    --------
    >>> from labkit import kv
    >>> from labkit.testbeds import recall
    >>> world = recall.load("retrieval", seed=0, prompts=64)
    >>> kv.recall_accuracy(world, kv.NACLPress(0.8, proxy_tokens=4, sink=1, recent=1)) > 0.8
    True
    """
    prompt = world.asked if asked else world.context
    return float(answers(world.model, press, prompt, world.question, world.answer).float().mean())


def text_loss(world: World, press: CachePress, *, tail: int = 48) -> float:
    """Loss on the last text tokens of the contexts after all before them was evicted, nats per token.

    Parameters
    ----------
    world : World
    press : CachePress
    tail : int
        Tokens that are fed after the eviction; those among them that are natural text are scored.

    Raises
    ------
    ValueError
        If the tail holds no text.
    """
    text = world.is_text[:, 1 - tail :]
    if not bool(text.any()):
        raise ValueError(
            f"the last {tail} tokens of these contexts hold no text to predict; use a world with text"
        )
    start, rest = world.context[:, :-tail], world.context[:, -tail:]
    loss, _ = continuation_loss(world.model, press, start, rest)  # (B, tail - 1)
    return float(loss[text].mean())
