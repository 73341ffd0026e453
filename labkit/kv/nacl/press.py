"""NACL on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.kv.attention import LayerContext, eviction_heads, head_scores, query_states
from labkit.kv.nacl.config import NACLConfig
from labkit.kv.nacl.scores import TruncatedShare, resolve_proxies
from labkit.kv.nacl.select import nacl_priorities, nacl_reasons
from labkit.kv.nacl.split import PAPER_TABLE, Split, official_split, paper_split, split_budget
from labkit.kv.press import CachePress
from labkit.kv.state import RECENT, LayerState, layer_states


class NACLPress(CachePress):
    """NACL on a model: ``with NACLPress(compression_ratio=0.8)(model): model.generate(...)``.

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict; or give ``budget_tokens``.
    **settings
        The other fields of :class:`NACLConfig`.

    Attributes
    ----------
    config : NACLConfig
        The settings.
    stats : dict of int to LayerStats
        Per layer: entries kept, and why.
    scores : dict of int to Tensor
        With ``keep_scores=True``: F of each layer, ``(B, K, n)``, 0 at padding.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import NACLPress, cache_bytes
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> press = NACLPress(compression_ratio=0.8, proxy_tokens=8, random_share=0.5)
    >>> with press(model), torch.no_grad():
    ...     cache = model(torch.arange(50)[None]).past_key_values
    >>> cache.get_seq_length(), cache_bytes(cache) == 2 * 2 * 2 * 10 * 8 * 4
    (10, True)
    >>> press.stats[0].kept.shape
    torch.Size([1, 2, 10])
    """

    def __init__(self, compression_ratio: float | None = None, **settings: Any) -> None:
        self.config = NACLConfig(compression_ratio, **settings)
        own = self.config.split is None
        super().__init__(
            compression_ratio if own else 0.0,
            budget_tokens=self.config.budget_tokens,
            min_length=self.config.min_length,
            seed=self.config.seed,
        )
        self.scores: dict[int, Tensor] = {}

    def __repr__(self) -> str:
        return f"NACLPress({self.config})"

    @classmethod
    def official(
        cls,
        *,
        sink_tokens: int = 256,
        token_protect_ratio: float = 0.01,
        proxy_tokens_ratio: float = 0.01,
        proxy_token_keep_ratio: float = 0.12,
        random_token_keep_ratio: float = 0.07,
        min_eviction_seqlen: int = 2048,
        **settings: Any,
    ) -> NACLPress:
        """Make the press with the authors' parameters, named as in their code, and their truncation.

        The mask and the heads are ours unless asked for: ``causal=False, head_reduction="head_index"``.
        """
        ratios = {
            "token_protect_ratio": token_protect_ratio,
            "proxy_tokens_ratio": proxy_tokens_ratio,
            "proxy_token_keep_ratio": proxy_token_keep_ratio,
            "random_token_keep_ratio": random_token_keep_ratio,
        }
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {ratio!r}")
        if sink_tokens < 0:
            raise ValueError(f"sink_tokens must not be negative; got {sink_tokens}")

        def split(n: int) -> Split:
            return official_split(
                n,
                sink_tokens=sink_tokens,
                token_protect_ratio=token_protect_ratio,
                proxy_token_keep_ratio=proxy_token_keep_ratio,
                random_token_keep_ratio=random_token_keep_ratio,
            )

        proxies = TruncatedShare(proxy_tokens_ratio)
        return cls(**{"min_length": min_eviction_seqlen, "proxy_tokens": proxies, **settings}, split=split)

    @classmethod
    def paper_table(cls, total: float, **settings: Any) -> NACLPress:
        """Make the press with the split of the paper's table 4 for a total budget of 0.1, 0.2 or 0.3.

        Examples
        --------
        >>> NACLPress.paper_table(0.1).config.split_for(1000)
        Split(sink=0, recent=10, by_score=20, by_random=70)
        """
        if total not in PAPER_TABLE:
            raise ValueError(f"total must be one of {', '.join(map(str, PAPER_TABLE))}; got {total!r}")
        protected, further, _, _ = PAPER_TABLE[total]
        return cls(**{"proxy_tokens": protected + further, **settings}, split=lambda n: paper_split(n, total))

    def budget(self, n: int) -> int:
        return n if n <= self.min_length else min(self.config.split_for(n).budget, n)

    def _reasons(self, scores: Tensor, split: Split, layer: int) -> Tensor:
        return nacl_reasons(
            scores,
            split,
            random_temperature=self.config.random_temperature,
            sampling=self.config.sampling,
            shared_heads=self.config.shared_heads,
            generator=self.generator(layer),
        )

    def _proxies(self, context: LayerContext) -> Tensor:
        return resolve_proxies(self.config.proxy_tokens, context.n, context.input_ids)

    def _score(self, module: nn.Module, q: Tensor, keys: Tensor, positions: Tensor, causal: bool) -> Tensor:
        return head_scores(
            module, q, keys, positions, causal=causal, head_reduction=self.config.head_reduction
        )

    def select(self, context: LayerContext) -> Tensor:
        positions = self._proxies(context)
        q = context.queries(positions)
        scores = self._score(context.module, q, context.keys, positions, self.config.causal)
        context.extra["scores"] = scores
        return self._reasons(scores, self.config.split_for(context.n), context.layer)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
        split: Split | None = None,
    ) -> Tensor:
        """Score as a kvpress ``ScorerPress`` does, so that its top-K is NACL; see :mod:`labkit.kv.interop`.

        With fewer ``hidden_states`` than keys (a wrapper that evicts while decoding), these last ones are the
        proxies, and see all keys.

        Returns
        -------
        Tensor
            float32, ``(B, K, n)``, from :func:`nacl_priorities`.
        """
        rows, tokens = hidden_states.shape[:2]
        n = keys.shape[2]
        index: int = module.layer_idx  # type: ignore[assignment]
        cos, sin = (x.expand(rows, -1, -1) for x in kwargs["position_embeddings"])
        context = LayerContext(module, index, hidden_states, keys, values, cos, sin, None)
        positions = self._proxies(context)
        if tokens == n:
            scores = self._score(module, context.queries(positions), keys, positions, self.config.causal)
        else:
            count = min(positions.shape[-1], tokens)
            if cos.shape[1] < count:  # tables of the newest token alone
                newest = (
                    kwargs["position_ids"] if "position_ids" in kwargs else kwargs["cache_position"][None]
                )
                places = newest[:, -1:] - torch.arange(count - 1, -1, -1, device=newest.device)
                tables = module.rotary_emb(hidden_states, places)  # type: ignore[operator]
                cos, sin = (x.expand(rows, -1, -1) for x in tables)
            q = query_states(module, hidden_states[:, -count:], cos[:, -count:], sin[:, -count:])
            scores = self._score(module, q, keys, torch.arange(count), False)
        return nacl_priorities(
            scores,
            split or self.config.split_for(n),
            random_temperature=self.config.random_temperature,
            sampling=self.config.sampling,
            shared_heads=self.config.shared_heads,
            generator=self.generator(index),
        )

    # Eviction while decoding.

    def on_prompt(self, state: LayerState, contexts: Sequence[tuple[list[int], LayerContext]]) -> None:
        layer = contexts[0][1].layer
        if self.config.keep_scores:
            stats = self.stats[layer]
            self.scores[layer] = torch.zeros(stats.reason.shape, device=stats.reason.device)
            for rows, context in contexts:
                if "scores" in context.extra:
                    self.scores[layer][rows, :, stats.prompt_length - context.n :] = context.extra[
                        "scores"
                    ].float()
        if self.config.decode_interval is None:
            return
        # The queries that score at the next eviction: as many as there were proxies, at first the proxies' own.
        queries: dict[int, Tensor] = {}
        splits: dict[int, Split] = {}
        for rows, context in contexts:
            found = context.queries(self._proxies(context))
            split = self.config.split_for(context.n)
            for place, row in enumerate(rows):
                queries[row] = found[place]
                target = state.budgets[row]
                splits[row] = (
                    split
                    if split.budget == target
                    else split_budget(target, target, split.sink, split.recent, self.config.random_share)
                )
        state.extra.update(queries=queries, splits=splits)

    def on_step(self, module: nn.Module, layer: Any, state: LayerState, arguments: dict[str, Any]) -> None:
        if self.config.decode_interval is None or "queries" not in state.extra:
            return
        hidden = arguments["hidden_states"]
        rows = hidden.shape[0]
        cos, sin = (x.expand(rows, -1, -1) for x in arguments["position_embeddings"])
        new = query_states(module, hidden, cos, sin)
        queries: dict[int, Tensor] = state.extra["queries"]
        for row, old in queries.items():
            queries[row] = torch.cat((old, new[row]), dim=1)[:, -old.shape[1] :]
        length = layer.keys.shape[-2]
        fill = [0] * rows if state.valid is None else (~state.valid).sum(1).tolist()
        if length - state.length < self.config.decode_interval or all(
            length - fill[row] <= state.budgets[row] for row in range(rows)
        ):
            return
        index: int = module.layer_idx  # type: ignore[assignment]
        heads = eviction_heads(module, layer.keys)
        reason = torch.zeros(rows, heads, length, dtype=torch.int8, device=hidden.device)
        for row, latest in queries.items():
            keys = layer.keys[row : row + 1, :, fill[row] :]
            n = keys.shape[2]
            if n <= state.budgets[row]:
                reason[row, :, fill[row] :] = RECENT
                continue
            # These queries stand at the very end, where entries no longer sit at their own index: no mask.
            last = torch.arange(latest.shape[1])
            scores = self._score(module, latest[None], keys, last, False)
            reason[row, :, fill[row] :] = self._reasons(scores, state.extra["splits"][row], index)[0]
        after = self._compact(module, layer, reason, state, arguments, state.budgets)
        after.extra = state.extra
        layer_states(arguments["past_key_values"])[index] = after
