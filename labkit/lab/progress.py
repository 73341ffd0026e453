"""Progress bars that are there for a person and silent in a batch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def is_batch() -> bool:
    """Whether nobody is watching: ``LABKIT_BATCH`` or ``TQDM_DISABLE`` is set to something true."""
    return any(os.environ.get(name, "0").lower() not in ("", "0", "false") for name in _VARIABLES)


def progress(iterable: Iterable[T], desc: str = "", total: int | None = None) -> Iterator[T]:
    """Iterate with a bar (a widget in a notebook, text in a terminal), or silently in a batch.

    Examples
    --------
    >>> list(progress(range(3), "steps"))
    [0, 1, 2]
    """
    from tqdm.auto import tqdm

    yield from tqdm(iterable, desc=desc, total=total, disable=is_batch(), leave=False)


_VARIABLES = ("LABKIT_BATCH", "TQDM_DISABLE")
