"""How a budget is divided among sinks, recent tokens, the best by score, and a random draw."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.kv.budget import round_half_up

# Table 4 of the paper, shares of the prompt: total -> (protected, further proxies, kept by score, kept by chance).
PAPER_TABLE = {
    0.1: (0.01, 0.03, 0.02, 0.07),
    0.2: (0.02, 0.18, 0.06, 0.12),
    0.3: (0.015, 0.20, 0.105, 0.18),
}


@dataclass(frozen=True)
class Split:
    """How one budget is divided, in tokens per KV head.

    Examples
    --------
    >>> Split(sink=4, recent=2, by_score=7, by_random=10).budget
    23
    """

    sink: int
    recent: int
    by_score: int
    by_random: int

    @property
    def budget(self) -> int:
        """All entries kept, K."""
        return self.sink + self.recent + self.by_score + self.by_random


def split_budget(n: int, budget: int, sink: int, recent: int, random_share: float) -> Split:
    """Divide a budget: first recent, then sinks, then the middle by score and by chance.

    Examples
    --------
    >>> split_budget(113, budget=23, sink=4, recent=2, random_share=0.6)
    Split(sink=4, recent=2, by_score=7, by_random=10)
    """
    budget = min(budget, n)
    recent = min(max(recent, 1), budget)
    sink = min(sink, budget - recent)
    by_random = round_half_up(random_share * (budget - sink - recent))
    return Split(sink, recent, budget - sink - recent - by_random, by_random)


def official_split(
    n: int,
    *,
    sink_tokens: int = 256,
    token_protect_ratio: float = 0.01,
    proxy_token_keep_ratio: float = 0.12,
    random_token_keep_ratio: float = 0.07,
) -> Split:
    """Divide the budget as the authors' code does, with its truncation of every product.

    Where its recent part is not positive and it would crash, the total stays that of the formula: at least one
    recent token, sinks within the budget, and the middle by score and by chance shrunk in proportion.

    Examples
    --------
    >>> official_split(30_000)
    Split(sink=256, recent=44, by_score=3600, by_random=2100)
    >>> official_split(4096)   # a fifth of the prompt all the same
    Split(sink=256, recent=1, by_score=354, by_random=206)
    """
    protect = int(token_protect_ratio * n)
    by_score, by_random = int(proxy_token_keep_ratio * n), int(random_token_keep_ratio * n)
    if protect > sink_tokens:
        return Split(sink_tokens, protect - sink_tokens, by_score, by_random)
    budget = max(1, protect + by_score + by_random)
    sink = min(sink_tokens, budget - 1)
    middle = budget - sink - 1
    drawn = round_half_up(middle * by_random / max(1, by_score + by_random))
    return Split(sink, 1, middle - drawn, drawn)


def paper_split(n: int, total: float) -> Split:
    """Divide the budget by table 4 of the paper, shares of n rounded.

    Examples
    --------
    >>> paper_split(1000, 0.2)
    Split(sink=0, recent=20, by_score=60, by_random=120)
    """
    protected, _, _, by_random = PAPER_TABLE[total]
    budget = max(1, round_half_up(total * n))
    recent = min(max(1, round_half_up(protected * n)), budget)
    drawn = min(round_half_up(by_random * n), budget - recent)
    return Split(0, recent, budget - recent - drawn, drawn)
