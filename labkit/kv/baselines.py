"""One-shot baselines: they evict once, after the prefill, as NACL does, and differ in what they look at.

StreamingLLM (Xiao et al., arXiv 2309.17453) looks at positions alone, H2O (Zhang et al., arXiv 2306.14048; here its
one-shot form) at the attention of all tokens, SnapKV (Li et al., arXiv 2404.14469) at that of the last ones, pooled.
H2O as it was published evicts token by token: :class:`labkit.kv.greedy.GreedyH2O`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from labkit.kv.attention import LayerContext
from labkit.kv.nacl import Split, nacl_reasons
from labkit.kv.press import CachePress


def top_reasons(scores: Tensor, budget: int, *, sink: int = 0, recent: int = 0) -> Tensor:
    """Keep ``sink`` first, ``recent`` last and the best of the rest by score, ``budget`` in all.

    Parameters
    ----------
    scores : Tensor
        ``(B, K, n)``.
    budget, sink, recent : int
        Recent entries come first where the budget is short, then sinks.

    Returns
    -------
    Tensor
        Reasons, ``(B, K, n)`` int8, as in :class:`labkit.kv.LayerStats`.
    """
    recent = min(recent, budget)
    sink = min(sink, budget - recent)
    return nacl_reasons(scores, Split(sink, recent, budget - sink - recent, 0))


class StreamingLLMPress(CachePress):
    """Keep the first ``sink`` and the last tokens: attention sinks and a window.

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict; or ``budget_tokens``.
    sink : int, default 4
        First tokens to keep.
    **settings
        Those of :class:`labkit.kv.CachePress`.

    Raises
    ------
    ValueError
        For a negative ``sink``, or a budget that leaves no room beside it.

    Examples
    --------
    >>> StreamingLLMPress(budget_tokens=20).budget(100)
    20
    """

    def __init__(self, compression_ratio: float | None = None, *, sink: int = 4, **settings: Any) -> None:
        super().__init__(compression_ratio, **settings)
        if sink < 0 or (self.budget_tokens is not None and self.budget_tokens < sink + 1):
            raise ValueError(
                f"sink must be at least 0 and leave room in the budget; got sink={sink}, "
                f"budget_tokens={self.budget_tokens}"
            )
        self.sink = sink

    def select(self, context: LayerContext) -> Tensor:
        budget = self.budget(context.n)
        sink = min(self.sink, budget - 1)
        flat = torch.zeros(context.shape, device=context.keys.device)
        return top_reasons(flat, budget, sink=sink, recent=budget - sink)


class RandomPress(CachePress):
    """Keep tokens drawn evenly at random, other ones in every head and layer."""

    def select(self, context: LayerContext) -> Tensor:
        noise = torch.rand(context.shape, generator=self.generator(context.layer))
        return top_reasons(noise.to(context.keys.device), self.budget(context.n))


class H2OPress(CachePress):
    r"""Keep the tokens with the most attention from all tokens: H2O in one shot.

    .. math:: F_{hj} = \sum_{p \ge j} \mathrm{softmax}_j(Q_{hp} \cdot K_{hj} / \sqrt d)

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict; or ``budget_tokens``.
    normalized : bool, default False
        Divide by the n - j queries that can see key j, which takes away the advantage of early tokens (the rule
        of kvpress's ``ObservedAttentionPress``). The plain sum is the paper's.
    recent : float, default 0.0
        Share of the budget for the last tokens.
    **settings
        Those of :class:`labkit.kv.CachePress`.
    """

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        normalized: bool = False,
        recent: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(compression_ratio, **settings)
        if not 0 <= recent <= 1:
            raise ValueError(f"recent is a share of the budget and must lie in [0, 1]; got {recent!r}")
        self.normalized = normalized
        self.recent = recent

    def select(self, context: LayerContext) -> Tensor:
        everyone = torch.arange(context.n, device=context.keys.device)
        scores = context.scores(everyone)
        if self.normalized:
            scores = scores / (context.n - everyone)
        budget = self.budget(context.n)
        return top_reasons(scores, budget, recent=round(self.recent * budget))


class SnapKVPress(CachePress):
    """Keep what the last tokens attend to, pooled over neighbours, and those last tokens themselves.

    Without pooling it is NACL with as many proxies and no random part.

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict; or ``budget_tokens``.
    window : int, default 64
        Tokens whose queries score, and that are kept (as many as the budget holds; on a prompt that is not
        longer than the window, half of it).
    kernel_size : int, default 5
        Width of the average pooling over keys, odd; 1 for none.
    **settings
        Those of :class:`labkit.kv.CachePress`.
    """

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        window: int = 64,
        kernel_size: int = 5,
        **settings: Any,
    ) -> None:
        super().__init__(compression_ratio, **settings)
        if window < 1:
            raise ValueError(f"window must be at least 1; got {window}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and positive; got {kernel_size}")
        self.window = window
        self.kernel_size = kernel_size

    def select(self, context: LayerContext) -> Tensor:
        window = self.window if context.n > self.window else max(1, context.n // 2)
        last = torch.arange(context.n - window, context.n, device=context.keys.device)
        scores = context.scores(last) / window
        before = F.avg_pool1d(
            scores[..., :-window].flatten(0, 1)[:, None],
            self.kernel_size,
            stride=1,
            padding=self.kernel_size // 2,
        )
        scores = torch.cat((before[:, 0].view(*scores.shape[:2], -1), scores[..., -window:]), dim=-1)
        return top_reasons(scores, self.budget(context.n), recent=window)
