"""The layer: a router, its experts, an optional shared expert and capacity, and two places to put a method in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from labkit.moe.capacity import expert_capacity, within_capacity
from labkit.moe.experts import Experts
from labkit.moe.routers import Router, make_router
from labkit.moe.routing import RoutingInfo

__all__ = ["MoEBlock", "MoEOutput", "SharedExpert", "collect_routing"]

BeforeDispatch = Callable[[RoutingInfo], RoutingInfo]
After = Callable[[Tensor, RoutingInfo, Tensor], Tensor]


@dataclass
class MoEOutput:
    """What a layer computed.

    Attributes
    ----------
    hidden : Tensor
        Of the input's shape.
    info : RoutingInfo
        The decision as the experts carried it out.
    state : object
        What the router passes to the next layer's.
    """

    hidden: Tensor
    info: RoutingInfo
    state: Any = None


class SharedExpert(nn.Module):
    """A gated network that every token passes, with an optional gate of its own (Qwen2-MoE): ``(..., D)`` to ``(..., D)``.

    Parameters
    ----------
    hidden_size, intermediate_size : int
        D and f.
    gate : bool, default False
        Multiply by ``sigmoid(g . x)``.
    scale : float, default 1
        Constant factor of the output.

    Examples
    --------
    >>> import torch
    >>> SharedExpert(8, 16, gate=True)(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, gate: bool = False, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.scale = scale
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if gate else None

    def options(self) -> dict[str, Any]:
        """Arguments that build the same expert."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "gate": self.shared_gate is not None,
            "scale": self.scale,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Compute the network on every token."""
        y = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        if self.shared_gate is not None:
            y = torch.sigmoid(self.shared_gate(x)) * y
        return y if self.scale == 1.0 else self.scale * y


class MoEBlock(nn.Module):
    """A mixture-of-experts layer that can stand where a transformers model has its ``mlp``.

    ``y = sum_e w_e expert_e(x) (+ shared(x))``. The parts have the names of transformers' blocks, ``gate`` and
    ``experts``.

    Parameters
    ----------
    gate : Router
        Any module with ``route(hidden, state, mask, layer=..., **context)``.
    experts : Experts
    shared_expert : torch.nn.Module, optional
        Maps ``(T, D)`` to ``(T, D)``; added.
    capacity_factor : float, optional
        Places of an expert as a multiple of ``k T / E`` (:func:`~labkit.moe.expert_capacity`), over the whole batch, first
        come first served; what finds no place gets nothing from that expert. No limit by default.
    drop_order : {"token", "slot"}, default "token"
        Who comes first, see :func:`~labkit.moe.within_capacity`.
    layer : int, default -1
        Index of the layer, for the record.

    Attributes
    ----------
    before_dispatch : list of callable
        Each takes and returns a :class:`~labkit.moe.RoutingInfo`, after the capacity was applied. Setting ``pairs`` on it
        changes what is computed.
    after : list of callable
        Each takes the output ``(T, D)``, the record and the input ``(T, D)``, and returns the output.

    Raises
    ------
    ValueError
        If router and experts differ in width or number of experts.

    Examples
    --------
    >>> import torch
    >>> block = MoEBlock.build(hidden_size=8, intermediate_size=16, num_experts=4, top_k=2)
    >>> block(torch.randn(2, 3, 8)).shape
    torch.Size([2, 3, 8])
    >>> block.run(torch.randn(2, 3, 8)).info.index.shape
    torch.Size([6, 2])
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        *,
        shared_expert: nn.Module | None = None,
        capacity_factor: float | None = None,
        drop_order: str = "token",
        layer: int = -1,
    ) -> None:
        super().__init__()
        for name in ("hidden_size", "num_experts"):
            if getattr(gate, name) != getattr(experts, name):
                raise ValueError(
                    f"gate and experts must share {name}; got {getattr(gate, name)} and {getattr(experts, name)}"
                )
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive, or None for no limit; got {capacity_factor}")
        if drop_order not in ("token", "slot"):
            raise ValueError(f"drop_order must be 'token' or 'slot'; got {drop_order!r}")
        self.gate: Any = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self.capacity_factor = capacity_factor
        self.drop_order = drop_order
        self.layer = layer
        self.before_dispatch: list[BeforeDispatch] = []
        self.after: list[After] = []

    @classmethod
    def build(
        cls,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        *,
        router: str = "linear",
        router_options: dict[str, Any] | None = None,
        expert_options: dict[str, Any] | None = None,
        shared_size: int | None = None,
        **options: Any,
    ) -> MoEBlock:
        """Build a block from sizes and a router's name.

        Parameters
        ----------
        hidden_size, intermediate_size, num_experts, top_k : int
            D, f, E and k.
        router : str, default "linear"
            A key of ``labkit.moe.ROUTERS``.
        router_options, expert_options : dict, optional
            Further arguments of the router and of :class:`~labkit.moe.Experts`.
        shared_size : int, optional
            Width of a shared expert.
        **options
            Arguments of the block.
        """
        gate = make_router(router, hidden_size, num_experts, top_k, **(router_options or {}))
        experts = Experts(num_experts, hidden_size, intermediate_size, **(expert_options or {}))
        shared = None if shared_size is None else SharedExpert(hidden_size, shared_size)
        return cls(gate, experts, shared_expert=shared, **options)

    def options(self) -> dict[str, Any]:
        """Plain description of the block that :meth:`from_options` builds again, weights and hooks apart.

        Raises
        ------
        ValueError
            If a part cannot be described: a router or shared expert of another class, or a recurrent router that shares
            its cell or projector with other layers.
        """
        gate, shared = self.gate, self.shared_expert
        if not isinstance(gate, Router) or not gate.kind:
            raise ValueError(f"a {type(gate).__name__} cannot be described: it is none of labkit.moe.ROUTERS")
        if getattr(gate, "_shared_cell", None) or getattr(gate, "_shared_projector", None):
            raise ValueError(
                "this recurrent router shares its cell or projector with other layers, which a block's description "
                "cannot hold: save the model that owns them"
            )
        if shared is not None and not isinstance(shared, SharedExpert):
            raise ValueError(
                f"a {type(shared).__name__} cannot be described as shared expert: use SharedExpert"
            )
        return {
            "gate": gate.options(),
            "experts": self.experts.options(),
            "shared_expert": None if shared is None else shared.options(),
            "capacity_factor": self.capacity_factor,
            "drop_order": self.drop_order,
            "layer": self.layer,
        }

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> MoEBlock:
        """Build a block from what :meth:`options` gave."""
        options = dict(options)
        shared = options.pop("shared_expert")
        return cls(
            make_router(**options.pop("gate")),
            Experts(**options.pop("experts")),
            shared_expert=None if shared is None else SharedExpert(**shared),
            **options,
        )

    def run(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        state: Any = None,
        token_ids: Tensor | None = None,
    ) -> MoEOutput:
        """Compute the layer with the record of its routing.

        Parameters
        ----------
        hidden_states : Tensor
            ``(..., D)``.
        mask : Tensor, optional
            ``(...)`` bool, False at padding: counted in no statistic, and without a place where places are limited.
        state : object, optional
            What the previous layer's router passed on.
        token_ids : Tensor, optional
            ``(...)``, for routers that read them.

        Returns
        -------
        MoEOutput
        """
        context = {} if token_ids is None else {"token_ids": token_ids}
        x = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, D)
        info, state = self.gate.route(hidden_states, state, mask, layer=self.layer, **context)
        if hidden_states.ndim == 3:
            info.sequences = hidden_states.shape[0]
        info = self._limit(info, hidden_states.shape[0])
        for hook in self.before_dispatch:
            info = hook(info)
        y = self._dispatch(x, info)
        if self.shared_expert is not None:
            y = y + self.shared_expert(x)
        for change in self.after:
            y = change(y, info, x)
        return MoEOutput(y.view(hidden_states.shape), info, state)

    def _limit(self, info: RoutingInfo, sequences: int) -> RoutingInfo:
        """Apply the capacity."""
        del sequences
        if self.capacity_factor is None:
            return info
        capacity = expert_capacity(info.num_tokens, info.num_experts, info.top_k, self.capacity_factor)
        kept = within_capacity(info.index, info.num_experts, capacity, order=self.drop_order, mask=info.mask)
        return info.replace(kept=kept)

    def _dispatch(self, x: Tensor, info: RoutingInfo) -> Tensor:
        """Compute what was decided."""
        if info.pairs is None and info.kept is None:
            return self.experts(x, info.index, info.weights)
        return self.experts.run_pairs(x, info.csr())

    def forward(self, hidden_states: Tensor, **context: Any) -> Tensor:
        """Compute the layer: ``(B, T, D)`` to ``(B, T, D)``. Keyword arguments are those of :meth:`run`."""
        return self.run(hidden_states, **context).hidden


@contextmanager
def collect_routing(model: nn.Module, *, detach: bool = False) -> Iterator[list[RoutingInfo]]:
    """Collect the records of every :class:`MoEBlock` of a model, in the order of their calls.

    Parameters
    ----------
    model : torch.nn.Module
        Holds the blocks.
    detach : bool, default False
        Whether the records are without gradients. Auxiliary losses need them.

    Yields
    ------
    list of RoutingInfo
        Grows with every call; empty it between steps (``infos.clear()``), or the graphs of all steps are held.

    Raises
    ------
    ValueError
        If the model has no such block.

    Examples
    --------
    >>> import torch
    >>> from labkit.moe import load_balancing_loss
    >>> block = MoEBlock.build(8, 16, num_experts=4, top_k=2)
    >>> with collect_routing(block) as infos:
    ...     loss = block(torch.randn(2, 3, 8)).sum()
    ...     loss = loss + 0.01 * load_balancing_loss(infos)
    >>> len(infos)
    1
    """
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no labkit.moe.MoEBlock")
    infos: list[RoutingInfo] = []

    def keep(info: RoutingInfo) -> RoutingInfo:
        infos.append(info.detach() if detach else info)
        return info

    for block in blocks:
        block.before_dispatch.append(keep)
    try:
        yield infos
    finally:
        for block in blocks:
            block.before_dispatch.remove(keep)
