"""The settings of NACL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from labkit.kv.budget import budget_of, check_budget, round_half_up
from labkit.kv.nacl.scores import HEAD_REDUCTIONS, Proxies, resolve_proxies
from labkit.kv.nacl.select import check_draw
from labkit.kv.nacl.split import Split, split_budget

_LONGEST = 2**62


@dataclass(frozen=True)
class NACLConfig:
    """All settings of NACL.

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict, in [0, 1). Either this or ``budget_tokens``.
    budget_tokens : int, optional
        Entries to keep per KV head.
    proxy_tokens : int, float, Tensor or callable, default 0.1
        The proxies, as in :func:`resolve_proxies`. Positions count from the first real token of a prompt.
    random_share : float, default 0.6
        Share of the middle's budget that is drawn at random. 0 where the proxies are sure to hold the question.
    sink : int, default 4
        First tokens, always kept.
    recent : int or float, default 0.02
        Last tokens, always kept: a number, or a share of n; at least one.
    random_temperature : float, default 1.0
        τ of the weights softmax(F/τ). F lies far below 1 save for heavy hitters, so at 1 the draw is nearly
        uniform; a small τ favours the next best by score.
    sampling : {"probability", "uniform"}, default "probability"
        How the random part is drawn.
    shared_heads : bool, default False
        One set for all heads of a layer, for ablation.
    causal : bool, default True
        Whether proxies see only the past.
    head_reduction : {"mean", "head_index"}, default "mean"
        How scores of query heads become those of a KV head.
    decode_interval : int, optional
        Evict back to the budget whenever this many tokens have been appended, scoring with the latest
        queries, as many as there were proxies. By default nothing is evicted while decoding. Not for beam search.
    min_length : int, default 0
        Prompts of up to this many tokens are left whole.
    seed : int, default 0
        Of the draw.
    split : callable, optional
        n to :class:`Split`, instead of the two ways to state a budget, ``sink``, ``recent`` and ``random_share``.
    keep_scores : bool, default False
        Whether the press keeps F of each layer, for plots.

    Raises
    ------
    ValueError, TypeError
        For a value outside its range; the message names value and range.
    """

    compression_ratio: float | None = None
    budget_tokens: int | None = None
    proxy_tokens: Proxies = 0.1
    random_share: float = 0.6
    sink: int = 4
    recent: int | float = 0.02
    random_temperature: float = 1.0
    sampling: str = "probability"
    shared_heads: bool = False
    causal: bool = True
    head_reduction: str = "mean"
    decode_interval: int | None = None
    min_length: int = 0
    seed: int = 0
    split: Callable[[int], Split] | None = None
    keep_scores: bool = False

    def __post_init__(self) -> None:
        if self.split is None:
            check_budget(self.compression_ratio, self.budget_tokens)
        elif self.compression_ratio is not None or self.budget_tokens is not None:
            raise ValueError("split states the budget already: leave out compression_ratio and budget_tokens")
        check_draw(self.random_share, self.random_temperature, self.sampling)
        if self.head_reduction not in HEAD_REDUCTIONS[:2]:
            raise ValueError(f"head_reduction must be 'mean' or 'head_index'; got {self.head_reduction!r}")
        if self.sink < 0 or isinstance(self.sink, bool) or not isinstance(self.sink, int):
            raise ValueError(f"sink must be an int of at least 0; got {self.sink!r}")
        if self.recent < 0 or (isinstance(self.recent, float) and self.recent >= 1):
            raise ValueError(f"recent must be a number of tokens or a share in [0, 1); got {self.recent!r}")
        if self.decode_interval is not None and self.decode_interval < 1:
            raise ValueError(f"decode_interval must be at least 1 (or None); got {self.decode_interval}")
        if not callable(self.proxy_tokens) or isinstance(self.proxy_tokens, Tensor):
            # Type and emptiness now; the range of positions is checked against each prompt.
            resolve_proxies(self.proxy_tokens, _LONGEST if isinstance(self.proxy_tokens, Tensor) else 1)
        if isinstance(self.recent, int) and self.budget_tokens is not None:
            self._check_room(self.recent)

    def _check_room(self, recent: int) -> None:
        if self.budget_tokens is not None and self.budget_tokens < self.sink + recent + 1:
            raise ValueError(
                "budget_tokens must be at least sink + recent + 1; got "
                f"budget_tokens={self.budget_tokens}, sink={self.sink}, recent={recent}"
            )

    def split_for(self, n: int) -> Split:
        """Divide the budget for a prompt of n tokens.

        Examples
        --------
        >>> NACLConfig(compression_ratio=0.8).split_for(113)
        Split(sink=4, recent=2, by_score=7, by_random=10)
        """
        if self.split is not None:
            return self.split(n)
        recent = max(1, round_half_up(self.recent * n) if isinstance(self.recent, float) else self.recent)
        budget = budget_of(n, self.compression_ratio, self.budget_tokens)
        if budget < n:
            self._check_room(recent)
        return split_budget(n, budget, self.sink, recent, self.random_share)
