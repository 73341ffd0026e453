"""The layer of Switch Transformers (arXiv 2101.03961): one expert a token, and places counted for each sequence.

``y = p(x) expert(x)`` with the expert of the largest probability p, two-matrix experts without biases, and a capacity for
each expert in each sequence, filled in the order of the tokens. What happens to a token without a place is a choice:
``overflow="input"`` gives it ``p(x) x``, as transformers did when the papers that build on its Switch were made;
``overflow="zero"`` gives it nothing, as transformers does now, so that only the residual connection remains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.moe.block import MoEBlock, MoEOutput
from labkit.moe.capacity import within_capacity
from labkit.moe.experts import _ACTIVATION_NAMES, Experts
from labkit.moe.routers import ROUTERS, Router, SwitchRouter
from labkit.moe.routing import RoutingInfo

__all__ = ["SwitchBlock"]

OVERFLOW = ("input", "zero")


class SwitchBlock(MoEBlock):
    """A Switch layer that can stand where transformers' Switch has its sparse ``mlp``.

    Parameters
    ----------
    gate : Router
        With ``top_k`` of 1, usually a :class:`SwitchRouter`.
    experts : Experts
        Not gated, usually with ReLU.
    expert_capacity : int, optional
        Places of each expert in each sequence; no limit by default.
    overflow : {"input", "zero"}, default "zero"
        What a token without a place gets, see the module.
    layer : int, default -1
        Index of the layer, for the record.

    Raises
    ------
    ValueError
        For a negative capacity, an unknown ``overflow``, or a router with several experts a token.

    Notes
    -----
    Padding takes no place where ``mask`` is given. transformers counts padding like other tokens: give no mask for the
    same.

    Examples
    --------
    >>> import torch
    >>> block = SwitchBlock(SwitchRouter(8, 4), Experts(4, 8, 16, activation="relu", gated=False), expert_capacity=1)
    >>> out = block.eval().run(torch.randn(2, 6, 8))
    >>> out.hidden.shape, bool(out.info.csr().per_expert().max() <= 2)
    (torch.Size([2, 6, 8]), True)
    """

    def __init__(
        self,
        gate: Router,
        experts: Experts,
        *,
        expert_capacity: int | None = None,
        overflow: str = "zero",
        layer: int = -1,
    ) -> None:
        super().__init__(gate, experts, layer=layer)
        if gate.top_k != 1:
            raise ValueError(f"a Switch layer gives a token one expert; this router chooses {gate.top_k}")
        if expert_capacity is not None and expert_capacity < 0:
            raise ValueError(
                f"expert_capacity must not be negative (None for no limit); got {expert_capacity}"
            )
        if overflow not in OVERFLOW:
            raise ValueError(f"overflow must be one of {', '.join(map(repr, OVERFLOW))}; got {overflow!r}")
        self.expert_capacity = expert_capacity
        self.overflow = overflow

    @classmethod
    def from_transformers(cls, mlp: nn.Module, *, overflow: str = "zero", layer: int = -1) -> SwitchBlock:
        """Build the same layer from a ``SwitchTransformersSparseMLP``, with copies of its weights.

        Raises
        ------
        TypeError
            If ``mlp`` is not one.
        ValueError
            If its activation is not known here.
        """
        router: Any = getattr(mlp, "router", None)
        experts = getattr(mlp, "experts", None)
        if not isinstance(experts, nn.ModuleDict) or not hasattr(router, "classifier"):
            raise TypeError(f"mlp must be a SwitchTransformersSparseMLP; got {type(mlp).__name__}")
        stock: list[Any] = list(experts.values())
        first = stock[0]
        activation = "relu" if isinstance(first.act, nn.ReLU) else type(first.act).__name__
        activation = {"NewGELUActivation": "gelu_tanh", "GELUActivation": "gelu"}.get(activation, activation)
        if activation not in _ACTIVATION_NAMES.values():
            raise ValueError(f"the activation {activation} is not one of {', '.join(_ACTIVATION_NAMES)}")
        weight = router.classifier.weight
        gate = SwitchRouter(
            weight.shape[1],
            weight.shape[0],
            bias=router.classifier.bias is not None,
            jitter=router.jitter_noise,
        )
        ours = Experts(
            len(stock),
            weight.shape[1],
            first.wi.weight.shape[0],
            activation=activation,
            gated=False,
            dropout=first.dropout.p,
        )
        block = cls(gate, ours, expert_capacity=router.expert_capacity, overflow=overflow, layer=layer)
        with torch.no_grad():
            gate.classifier.load_state_dict(router.classifier.state_dict())
            ours.up_proj.copy_(torch.stack([e.wi.weight for e in stock]))
            ours.down_proj.copy_(torch.stack([e.wo.weight for e in stock]))
        return block.to(first.wi.weight.device, first.wi.weight.dtype).train(mlp.training)

    def copy_to(self, mlp: nn.Module) -> None:
        """Write the weights back into a ``SwitchTransformersSparseMLP`` of the same sizes."""
        stock: Any = mlp
        with torch.no_grad():
            stock.router.classifier.load_state_dict(self.gate.classifier.state_dict())
            for expert, up, down in zip(
                stock.experts.values(), self.experts.up_proj, self.experts.down_proj, strict=True
            ):
                expert.wi.weight.copy_(up)
                expert.wo.weight.copy_(down)

    def options(self) -> dict[str, Any]:
        return {
            "gate": self.gate.options(),
            "experts": self.experts.options(),
            "expert_capacity": self.expert_capacity,
            "overflow": self.overflow,
            "layer": self.layer,
        }

    @classmethod
    def from_options(cls, options: dict[str, Any]) -> SwitchBlock:
        options = dict(options)
        gate = dict(options.pop("gate"))
        return cls(ROUTERS[gate.pop("kind")](**gate), Experts(**options.pop("experts")), **options)

    def run(
        self,
        hidden_states: Tensor,
        *,
        mask: Tensor | None = None,
        state: Any = None,
        token_ids: Tensor | None = None,
    ) -> MoEOutput:
        """Compute the layer with the record of its routing; see :meth:`MoEBlock.run`.

        ``hidden_states`` is ``(B, T, D)``: capacity is counted for each of the B sequences.
        """
        if hidden_states.ndim != 3:
            raise ValueError(
                f"a Switch layer counts places by sequence and needs (B, T, D); got {tuple(hidden_states.shape)}"
            )
        return super().run(hidden_states, mask=mask, state=state, token_ids=token_ids)

    def _limit(self, info: RoutingInfo, sequences: int) -> RoutingInfo:
        if self.expert_capacity is None:
            return info
        kept = within_capacity(
            info.index, info.num_experts, self.expert_capacity, sequences=sequences, mask=info.mask
        )
        return info.replace(kept=kept)

    def _dispatch(self, x: Tensor, info: RoutingInfo) -> Tensor:
        y = super()._dispatch(x, info)
        if self.overflow == "zero" or info.kept is None:
            return y
        lost = ~info.kept[:, 0]
        if info.pairs is not None:  # a hook may have found experts for a token that had lost its own
            lost = lost & (info.pairs.per_token() == 0)
        return y + torch.where(lost, info.weights[:, 0], 0.0).to(x.dtype)[:, None] * x
