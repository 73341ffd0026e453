"""Tasks, and batches of dicts that any number of processes can share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from labkit.training.data import DatasetBatches, GlobalBatches, map_tensors

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Task:
    """One task of a sequence.

    Parameters
    ----------
    name : str
        For the score matrix.
    batches : callable, GlobalBatches or data set
        ``batches(seed)``: an iterator of dicts of tensors, all of one number of rows, such as ``input_ids`` and
        ``labels``. Or a `labkit.training.GlobalBatches`, or a data set with a length whose rows `collate` joins.
    evaluate : callable
        ``evaluate(model)``: the score, larger is better. It gets the model in evaluation mode, without gradients.
    steps : int, optional
        Updates of this task's stage; by default what `sequential_finetune` is given.
    batch : int
        Rows of an update, where `batches` is a data set.
    collate : callable, optional
        As for `labkit.training.DatasetBatches`; the collator of a transformers tokenizer will do.

    Raises
    ------
    ValueError, TypeError
        When `batches` or `evaluate` is of another kind, or `steps` is not positive.

    Examples
    --------
    >>> rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(8)]
    >>> Task("count", rows, evaluate=lambda model: 0.0, batch=2).data(seed=0).batch
    2
    """

    name: str
    batches: Any
    evaluate: Callable[[Any], float]
    steps: int | None = None
    batch: int = 32
    collate: Callable[[list[Any]], Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.evaluate):
            raise TypeError(f"task {self.name!r}: evaluate must be callable, got {self.evaluate!r}")
        sized = hasattr(self.batches, "__len__") and hasattr(self.batches, "__getitem__")
        if not (callable(self.batches) or isinstance(self.batches, GlobalBatches) or sized):
            raise TypeError(
                f"task {self.name!r}: batches must be a function of a seed that returns an iterator of dicts, a "
                f"GlobalBatches or a data set with a length, got {type(self.batches).__name__}"
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"task {self.name!r}: steps must be at least 1, got {self.steps}")

    def data(self, seed: int) -> GlobalBatches:
        """Batches of the task, the same whenever and on however many processes they are asked for."""
        if isinstance(self.batches, GlobalBatches):
            return self.batches
        if hasattr(self.batches, "__getitem__"):
            return DatasetBatches(self.batches, self.batch, collate=self.collate, seed=seed)
        return StreamBatches(self.batches, seed, self.name)


class StreamBatches(GlobalBatches):
    """Batches of an iterator, which is made anew where an earlier step is asked for.

    Parameters
    ----------
    stream : callable
        ``stream(seed)``: iterator of dicts.
    seed : int
    name : str
        For messages.
    """

    def __init__(self, stream: Callable[[int], Iterator[Batch]], seed: int, name: str = "stream") -> None:
        self.stream, self.name = stream, name
        self._iterator: Iterator[Batch] = iter(stream(seed))
        self._current: Batch = self._next(0)
        self._step = 0
        super().__init__(rows_of(self._current, name), seed)

    def _next(self, step: int) -> Batch:
        try:
            return next(self._iterator)
        except StopIteration:
            raise ValueError(
                f"the batches of {self.name!r} end after {step} steps: let the iterator go on, or ask for fewer steps"
            ) from None

    def rows(self, step: int, first: int, last: int) -> Batch:
        """Wind the iterator to this step, and cut its batch."""
        if step < self._step:
            self._iterator = iter(self.stream(self.seed))
            self._step, self._current = 0, self._next(0)
        while self._step < step:
            self._step += 1
            self._current = self._next(self._step)
        if rows_of(self._current, self.name) != self.batch:
            raise ValueError(
                f"step {step} of {self.name!r} has {rows_of(self._current, self.name)} rows, the first had "
                f"{self.batch}: all batches must be alike"
            )
        return map_tensors(lambda tensor: tensor[first:last], self._current)  # type: ignore[no-any-return]


def rows_of(batch: Any, name: str = "task") -> int:
    """Rows of a dict of tensors.

    Raises
    ------
    TypeError
        When it is none.
    """
    if not isinstance(batch, Mapping) or not any(isinstance(v, torch.Tensor) for v in batch.values()):
        raise TypeError(
            f"a batch of {name!r} must be a dict of tensors such as input_ids and labels, got {type(batch).__name__}"
        )
    return next(len(v) for v in batch.values() if isinstance(v, torch.Tensor))


def joined(batches: Sequence[Batch]) -> Batch:
    """Join batches by rows; shorter ones are padded on the right, with labels that do not count.

    Examples
    --------
    >>> one = {"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2).long()}
    >>> other = {"input_ids": torch.ones(1, 3).long(), "labels": torch.ones(1, 3).long()}
    >>> both = joined([one, other])
    >>> both["labels"].tolist(), both["attention_mask"].tolist()
    ([[1, 1, -100], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]])
    """
    if len(batches) == 1:
        return dict(batches[0])
    batches = [dict(batch) for batch in batches]
    if len({batch["input_ids"].shape[1:] for batch in batches if "input_ids" in batch}) > 1:
        for batch in batches:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    names = list(batches[0])
    if any(set(batch) != set(names) for batch in batches):
        raise ValueError(
            "tasks that are mixed must have the same fields in their batches, got "
            + " and ".join(str(sorted(batch)) for batch in batches)
        )
    result = {}
    for name in names:
        longest = max(batch[name].shape[1] if batch[name].ndim > 1 else 0 for batch in batches)
        fill = -100 if name == "labels" else 0
        result[name] = torch.cat(
            [
                F.pad(t, (0, longest - t.shape[1]), value=fill) if t.ndim == 2 else t
                for t in (batch[name] for batch in batches)
            ]
        )
    return result


def first_rows(data: GlobalBatches, count: int) -> Batch:
    """The first rows that a stage trains on."""
    steps = range(-(-count // data.batch))
    whole = joined([data.rows(step, 0, data.batch) for step in steps])
    return {name: tensor[:count] for name, tensor in whole.items()}
