"""Recurrent routers for a model of transformers: put in, taken out again."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from labkit.moe.adapters import BlockAdapter, moe_blocks
from labkit.moe.rmoe.settings import RecurrentSettings
from labkit.moe.rmoe.shared import RecurrentGate, SharedRecurrence

#: Where the shared cell stands in the base model.
PLACE = "recurrent_router"
_ATTENTION = ("self_attn", "attention", "attn")


class RecurrentRouting:
    """The recurrent routers of one model. See `attach_recurrent_router`.

    Attributes
    ----------
    model : PreTrainedModel
        The base model that holds the shared cell.
    settings : RecurrentSettings
    shared : SharedRecurrence
        The shared cell, also ``model.recurrent_router``.
    gates : list of RecurrentGate
        One a MoE layer, in the order of the layers.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        blocks: list[BlockAdapter],
        settings: RecurrentSettings,
        *,
        top_k: int | None = None,
        renormalize: bool | None = None,
    ) -> None:
        self.model = base
        self.settings = settings
        self._blocks = blocks
        self._old = [block.router for block in blocks]
        std = float(getattr(base.config, "initializer_range", 0.02))
        widths = [_width(block) for block in blocks]
        projector = None
        if settings.shared_projector:
            if len(set(widths)) > 1:
                raise ValueError(
                    f"shared_projector=True needs layers of one width; they have {sorted(set(widths))}"
                )
            projector = nn.Linear(widths[0], settings.state_size, bias=settings.bias)
            nn.init.normal_(projector.weight, 0.0, std)
            if projector.bias is not None:
                nn.init.zeros_(projector.bias)
        self.shared = SharedRecurrence(settings.state_size, settings.cell, projector)
        options = settings.to_dict()
        for name in ("state_size", "cell", "shared_projector"):
            del options[name]
        self.gates: list[RecurrentGate] = []
        for position, (block, width) in enumerate(zip(blocks, widths, strict=True)):
            normed = getattr(block.router, "norm_topk_prob", None)
            gate = RecurrentGate(
                width,
                block.num_experts,
                block.top_k if top_k is None else top_k,
                shared=self.shared,
                position=position,
                scale=float(getattr(block.router, "routed_scaling_factor", 1.0)),
                std=std,
                renormalize=(True if normed is None else bool(normed))
                if renormalize is None
                else renormalize,
                **options,
            )
            like = next(block.module.parameters())
            self.gates.append(gate.to(device=like.device, dtype=like.dtype))
        like = next(blocks[0].module.parameters())
        self.shared.to(device=like.device, dtype=like.dtype)
        self._put()

    def _put(self) -> None:
        base, shared = self.model, self.shared
        for block, gate in zip(self._blocks, self.gates, strict=True):
            gate.train(block.module.training)
            setattr(block.module, block.router_name, gate)
        base.add_module(PLACE, shared)
        self._handles = [
            base.register_forward_pre_hook(shared.begin, with_kwargs=True),
            base.register_forward_hook(shared.end, always_call=True),
        ]
        layers = {block.name.rpartition(".")[0]: place for place, block in enumerate(self._blocks)}
        for name, module in base.named_modules():
            layer, _, leaf = name.rpartition(".")
            if leaf in _ATTENTION:
                announce = functools.partial(shared.announce, layers.get(layer))
                self._handles.append(module.register_forward_pre_hook(announce, with_kwargs=True))

    @property
    def strength(self) -> float:
        """What multiplies the state where it is passed on: 1 is the method, 0 passes nothing."""
        return self.shared.strength

    @strength.setter
    def strength(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"strength must lie in [0, 1]; got {value}")
        self.shared.strength = float(value)

    def detach(self) -> None:
        """Put the former routers back."""
        if getattr(self.model, PLACE, None) is not self.shared:
            raise RuntimeError("these routers are not in the model any more")
        if any(block.router is not gate for block, gate in zip(self._blocks, self.gates, strict=True)):
            raise RuntimeError("the routers were swapped since; undo the later swap first")
        for handle in self._handles:
            handle.remove()
        for block, router in zip(self._blocks, self._old, strict=True):
            setattr(block.module, block.router_name, router)
        delattr(self.model, PLACE)

    def __enter__(self) -> RecurrentRouting:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _width(block: BlockAdapter) -> int:
    """D, also of experts that are not loaded yet."""
    down = block.experts.down_proj
    return int(down.shape[-1 if getattr(block.experts, "is_transposed", False) else 1])  # type: ignore[union-attr, arg-type]


