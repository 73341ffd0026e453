"""Which memories fire for a prompt, what they write, and what the model says without one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from labkit.finetuning.anatomy import FFNMemory, ffn_parts
from labkit.finetuning.keys_values.requests import check_model
from labkit.finetuning.keys_values.rome import hidden


@dataclass(frozen=True, eq=False)
class MemoryTrace:
    """The memories that write most, strongest first.

    Attributes
    ----------
    memory : (B, k) int64
        Number of the network in ``ffn_parts(model)``.
    layer, index : (B, k) int64
        Layer, and number i of key and value in it.
    expert : (B, k) int64
        Expert, or -1 where there are none.
    coefficient : (B, k) tensor
        How far the key fires: entry i of what the second linear layer gets, times the router's weight.
    strength : (B, k) tensor
        |coefficient| times the length of the value.
    tokens : (B, k, n) int64
        Tokens that the written vector (coefficient times value) raises most, through the final norm and the output
        embeddings; -1 where the stack has no output.
    """

    memory: torch.Tensor
    layer: torch.Tensor
    index: torch.Tensor
    expert: torch.Tensor
    coefficient: torch.Tensor
    strength: torch.Tensor
    tokens: torch.Tensor

    def to_frame(self, row: int = 0, word: Callable[[int], str] = str) -> Any:
        """One row of the batch as a pandas table; `word` names a token id."""
        import pandas as pd

        columns = {
            "layer": self.layer[row].tolist(),
            "memory": self.index[row].tolist(),
            "fires": self.coefficient[row].tolist(),
            "strength": self.strength[row].tolist(),
            "promotes": [", ".join(word(t) for t in ids if t >= 0) for ids in self.tokens[row].tolist()],
        }
        if (self.expert >= 0).any():
            columns["expert"] = self.expert[row].tolist()
        return pd.DataFrame(columns)


@torch.no_grad()
def memory_trace(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor] | torch.Tensor,
    *,
    top: int = 10,
    tokens: int = 5,
) -> MemoryTrace:
    """List the memories with the largest |f(h k_i)| times ||v_i|| at the last real token of each row.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Any model that `labkit.finetuning.ffn_parts` understands.
    inputs : mapping or (B, T) tensor
        What the model is called with; the last real token of a row is read off ``attention_mask``, so padding may be
        on either side. Memories of a decoder behind an encoder are read at the last of ``decoder_input_ids``.
    top : int
        Memories a row, over all layers together.
    tokens : int
        Promoted tokens a memory.

    Returns
    -------
    MemoryTrace

    Raises
    ------
    ValueError
        For a count below one, a row without a real token, or a model that is not understood.

    Notes
    -----
    A key may fire negatively, in a gated network strongly so; its value is then written with a minus, and the tokens
    shown are those that this raises.

    Examples
    --------
    >>> from labkit.testbeds.facts import FactsWorld, facts_model
    >>> trace = memory_trace(facts_model(0), FactsWorld(0).prompts()[:2], top=3)
    >>> trace.strength.shape, trace.tokens.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 5]))
    """
    check_model(model)
    for name, count in (("top", top), ("tokens", tokens)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count!r}")
    given = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
    given = {name: value.to(model.device) for name, value in given.items() if name != "labels"}
    seq2seq = model.config.is_encoder_decoder
    memories = ffn_parts(model)
    if seq2seq and "decoder_input_ids" not in given:
        start = model.config.decoder_start_token_id
        given["decoder_input_ids"] = torch.full_like(given["input_ids"][:, :1], start)
    rows = len(given["input_ids"])
    last = {
        stack: _last(given, "decoder_" if seq2seq and stack == "decoder" else "")
        for stack in ("encoder", "decoder")
    }
    heard: dict[int, tuple[Any, ...]] = {}
    handles = []
    for number, memory in enumerate(memories):
        hook = _listener(heard, number)
        path = memory.module if memory.experts else memory.values.name.removesuffix(".weight")
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    was_training = model.training
    model.eval()
    try:
        model(**given)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)

    found: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("coef", "norm", "memory", "index", "expert")
    }
    for number, memory in enumerate(memories):
        at = last[memory.stack]
        coef, expert = _coefficients(model, memory, heard[number], rows, at)  # (B, n)
        norms = _values(memory).norm(dim=-1)  # (m,), or (E, m) for experts
        size = norms.shape[-1]
        index = torch.arange(size, device=coef.device).repeat(coef.shape[1] // size).expand_as(coef)
        found["coef"].append(coef)
        found["norm"].append(norms[expert, index] if memory.experts else norms.expand_as(coef))
        found["memory"].append(torch.full_like(index, number))
        found["index"].append(index)
        found["expert"].append(expert if memory.experts else torch.full_like(index, -1))
    joined = {name: torch.cat(parts, 1) for name, parts in found.items()}
    strength = joined["coef"].abs() * joined["norm"]
    best = strength.topk(min(top, strength.shape[1]), dim=1).indices
    picked = {name: values.gather(1, best) for name, values in joined.items()}
    layers = torch.tensor([memory.layer for memory in memories], device=best.device)[picked["memory"]]
    return MemoryTrace(
        picked["memory"].cpu(),
        layers.cpu(),
        picked["index"].cpu(),
        picked["expert"].cpu(),
        picked["coef"].cpu(),
        strength.gather(1, best).cpu(),
        _promoted(model, memories, picked, tokens).cpu(),
    )


def _listener(heard: dict[int, tuple[Any, ...]], number: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard[number] = (*args, *kwargs.values())

    return hook


def _last(given: Mapping[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """Place of each row's last real token, (B,)."""
    ids, mask = given[f"{prefix}input_ids"], given.get(f"{prefix}attention_mask")
    if mask is None:
        return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    if not mask.any(1).all():
        raise ValueError(
            f"row {int((~mask.any(1)).nonzero()[0])} of {prefix}attention_mask has no real token"
        )
    places = torch.arange(mask.shape[1], device=mask.device)
    return (places * mask.bool()).argmax(1)


