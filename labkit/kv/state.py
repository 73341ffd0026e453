"""What is known of a cache after an eviction, and how to go on from it: positions, masks, sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Why an entry was kept; 0 is an evicted one.
EVICTED, SINK, RECENT, BY_SCORE, BY_LUCK = range(5)

STATE = "labkit_eviction"


@dataclass
class LayerState:
    """What a cache layer holds after an eviction. Entries appended later stand behind the kept ones.

    Attributes
    ----------
    columns : Tensor
        Column of ``input_ids`` that each kept entry came from, ``(B, K, S)`` int32; -1 at fill.
    valid : Tensor or None
        ``(B, S)`` bool, False at fill; None when there is none.
    seen : int
        Columns that the layer had processed at that time.
    next_position : Tensor
        Rotary position of the token at column ``seen``, ``(B,)``.
    budgets : tuple of int
        Entries per KV head that each row may keep.
    extra : dict
        What a rule carries along from step to step.
    """

    columns: Tensor
    valid: Tensor | None
    seen: int
    next_position: Tensor
    budgets: tuple[int, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return self.columns.shape[-1]


@dataclass
class LayerStats:
    """What the last eviction of one layer did, for tables and plots.

    Attributes
    ----------
    layer : int
        Index of the layer.
    prompt_length : int
        Entries before the eviction, fill included.
    kept : Tensor
        Columns kept, ``(B, K, S')``, ascending; -1 at fill.
    reason : Tensor
        ``(B, K, n)`` int8 over the entries before the eviction: 0 evicted (or padding), 1 sink, 2 recent,
        3 kept by score, 4 kept by luck.
    """

    layer: int
    prompt_length: int
    kept: Tensor
    reason: Tensor


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds.

    Parameters
    ----------
    cache : Cache
        A transformers cache whose layers hold ``keys`` and ``values``.

    Returns
    -------
    int
        Sum over layers; layers without tensors count 0.

    Examples
    --------
    >>> import torch
    >>> from transformers import DynamicCache
    >>> cache = DynamicCache()
    >>> _ = cache.update(torch.zeros(1, 2, 10, 8), torch.zeros(1, 2, 10, 8), 0)
    >>> cache_bytes(cache)   # 2 tensors of 2 x 10 x 8 floats
    1280
    """
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


def layer_states(cache: Any) -> dict[int, LayerState]:
    """The eviction records on a cache, by layer; empty for one that no press has touched."""
    return getattr(cache, STATE, {}) if cache is not None else {}


def continuation(
    cache: Any, states: dict[int, LayerState], q_len: int, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Position ids and mask for ``q_len`` new tokens on an evicted cache."""
    layer, state = next(iter(states.items()))
    appended = cache.layers[layer].keys.shape[-2] - state.length
    device = state.next_position.device
    positions = state.next_position[:, None] + appended + torch.arange(q_len, device=device)
    new = appended + q_len
    tail = None
    if attention_mask is not None and attention_mask.shape[-1] >= new:
        tail = attention_mask[:, -new:].to(device=device, dtype=torch.bool)
    if state.valid is None and (tail is None or bool(tail.all())):
        return positions, None
    rows = state.columns.shape[0]
    front = (
        torch.ones(rows, state.length, dtype=torch.bool, device=device)
        if state.valid is None
        else state.valid
    )
    back = torch.ones(rows, new, dtype=torch.bool, device=device) if tail is None else tail
    return positions, torch.cat((front, back), dim=1)


def decode_inputs(cache: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
    """Arguments for a model call that continues an evicted cache, for decode loops written by hand.

    Parameters
    ----------
    cache : Cache
        A cache that a press has made smaller.
    input_ids : Tensor
        The new tokens, ``(B, T)``.
    attention_mask : Tensor, optional
        ``(B, any + T)``; only the columns of tokens after the prompt are read. All ones by default.

    Returns
    -------
    dict
        ``input_ids``, ``past_key_values``, ``position_ids`` counting on from the length of the prompt, and
        ``attention_mask`` (None when nothing is hidden).

    Raises
    ------
    ValueError
        If no press has touched the cache.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import NACLPress, decode_inputs
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> with NACLPress(budget_tokens=20)(model), torch.no_grad():
    ...     cache = model(torch.randint(64, (1, 100))).past_key_values
    >>> arguments = decode_inputs(cache, torch.tensor([[5]]))
    >>> arguments["position_ids"], model(**arguments).past_key_values.get_seq_length()
    (tensor([[100]]), 21)
    """
    states = layer_states(cache)
    if not states:
        raise ValueError("this cache was not made smaller by a labkit press: call the model as usual")
    positions, mask = continuation(cache, states, input_ids.shape[1], attention_mask)
    return {
        "input_ids": input_ids,
        "past_key_values": cache,
        "position_ids": positions.to(input_ids.device),
        "attention_mask": mask,
    }


def padding_of(attention_mask: Any, rows: int, columns: int) -> tuple[int, ...] | None:
    """Left padding of each row of a prompt, or None when there is none.

    Raises
    ------
    ValueError
        For a mask that is not 2-D, hides a whole row, or hides anything but a left margin.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "cache eviction reads padding from a 2-D attention_mask (B, T); got "
            + (
                f"a tensor of shape {tuple(attention_mask.shape)}"
                if isinstance(attention_mask, Tensor)
                else "a dict"
            )
        )
    if attention_mask.shape != (rows, columns):
        raise ValueError(
            f"attention_mask must be ({rows}, {columns}), as the prompt is; got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask.bool()
    if bool(mask.all()):
        return None
    pads = (~mask).sum(1)
    left = torch.arange(columns, device=mask.device) >= pads[:, None]
    if not bool((mask == left).all()):
        row = int((mask != left).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask has padding to the right of (or inside) row {row}; cache eviction needs left padding: "
            "set tokenizer.padding_side = 'left'"
        )
    if bool((pads == columns).any()):
        raise ValueError(f"row {int(pads.argmax())} of attention_mask is all padding; remove that row")
    return tuple(int(p) for p in pads)
