r"""Progressive fusion: the heads of a group become one while the model trains.

The loss is that of the language model plus an augmented Lagrangian of the constraint L_fusion <= t_k, the target
falling to zero:

.. math::

    L = L_{\mathrm{LM}} + \lambda e + \tfrac{\rho_k}{2} \max(e, 0)^2, \quad e = L_{\mathrm{fusion}} - t_k, \qquad
    \lambda \leftarrow \max(0, \lambda + \eta \rho_k e)

with :math:`t_k = \max(0, 1 - k / (f n))^2` (``fall`` f of ``steps`` n), :math:`\rho_k = r (1 + k / 5)` (``penalty``
r) and η ``dual_rate``. In the last ``contract`` share of the steps the operators are also drawn to their mean,
:math:`\omega \leftarrow \omega + s (\bar\omega - \omega)`, s rising from 0.3 to 1: at the end the rows of a group are
equal, and the collapse is exact.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from labkit.kv.dha.align import align_heads
from labkit.kv.dha.checks import attention_layers, check_fits
from labkit.kv.dha.convert import collapsed
from labkit.kv.dha.groups import HeadGroups
from labkit.kv.dha.model import DHALlamaForCausalLM
from labkit.kv.dha.operators import FusedProjection, FusionSchedule
from labkit.kv.dha.similarity import HeadMoments

WARN_ABOVE, FAIL_ABOVE = 1e-4, 1e-2


class FusionStep(NamedTuple):
    """What a fusion step reports: its number, the loss of the language model, fusion loss, target, multiplier."""

    number: int
    loss: float
    fusion_loss: float
    target: float
    multiplier: float


def next_token_loss(model: Any, batch: Any) -> Tensor:
    """Mean cross-entropy; a batch is (tokens, targets), token ids alone, or a mapping that holds labels."""
    if hasattr(batch, "keys"):
        loss: Tensor = model(**batch, use_cache=False).loss
        return loss
    tokens, targets = batch if isinstance(batch, tuple | list) else (batch[:, :-1], batch[:, 1:])
    logits = model(input_ids=tokens, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class DHAConverter:
    """Make a model with decoupled heads from a checkpoint: prepare, fuse, collapse.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint. It is copied, unless ``inplace``. With grouped queries its key-value heads are fused.
    groups : HeadGroups
        From :func:`search_groups`.
    schedule : FusionSchedule, optional
        The default has 100 steps.
    align : bool, default False
        Turn the heads of every group into a common basis first (:func:`align_heads`).
    moments : list of HeadMoments, optional
        For the alignment.
    operator_lr : float, default 20.0
        Learning rate of the operators, in multiples of that of the model.
    inplace : bool, default False
        Change the given model instead of a copy; it is of no other use afterwards.

    Raises
    ------
    ValueError
        For an unsupported model or groups of another one, before any work.

    Examples
    --------
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import DHAConverter, FusionSchedule, head_similarity, search_groups
    >>> tokens = torch.randint(64, (8, 33), generator=torch.Generator().manual_seed(0))
    >>> mha = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=4))
    >>> groups = search_groups(head_similarity(mha, [tokens]), kv_budget=0.5)
    >>> converter = DHAConverter(mha, groups, schedule=FusionSchedule(steps=20))
    >>> path = [step.fusion_loss for step in converter.fuse([tokens] * 20, lr=1e-3)]
    >>> small = converter.collapse()
    >>> sum(small.config.key_heads), sum(small.config.value_heads), small.generate(tokens[:1], max_length=36).shape
    (4, 4, torch.Size([1, 36]))
    """

    def __init__(
        self,
        model: Any,
        groups: HeadGroups,
        *,
        schedule: FusionSchedule | None = None,
        align: bool = False,
        moments: list[HeadMoments] | None = None,
        operator_lr: float = 20.0,
        inplace: bool = False,
    ) -> None:
        check_fits(groups, attention_layers(model))
        if not operator_lr > 0:
            raise ValueError(f"operator_lr must be positive; got {operator_lr!r}")
        self.groups = groups
        self.schedule = schedule or FusionSchedule()
        self.operator_lr = operator_lr
        self.multiplier = 0.0
        self.step = 0
        self._source, self._align, self._moments, self._inplace = model, align, moments, inplace
        self._model: Any = None
        self._fused: list[tuple[FusedProjection, FusedProjection]] = []
        # Value at the identity; 0 where every head stays.
        self._scale = sum(groups.heads - n for n in (*groups.key_heads, *groups.value_heads))

    def prepare(self) -> Any:
        """Put the fusion operators in place; the logits stay those of the checkpoint (to 1e-5 in float32).

        Returns
        -------
        LlamaForCausalLM
            The model to train, with as many heads as before. The same one when called again.
        """
        if self._model is not None:
            return self._model
        source = self._source
        model = source if self._inplace else copy.deepcopy(source)
        if self._align:
            turned = align_heads(model, self.groups, self._moments)
            model.load_state_dict(turned.state_dict())
        for index, layer in enumerate(attention_layers(model)):
            layer.k_proj = FusedProjection(layer.k_proj, self.groups.keys[index], self.groups.heads)
            layer.v_proj = FusedProjection(layer.v_proj, self.groups.values[index], self.groups.heads)
            self._fused.append((layer.k_proj, layer.v_proj))
        self._model, self._source = model, None
        return model

    def operators(self) -> list[dict[str, Tensor]]:
        """Copies of the fusion operators of every layer: ``{"k": (K, K), "v": (K, K)}``."""
        self.prepare()
        return [
            {"k": k.operators().detach().clone(), "v": v.operators().detach().clone()} for k, v in self._fused
        ]

    def fusion_loss(self) -> Tensor:
        """L_fusion over the whole model: 1 at the start, 0 when every group is one head."""
        self.prepare()
        parts = [projection.distance() for pair in self._fused for projection in pair]
        return torch.stack(parts).sum() / max(1, self._scale)

    def penalty(self) -> Tensor:
        """The Lagrangian's terms at this step, to be added to the loss of the language model."""
        excess = self.fusion_loss() - self.schedule.target(self.step)
        return self.multiplier * excess + self.schedule.weight(self.step) / 2 * excess.relu().square()

    @torch.no_grad()
    def advance(self) -> None:
        """End a step, after the optimiser's: raise the multiplier, contract, count."""
        excess = float(self.fusion_loss()) - self.schedule.target(self.step)
        rate = self.schedule.dual_rate * self.schedule.weight(self.step)
        self.multiplier = max(0.0, self.multiplier + rate * excess)
        share = self.schedule.contraction(self.step)
        if share:
            for projection in (p for pair in self._fused for p in pair):
                projection.contract(share)
        self.step += 1

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameters for an optimiser: those of the model at ``lr``, the operators at a multiple, without decay."""
        model = self.prepare()
        operators = [p.omega for pair in self._fused for p in pair]
        known = {id(p) for p in operators}
        rest = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
        return [
            {"params": rest, "lr": lr, "scale": 1.0},
            {
                "params": operators,
                "lr": lr * self.operator_lr,
                "scale": self.operator_lr,
                "weight_decay": 0.0,
            },
        ]

    def fuse(
        self,
        batches: Iterable[Any],
        *,
        lr: float | Callable[[int], float] = 1e-4,
        loss: Callable[[Any, Any], Tensor] = next_token_loss,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        clip: float = 1.0,
    ) -> Iterator[FusionStep]:
        """Run the fusion, one yielded step at a time, ``schedule.steps`` of them in all.

        For a loop of one's own: ``(loss + converter.penalty()).backward()``, the optimiser's step on
        ``converter.parameter_groups(lr)``, ``converter.advance()``.

        Parameters
        ----------
        batches : iterable
            One a step, in the form that ``loss`` takes.
        lr : float or callable, default 1e-4
            Of the model; a callable gives that of each step, so that fusion and the training after it can share
            one schedule, and all arms of a comparison one budget.
        loss : callable
            ``loss(model, batch)``, a scalar; by default the cross-entropy of next tokens.
        betas, weight_decay, clip
            Of AdamW and of the clipped gradient norm.

        Raises
        ------
        FloatingPointError
            When the loss stops being finite.
        RuntimeError
            If there are fewer batches than steps left.
        """
        model = self.prepare()
        rate = lr if callable(lr) else lambda step: lr
        groups = self.parameter_groups(rate(self.step))
        every = [p for group in groups for p in group["params"]]
        optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay, fused=True)
        model.train()
        source = iter(batches)
        while self.step < self.schedule.steps:
            try:
                batch = next(source)
            except StopIteration:
                raise RuntimeError(
                    f"batches ended at step {self.step} of {self.schedule.steps}; give more, or a schedule with "
                    f"FusionSchedule(steps={self.step})"
                ) from None
            number, target = self.step, self.schedule.target(self.step)
            for group in optimizer.param_groups:
                group["lr"] = rate(number) * group["scale"]
            value = loss(model, batch)
            if not bool(torch.isfinite(value)):
                raise FloatingPointError(f"the loss is {value.item()} at step {number}: lower lr")
            optimizer.zero_grad(set_to_none=True)
            (value + self.penalty()).backward()
            torch.nn.utils.clip_grad_norm_(every, clip)
            optimizer.step()
            self.advance()
            yield FusionStep(
                number, float(value.detach()), float(self.fusion_loss().detach()), target, self.multiplier
            )

    @torch.no_grad()
    def collapse(self) -> DHALlamaForCausalLM:
        """Make every group one head.

        Returns
        -------
        DHALlamaForCausalLM
            In evaluation mode, with weights of its own. It computes what the fused model does, as far as the
            fusion loss is 0.

        Raises
        ------
        RuntimeError
            If the fusion loss is above 1e-2: the loss of the language model would jump. Above 1e-4 it warns.
        """
        model = self.prepare()
        left = float(self.fusion_loss())
        if left > WARN_ABOVE:
            message = (
                f"the heads are not merged yet: fusion loss {left:.2g} after {self.step} of {self.schedule.steps} "
                f"steps, and the collapse is exact at 0 (at most {WARN_ABOVE:g}); finish the schedule, with "
                "contract > 0"
            )
            if left > FAIL_ABOVE:
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
        mixes = [{"k": k.mix(), "v": v.mix()} for k, v in self._fused]
        weights = []
        for layer in model.model.layers:
            state = layer.self_attn.state_dict()
            names = {name: name.replace(".linear", "") for name in state}
            weights.append(
                {new: state[name] for name, new in names.items() if new.endswith((".weight", ".bias"))}
            )
        return collapsed(model, self.groups, mixes, weights).eval()
