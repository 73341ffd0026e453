"""Budgets in tokens, from a share or a number."""

from __future__ import annotations

import math


def round_half_up(x: float) -> int:
    """Round to the nearest integer, halves up; float error just below a half counts as the half.

    Examples
    --------
    >>> round_half_up(100 * (1 - 0.8)), round_half_up(2.5)   # 19.999999999999996 keeps 20
    (20, 3)
    """
    return math.floor(x + 0.5 + 1e-9)


def check_budget(compression_ratio: float | None, budget_tokens: int | None) -> None:
    """Check that exactly one of the two ways to state a budget is given, and is sound."""
    if (compression_ratio is None) == (budget_tokens is None):
        raise ValueError(
            "give either compression_ratio or budget_tokens, and not both; "
            f"got compression_ratio={compression_ratio!r} and budget_tokens={budget_tokens!r}"
        )
    if compression_ratio is not None and not 0 <= compression_ratio < 1:
        raise ValueError(
            f"compression_ratio is the share to evict and must lie in [0, 1); got {compression_ratio!r}"
        )
    if budget_tokens is not None:
        if isinstance(budget_tokens, bool) or not isinstance(budget_tokens, int):
            raise TypeError(
                f"budget_tokens must be an int; got {budget_tokens!r} (a share is compression_ratio)"
            )
        if budget_tokens < 1:
            raise ValueError(f"budget_tokens must be at least 1; got {budget_tokens}")


def budget_of(n: int, compression_ratio: float | None, budget_tokens: int | None) -> int:
    """Entries to keep of n: rounded, at least 1, at most n."""
    if budget_tokens is not None:
        return min(budget_tokens, n)
    return min(max(1, round_half_up(n * (1 - (compression_ratio or 0.0)))), n)
