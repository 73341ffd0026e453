"""Record what every router of a model decides: one hook for all classes.

transformers can return ``router_logits``, but what they are differs: probabilities in some versions, the maximum of the
probabilities in others, nothing for models that do not record them, and a router that was put in later is missed. So the
recorder here hooks the routers of the model in hand, takes their *input*, and computes raw logits in float32 itself
(:meth:`labkit.moe.adapters.BlockAdapter.routing`). Index and weights are those that the model used.

Only calls of the model itself are recorded. What gradient checkpointing computes again in the backward pass is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from labkit.moe.adapters import BlockAdapter, moe_blocks
from labkit.moe.routing import RoutingInfo

__all__ = ["BlockInput", "capture_inputs", "capture_routing"]


@dataclass(frozen=True)
class BlockInput:
    """What a block was given.

    Attributes
    ----------
    block : BlockAdapter
        The block.
    hidden : Tensor
        ``(T, D)``, what its router and its experts read.
    routing : RoutingInfo
        What its router decided.
    """

    block: BlockAdapter
    hidden: Tensor
    routing: RoutingInfo


def _token_mask(kwargs: dict[str, Any], stack: str, encoder_decoder: bool) -> Tensor | None:
    """The 2-D padding mask that concerns a stack; None where none was given."""
    name = "decoder_attention_mask" if encoder_decoder and stack == "decoder" else "attention_mask"
    mask = kwargs.get(name)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


@contextlib.contextmanager
def _recording(
    model: nn.Module, read: Callable[[BlockAdapter, Tensor, RoutingInfo], Any], detach: bool
) -> Iterator[list[list[Any]]]:
    blocks = moe_blocks(model)
    if not detach and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "detach=False keeps the graph of the logits, which gradient checkpointing throws away: call "
            "model.gradient_checkpointing_disable(), or leave detach=True"
        )
    forwards: list[list[Any]] = []
    current: list[Any] = []
    call: dict[str, Any] = {}
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.clear()
        call.clear()
        call.update(kwargs, active=True)
        if len(args) > 1 and isinstance(args[1], Tensor) and "attention_mask" not in kwargs:
            call["attention_mask"] = args[1]

    def end(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if output is not None:
            forwards.append(list(current))
        current.clear()
        call.clear()

    def hook(block: BlockAdapter, shape: dict[str, torch.Size]) -> Callable[..., None]:
        def decided(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if not call.get("active"):
                return
            hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            with contextlib.nullcontext() if not detach else torch.no_grad():
                info = block.routing(hidden, output)
                mask = _token_mask(call, block.stack, encoder_decoder)
                if mask is not None and "seen" in shape:
                    batch, length = shape["seen"][:2]
                    if (
                        mask.shape[0] == batch and mask.shape[1] >= length
                    ):  # a cache holds the earlier columns
                        info = replace(info, mask=mask[:, mask.shape[1] - length :].reshape(-1).bool())
                current.append(read(block, hidden.reshape(-1, hidden.shape[-1]), info))

        return decided

    def after(block: BlockAdapter) -> Callable[..., Tensor]:
        def computed(y: Tensor, info: RoutingInfo, x: Tensor) -> Tensor:
            if call.get("active"):
                current.append(read(block, x, replace(info, layer=block.layer)))
            return y

        return computed

    def see(shape: dict[str, torch.Size]) -> Callable[..., None]:
        def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
            if hidden.ndim == 3:
                shape["seen"] = hidden.shape

        return entered

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, with_kwargs=True, always_call=True),
    ]
    own: list[tuple[list[Any], Callable[..., Tensor]]] = []
    for block in blocks:
        hooks = getattr(block.module, "after", None)
        if isinstance(
            hooks, list
        ):  # labkit's layer calls its router's route(), and hands its decision on itself
            own.append((hooks, after(block)))
            hooks.append(own[-1][1])
            continue
        shape: dict[str, torch.Size] = {}
        handles.append(block.module.register_forward_pre_hook(see(shape), with_kwargs=True))
        handles.append(block.router.register_forward_hook(hook(block, shape), with_kwargs=True))
    try:
        yield forwards
    finally:
        for handle in handles:
            handle.remove()
        for hooks, ours in own:
            hooks.remove(ours)


@contextlib.contextmanager
def capture_routing(
    model: nn.Module, *, detach: bool = True, cpu: bool = False
) -> Iterator[list[list[RoutingInfo]]]:
    """Record the decisions of all routers of a model.

    Parameters
    ----------
    model : nn.Module
        As for `iter_moe_blocks`; in training or evaluation, under autocast or not. Routers that `swap_router` put in
        are recorded like the model's own, if they were put in before; of labkit's own layers the decision is recorded as
        the experts carried it out, with capacity and pairs.
    detach : bool, default True
        False keeps the graph, for losses on the logits; gradient checkpointing must then be off.
    cpu : bool, default False
        Move the records to the CPU, to keep many of them.

    Yields
    ------
    list of list of RoutingInfo
        Grows by one list a forward pass, one record a block in the order of the layers. ``logits`` are raw and float32,
        ``mask`` is the model's 2-D attention mask at the tokens routed (also in generation with a cache).

    Raises
    ------
    ValueError
        If the model has no MoE block, or for ``detach=False`` under gradient checkpointing.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("mixtral", width=16, heads=2, layers=3, seed=0).eval()
    >>> with capture_routing(model) as forwards:
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> len(forwards), [info.layer for info in forwards[0]], tuple(forwards[0][0].logits.shape)
    (1, [0, 1, 2], (3, 4))
    """

    def read(block: BlockAdapter, hidden: Tensor, info: RoutingInfo) -> RoutingInfo:
        info = info.detach() if detach else info
        return info.to("cpu") if cpu else info

    with _recording(model, read, detach) as forwards:
        yield forwards


@contextlib.contextmanager
def capture_inputs(model: nn.Module, *, cpu: bool = False) -> Iterator[list[list[BlockInput]]]:
    """Record what every block reads, with the decision of its router.

    Parameters
    ----------
    model : nn.Module
        As for `capture_routing`.
    cpu : bool, default False
        Move the records to the CPU.

    Yields
    ------
    list of list of BlockInput
        Grows by one list a forward pass.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("mixtral", width=16, heads=2, seed=0).eval()
    >>> with capture_inputs(model) as forwards, torch.no_grad():
    ...     _ = model(torch.tensor([[1, 2, 3]]))
    >>> seen = forwards[0][0]
    >>> tuple(seen.block.expert_outputs(seen.hidden).shape)
    (3, 4, 16)
    """

    def read(block: BlockAdapter, hidden: Tensor, info: RoutingInfo) -> BlockInput:
        hidden = hidden.detach().clone()
        info = info.detach()
        return BlockInput(block, hidden.cpu(), info.to("cpu")) if cpu else BlockInput(block, hidden, info)

    with _recording(model, read, True) as forwards:
        yield forwards
