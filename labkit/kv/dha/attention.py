r"""Attention with a key head and a value head of its own choice for every query head.

Three ways, the same function:

stock
    Where query heads that share a key head also share their value head, in equal groups, it is grouped-query
    attention, and transformers' attention function is called as it is.
decoding, one token
    Two matrix products over the cache as it lies: all queries of a key head against that head, softmax, then all
    probabilities of a value head against that one. The cache is read once, and nothing of its size is written. Groups
    of unequal size are filled up with zero queries, or on the CPU multiplied one by one.
everything else
    Keys and values are expanded by index to one head for each distinct pair (κ, ν), and transformers' attention
    function is called.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# Entries from which the CPU multiplies unequal groups one by one. Measured on one core with 16 heads of 64: at 1024
# filling up takes 0.8 of that time, at 4096 1.1 to 1.6, at 16384 1.0 to 1.7.
LONG = 2048


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

        self._plans: dict[bool, _Plan] = {}

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
        # On the CPU a product of each head on its own costs less than filling up, once the cache is long.
        ragged = keys.device.type == "cpu" and keys.shape[2] >= LONG
        if ragged not in self._plans:
            self._plans[ragged] = _Plan(self.key_map, self.value_map, fill=not ragged)
        plan = self._plans[ragged]
        q = q[:, :, 0] * scale  # (B, H, d)
        if plan.filled:
            q = nn.functional.pad(q, (0, 0, 0, 1))
        logits = _grouped(plan.take("queries", q), keys.transpose(2, 3), plan.key_sizes)  # (B, places, S)
        if mask is not None:
            logits = (
                logits.masked_fill(~mask[:, 0], torch.finfo(logits.dtype).min)
                if mask.dtype == torch.bool
                else logits + mask[:, 0]
            )
        attention = logits.softmax(-1, dtype=torch.float32).to(values.dtype)
        out = _grouped(plan.take("regroup", attention), values, plan.value_sizes)  # (B, places, d)
        return plan.take("outputs", out)[:, None]


class _Plan:
    """Where the rows of all query heads stand on their way through the two products.

    ``queries`` puts them in the places of their key heads, ``regroup`` from there into those of their value heads,
    ``outputs`` back in order. With ``fill`` every head gets as many places as the largest, else as many as it needs.
    """

    def __init__(self, key_map: Sequence[int], value_map: Sequence[int], *, fill: bool) -> None:
        heads = len(key_map)
        key_slots, self.key_sizes = _slots(key_map, fill)
        value_slots, self.value_sizes = _slots(value_map, fill)
        key_place = {head: place for place, head in enumerate(key_slots)}
        value_place = {head: place for place, head in enumerate(value_slots)}
        self.filled = heads in key_slots
        # A filled place of a value head may hold anything: nobody reads it.
        self._index = {
            "queries": key_slots,
            "regroup": [key_place.get(head, 0) for head in value_slots],
            "outputs": [value_place[head] for head in range(heads)],
        }
        if value_slots == key_slots:
            self._index["regroup"] = list(range(len(key_slots)))
        sources = (heads, len(key_slots), len(value_slots))
        for (name, index), count in zip(list(self._index.items()), sources, strict=True):
            if index == list(range(count)):
                del self._index[name]
        self._tables: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, x: Tensor) -> Tensor:
        """Reorder the rows, ``(B, places, ...)``."""
        if name not in self._index:
            return x
        if (name, x.device) not in self._tables:
            self._tables[name, x.device] = torch.tensor(self._index[name], device=x.device)
        return x.index_select(1, self._tables[name, x.device])


def _grouped(x: Tensor, y: Tensor, sizes: list[int]) -> Tensor:
    """Multiply rows ``(B, places, a)`` with the matrix of their group, ``(B, G, a, b)``: ``(B, places, b)``."""
    if len(set(sizes)) == 1:
        return torch.matmul(x.unflatten(1, (len(sizes), sizes[0])), y).flatten(1, 2)
    parts = x.split(sizes, dim=1)
    return torch.cat([torch.matmul(part, y[:, group]) for group, part in enumerate(parts)], dim=1)


def _slots(head_map: Sequence[int], fill: bool) -> tuple[list[int], list[int]]:
    """Query heads by group, H in places left empty; and the places of each group."""
    members: list[list[int]] = [[] for _ in range(max(head_map) + 1)]
    for head, group in enumerate(head_map):
        members[group].append(head)
    most = max(map(len, members))
    if fill:
        members = [group + [len(head_map)] * (most - len(group)) for group in members]
    return [head for group in members for head in group], [len(group) for group in members]


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
