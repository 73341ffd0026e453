"""What the layers of one model share, and the router of one layer.

A layer of transformers calls its router with the hidden states alone. The state of the layer before therefore travels in a
:class:`RouterPass`, which the model's forward makes when it begins and drops when it ends. It is found through a context
variable, so that forwards in several threads, or of one model within another's, each have their own.

Gradient checkpointing computes a layer again during the backward pass, when the forward is over. The layer must then read
the state that it read first. For that the pass goes along as a keyword of the layer's call, which the checkpoint keeps, and
the pass remembers the state that each layer read. Checkpointing of the reentrant kind computes the layer without a graph,
where the recurrent gradient is lost without a word: it is refused.
"""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from labkit.moe.routers.recurrent import RecurrentCell, RecurrentRouter, RouterState

KEYWORD = "routing_pass"
WHOLE_MODEL = (
    "a recurrent router reads the state of the layer before, which only a forward of the whole model makes: call the model "
    "(or its base model), not a layer or a router alone. Routers copied by themselves (modules_to_save of peft) have lost "
    "their shared cell: train them with requires_grad_(True) instead"
)


@dataclass(eq=False)
class RouterPass:
    """The routing state of one forward.

    Attributes
    ----------
    owner : SharedRecurrence
        Whose forward it is.
    outer : RouterPass or None
        The pass in whose midst this one began.
    gradient : bool
        Whether the forward builds a graph.
    checkpointed : bool
        Whether layers will be computed again.
    latest : RouterState or None
        What the last layer passed on.
    read : dict
        For each router so far, what it read: kept without its graph, only under checkpointing.
    announced : set
        Routers whose layer received the pass by keyword.
    active : bool
        False once the forward is over.
    """

    owner: SharedRecurrence
    outer: RouterPass | None
    gradient: bool
    checkpointed: bool
    latest: RouterState | None = None
    read: dict[int, RouterState | None] = field(default_factory=dict)
    announced: set[int] = field(default_factory=set)
    active: bool = True


_CURRENT: contextvars.ContextVar[RouterPass | None] = contextvars.ContextVar("labkit_routing", default=None)


def _leaf(value: Tensor | None) -> Tensor | None:
    # A copy of the values alone: the graph would otherwise hold the pass, and the pass the graph. It asks for a gradient
    # where the original does, so that the layer saves the same tensors when it is computed again.
    return None if value is None else value.detach().requires_grad_(value.requires_grad)