def _values(memory: FFNMemory) -> torch.Tensor:
    """All values, one a row: (m, D), or (E, m, D) for experts."""
    weight = memory.values.param
    return weight if memory.transposed else weight.transpose(-1, -2)


def _coefficients(
    model: nn.Module, memory: FFNMemory, heard: tuple[Any, ...], rows: int, at: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each key fires at one place of each row, (B, n), and each one's expert."""
    if not memory.experts:
        inside = hidden(heard[0], rows)
        coef = inside[torch.arange(rows, device=at.device), at]
        return coef, torch.full_like(coef, -1, dtype=torch.long)
    states, chosen, weights = heard[:3]
    length = states.numel() // states.shape[-1] // rows
    token = torch.arange(rows, device=at.device) * length + at
    h, experts, share = states.flatten(0, -2)[token], chosen[token], weights[token]  # (B, D), (B, k), (B, k)
    keys = memory.keys[0].param[experts]  # (B, k, 2m, D)
    gate, up = torch.einsum("bkmd,bd->bkm", keys, h).chunk(2, -1)
    activation: Any = model.get_submodule(memory.module).act_fn
    coef = activation(gate) * up * share[..., None]  # (B, k, m)
    return coef.flatten(1), experts[..., None].expand_as(coef).flatten(1)


def _promoted(
    model: PreTrainedModel, memories: list[FFNMemory], picked: Mapping[str, torch.Tensor], count: int
) -> torch.Tensor:
    head = model.get_output_embeddings()
    rows, kept = picked["index"].shape
    tokens = torch.full((rows, kept, count), -1, device=picked["index"].device)
    if head is None:
        return tokens
    for row in range(rows):
        for place in range(kept):
            memory = memories[int(picked["memory"][row, place])]
            if model.config.is_encoder_decoder and memory.stack == "encoder":
                continue
            values = _values(memory)
            if memory.experts:
                values = values[int(picked["expert"][row, place])]
            written = values[int(picked["index"][row, place])] * picked["coef"][row, place]
            norm = _final_norm(model, memory)
            logits = head((written if norm is None else norm(written)).to(head.weight.dtype))
            tokens[row, place] = logits.topk(count).indices
    return tokens


def _final_norm(model: nn.Module, memory: FFNMemory) -> nn.Module | None:
    """The norm beside the stack's list of layers, after the last layer; None for models that have none."""
    parts = memory.module.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    stack = model.get_submodule(".".join(parts[: number - 1]))
    norms = [
        child
        for child in stack.children()
        if type(child).__name__.endswith(("LayerNorm", "RMSNorm"))
        and child._parameters.get("weight") is not None
    ]
    return norms[-1] if norms else None


@contextmanager
def without_memory(
    memory: FFNMemory, index: int, *, by: str = "values", expert: int | None = None
) -> Iterator[None]:
    """Take one memory away: zero its value, or one of its keys with its bias. They come back at the end.

    Both sides change the output alike wherever f(0) = 0, as for relu, gelu and silu, which is the check of the whole
    picture of memories.

    Parameters
    ----------
    memory : FFNMemory
        From `labkit.finetuning.ffn_parts`.
    index : int
        Number i of the memory, in 0..m - 1.
    by : {"values", "keys", "key_gate", "key_up"}
        What to zero: column i of the second linear layer, row i of the first, or of one of the two first.
    expert : int, optional
        Which expert, where values are stacked over experts.

    Raises
    ------
    ValueError
        For an index out of range, a gate where there is none, or a missing or needless expert.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", seed=0)
    >>> with without_memory(ffn_parts(model)[0], 3):
    ...     print(int((model.model.layers[0].mlp.down_proj.weight == 0).sum()))
    64
    """
    values = _values(memory)
    roles = {"values": None, "keys": ("in", "gate", "up"), "key_gate": ("gate",), "key_up": ("up",)}
    if by not in roles:
        raise ValueError(f"by must be one of {', '.join(map(repr, roles))}; got {by!r}")
    if by in ("key_gate", "key_up") and not memory.gated:
        raise ValueError(f"by={by!r} needs a gated network, {memory.module} is not: take by='keys'")
    size = values.shape[-2]
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < size:
        raise ValueError(f"index must lie in 0..{size - 1} (memories of {memory.module}), got {index!r}")
    if memory.experts != (expert is not None):
        need = f"say which of {values.shape[0]} experts" if memory.experts else "leave expert out"
        raise ValueError(
            f"expert={expert!r}: {memory.module} {'has' if memory.experts else 'has no'} experts, {need}"
        )
    if expert is not None and not 0 <= expert < values.shape[0]:
        raise ValueError(f"expert must lie in 0..{values.shape[0] - 1}, got {expert}")
    wanted = roles[by]
    slices: list[torch.Tensor] = []
    if wanted is None:
        slices.append((values if expert is None else values[expert])[index])
    else:
        for key in memory.keys:
            if key.role not in wanted:
                continue
            weight = key.param.transpose(-1, -2) if memory.transposed else key.param
            weight = weight if expert is None else weight[expert]
            shift = size if memory.fused and key.role == "up" else 0
            slices.append(weight[index + shift])
            bias = memory.biases.get(key.name)
            if bias is not None:
                slices.append(bias[index + shift : index + shift + 1])
    kept = [one.detach().clone() for one in slices]
    with torch.no_grad():
        for one in slices:
            one.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for one, old in zip(slices, kept, strict=True):
                one.copy_(old)
