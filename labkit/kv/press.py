r"""The eviction core that all presses share: hooks on a model that make its key-value cache smaller.

A *press* is a context manager: ``with press(model): model.generate(...)``. Inside it, right after an attention
layer has processed a whole prompt, the press chooses which entries of that layer's cache to keep, and the layer's
tensors are replaced by smaller, contiguous ones. It happens layer by layer, so while a later layer still holds the
whole prompt the earlier ones are already small. Nothing of transformers is patched: the hooks sit on the model
instance and are removed on leaving, also after an exception.

What a smaller cache changes, and where it is taken care of:

positions
    Keys hold their rotary embedding, so kept keys keep their places, and the next token stands at n, not at the
    cache's length K. ``generate`` counts on its own. For a bare forward call without ``position_ids`` a hook
    on the model adds them; after the press is left, :func:`decode_inputs` does.
masks
    transformers reads the first columns of ``attention_mask`` as those of the cached entries, which is wrong once
    entries are gone. The hook replaces the mask by that of the kept entries.
batches
    Padding stands on the left. Each prompt is judged on its own, with the budget of its own length; rows with
    fewer kept entries are filled up on the left, and the mask hides the fill.

The bookkeeping (:class:`LayerState`) travels on the cache object itself, so copying a cache copies it too.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.kv.attention import (
    LayerContext,
    attention_modules,
    compacted,
    eviction_heads,
    left_alone,
)
from labkit.kv.budget import budget_of, check_budget
from labkit.kv.state import (
    RECENT,
    STATE,
    LayerState,
    LayerStats,
    continuation,
    layer_states,
    padding_of,
)

__all__ = ["CachePress", "FullCache"]


@dataclass
class _Prompt:
    input_ids: Tensor | None
    pads: tuple[int, ...] | None
    attention_mask: Tensor | None
    prefill: bool


class CachePress:
    """Base of all presses: a budget, and hooks that evict after the prefill.

    A press says what to keep by overriding :meth:`select`. Every layer and KV head keeps the same number of
    entries, so that the cache is really smaller. With decoupled heads (:mod:`labkit.kv.dha`) "KV head" stands
    for a set of key and value heads that are linked by a query head, as these must hold the same entries.

    Parameters
    ----------
    compression_ratio : float, optional
        Share of the prompt to evict, in [0, 1). The number kept is rounded, not floored.
    budget_tokens : int, optional
        Entries to keep per KV head, instead of a share.
    min_length : int, default 0
        Prompts of up to this many tokens are left whole.
    seed : int, default 0
        Of the random parts. Entering the context starts the random numbers anew, with a generator of its own
        for each layer.

    Attributes
    ----------
    stats : dict of int to LayerStats
        What the last eviction of each layer did.
    """

    _selects = True

    def __init__(
        self,
        compression_ratio: float | None = None,
        *,
        budget_tokens: int | None = None,
        min_length: int = 0,
        seed: int = 0,
    ) -> None:
        check_budget(compression_ratio, budget_tokens)
        if min_length < 0:
            raise ValueError(f"min_length must not be negative; got {min_length}")
        self.compression_ratio = compression_ratio
        self.budget_tokens = budget_tokens
        self.min_length = min_length
        self.seed = seed
        self.stats: dict[int, LayerStats] = {}
        self._prompt: _Prompt | None = None
        self._generators: dict[int, torch.Generator] = {}
        self._skipped: set[int] = set()
        self._warned: set[str] = set()
        self._active = False

    def __repr__(self) -> str:
        budget = (
            f"budget_tokens={self.budget_tokens}"
            if self.budget_tokens is not None
            else f"compression_ratio={self.compression_ratio}"
        )
        return f"{type(self).__name__}({budget})"

    # What a subclass may override.

    def budget(self, n: int) -> int:
        """Entries kept per KV head of a prompt of n tokens."""
        return n if n <= self.min_length else budget_of(n, self.compression_ratio, self.budget_tokens)

    def select(self, context: LayerContext) -> Tensor:
        """Say why each entry is kept, ``(B, K, n)`` int8, 0 for evicted; ``budget(n)`` kept per head."""
        raise NotImplementedError(f"{type(self).__name__} must define select")

    def generator(self, layer: int) -> torch.Generator:
        """Random numbers of a layer (on the CPU, so that a seed means the same on every device)."""
        if layer not in self._generators:
            self._generators[layer] = torch.Generator().manual_seed((self.seed * 1_000_003 + layer) % 2**63)
        return self._generators[layer]

    def on_prompt(self, state: LayerState, contexts: Sequence[tuple[list[int], LayerContext]]) -> None:
        """Take note of a prompt just evicted; ``contexts`` holds the rows by length."""

    def on_step(self, module: nn.Module, layer: Any, state: LayerState, arguments: dict[str, Any]) -> None:
        """Act after a layer has processed tokens behind the prompt."""

    # The context manager.

    @contextmanager
    def __call__(self, model: Any) -> Iterator[CachePress]:
        """Register the hooks on ``model``, and remove them on leaving.

        Raises
        ------
        ValueError
            For an attention class that is not supported.
        RuntimeError
            In training mode, with the cache switched off, when entered twice, or if no layer's cache can be
            made smaller.
        """
        if self._active:
            raise RuntimeError("this press is already active on a model; make another one")
        modules = attention_modules(model)
        self._check_model(model, None)
        self._generators.clear()
        self._skipped.clear()
        self._prompt = None
        self.stats = {}
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
        names = list(inspect.signature(decoder.forward).parameters)
        handles: list[Any] = []
        self._active = True
        try:
            handles.append(decoder.register_forward_pre_hook(self._before_model(names), with_kwargs=True))
            handles.append(decoder.register_forward_hook(self._after_model, with_kwargs=True))
            for module in modules:
                handles.extend(self._hook(module))
            with self._prepared(model, modules):
                yield self
        finally:
            self._active = False
            self._prompt = None
            for handle in handles:
                handle.remove()

    @contextmanager
    def _prepared(self, model: Any, modules: list[nn.Module]) -> Iterator[None]:
        yield

    def _hook(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_hook(self._after_attention, with_kwargs=True)]

    def _warn(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)

    def _check_model(self, model: Any, use_cache: bool | None) -> None:
        if model.training:
            raise RuntimeError("no cache to evict: the model is in training mode; call model.eval() first")
        if use_cache is None:
            use_cache = getattr(model.config, "use_cache", True)
        if use_cache is False:
            raise RuntimeError("no cache to evict: use_cache is False; pass use_cache=True")

    def _before_model(self, names: list[str]) -> Callable[..., Any]:
        def hook(
            model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
            self._check_model(model, kwargs.get("use_cache"))
            ids: Tensor | None = kwargs.get("input_ids")
            cache: Any = kwargs.get("past_key_values")
            mask = kwargs.get("attention_mask")
            tokens = ids if ids is not None else kwargs["inputs_embeds"]
            rows, columns = tokens.shape[:2]
            states = layer_states(cache)
            prefill = cache is None or cache.get_seq_length() == 0
            if prefill:
                # A static cache has its mask made beforehand; that no layer is evicted is said after the call.
                pads = (
                    padding_of(mask, rows, columns) if not getattr(cache, "is_compileable", False) else None
                )
                if states:
                    states.clear()
                self._prompt = _Prompt(ids, pads, mask, True)
                return (), kwargs
            self._prompt = _Prompt(
                ids, None, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None, False
            )
            if columns > 1 and self._selects:
                self._warn(
                    "chunk",
                    f"{columns} tokens were appended to a cache of {cache.get_seq_length()} entries: only a prompt "
                    "prefilled in one piece is evicted, these stay whole",
                )
            if states:
                positions, kept = continuation(cache, states, columns, self._prompt.attention_mask)
                if self._skipped and kept is not None:
                    raise ValueError(
                        "padding together with sliding-window layers is not supported after eviction: "
                        "run the prompts one by one"
                    )
                kwargs["attention_mask"] = kept
                if kwargs.get("position_ids") is None:
                    kwargs["position_ids"] = positions.to(tokens.device)
            return (), kwargs

        return hook

    def _after_model(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._prompt is None or not self._prompt.prefill or not self._skipped:
            return
        layers = f"layers {sorted(self._skipped)}"
        why = "whose cache is static, quantized or of a sliding window (config.sliding_window, layer_types)"
        if len(self._skipped) == len(attention_modules(model)):
            raise RuntimeError(
                f"nothing was evicted: all layers have a cache that {why.removeprefix('whose cache ')}; use a "
                "DynamicCache, and set config.sliding_window = None where prompts fit the window"
            )
        self._warn("skipped", f"{layers} were left whole: {why}")

    def _layer(self, module: nn.Module, kwargs: dict[str, Any]) -> Any:
        """Return the cache layer to evict, or None for one to leave alone."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            raise RuntimeError("no cache to evict: the attention layer was called without past_key_values")
        index: int = module.layer_idx  # type: ignore[assignment]
        layer = cache.layers[index]
        if left_alone(module, layer):
            self._skipped.add(index)
            return None
        return layer

    @torch.no_grad()
    def _after_attention(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        layer = self._layer(module, kwargs)
        if layer is None or self._prompt is None:
            return
        index: int = module.layer_idx  # type: ignore[assignment]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        cache = kwargs["past_key_values"]
        arguments = {**kwargs, "hidden_states": hidden}
        if not self._prompt.prefill:
            state = layer_states(cache).get(index)
            if state is not None:
                self.on_step(module, layer, state, arguments)
            return
        rows, n = hidden.shape[:2]
        cos, sin = (x.expand(rows, -1, -1) for x in kwargs["position_embeddings"])
        pads = self._prompt.pads or (0,) * rows
        groups = [[row for row in range(rows) if pads[row] == pad] for pad in sorted(set(pads))]
        contexts = []
        ids = self._prompt.input_ids
        for group in groups:
            pad = pads[group[0]]
            part = slice(None) if len(groups) == 1 else torch.tensor(group, device=hidden.device)

            def cut(x: Tensor, pad: int = pad, part: Any = part) -> Tensor:
                return x[part][..., pad:, :]

            contexts.append(
                (
                    group,
                    LayerContext(
                        module, index, cut(hidden), cut(layer.keys), cut(layer.values), cut(cos), cut(sin),
                        None if ids is None else ids[part][:, pad:],
                    ),
                )
            )  # fmt: skip
        heads = eviction_heads(module, layer.keys)
        reason = torch.zeros(rows, heads, n, dtype=torch.int8, device=hidden.device)
        for group, context in contexts:
            if self.budget(context.n) >= context.n:
                part_reason: Tensor | int = RECENT
            else:
                part_reason = self.select(context)
            reason[group, :, n - context.n :] = part_reason
        state = self._compact(module, layer, reason, None, kwargs, self._budgets(pads, n))
        if not hasattr(cache, STATE):
            setattr(cache, STATE, {})
        layer_states(cache)[index] = state
        self.on_prompt(state, contexts)

    def _budgets(self, pads: Sequence[int], n: int) -> tuple[int, ...]:
        """Entries that each row may hold from now on; ``budget_tokens`` even where the prompt was shorter."""
        return tuple(self.budget_tokens or self.budget(n - pad) for pad in pads)

    def _compact(
        self,
        module: nn.Module,
        layer: Any,
        reason: Tensor,
        state: LayerState | None,
        kwargs: dict[str, Any],
        budgets: tuple[int, ...],
    ) -> LayerState:
        """Keep the entries of ``layer`` with a reason; return the record of what it holds now."""
        rows, heads, n = reason.shape
        index: int = module.layer_idx  # type: ignore[assignment]
        slots = torch.arange(n, device=reason.device)
        per_head = (reason > 0).sum(-1)  # (B, K)
        counts = per_head[:, 0].tolist()
        if not bool((per_head == per_head[:, :1]).all()):
            raise ValueError(f"{type(self).__name__}.select must keep equally many entries for every KV head")
        length = max(counts)
        # Kept slots ascending, -1 first where a row keeps fewer than the longest.
        marked = torch.where(reason > 0, slots, -1)
        keep = marked.topk(length, dim=-1, sorted=True).values.flip(-1)
        if min(counts) < n:
            layer.keys, layer.values = compacted(module, layer.keys, layer.values, keep.clamp(min=0))
        if state is None:
            columns, seen = keep.int(), n
        else:
            appended = torch.arange(n - state.length, device=reason.device, dtype=torch.int32) + state.seen
            before = torch.cat((state.columns, appended.expand(rows, heads, -1)), dim=-1)
            columns = torch.where(keep < 0, -1, before.gather(-1, keep.clamp(min=0)))
            seen = state.seen + n - state.length
        valid = None if min(counts) == length else (columns[:, 0] >= 0)
        positions = kwargs.get("position_ids")
        following = (
            positions[..., -1].expand(rows) + 1
            if positions is not None
            else torch.full((rows,), seen, device=reason.device)
        )
        self.stats[index] = LayerStats(index, n, columns, reason)
        return LayerState(columns, valid, seen, following, budgets)


class FullCache(CachePress):
    """Evict nothing: the reference that every press is compared with.

    Examples
    --------
    >>> FullCache().budget(1000)
    1000
    """

    _selects = False

    def __init__(self) -> None:
        super().__init__(compression_ratio=0.0)
