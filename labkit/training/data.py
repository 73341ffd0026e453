"""Global batches that do not depend on how many processes share them.

The rows of step s are a function of the seed and of s alone. Each process makes its own rows of them with
generators of its own: rows ``[r B / W, (r + 1) B / W)`` of the global batch B for process r of W, in order, cut into
the micro-batches of gradient accumulation. Nothing needs to be stored to resume but the number of the step, and the
number of processes may change in between.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch

Draw = Callable[[int, torch.Generator], Any]


def mixed_seed(*numbers: int) -> int:
    """A seed that depends on several numbers, for generators that must not be alike.

    Examples
    --------
    >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
    (True, False)
    """
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], batch: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists, mappings and dataclasses.

    Examples
    --------
    >>> map_tensors(lambda t: t + 1, {"a": torch.zeros(2), "b": (torch.ones(1), "text")})
    {'a': tensor([1., 1.]), 'b': (tensor([2.]), 'text')}
    """
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, part) for part in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, part) for part in batch)
    if isinstance(batch, Mapping):
        return {name: map_tensors(function, part) for name, part in batch.items()}
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = {f.name: map_tensors(function, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **parts)
    return batch


def _joined(batches: Sequence[Any]) -> Any:
    """Several batches of one form as one, joined along the first axis of their tensors."""
    if len(batches) == 1:
        return batches[0]
    columns: list[list[torch.Tensor]] = []
    for batch in batches:
        mine: list[torch.Tensor] = []
        map_tensors(lambda tensor, mine=mine: mine.append(tensor) or tensor, batch)  # type: ignore[misc]
        columns.append(mine)
    joined = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    return map_tensors(lambda _: next(joined), batches[0])


class GlobalBatches(ABC):
    """Base of the two ways to make batches; a subclass says what rows a step has.

    Parameters
    ----------
    batch : int
        Rows B of the global batch: of one update, over all processes and micro-batches.
    seed : int
        Of the data and their order.
    """

    def __init__(self, batch: int, seed: int = 0) -> None:
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch = batch
        self.seed = seed

    @abstractmethod
    def rows(self, step: int, first: int, last: int) -> Any:
        """Rows ``first`` to ``last - 1`` of a step's global batch, as a batch."""

    def describe(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that a run resumes on the same data."""
        return {"kind": type(self).__name__, "batch": self.batch, "seed": self.seed}

    def micro_batches(self, step: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> Iterator[Any]:
        """One process's micro-batches of a step.

        Parameters
        ----------
        step : int
            Number of the update, from 0.
        rank, world : int
            Which process of how many.
        accumulate : int
            Micro-batches of each process.

        Raises
        ------
        ValueError
            When the global batch can't be cut evenly.
        """
        if self.batch % (world * accumulate):
            raise ValueError(
                f"a global batch of {self.batch} rows can't be cut evenly into {world} processes times {accumulate} "
                f"micro-batches: take a multiple of {world * accumulate}"
            )
        size = self.batch // (world * accumulate)
        first = rank * accumulate * size
        for start in range(first, first + accumulate * size, size):
            yield self.rows(step, start, start + size)


class DrawnBatches(GlobalBatches):
    """Batches of a synthetic task, from a function that draws rows with a generator.

    Parameters
    ----------
    draw : callable
        ``draw(rows, generator)``: a batch, as nested tensors whose first axis is the rows.
    batch, seed : int
        See `GlobalBatches`.
    block : int, optional
        Rows drawn at a time, each block with a generator of its own. By default the whole global batch is drawn in
        every process and cut, which changes nothing about a task but costs each process the whole batch; with a
        divisor of the rows of a micro-batch no process draws what is not its own.

    Examples
    --------
    >>> data = DrawnBatches(lambda rows, generator: torch.rand(rows, generator=generator), batch=4, block=2)
    >>> whole = next(data.micro_batches(step=7))
    >>> halves = [next(data.micro_batches(7, rank, world=2)) for rank in (0, 1)]
    >>> torch.equal(whole, torch.cat(halves))
    True
    """

    def __init__(self, draw: Draw, batch: int, *, block: int | None = None, seed: int = 0) -> None:
        super().__init__(batch, seed)
        self.draw = draw
        self.block = batch if block is None else block
        if self.block < 1 or batch % self.block:
            raise ValueError(f"block must divide the batch of {batch} rows, got {block}")

    def rows(self, step: int, first: int, last: int) -> Any:
        """Draw the blocks that hold these rows, and cut them."""
        parts = []
        for number in range(first // self.block, -(-last // self.block)):
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, number))
            start = number * self.block
            low, high = max(first, start) - start, min(last, start + self.block) - start
            drawn = self.draw(self.block, generator)
            parts.append(map_tensors(lambda t, low=low, high=high: t[low:high], drawn))  # type: ignore[misc]
        return _joined(parts)

    def describe(self) -> dict[str, Any]:
        """Adds the block, which enters the rows' seeds."""
        return super().describe() | {"block": self.block}


class DatasetBatches(GlobalBatches):
    """Batches of a data set with a length, each epoch in an order of its own.

    An epoch's last rows are not dropped: a batch may end one epoch and begin the next.

    Parameters
    ----------
    dataset : sized, indexable
        A list, a `torch.utils.data.Dataset`, a `datasets.Dataset`.
    batch, seed : int
        See `GlobalBatches`.
    collate : callable, optional
        ``collate(rows)``: a batch from a list of rows; `torch.utils.data.default_collate` by default.
    shuffle : bool
        False keeps the data set's own order.

    Examples
    --------
    >>> data = DatasetBatches(torch.arange(10), batch=4, seed=0)
    >>> seen = torch.cat([next(data.micro_batches(step)) for step in range(5)])
    >>> sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    True
    """

    def __init__(
        self,
        dataset: Any,
        batch: int,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(batch, seed)
        if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must have a length and an index, got {type(dataset).__name__}; for a stream use DrawnBatches"
            )
        if not len(dataset):
            raise ValueError("the data set is empty")
        self.dataset: Any = dataset
        self.collate = collate if collate is not None else torch.utils.data.default_collate
        self.shuffle = shuffle
        self._orders: dict[int, torch.Tensor] = {}

    def _order(self, epoch: int) -> torch.Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch))
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = torch.randperm(len(self.dataset), generator=generator)
        return self._orders[epoch]

    def rows(self, step: int, first: int, last: int) -> Any:
        """Look up and collate these rows."""
        taken = []
        for position in range(step * self.batch + first, step * self.batch + last):
            epoch, place = divmod(position, len(self.dataset))
            taken.append(self.dataset[int(self._order(epoch)[place]) if self.shuffle else place])
        return self.collate(taken)

    def describe(self) -> dict[str, Any]:
        """Adds the number of rows and whether they are shuffled."""
        return super().describe() | {"rows": len(self.dataset), "shuffle": self.shuffle}
