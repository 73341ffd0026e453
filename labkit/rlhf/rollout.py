"""Responses of a policy: padding, sampling that does not depend on how rows are batched, and the batch they make.

Each row draws its own uniform numbers, from a generator seeded with the run's seed, the iteration and the row's place in the
global batch; a token is the inverse of the cumulated distribution at such a number. The same responses come out (up to
rounding of the logits) however the rows are split over batches and processes, and nothing else consumes random
numbers. The rank of each sampled token among the scores it was drawn from is noted on the way, so that no tensor of
all scores ``(B, T, V)`` is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from labkit.rlhf.logprobs import plain
from labkit.training.data import mixed_seed


def _itself(values: Tensor) -> Tensor:
    return values


@dataclass
class RolloutBatch:
    """Responses and all that is known about them. B rows, P prompt tokens, T response tokens, D width.

    Attributes
    ----------
    prompt_ids, prompt_mask : Tensor
        ``(B, P)`` ids and bool, padded on the left.
    tokens, mask : Tensor
        ``(B, T)`` ids and bool, padded on the right; the end token is a real one. Rows that are left out of the updates
        have no real token.
    ranks : Tensor
        ``(B, T)`` how many tokens had a higher score than the sampled one when it was sampled; 0 is the most probable.
    eos : Tensor
        ``(B,)`` bool, whether the response ended by itself.
    rows : Tensor
        ``(B,)`` place in the global rollout.
    prompts, completions : list
        Text, or lists of ids where there is no tokenizer.
    columns : dict of str to list
        Other columns of the data set.
    iteration : int
    logprobs, ref_logprobs : Tensor
        ``(B, T)`` under the sampling policy and the reference, 0 on padding.
    entropy : Tensor
        ``(B, T)`` of the policy before the token, nats.
    values : Tensor
        ``(B, T)`` of the state before the token.
    ref_hidden : Tensor or None
        ``(B, T + 1, D)`` last hidden states of the reference: the state before token t is ``[:, t]``, the one after it
        ``[:, t + 1]``. Only where a hook asks for it.
    scores : Tensor
        ``(B,)`` rewards of whole responses, before clipping and penalties.
    rewards : Tensor
        ``(B, T)`` of tokens: KL penalty, hooks, and the clipped score on the last real token.
    segments : Tensor
        ``(B, T)`` macro action of each token, -1 on padding.
    advantages, returns : Tensor
        ``(B, T)``.
    reduce : callable
        Sums a tensor over all processes.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    ranks: Tensor
    eos: Tensor
    rows: Tensor
    prompts: list[Any] = field(default_factory=list)
    completions: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    iteration: int = 0
    # None until the collector has got so far; the reference's stay None where there is no reference
    logprobs: Tensor = None  # type: ignore[assignment]
    ref_logprobs: Tensor | None = None
    entropy: Tensor = None  # type: ignore[assignment]
    values: Tensor = None  # type: ignore[assignment]
    ref_hidden: Tensor | None = None
    scores: Tensor = None  # type: ignore[assignment]
    rewards: Tensor = None  # type: ignore[assignment]
    segments: Tensor = None  # type: ignore[assignment]
    advantages: Tensor = None  # type: ignore[assignment]
    returns: Tensor = None  # type: ignore[assignment]
    reduce: Callable[[Tensor], Tensor] = _itself

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> Tensor:
        """``(B,)`` real tokens of each response."""
        return self.mask.sum(1)

    def select(self, index: Sequence[int] | Tensor) -> RolloutBatch:
        """Some of the rows, cut to the longest prompt and response among them."""
        index = torch.as_tensor(index, dtype=torch.long, device=self.tokens.device)
        lists = index.tolist()
        keep = int(self.mask[index].sum(1).max()) if len(lists) else 0
        keep = max(keep, 1)
        skip = self.prompt_ids.shape[1] - max(
            1, int(self.prompt_mask[index].sum(1).max()) if len(lists) else 0
        )
        length = self.tokens.shape[1]
        parts: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, Tensor):
                value = value[index]
                if entry.name in ("prompt_ids", "prompt_mask"):
                    value = value[:, skip:]
                elif entry.name == "ref_hidden":
                    value = value[:, : keep + 1]
                elif value.ndim == 2 and value.shape[1] == length:
                    value = value[:, :keep]
            elif isinstance(value, list):
                value = [value[i] for i in lists] if value else value
            elif isinstance(value, dict):
                value = {name: [column[i] for i in lists] for name, column in value.items()}
            parts[entry.name] = value
        return RolloutBatch(**parts)

    @staticmethod
    def concatenate(parts: Sequence[RolloutBatch], pad: int = 0) -> RolloutBatch:
        """Rows of several batches, padded to the longest prompt and response."""
        prompt = max(part.prompt_ids.shape[1] for part in parts)
        length = max(part.tokens.shape[1] for part in parts)
        joined: dict[str, Any] = {}
        for entry in dataclasses.fields(RolloutBatch):
            values = [getattr(part, entry.name) for part in parts]
            first = values[0]
            if isinstance(first, Tensor) and first.ndim > 1:
                fill = (
                    pad if entry.name in ("tokens", "prompt_ids") else -1 if entry.name == "segments" else 0
                )
                left = entry.name in ("prompt_ids", "prompt_mask")
                size = prompt if left else length + (entry.name == "ref_hidden")
                joined[entry.name] = torch.cat([_padded(value, size, fill, left) for value in values])
            elif isinstance(first, Tensor):
                joined[entry.name] = torch.cat(values)
            elif isinstance(first, list):
                joined[entry.name] = [row for value in values for row in value]
            elif isinstance(first, dict):
                joined[entry.name] = {
                    name: [row for value in values for row in value[name]] for name in first
                }
            else:
                joined[entry.name] = first
        return RolloutBatch(**joined)


