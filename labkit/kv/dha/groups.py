"""Groups of key heads and of value heads, layer by layer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Partition = tuple[tuple[int, ...], ...]


def _partition(groups: Iterable[Iterable[int]], heads: int, where: str) -> Partition:
    made = tuple(sorted(tuple(sorted(int(h) for h in group)) for group in groups))
    count = Counter(head for group in made for head in group)
    problems = [
        (sorted(h for h, times in count.items() if times > 1), "in more than one group"),
        (sorted(set(range(heads)) - set(count)), "in no group"),
        (sorted(set(count) - set(range(heads))), f"outside 0..{heads - 1}"),
    ]
    for wrong, what in problems:
        if wrong:
            raise ValueError(f"{where}: head {wrong[0]} is {what}; groups must partition 0..{heads - 1}")
    if not all(made):
        raise ValueError(f"{where}: a group is empty; leave it out")
    return made


@dataclass(frozen=True)
class HeadGroups:
    """Which key heads and which value heads become one, in every layer.

    Parameters
    ----------
    keys, values : sequence of partitions
        For every layer the groups of its key (value) heads; each a partition of 0..heads-1. Kept sorted.
    heads : int
        Key-value heads of a layer of the checkpoint.

    Raises
    ------
    ValueError
        For groups that are no partition (the missing or repeated head is named), or keys and values of
        different depth.

    Examples
    --------
    >>> from labkit.kv import HeadGroups
    >>> groups = HeadGroups(keys=[[[0, 2], [1, 3]]], values=[[[0, 1, 2, 3]]], heads=4)
    >>> groups.key_heads, groups.value_heads, groups.kept
    ((2,), (1,), 0.375)
    >>> groups.maps("k")
    ((0, 1, 0, 1),)
    """

    keys: tuple[Partition, ...]
    values: tuple[Partition, ...]
    heads: int

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.values) or not self.keys:
            raise ValueError(
                f"keys and values must be given for the same layers; got {len(self.keys)} and {len(self.values)}"
            )
        for name in ("keys", "values"):
            made = tuple(
                _partition(groups, self.heads, f"{name} of layer {layer}")
                for layer, groups in enumerate(getattr(self, name))
            )
            object.__setattr__(self, name, made)

    @classmethod
    def adjacent(cls, layers: int, heads: int, groups: int) -> HeadGroups:
        """Equal groups of neighbouring heads in every layer, the same for keys and values, as GQA has them.

        Raises
        ------
        ValueError
            If ``groups`` does not divide ``heads``.

        Examples
        --------
        >>> HeadGroups.adjacent(1, 4, 2).keys
        (((0, 1), (2, 3)),)
        """
        if groups < 1 or heads % groups:
            allowed = [g for g in range(1, heads + 1) if heads % g == 0]
            raise ValueError(f"adjacent groups must divide the {heads} heads: {allowed}; got {groups}")
        size = heads // groups
        layer = [range(g * size, (g + 1) * size) for g in range(groups)]
        return cls((layer,) * layers, (layer,) * layers, heads)  # type: ignore[arg-type]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.keys)

    @property
    def key_heads(self) -> tuple[int, ...]:
        """Key heads that each layer will have, G_K."""
        return tuple(len(groups) for groups in self.keys)

    @property
    def value_heads(self) -> tuple[int, ...]:
        """Value heads that each layer will have, G_V."""
        return tuple(len(groups) for groups in self.values)

    @property
    def kept(self) -> float:
        """Share of the checkpoint's cache that is left: the sum of G_K + G_V over that of all heads twice."""
        return (sum(self.key_heads) + sum(self.value_heads)) / (2 * self.layers * self.heads)

    @property
    def allocation(self) -> list[dict[str, int]]:
        """Heads by layer, as rows of a table: ``{"layer": 0, "key heads": 2, "value heads": 1}``."""
        return [
            {"layer": layer, "key heads": k, "value heads": v}
            for layer, (k, v) in enumerate(zip(self.key_heads, self.value_heads, strict=True))
        ]

    def of(self, kind: str) -> tuple[Partition, ...]:
        """Return the partitions of keys (``"k"``) or values (``"v"``)."""
        if kind not in ("k", "v"):
            raise ValueError(f"kind must be 'k' or 'v'; got {kind!r}")
        return self.keys if kind == "k" else self.values

    def maps(self, kind: str) -> tuple[tuple[int, ...], ...]:
        """For every layer the group of each head, ``kind`` being ``"k"`` or ``"v"``."""
        return tuple(group_of(groups, self.heads) for groups in self.of(kind))

    def to_json(self) -> str:
        """Write as JSON; :meth:`from_json` reads it."""
        return json.dumps({"heads": self.heads, "keys": self.keys, "values": self.values})

    @classmethod
    def from_json(cls, text: str) -> HeadGroups:
        """Read what :meth:`to_json` wrote."""
        read = json.loads(text)
        return cls(read["keys"], read["values"], read["heads"])


def group_of(groups: Sequence[Sequence[int]], heads: int) -> tuple[int, ...]:
    """Return the number of each head's group."""
    owner = {head: number for number, group in enumerate(groups) for head in group}
    return tuple(owner[head] for head in range(heads))