def _check_contract(block: BlockAdapter) -> None:
    """Refuse a block that does not take (logits, weights, index) from its router."""
    if isinstance(getattr(block.module, "after", None), list):
        raise ValueError(
            f"{block.name} is a layer of labkit, which hands the state on itself: build it with router='recurrent' and one "
            "shared RecurrentCell"
        )
    output: Any = None
    if isinstance(getattr(block.experts, "down_proj", None), Tensor):
        like = next(block.module.parameters())
        if like.is_meta:
            raise ValueError(f"{block.name} is on the meta device: load the model before routers are put in")
        with torch.no_grad():
            output = block.router(torch.zeros(2, _width(block), device=like.device, dtype=like.dtype))
    parts = output if isinstance(output, tuple) and len(output) == 3 else ()
    right = (
        len(parts) == 3
        and all(isinstance(part, Tensor) and part.ndim == 2 for part in parts)
        and parts[0].is_floating_point()
        and parts[0].shape == (2, block.num_experts)
        and parts[1].shape == parts[2].shape
        and parts[2].dtype == torch.int64
    )
    if not right:
        raise ValueError(
            f"{block.name} ({type(block.module).__name__}) does not take (logits, weights, index) from its router; "
            "recurrent routers fit Mixtral, Qwen2/3-MoE, OLMoE and classes of their form. For others build "
            "labkit.moe.MoEBlock layers"
        )


def attach_recurrent_router(
    model: PreTrainedModel,
    state_size: int = 128,
    *,
    top_k: int | None = None,
    renormalize: bool | None = None,
    **settings: Any,
) -> RecurrentRouting:
    """Give a model one recurrent router in place of its own routers (equations 4 to 6 of arXiv 2408.06793).

    The new routers begin untrained: projectors and heads are N(0, ``initializer_range``). Dense layers between MoE layers
    pass the state on unchanged. Training, generation with a cache, left padding, autocast and gradient checkpointing
    (not reentrant) work as before.

    Parameters
    ----------
    model : PreTrainedModel
        Mixtral, Qwen2/3-MoE, OLMoE or another whose MoE blocks take ``(logits, weights, index)`` from their router; with
        or without a language-model head. It is changed in place. What a router adds to softmax and top-k is replaced with
        it (DeepSeek's groups and sigmoid); only its constant scale of the weights is kept.
    state_size : int, default 128
        p.
    top_k : int, optional
        Experts a token; by default the model's own number.
    renormalize : bool, optional
        Whether a token's weights are made to sum to 1, as in the paper; by default the model's own rule
        (``norm_topk_prob`` of OLMoE and Qwen-MoE).
    **settings
        Of :class:`RecurrentSettings`: cell, passing, logit_residual, residual_of, detach_logits, bias, shared_projector,
        head, temperature, jitter.

    Returns
    -------
    RecurrentRouting
        Its ``detach()``, or leaving a ``with`` block, puts the former routers back.

    Raises
    ------
    TypeError
        If `model` is no model of transformers, or for a setting that does not exist.
    ValueError
        For a setting out of range, a model without MoE blocks or with blocks of another form, or one that has recurrent
        routers already.

    Warns
    -----
    UserWarning
        If there are fewer than two MoE layers: nothing is passed then.

    Notes
    -----
    ``output_router_logits=True`` does not see routers that are put in, and is refused; take the balancing loss with
    ``capture_routing(model, detach=False)`` and ``load_balancing_loss``. Save with :func:`save_recurrent`.

    With peft, attach before wrapping, and train the routers by ``requires_grad_(True)`` after it: ``modules_to_save``
    copies each router by itself, away from the cell that they share, and the forward then says so.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("mixtral", width=16, heads=2, seed=0).eval()
    >>> tokens = torch.tensor([[1, 2, 3]])
    >>> before = model(tokens).logits
    >>> with attach_recurrent_router(model, state_size=4) as routing:
    ...     during = model(tokens).logits
    >>> len(routing.gates), torch.equal(during, before), torch.equal(model(tokens).logits, before)
    (2, False, True)
    """
    checked = RecurrentSettings.named(state_size=state_size, **settings)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel; got {type(model).__name__} (for peft, attach before wrapping)"
        )
    base: Any = model.base_model
    if getattr(base, PLACE, None) is not None:
        raise ValueError(f"{type(model).__name__} has recurrent routers already; detach() them first")
    blocks = moe_blocks(base)
    for block in blocks:
        _check_contract(block)
        if top_k is not None and not 1 <= top_k <= block.num_experts:
            raise ValueError(
                f"top_k must lie in 1..{block.num_experts}, the experts of {block.name}; got {top_k}"
            )
    if len(blocks) < 2:
        warnings.warn(
            f"{type(model).__name__} has one MoE layer: a recurrent router has nothing to pass on there",
            UserWarning,
            stacklevel=2,
        )
    return RecurrentRouting(base, blocks, checked, top_k=top_k, renormalize=renormalize)
