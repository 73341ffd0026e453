"""A router that looks at the token's id alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.moe.routers.base import Router
from labkit.moe.routing import RoutingInfo

# Far below any other logit, yet finite: losses and statistics stay free of 0 * inf.
NEVER = -1e9


class HashRouter(Router):
    """A fixed, balanced table from token ids to experts; every weight is 1/k. Nothing is learned.

    Parameters
    ----------
    hidden_size, num_experts, top_k, renormalize, jitter
        See :class:`~labkit.moe.Router`.
    vocab_size : int
        V.
    seed : int, default 0
        Seed of the table.

    Notes
    -----
    It needs ``token_ids``, so it can be called through :meth:`route` (``MoEBlock(...)(hidden, token_ids=ids)``), but not
    stand alone as the gate of a transformers block.

    Examples
    --------
    >>> import torch
    >>> router = HashRouter(8, 4, 1, vocab_size=100)
    >>> ids = torch.tensor([[7, 7, 9]])
    >>> info, _ = router.route(torch.randn(1, 3, 8), token_ids=ids)
    >>> bool(info.index[0] == info.index[1]), info.weights[:, 0].tolist()
    (True, [1.0, 1.0, 1.0])
    """

    kind = "hash"
    table: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        vocab_size: int,
        seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, **common)
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1; got {vocab_size}")
        self.vocab_size = vocab_size
        generator = torch.Generator().manual_seed(seed)
        first = torch.randperm(vocab_size, generator=generator) % num_experts
        # the further experts of an id are at distances that its expert's neighbours share, so all loads stay equal
        steps = torch.randperm(num_experts - 1, generator=generator)[: top_k - 1] + 1
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), steps])
        self.register_buffer("table", (first[:, None] + offsets) % num_experts)  # (V, k)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "vocab_size": self.vocab_size}

    def route(
        self,
        hidden: Tensor,
        state: Any = None,
        mask: Tensor | None = None,
        *,
        layer: int = -1,
        **context: Any,
    ) -> tuple[RoutingInfo, Any]:
        ids = context.get("token_ids")
        if ids is None:
            raise ValueError(
                "HashRouter routes by token id: pass token_ids, of the shape of hidden without its width"
            )
        tokens = self._tokens(hidden).shape[0]
        ids = ids.reshape(-1)
        if ids.shape[0] != tokens:
            raise ValueError(f"token_ids must name {tokens} tokens; got {ids.shape[0]}")
        index = self.table[ids]
        logits = torch.full((tokens, self.num_experts), NEVER, device=index.device).scatter(1, index, 0.0)
        weights = torch.full(index.shape, 1.0 / self.top_k, device=index.device)
        flat = None if mask is None else mask.reshape(-1)
        return RoutingInfo(logits, logits.softmax(-1), index, weights, flat, layer), state
