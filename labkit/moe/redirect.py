"""Change what the experts of a model compute, layer by layer, without touching the model's code.

A :class:`Redirect` puts hooks on the blocks of any supported model. A *rule* reads each block's decision as a
:class:`~labkit.moe.RoutingInfo` and returns another: other experts in ``index`` and ``weights``, or, with ``pairs``, any
number of experts for each token. Where the rule returns the record that it was given, the block's own call goes through
untouched, to the bit.

A ragged decision runs in one call of the model's own experts, whatever their implementation: each (token, expert) pair
becomes a row with one expert, and the rows of a token are summed afterwards. JetMoE's blocks are ragged by themselves, and
labkit's own take the record as it is.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labkit.moe.adapters import BlockAdapter, moe_blocks
from labkit.moe.capture import _token_mask
from labkit.moe.routing import RoutingInfo

__all__ = ["BlockCall", "Redirect"]


@dataclass
class BlockCall:
    """One call of one block, as a rule sees it.

    Attributes
    ----------
    block : BlockAdapter
        The block.
    hidden : Tensor or None
        ``(T, D)``, what the experts read; None where labkit's own block was run without being called as a module.
    """

    block: BlockAdapter
    hidden: Tensor | None


Rule = Callable[[RoutingInfo, BlockCall], RoutingInfo]
After = Callable[[Tensor, RoutingInfo, Tensor], Tensor]

# experts whose running call was changed already, so that a second rule does not read a decision that no longer holds
_changed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def chosen_layers(model: nn.Module, layers: Sequence[int] | None) -> list[BlockAdapter]:
    """Blocks of a model in the layers named, all by default.

    Raises
    ------
    ValueError
        For a layer without experts, or a model without any.
    """
    blocks = moe_blocks(model)
    if layers is None:
        return blocks
    known = [block.layer for block in blocks]
    unknown = sorted(set(layers) - set(known))
    if unknown or not list(layers):
        raise ValueError(f"layers {unknown or list(layers)} have no MoE block; the MoE layers are {known}")
    return [block for block in blocks if block.layer in set(layers)]


def hookable(block: BlockAdapter) -> None:
    """Raise where a block's dispatch cannot be changed from outside."""
    if _form(block) in ("labkit", "grouped"):
        return
    if isinstance(block.experts, nn.ModuleList) or type(block.experts).forward is nn.ModuleDict.forward:
        raise ValueError(
            f"{block.name}: {type(block.module).__name__} calls its experts one by one in its own code, which hooks "
            "cannot change; put labkit's block in its place (labkit.moe.replace_module, MoEBlock)"
        )


def _form(block: BlockAdapter) -> str:
    if isinstance(getattr(block.module, "before_dispatch", None), list):
        return "labkit"
    if hasattr(block.module, "input_linear"):
        return "grouped"
    return "one-hot" if isinstance(block.experts, nn.ModuleDict) else "fused"


def recomputing() -> bool:
    """Whether the backward pass is running, in which gradient checkpointing computes layers a second time."""
    return torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks


