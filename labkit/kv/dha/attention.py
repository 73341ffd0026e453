r"""Attention with a key head and a value head of its own choice for every query head.

Three ways, the same function:

stock
    Where query heads that share a key head also share their value head, in equal groups, it is grouped-query
    attention, and transformers' attention function is called as it is.
decoding, one token
    Two matrix products over the cache as it lies: all queries of a key head against that head, softmax, then all
    probabilities of a value head against that one. The cache is read once, and nothing of its size is written. Groups
    of unequal size are filled up with zero queries; next to the cache these are nothing.
everything else
    Keys and values are expanded by index to one head for each distinct pair (κ, ν), and transformers' attention
    function is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class HeadLayout:
    """The index tables of one layer, made from its two maps.

    Parameters
    ----------
    key_map, value_map : sequence of int
        Key head and value head of every query head.

    Attributes
    ----------
    repeats : int
        Query heads that share one expanded head; a divisor of H.
    site_of_query, site_of_key, site_of_value : tuple of int
        Connected components of heads that share anything: entries of the cache can be evicted for each component
        apart, and not for less.
    """

    def __init__(self, key_map: Sequence[int], value_map: Sequence[int]) -> None:
        self._indices: dict[str, list[int]] = {}
        self._tables: dict[tuple[str, torch.device], Tensor] = {}
        self.key_map, self.value_map = tuple(key_map), tuple(value_map)
        self.query_heads = len(self.key_map)
        self.key_heads, self.value_heads = max(key_map) + 1, max(value_map) + 1
        pairs = list(zip(self.key_map, self.value_map, strict=True))
        distinct = list(dict.fromkeys(pairs))
        size = self.query_heads // len(distinct)
        regular = pairs == [pair for pair in distinct for _ in range(size)]
        self.repeats = size if regular else 1
        expanded = distinct if regular else pairs
        self.stock = all(
            [p[i] for p in expanded] == list(range(count))
            for i, count in ((0, self.key_heads), (1, self.value_heads))
        )
        self._indices["expand_keys"] = [k for k, _ in expanded]
        self._indices["expand_values"] = [v for _, v in expanded]

        key_slots, key_size = _slots(self.key_map, self.key_heads)
        value_slots, value_size = _slots(self.value_map, self.value_heads)
        self.key_group, self.value_group = key_size, value_size
        nowhere = self.query_heads
        place_of = {head: place for place, head in enumerate(key_slots) if head != nowhere}
        # Query heads in the places of their key heads; probabilities from there to those of their value heads.
        self._indices["queries"] = key_slots
        self._indices["regroup"] = [place_of.get(head, 0) for head in value_slots]
        out_of = {head: place for place, head in enumerate(value_slots) if head != nowhere}
        self._indices["outputs"] = [out_of[head] for head in range(self.query_heads)]
        self.padded_queries = nowhere in key_slots
        self.same_queries = key_slots == list(range(nowhere))
        self.same_regroup = value_slots == key_slots and key_size == value_size
        self.same_outputs = value_slots == list(range(nowhere))

        self.site_of_query = _components(pairs)
        self.site_of_key = tuple(self.site_of_query[self.key_map.index(k)] for k in range(self.key_heads))
        self.site_of_value = tuple(
            self.site_of_query[self.value_map.index(v)] for v in range(self.value_heads)
        )

    def table(self, name: str, device: torch.device) -> Tensor:
        """Return an index table, on the device."""
        # Made when used: a model that is being loaded has no device yet.
        if (name, device) not in self._tables:
            self._tables[name, device] = torch.tensor(self._indices[name], device=device)
        return self._tables[name, device]

    def expand(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Make one key head and one value head for each distinct pair: ``(B, H / repeats, S, d)`` both."""
        if self.stock:
            return keys, values
        return (
            keys.index_select(1, self.table("expand_keys", keys.device)),
            values.index_select(1, self.table("expand_values", values.device)),
        )

    def decode(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attend with the queries of one token.

        Parameters
        ----------
        q : Tensor
            ``(B, H, 1, d)``, after rotary embedding.
        keys, values : Tensor
            ``(B, G_K, S, d)`` and ``(B, G_V, S, d)``.
        mask : Tensor, optional
            ``(B, 1, 1, S)``, bool (True attends) or additive.
        scale : float
            Factor of the logits.

        Returns
        -------
        Tensor
            ``(B, 1, H, d)``.
        """
        rows, _, _, width = q.shape
        q = q[:, :, 0]  # (B, H, d)
        if self.padded_queries:
            q = nn.functional.pad(q, (0, 0, 0, 1))
        if not self.same_queries:
            q = q.index_select(1, self.table("queries", q.device))
        q = (q * scale).view(rows, self.key_heads, self.key_group, width)
        logits = torch.matmul(q, keys.transpose(2, 3))  # (B, G_K, g, S)
        if mask is not None:
            logits = (
                logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
                if mask.dtype == torch.bool
                else logits + mask
            )
        attention = logits.softmax(-1, dtype=torch.float32).to(values.dtype)
        if not self.same_regroup:
            attention = attention.flatten(1, 2).index_select(1, self.table("regroup", q.device))
        attention = attention.view(rows, self.value_heads, self.value_group, -1)
        out = torch.matmul(attention, values).flatten(1, 2)  # (B, places, d)
        if not self.same_outputs:
            out = out.index_select(1, self.table("outputs", q.device))
        return out[:, None]


def _slots(head_map: Sequence[int], groups: int) -> tuple[list[int], int]:
    """Query heads by group, every group filled up with H to the size of the largest."""
    members: list[list[int]] = [[] for _ in range(groups)]
    for head, group in enumerate(head_map):
        members[group].append(head)
    size = max(map(len, members))
    return [head for group in members for head in group + [len(head_map)] * (size - len(group))], size


def _components(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """Connected component of each query head, numbered by first appearance."""
    label = list(range(len(pairs)))
    changed = True
    while changed:
        changed = False
        for side in (0, 1):
            least: dict[int, int] = {}
            for pair, mark in zip(pairs, label, strict=True):
                least[pair[side]] = min(mark, least.get(pair[side], mark))
            for place, pair in enumerate(pairs):
                if least[pair[side]] < label[place]:
                    label[place] = least[pair[side]]
                    changed = True
    order = {mark: number for number, mark in enumerate(dict.fromkeys(label))}
    return tuple(order[mark] for mark in label)
