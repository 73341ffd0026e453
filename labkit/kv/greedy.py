r"""Greedy baselines: the cache is held at its budget while the prompt is read, token by token.

H2O (Zhang et al., arXiv 2306.14048), TOVA and "MSRNN" (Oren et al., "Transformers are multi-state RNNs",
arXiv 2401.06104), Scissorhands (Liu et al., arXiv 2305.17118). After token t has attended to the cache with
probabilities a_j (per KV head: the mean over its query heads), one entry is evicted if the cache exceeds its
budget K:

====================  ===============================================================  ==============
rule                  entry evicted                                                    spared
====================  ===============================================================  ==============
``"h2o"``             lowest sum of a_j over all tokens so far                         recent half
``"tova"``            lowest a_j of token t, averaged over all heads of the layer      nothing
``"msrnn"``           lowest a_j of token t, in each head                              nothing
``"scissorhands"``    most often below the mean 1/t within the last ``window`` tokens  recent half
====================  ===============================================================  ==============

Ties evict the oldest. The half that H2O spares is recalled from its paper; Scissorhands is a simple reading of
one line of NACL's, and its own code evicts many entries at a time.

How it runs: what a layer evicts depends on that layer alone, so a prompt need not pass the whole model token by
token. Inside the context each layer's attention is a function registered through transformers'
``AttentionInterface``, that walks through the prompt with a buffer of K + 1 entries per head, in which the new
token overwrites the evicted one: the numbers are those of decode steps on K entries, and the cache left behind
has K entries. Only while one layer is at work are the prompt's keys of that layer in memory. Tokens decoded
inside the context evict in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.kv.press import CachePress
from labkit.kv.state import BY_SCORE, STATE, LayerState, LayerStats, layer_states

RULES = ("h2o", "tova", "msrnn", "scissorhands")
_NAME = "labkit_greedy"


class GreedyEviction(CachePress):
    """Hold the cache at its budget from the first token on, evicting the worst entry at each step.

    Parameters
    ----------
    rule : {"h2o", "tova", "msrnn", "scissorhands"}
        Which entry is the worst; see the module's table.
    compression_ratio : float, optional
        Share of the prompt that is not kept: the budget is known before the prompt is read, and holds while
        decoding too. Or ``budget_tokens``.
    recent : float, optional
        Share of the budget for the latest tokens, that are never evicted: half for ``"h2o"`` and
        ``"scissorhands"``, nothing for the others.
    window : int, default 32
        History of ``"scissorhands"``, in tokens.
    **settings
        Those of :class:`labkit.kv.CachePress`.

    Raises
    ------
    ValueError
        For an unknown rule, or a value outside its range.

    Notes
    -----
    Attention weights are computed here, so ``output_attentions`` gives none. The loop is in Python: a prompt of n
    tokens costs n small steps per layer, whatever the batch.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import GreedyEviction
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).eval()
    >>> with GreedyEviction("h2o", budget_tokens=10)(model), torch.no_grad():
    ...     cache = model(torch.arange(50)[None]).past_key_values
    >>> cache.get_seq_length()
    10
    """

    _selects = False

    def __init__(
        self,
        rule: str,
        compression_ratio: float | None = None,
        *,
        recent: float | None = None,
        window: int = 32,
        **settings: Any,
    ) -> None:
        super().__init__(compression_ratio, **settings)
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")
        if recent is None:
            recent = 0.5 if rule in ("h2o", "scissorhands") else 0.0
        if not 0 <= recent < 1:
            raise ValueError(f"recent is a share of the budget and must lie in [0, 1); got {recent!r}")
        if window < 1:
            raise ValueError(f"window must be at least 1; got {window}")
        self.rule = rule
        self.recent = recent
        self.window = window

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(rule={self.rule!r}, ", 1)

    @contextmanager
    def _prepared(self, model: Any, modules: list[nn.Module]) -> Iterator[None]:
        from transformers import AttentionInterface

        if any(hasattr(module, "layout") for module in modules):
            raise ValueError(
                f"{type(self).__name__} evicts key and value heads in pairs, and {type(model).__name__} has them "
                "decoupled: use a press that evicts once (NACLPress, H2OPress, SnapKVPress, StreamingLLMPress)"
            )
        AttentionInterface.register(_NAME, _attention)
        configs: list[Any] = list({id(m.config): m.config for m in modules}.values())
        before = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation = _NAME
            yield
        finally:
            for config, implementation in zip(configs, before, strict=True):
                config._attn_implementation = implementation

    def _hook(self, module: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(self._before_attention, with_kwargs=True),
            module.register_forward_hook(self._after_attention, with_kwargs=True),
        ]

    def _before_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        layer = self._layer(module, kwargs)
        if layer is None:
            raise RuntimeError(
                f"greedy eviction needs a plain DynamicCache in every layer: layer {module.layer_idx} has a static, "
                "quantized or sliding-window cache (set config.sliding_window = None)"
            )
        cache = kwargs["past_key_values"]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        rows, new = hidden.shape[:2]
        index: int = module.layer_idx  # type: ignore[assignment]
        prompt = self._prompt
        state = layer_states(cache).get(index)
        if prompt is None or (state is None and layer.get_seq_length() > 0):
            raise RuntimeError(
                "greedy eviction must see the cache from its first token on: start with an empty cache"
            )
        mask = prompt.attention_mask
        real = None
        if mask is not None and mask.shape[-1] >= new and not bool(mask[:, -new:].all()):
            real = mask[:, -new:].bool().to(hidden.device)
        budgets = state.budgets if state is not None else self._budgets(prompt.pads or (0,) * rows, new)
        return args, {**kwargs, "greedy_step": _Step(self, state, budgets, real)}

    @torch.no_grad()
    def _after_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        step: _Step = kwargs["greedy_step"]
        cache = kwargs["past_key_values"]
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = cache.layers[index]
        if step.result is None:
            raise RuntimeError(
                f"{type(module).__name__} did not call the attention function of greedy eviction"
            )
        layer.keys, layer.values = step.keys, step.values
        state = step.result
        positions = kwargs.get("position_ids")
        if positions is not None:
            state.next_position = positions[..., -1].expand(len(state.budgets)) + 1
        if not hasattr(cache, STATE):
            setattr(cache, STATE, {})
        layer_states(cache)[index] = state
        reason = torch.zeros(
            *state.columns.shape[:2], state.seen + 1, dtype=torch.int8, device=state.columns.device
        )
        reason.scatter_(
            2, state.columns.long() % (state.seen + 1), BY_SCORE
        )  # -1 lands on the spare last place
        self.stats[index] = LayerStats(index, state.seen, state.columns, reason[..., :-1])


@dataclass
class _Step:
    """One call of one layer: some new tokens, perhaps on entries kept before."""

    press: GreedyEviction
    state: LayerState | None
    budgets: tuple[int, ...]
    real: Tensor | None
    keys: Tensor | None = None
    values: Tensor | None = None
    result: LayerState | None = None

    @torch.no_grad()
    def run(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """Walk through the new tokens; q (B, H, T, d), k and v (B, K, S, d) with the entries kept before in front."""
        press, state = self.press, self.state
        rows, query_heads, new, _ = q.shape
        heads, device = k.shape[1], k.device
        old = k.shape[2] - new
        seen = state.seen if state is not None else 0
        group = query_heads // heads
        most = max(self.budgets)
        size = min(most, k.shape[2]) + 1
        budgets = torch.tensor(self.budgets, device=device)
        spared = (budgets * press.recent + 0.5).long()[:, None, None]
        slots = torch.arange(size, device=device)

        def buffer(*tail: int, dtype: torch.dtype, fill: float = 0) -> Tensor:
            return torch.full((rows, heads, size, *tail), fill, dtype=dtype, device=device)

        keys, values = buffer(k.shape[3], dtype=k.dtype), buffer(v.shape[3], dtype=v.dtype)
        column = buffer(dtype=torch.int64, fill=-1)  # -1: an empty slot
        history = press.rule == "scissorhands"
        memory = buffer(press.window, dtype=torch.bool) if history else buffer(dtype=torch.float32)
        count = torch.zeros(rows, dtype=torch.int64, device=device)
        if state is not None and old:
            # Entries kept before stand at the right of their rows: move them to the first slots.
            count = (state.columns[:, 0] >= 0).sum(1)
            shift = (torch.arange(old, device=device) + (old - count)[:, None]) % old
            index = shift[:, None].expand(-1, heads, -1)
            column[:, :, :old] = state.columns.long().gather(2, index)
            for target, source in (
                (keys, k[:, :, :old]),
                (values, v[:, :, :old]),
                (memory, state.extra["memory"]),
            ):
                full = index.reshape(*index.shape, *(1,) * (source.ndim - 3)).expand(source.shape)
                target[:, :, :old] = source.gather(2, full)
        free = count[:, None].expand(-1, heads)
        output = torch.empty(rows, query_heads, new, v.shape[3], dtype=q.dtype, device=device)
        grouped = q.reshape(rows, heads, group, new, -1)

        for t in range(new):
            now = seen + t
            real = None if self.real is None else self.real[:, t]
            stamp = column.new_full((rows, heads, 1), now)
            if real is not None:
                stamp = torch.where(real[:, None, None], stamp, -1)
            place = free[..., None]
            column.scatter_(2, place, stamp)
            wide = place[..., None]
            keys.scatter_(2, wide.expand(-1, -1, -1, keys.shape[3]), k[:, :, old + t, None])
            values.scatter_(2, wide.expand(-1, -1, -1, values.shape[3]), v[:, :, old + t, None])
            if history:
                memory.scatter_(2, wide.expand(-1, -1, -1, press.window), False)
            else:
                memory.scatter_(2, place, 0.0)
            count = count + (1 if real is None else real.long())

            live = column >= 0
            logits = torch.matmul(grouped[:, :, :, t], keys.transpose(2, 3)) * scaling  # (B, K, g, S)
            logits = logits.masked_fill(~live[:, :, None], torch.finfo(logits.dtype).min)
            attention = logits.softmax(-1, dtype=torch.float32)
            output[:, :, t] = torch.matmul(attention.to(q.dtype), values).flatten(1, 2)

            score = self._score(attention.mean(2), memory, live, count, now, real)
            over = count > budgets
            evictable = live & (column <= now - spared)
            score = score.masked_fill(~evictable, float("inf"))
            worst = score.amin(-1, keepdim=True)
            age = torch.where((score == worst) & evictable, column, now + 1)
            victim = age.argmin(-1)  # the oldest of the worst
            empty = torch.where(over[:, None, None], victim[..., None], size)
            column = column.masked_fill(slots == empty, -1)
            following = count[:, None] if real is None else torch.where(real[:, None], count[:, None], free)
            free = torch.where(over[:, None], victim, following)
            count = count - over.long()

        self._finish(keys, values, column, memory, seen + new, size)
        return output

    def _score(
        self, attention: Tensor, memory: Tensor, live: Tensor, count: Tensor, now: int, real: Tensor | None
    ) -> Tensor:
        """Score every slot, lowest first to go, and carry on the memory; attention (B, K, S)."""
        rule = self.press.rule
        if real is not None:
            live = live & real[:, None, None]  # a padding token's attention means nothing
        attention = attention.masked_fill(~live, 0.0)
        if rule == "h2o":
            return memory.add_(attention)
        if rule == "scissorhands":
            memory[..., now % self.press.window] = (attention < 1 / count.clamp(min=1)[:, None, None]) & live
            return -memory.sum(-1).float()
        return attention.mean(1, keepdim=True).expand_as(attention) if rule == "tova" else attention

    def _finish(
        self, keys: Tensor, values: Tensor, column: Tensor, memory: Tensor, seen: int, size: int
    ) -> None:
        """Order the entries by column, fill first, and cut the buffer down to the longest row."""
        counts = (column[:, 0] >= 0).sum(1).tolist()
        length = max(counts)
        columns, order = column.sort(dim=-1)
        columns, order = columns[..., size - length :], order[..., size - length :]

        def take(x: Tensor) -> Tensor:
            index = order.reshape(*order.shape, *(1,) * (x.ndim - 3)).expand(*order.shape, *x.shape[3:])
            return x.gather(2, index)

        self.keys, self.values = take(keys), take(values)
        valid = None if min(counts) == length else columns[:, 0] >= 0
        following = torch.full((column.shape[0],), seen, device=column.device)
        self.result = LayerState(
            columns.int(), valid, seen, following, self.budgets, {"memory": take(memory)}
        )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    greedy_step: _Step | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do, evicting on the way."""
    if greedy_step is None:
        raise RuntimeError("the labkit_greedy attention works only inside a greedy press")
    output = greedy_step.run(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return output.transpose(1, 2).contiguous(), None


class GreedyH2O(GreedyEviction):
    """H2O as published: :class:`GreedyEviction` with rule ``"h2o"``."""

    def __init__(self, compression_ratio: float | None = None, **settings: Any) -> None:
        super().__init__("h2o", compression_ratio, **settings)


class GreedyTOVA(GreedyEviction):
    """TOVA as published: :class:`GreedyEviction` with rule ``"tova"``, one set for all heads of a layer."""

    def __init__(self, compression_ratio: float | None = None, **settings: Any) -> None:
        super().__init__("tova", compression_ratio, **settings)


class GreedyMSRNN(GreedyEviction):
    """The multi-state RNN of NACL's tables: rule ``"msrnn"``, TOVA with a set for each head."""

    def __init__(self, compression_ratio: float | None = None, **settings: Any) -> None:
        super().__init__("msrnn", compression_ratio, **settings)


class Scissorhands(GreedyEviction):
    """Scissorhands, simplified: rule ``"scissorhands"``."""

    def __init__(self, compression_ratio: float | None = None, *, window: int = 32, **settings: Any) -> None:
        super().__init__("scissorhands", compression_ratio, window=window, **settings)