def _padded(x: Tensor, size: int, fill: int, left: bool) -> Tensor:
    missing = size - x.shape[1]
    if not missing:
        return x
    filler = x.new_full((len(x), missing, *x.shape[2:]), fill)
    return torch.cat([filler, x] if left else [x, filler], 1)


def left_pad(
    prompts: Sequence[Sequence[int]], pad: int = 0, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Prompts of different lengths as one tensor, padded on the left, and its mask.

    Raises
    ------
    ValueError
        For an empty prompt.

    Examples
    --------
    >>> ids, mask = left_pad([[5, 6, 7], [8]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [0, 0, 8]], [[True, True, True], [False, False, True]])
    """
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: a model needs at least one token to go on from")
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return ids, mask


def uniforms(rows: Sequence[int], length: int, *seeds: int) -> Tensor:
    """``(B, length)`` uniform numbers in float64, each row's from a generator of its own."""
    return torch.stack(
        [
            torch.rand(
                length, generator=torch.Generator().manual_seed(mixed_seed(*seeds, row)), dtype=torch.float64
            )
            for row in rows
        ]
    )


class RankedSampler(LogitsProcessor):
    """Samples inside ``generate``, with given uniform numbers, and notes the rank of what it took.

    It must be the last processor, with ``do_sample=False``: it leaves a single finite score.

    Parameters
    ----------
    uniform : Tensor
        ``(B, T)`` in [0, 1).
    temperature, top_k, top_p
        Of the distribution that is drawn from.
    """

    def __init__(self, uniform: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
        self.uniform = uniform.clamp(max=1 - 2**-24)  # below 1 in float32 too
        self.temperature = temperature
        self.warpers: list[LogitsProcessor] = []
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.ranks: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Take a token of each row."""
        warped = scores.float() / self.temperature
        for warp in self.warpers:
            warped = warp(input_ids, warped)  # type: ignore[arg-type]
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulated = warped.softmax(-1).to(exact).cumsum(-1)
        drawn = self.uniform[:, len(self.ranks), None].to(exact).to(scores.device) * cumulated[:, -1:]
        # right=True passes over tokens of probability zero
        token = torch.searchsorted(cumulated, drawn, right=True).clamp(max=scores.shape[1] - 1)
        self.ranks.append((warped > warped.gather(1, token)).sum(1))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0)


class Responses(NamedTuple):
    """What `generate_responses` returns, see `RolloutBatch`."""

    tokens: Tensor
    mask: Tensor
    ranks: Tensor
    eos: Tensor


@contextmanager
def _own_generation_config(*models: Any) -> Iterator[None]:
    """Models without wishes of their own: ``generate`` fills in from them whatever it is not given."""
    # Their own attributes only: a peft model shows that of the model inside, and would hide it with one of its own.
    kept = [(model, model.generation_config) for model in models if "generation_config" in vars(model)]
    try:
        for model, _ in kept:
            model.generation_config = GenerationConfig()
        yield
    finally:
        for model, config in kept:
            model.generation_config = config


@torch.no_grad()
def generate_responses(
    model: Any,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Responses:
    """Sample a response to each prompt with the model's own ``generate``.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
    prompt_ids, prompt_mask : Tensor
        ``(B, P)``, padded on the left, see `left_pad`.
    uniform : Tensor
        ``(B, T)`` numbers in [0, 1), one for each token of the longest response; see `uniforms`.
    temperature, top_k, top_p
        Of sampling.
    eos_token_ids : sequence of int
        What ends a response; empty for responses of exactly T tokens.
    pad_token_id : int
    options : mapping, optional
        More arguments for ``generate``. Nothing else bends the distribution: what the model's own ``generation_config``
        asks for, such as a repetition penalty, is left out.

    Returns
    -------
    Responses
        tokens, mask, ranks ``(B, T')`` with T' the longest response, and eos ``(B,)``.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> ids, mask = left_pad([[5, 6, 7], [8]])
    >>> found = generate_responses(tiny("llama", vocab=50, seed=0), ids, mask, uniforms([0, 1], 4, 0))
    >>> found.tokens.shape, found.mask.all().item()
    (torch.Size([2, 4]), True)
    """
    inner = plain(model)
    training = inner.training
    inner.eval()
    sampler = RankedSampler(uniform, temperature, top_k, top_p)
    settings: dict[str, Any] = {
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_k": None,
        "top_p": None,
        "max_new_tokens": uniform.shape[1],
        "eos_token_id": list(eos_token_ids) or None,
        "pad_token_id": pad_token_id,
        "use_cache": True,
        "return_dict_in_generate": False,
    }
    try:
        with _own_generation_config(model, inner):
            output = model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask.long(),
                logits_processor=LogitsProcessorList([sampler]),
                **(settings | dict(options or {})),
            )
    finally:
        inner.train(training)
    tokens = output[:, prompt_ids.shape[1] :]
    ranks = torch.stack(sampler.ranks, 1)
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    for end in eos_token_ids:
        ends |= tokens == end
    mask = ends.long().cumsum(1) - ends.long() == 0  # up to the first end token and with it
    tokens = torch.where(mask, tokens, pad_token_id)
    return Responses(tokens, mask, torch.where(mask, ranks, 0), ends.any(1))