class Redirect:
    """A rule put on the blocks of a model by ``attach()`` or ``with``, and taken off again.

    Parameters
    ----------
    model : nn.Module
        As for :func:`~labkit.moe.iter_moe_blocks`: Mixtral, Qwen-MoE, OLMoE, Switch, JetMoE, labkit's own blocks, and
        their relatives.
    rule : callable
        ``rule(info, call)`` returns the decision to carry out, or ``info`` itself to change nothing. ``info.mask`` is the
        model's 2-D attention mask, ``info.sequences`` the batch size. Choices that a capacity dropped have ``kept``
        False; ``pairs``, where set, is what runs.
    after : callable, optional
        ``after(y, info, x)`` returns the experts' summed output ``(T, D)``; called where the rule changed something.
    layers : sequence of int, optional
        Layers concerned; all by default.
    training_only : bool, default False
        Leave blocks in evaluation mode alone.

    Raises
    ------
    ValueError
        For a model without MoE blocks, unknown layers, or blocks that call their experts one by one.

    Notes
    -----
    Under gradient checkpointing the rule is asked again in the backward pass, with the mask of the last forward pass: do
    one backward pass for each forward pass, and let the rule be deterministic.

    `capture_routing` records the routers' own decisions, not the rule's. On JetMoE, whose router hands over the ragged form
    itself, start capturing before the rule is put on.

    Examples
    --------
    Every expert for every token:

    >>> import torch
    >>> from labkit.moe.routing import Pairs
    >>> from labkit.testbeds.models import tiny
    >>> def everyone(info, call):
    ...     return info.replace(pairs=Pairs.from_mask(torch.ones_like(info.probs).bool(), info.probs))
    >>> model, tokens = tiny("mixtral", width=16, heads=2, seed=0).eval(), torch.tensor([[1, 2, 3]])
    >>> before = model(tokens).logits
    >>> with Redirect(model, everyone):
    ...     during = model(tokens).logits
    >>> torch.equal(during, before), torch.equal(model(tokens).logits, before)
    (False, True)
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        *,
        after: After | None = None,
        layers: Sequence[int] | None = None,
        training_only: bool = False,
    ) -> None:
        self.model, self.rule, self.after, self.training_only = model, rule, after, training_only
        self.blocks = chosen_layers(model, layers)
        for block in self.blocks:
            hookable(block)
        self._call: dict[str, Any] = {}
        self._undo: list[Callable[[], None]] = []

    @property
    def attached(self) -> bool:
        """Whether the rule is on."""
        return bool(self._undo)

    def attach(self) -> Redirect:
        """Put the rule on."""
        if self._undo:
            raise RuntimeError("this rule is on already; detach() first")
        self._undo.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
        put = {"labkit": self._put_own, "grouped": self._put_grouped}
        for block in self.blocks:
            put.get(_form(block), self._put_experts)(block)
        return self

    def detach(self) -> None:
        """Take the rule off."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._call.clear()

    def __enter__(self) -> Redirect:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masks: dict[str, Any] = {
            name: value for name, value in kwargs.items() if name.endswith("attention_mask")
        }
        if len(args) > 1 and isinstance(args[1], Tensor):
            masks.setdefault("attention_mask", args[1])
        self._call = masks  # kept after the call, for layers that the backward pass computes again

    def _on(self, block: BlockAdapter) -> bool:
        return block.module.training or not self.training_only

    def _mask(self, block: BlockAdapter, shape: torch.Size | None) -> Tensor | None:
        config = getattr(self.model, "config", None)
        mask = _token_mask(self._call, block.stack, bool(getattr(config, "is_encoder_decoder", False)))
        if mask is None or shape is None or len(shape) != 3:
            return None
        batch, length = shape[:2]
        if mask.shape[0] != batch or mask.shape[1] < length:
            return None
        return mask[:, mask.shape[1] - length :].reshape(-1).bool()  # a cache holds the earlier columns

    def _decide(
        self, block: BlockAdapter, info: RoutingInfo, hidden: Tensor | None, shape: torch.Size | None
    ) -> RoutingInfo:
        mask = self._mask(block, shape) if info.mask is None else info.mask
        mask = None if mask is None else mask.to(info.logits.device)
        sequences = shape[0] if shape is not None and len(shape) == 3 else info.sequences
        seen = info.replace(mask=mask, sequences=sequences, layer=block.layer)
        new = self.rule(seen, BlockCall(block, hidden))
        return info if new is seen else new

    def _shapes(self, block: BlockAdapter) -> dict[str, Any]:
        """What the block is called with, kept from its beginning to its end."""
        seen: dict[str, Any] = {}

        def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._on(block):
                hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
                seen.update(shape=hidden.shape, hidden=hidden)

        def left(*_: Any) -> None:
            seen.clear()

        self._undo.append(block.module.register_forward_pre_hook(entered, with_kwargs=True).remove)
        self._undo.append(block.module.register_forward_hook(left, always_call=True).remove)
        return seen

    def _put_own(self, block: BlockAdapter) -> None:
        seen = self._shapes(block)
        module: Any = block.module
        changed: list[RoutingInfo] = []

        def before(info: RoutingInfo) -> RoutingInfo:
            changed.clear()
            if not self._on(block):
                return info
            hidden = seen["hidden"].reshape(-1, seen["hidden"].shape[-1]) if seen else None
            new = self._decide(block, info, hidden, seen.get("shape"))
            if new is not info:
                changed.append(new)
            return new

        def then(y: Tensor, info: RoutingInfo, x: Tensor) -> Tensor:
            if self.after is None or not changed:
                return y
            return self.after(y, changed.pop(), x)

        for hooks, ours in ((module.before_dispatch, before), (module.after, then)):
            hooks.append(ours)
            self._undo.append(functools.partial(hooks.remove, ours))

    def _read_router(self, block: BlockAdapter, seen: dict[str, Any]) -> None:
        def decided(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            seen.pop("change", None)
            if not self._on(block):
                return
            hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            info = block.routing(hidden, output)
            new = self._decide(block, info, hidden.reshape(-1, hidden.shape[-1]), seen.get("shape"))
            if new is not info:
                seen["change"] = new

        self._undo.append(block.router.register_forward_hook(decided, with_kwargs=True).remove)

    def _put_experts(self, block: BlockAdapter) -> None:
        seen = self._shapes(block)
        self._read_router(block, seen)
        one_hot = _form(block) == "one-hot"

        def before(
            experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            new = seen.get("change")
            if new is None:
                return None
            if experts in _changed:
                raise RuntimeError(
                    f"{block.name}: two rules change the experts of the same call; leave one of them first"
                )
            _changed.add(experts)
            seen["running"] = True
            hidden, _, weights = [*args, *kwargs.values()][:3]
            seen["input"] = hidden
            if new.pairs is not None:
                index, weights = new.pairs.expert[:, None], new.pairs.weight[:, None].to(weights.dtype)
                rows = hidden[new.pairs.token]
            else:
                index, weights, rows = new.index, new.weights.to(weights.dtype), hidden
            if one_hot:
                index = F.one_hot(index, block.num_experts)  # (S, 1, E)
                if new.pairs is None and new.kept is not None:
                    index = index * new.kept[..., None]
            return (rows, index, weights), {}

        def then(experts: nn.Module, args: Any, kwargs: Any, y: Tensor | None) -> Tensor | None:
            if not seen.pop("running", False):
                return None
            _changed.discard(experts)
            new, x = seen.pop("change"), seen.pop("input")
            if y is None:
                return None
            if new.pairs is not None:
                y = y.new_zeros(x.shape[0], y.shape[-1]).index_add(0, new.pairs.token, y)
            return y if self.after is None else self.after(y, new, x)

        experts = block.experts
        self._undo.append(experts.register_forward_pre_hook(before, with_kwargs=True).remove)
        self._undo.append(
            experts.register_forward_hook(then, with_kwargs=True, always_call=True, prepend=True).remove
        )

    def _put_grouped(self, block: BlockAdapter) -> None:
        seen: dict[str, Any] = {}

        def entered(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.update(shape=args[0].shape)

        def decided(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            seen.pop("change", None)
            if not self._on(block):
                return None
            info = block.routing(args[0], output)
            new = self._decide(block, info, args[0], seen.get("shape"))
            if new is info:
                return None
            seen.update(change=new, input=args[0])
            pairs = new.csr()
            order = pairs.expert.sort(stable=True).indices
            weight = pairs.weight[order].to(output[2].dtype)
            return order, pairs.token[order], weight, pairs.per_expert().tolist(), output[4]

        def then(_: nn.Module, args: Any, y: Tensor | None) -> Tensor | None:
            new, x = seen.pop("change", None), seen.pop("input", None)
            if y is None or new is None or self.after is None:
                return None
            return self.after(y.reshape(x.shape), new, x).view(y.shape)

        self._undo.append(block.module.register_forward_pre_hook(entered).remove)
        self._undo.append(block.router.register_forward_hook(decided).remove)
        self._undo.append(block.module.register_forward_hook(then, always_call=True).remove)