class SharedRecurrence(RecurrentCell):
    """The cell that all routers of a model share, and the passing of its state; a submodule of the base model.

    Parameters
    ----------
    state_size : int
        p.
    kind : {"gru", "rnn", "lstm"}, default "gru"
    projector : torch.nn.Linear, optional
        One for all layers.

    Attributes
    ----------
    strength : float
        Multiplies the state where it is passed on. 1 is the method; less shows what depends on the state.

    Examples
    --------
    >>> import torch
    >>> shared = SharedRecurrence(4)
    >>> gates = [RecurrentGate(8, 3, 1, shared=shared, position=i) for i in range(2)]
    >>> gates[0](torch.randn(5, 8))
    Traceback (most recent call last):
    ...
    RuntimeError: a recurrent router reads the state of the layer before, ...
    """

    def __init__(self, state_size: int, kind: str = "gru", projector: nn.Linear | None = None) -> None:
        super().__init__(state_size, kind)
        self.projector = projector
        self.strength = 1.0
        self.records_logits = False

    def begin(
        self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Start a pass: a forward pre-hook of the base model."""
        wanted = kwargs.get("output_router_logits")
        wanted = (
            getattr(getattr(base, "config", None), "output_router_logits", False)
            if wanted is None
            else wanted
        )
        if wanted and not self.records_logits:
            raise ValueError(
                f"output_router_logits=True does not see the routers put into {type(base).__name__}, and its balancing loss "
                "would be 0: use labkit.moe.capture_routing(model, detach=False) and labkit.moe.load_balancing_loss, or "
                "RecurrentMixtralForCausalLM"
            )
        outer = _CURRENT.get()
        gradient = torch.is_grad_enabled()
        checkpointed = gradient and any(
            getattr(module, "gradient_checkpointing", False) and module.training for module in base.modules()
        )
        passed = RouterPass(
            self, outer if outer is not None and outer.active else None, gradient, checkpointed
        )
        _CURRENT.set(passed)
        return (args, {**kwargs, KEYWORD: passed}) if checkpointed else None

    def end(self, base: nn.Module, args: Any, output: Any) -> None:
        """Drop the pass, also after an error: a forward hook of the base model."""
        passed = _CURRENT.get()
        if passed is not None and passed.owner is self:
            passed.active = False
            passed.latest = None
            _CURRENT.set(passed.outer)

    def announce(
        self, position: int | None, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the pass out of a layer's keywords: a forward pre-hook of its attention, which runs before its router."""
        passed = kwargs.pop(KEYWORD, None)
        if passed is None:
            return None
        if position is not None:
            passed.announced.add(position)
            if not passed.active:
                passed.outer = _CURRENT.get()
                _CURRENT.set(passed)
        return args, kwargs

    def enter(self, position: int) -> RouterState | None:
        """The state that router number `position` reads."""
        passed = _CURRENT.get()
        if passed is None or passed.owner is not self:
            raise RuntimeError(WHOLE_MODEL)
        if not passed.active:
            if position not in passed.read:
                raise RuntimeError(WHOLE_MODEL)
            return passed.read[position]
        if position in passed.read:
            raise RuntimeError(
                f"router {position} was called twice in one forward; a state over depth needs each layer once"
            )
        if passed.gradient and not torch.is_grad_enabled():
            raise RuntimeError(
                "reentrant gradient checkpointing runs layers without a graph, and the gradient through the routing state "
                "would be lost: call model.gradient_checkpointing_enable({'use_reentrant': False})"
            )
        if passed.checkpointed and position not in passed.announced:
            raise RuntimeError(
                "this class of model does not hand keywords on to its attention, so a layer computed again could not find "
                "its routing state: call model.gradient_checkpointing_disable()"
            )
        state = passed.latest
        if state is not None and self.strength != 1.0:
            memory = None if state.cell is None else state.cell * self.strength
            state = RouterState(state.hidden * self.strength, memory, state.logits)
        kept = None
        if passed.checkpointed and state is not None:
            hidden = _leaf(state.hidden)
            kept = None if hidden is None else RouterState(hidden, _leaf(state.cell), _leaf(state.logits))
        passed.read[position] = kept
        return state

    def leave(self, state: RouterState) -> None:
        """Keep the state for the next router, or go back to the backward pass."""
        passed = _CURRENT.get()
        if passed is None:
            raise RuntimeError(WHOLE_MODEL)
        if passed.active:
            passed.latest = state
        else:
            _CURRENT.set(passed.outer)
            passed.outer = None


class RecurrentGate(RecurrentRouter):
    """The recurrent router of one layer, in the place of ``layer.mlp.gate``.

    Parameters
    ----------
    hidden_size, num_experts, top_k : int
        D, E and k.
    shared : SharedRecurrence
        Of the model. It is used here, and registered in the base model alone.
    position : int
        Number of the router in the order of the layers, dense layers not counted.
    scale : float, default 1
        Multiplies the weights, as DeepSeek's ``routed_scaling_factor`` does.
    **settings
        See :class:`~labkit.moe.RecurrentRouter`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        shared: SharedRecurrence,
        position: int,
        scale: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            state_size=shared.state_size,
            cell=shared,
            projector=shared.projector,
            **settings,
        )
        self.shared_recurrence = (shared,)
        self.position = position
        self.scale = scale

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(T, E)`` in float32, weights ``(T, k)`` in the model's dtype and experts ``(T, k)``.

        Raises
        ------
        RuntimeError
            Outside a forward of the whole model, or for another number of tokens than in the layer before.
        """
        (shared,) = self.shared_recurrence
        info, state = self.route(hidden_states, shared.enter(self.position))
        shared.leave(state)
        weights = info.weights if self.scale == 1.0 else info.weights * self.scale
        return info.logits, weights.to(hidden_states.dtype), info.index
