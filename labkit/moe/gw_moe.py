r"""GW-MoE: fine-tuning that broadcasts uncertain tokens to all experts (arXiv 2406.12375).

A router that spreads its probability evenly over the experts chooses almost by chance. GW-MoE lets every expert learn
from such tokens, in fine-tuning only, so that the choice matters less at inference. For a token x with router logits l of
E experts, ``p = softmax(l)``:

.. math::

    H(x) = -\sum_e p_e \ln(p_e + 10^{-5}), \qquad
    y = \sum_e p_e\, \mathrm{expert}_e(x) \text{ where } H(x) \ge H^*, \text{ else the model's own rule.}

``threshold`` is H* in nats, ``quantile`` finds it on data. ``max_slots`` is the capacity of the workspace: in each
sequence and layer only the first so many uncertain tokens, by position, are broadcast. Every layer decides for itself. In
evaluation mode nothing is changed, to the bit.

Where the released code (github.com/WaitHZ/GW-MoE, Switch Transformers only) differs:

- It does not compute the sum. Within the loop over experts it overwrites the result by ``p_e x``, so that a broadcast
  token gets ``p_E x`` with the last expert's probability, and no expert sees it. ``rule="released"`` does the same.
- Padding takes slots there. Here it does not, unless ``count_padding=True``.
- Its default of slots, -1, broadcasts nothing. Here None is no limit, and 0 is off.

``rule="all"`` broadcasts every token, the ablation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from labkit.moe.adapters import BlockAdapter
from labkit.moe.redirect import BlockCall, Redirect, recomputing
from labkit.moe.routing import Pairs, RoutingInfo
from labkit.moe.stats import router_entropy
from labkit.moe.uncertainty import EPS, highest_entropy, token_entropies

__all__ = ["GlobalWorkspace", "WorkspaceStats", "workspace_slots"]

RULES = ("paper", "released", "all")
BINS = 32


def workspace_slots(uncertain: Tensor, max_slots: int | None, sequences: int = 1) -> Tensor:
    """Leave in each sequence the first ``max_slots`` uncertain tokens.

    Parameters
    ----------
    uncertain : Tensor
        ``(T,)`` bool, the tokens of ``sequences`` sequences of equal length one after the other.
    max_slots : int or None
        None for no limit.
    sequences : int, default 1

    Returns
    -------
    Tensor
        ``(T,)`` bool, the tokens to broadcast.

    Raises
    ------
    ValueError
        For negative slots, or T that is no multiple of ``sequences``.

    Examples
    --------
    >>> import torch
    >>> workspace_slots(torch.tensor([True, False, True, True, True, True]), 1, sequences=2).long().tolist()
    [1, 0, 0, 1, 0, 0]
    """
    if max_slots is None:
        return uncertain
    if max_slots < 0:
        raise ValueError(
            f"max_slots must not be negative (0 broadcasts nothing, None has no limit); got {max_slots}"
        )
    if sequences < 1 or uncertain.shape[0] % sequences:
        raise ValueError(f"{uncertain.shape[0]} tokens are no {sequences} sequences of equal length")
    rows = uncertain.view(sequences, -1)
    return (rows & (rows.cumsum(1) <= max_slots)).view(-1)


@dataclass
class WorkspaceStats:
    """What the workspace did in one layer since the statistics were last cleared.

    Attributes
    ----------
    layer, num_experts, top_k : int
    tokens, uncertain, broadcast : int
        Real tokens; those at or above the threshold; those that found a slot.
    sequences : int
        Sequences seen.
    histogram : Tensor
        ``(32,)`` counts of real tokens by entropy, in equal bins from 0 to the entropy of equal probabilities.
    """

    layer: int
    num_experts: int
    top_k: int
    tokens: int = 0
    uncertain: int = 0
    broadcast: int = 0
    sequences: int = 0
    histogram: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.long))

    @property
    def share(self) -> float:
        """Share of tokens that were broadcast."""
        return self.broadcast / max(1, self.tokens)

    @property
    def slots(self) -> float:
        """Slots taken in a sequence, on average."""
        return self.broadcast / max(1, self.sequences)

    @property
    def cost(self) -> float:
        """Arithmetic of the experts as a multiple of the model's own rule: ``(1 - u) + u E / k`` for the share u."""
        return 1.0 - self.share + self.share * self.num_experts / self.top_k


class GlobalWorkspace(TrainerCallback):
    """Broadcast uncertain tokens to all experts while a model trains.

    A context manager for loops of one's own, and a ``TrainerCallback`` that is on from the beginning to the end of
    ``Trainer.train``. The model's classes and parameters stay as they are, and blocks in evaluation mode compute what they
    always compute.

    Parameters
    ----------
    model : nn.Module
        As for :class:`~labkit.moe.Redirect`: Mixtral, Qwen-MoE, OLMoE, Switch, JetMoE, labkit's own blocks, relatives.
    threshold : float, optional
        H* in nats. The authors' scripts for Switch-Base-8 have 1.6 and 1.8, of at most 2.079.
    quantile : float, optional
        Instead of a threshold: broadcast the share ``1 - quantile`` of the tokens, after :meth:`calibrate`.
    max_slots : int or dict, optional
        Places of the workspace in each sequence and layer; ``{"encoder": 8, "decoder": 1}`` for each stack its own. No
        limit by default, nor for a stack that is not named.
    layers : sequence of int, optional
        Layers concerned; all by default.
    rule : {"paper", "released", "all"}, default "paper"
        See the module. ``"all"`` takes neither threshold nor quantile.
    count_padding : bool, default False
        Treat padding like other tokens, as the released code does.

    Attributes
    ----------
    stats : dict of int to WorkspaceStats
        By layer, counted in training forward passes; empty it with ``stats.clear()``.

    Raises
    ------
    ValueError
        For threshold and quantile both given or both missing, a threshold that no token or every token reaches, negative
        slots, an unknown rule or stack, a model without MoE blocks, or unknown layers.

    Notes
    -----
    Broadcast weights are the softmax of the raw logits, also in models whose own rule scores experts in another way
    (DeepSeek-V3, GPT-OSS). The auxiliary losses remain the model's. Gradient checkpointing works: the entropy is computed
    again from the same numbers. With router jitter that holds while checkpointing restores the random state, which is its
    default, and is refused otherwise.

    Examples
    --------
    >>> import torch
    >>> from labkit.testbeds.models import tiny
    >>> model, tokens = tiny("mixtral", width=16, heads=2, seed=0), torch.arange(24).view(2, 12)
    >>> workspace = GlobalWorkspace(model, quantile=0.75, max_slots=4)
    >>> H = workspace.calibrate(tokens)
    >>> with workspace:
    ...     model.train()(tokens, labels=tokens).loss.backward()
    >>> sorted(workspace.stats), bool(0 < workspace.stats[0].share <= 8 / 24)
    ([0, 1], True)
    """

    def __init__(
        self,
        model: nn.Module,
        threshold: float | None = None,
        quantile: float | None = None,
        max_slots: int | Mapping[str, int | None] | None = None,
        layers: Sequence[int] | None = None,
        rule: str = "paper",
        *,
        count_padding: bool = False,
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
        if rule == "all" and (threshold is not None or quantile is not None):
            raise ValueError("rule='all' broadcasts every token: it takes neither threshold nor quantile")
        if rule != "all" and (threshold is None) == (quantile is None):
            given = "neither" if threshold is None else "both"
            raise ValueError(f"give threshold (H* in nats) or quantile (0.95 broadcasts 5 %), not {given}")
        if quantile is not None and not 0.0 < quantile < 1.0:
            raise ValueError(f"quantile must lie strictly between 0 and 1; got {quantile}")
        self._slots = _by_stack(max_slots)
        self._redirect = Redirect(
            model,
            self._rule,
            after=self._released if rule == "released" else None,
            layers=layers,
            training_only=True,
        )
        if threshold is not None:
            _check_threshold(threshold, self._redirect.blocks)
        self.model, self.threshold, self.quantile = model, threshold, quantile
        self.rule, self.count_padding = rule, count_padding
        self.stats: dict[int, WorkspaceStats] = {}

    def calibrate(self, batches: Tensor | Mapping[str, Any] | Iterable[Tensor | Mapping[str, Any]]) -> float:
        """Set the threshold to the quantile of the entropies that the model has on data, over all layers concerned.

        Parameters
        ----------
        batches : Tensor, mapping, or iterable of them
            Token ids ``(B, T)``, or what the model is called with; padding of an attention mask does not count.

        Returns
        -------
        float
            H*. Of n entropies ``n - floor(quantile n)`` are at or above it (more with ties).

        Raises
        ------
        ValueError
            If the workspace has a threshold of its own, or there is no real token in ``batches``.
        """
        if self.quantile is None:
            raise ValueError("calibrate needs a quantile: GlobalWorkspace(model, quantile=0.95)")
        found = [
            entropy
            for layers in token_entropies(self.model, batches, self._redirect.blocks)
            for entropy, real in layers.values()
            for entropy in [entropy[real]]
        ]
        values = torch.cat(found) if found else torch.empty(0)
        if not len(values):
            raise ValueError("there is no real token to calibrate on: the batches are empty or all padding")
        place = min(int(self.quantile * len(values)), len(values) - 1)
        self.threshold = float(values.sort().values[place])
        return self.threshold

    def attach(self) -> GlobalWorkspace:
        """Put the workspace on.

        Raises
        ------
        RuntimeError
            If it is on already, or has a quantile and no threshold yet.
        ValueError
            Under gradient checkpointing without the random state, with router jitter.
        """
        if self.rule != "all" and self.threshold is None:
            raise RuntimeError("there is no threshold yet: call calibrate(batch) first, or give threshold=")
        self._check_checkpointing()
        self._redirect.attach()
        return self

    def detach(self) -> None:
        """Take the workspace off."""
        self._redirect.detach()

    def __enter__(self) -> GlobalWorkspace:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the workspace on for ``Trainer.train``."""
        if not self._redirect.attached:
            self.attach()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it off again."""
        self.detach()

    def _rule(self, info: RoutingInfo, call: BlockCall) -> RoutingInfo:
        with torch.no_grad():
            entropy = router_entropy(info.logits, eps=EPS)  # (T,)
            real = torch.ones_like(entropy, dtype=torch.bool) if self.count_padding else info.real()
            reached = torch.ones_like(real) if self.threshold is None else entropy >= self.threshold
            uncertain = reached & real
            broadcast = workspace_slots(uncertain, self._slots[call.block.stack], info.sequences)
            if not recomputing():
                self._count(info, entropy, real, uncertain, broadcast)
        if not broadcast.any():
            return info
        own = info.csr()
        kept = ~broadcast[own.token]
        if self.rule == "released":
            pairs = Pairs(
                own.token[kept], own.expert[kept], own.weight[kept], info.num_tokens, info.num_experts
            )
            # a token that its expert had dropped is no longer lost, or a Switch block would add it once more
            found = None if info.kept is None else info.kept | broadcast[:, None]
            return info.replace(pairs=pairs, kept=found)
        chosen = info.probs.new_zeros(info.probs.shape, dtype=torch.bool)
        weights = info.probs.to(own.weight.dtype).index_put(
            (own.token[kept], own.expert[kept]), own.weight[kept]
        )
        chosen[own.token[kept], own.expert[kept]] = True
        chosen[broadcast] = True
        return info.replace(pairs=Pairs.from_mask(chosen, weights))

    def _released(self, y: Tensor, info: RoutingInfo, x: Tensor) -> Tensor:
        """The last expert's probability times the input, for the tokens that the rule took from the experts."""
        if info.pairs is None:
            return y
        left = info.pairs.per_token() == 0
        if info.kept is not None:
            left = left & info.kept.any(-1)
        return y + torch.where(left, info.probs[:, -1], 0.0).to(y.dtype)[:, None] * x.to(y.dtype)

    def _count(
        self, info: RoutingInfo, entropy: Tensor, real: Tensor, uncertain: Tensor, broadcast: Tensor
    ) -> None:
        stats = self.stats.setdefault(info.layer, WorkspaceStats(info.layer, info.num_experts, info.top_k))
        stats.tokens += int(real.sum())
        stats.uncertain += int(uncertain.sum())
        stats.broadcast += int(broadcast.sum())
        stats.sequences += info.sequences
        top = highest_entropy(info.num_experts)
        bins = (entropy[real] / top * BINS).long().clamp(0, BINS - 1)
        stats.histogram += torch.bincount(bins, minlength=BINS).cpu()

    def _check_checkpointing(self) -> None:
        jitter = any(
            getattr(module, name, 0.0)
            for block in self._redirect.blocks
            for module in (block.module, block.router)
            for name in ("jitter", "jitter_noise", "input_jitter_noise")
        )
        for module in self.model.modules():
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if (
                jitter
                and getattr(module, "gradient_checkpointing", False)
                and not keywords.get("preserve_rng_state", True)
            ):
                raise ValueError(
                    "with router jitter, gradient checkpointing finds other uncertain tokens when it computes a layer "
                    "again without the random state: leave preserve_rng_state at True, or set the jitter to 0"
                )


def _check_threshold(threshold: float, blocks: Sequence[BlockAdapter]) -> None:
    experts = max(block.num_experts for block in blocks)
    if not threshold > 0.0:
        raise ValueError(
            f"threshold must be positive; got {threshold}. To broadcast every token use rule='all'"
        )
    if threshold > highest_entropy(experts):
        raise ValueError(
            f"no token can be uncertain at threshold={threshold}: the entropy of {experts} experts is at most "
            f"{highest_entropy(experts):.5f}"
        )


def _by_stack(max_slots: int | Mapping[str, int | None] | None) -> dict[str, int | None]:
    given = (
        dict(max_slots)
        if isinstance(max_slots, Mapping)
        else dict.fromkeys(("encoder", "decoder"), max_slots)
    )
    unknown = sorted(set(given) - {"encoder", "decoder"})
    if unknown:
        raise ValueError(f"max_slots names the stacks 'encoder' and 'decoder'; got {', '.join(unknown)}")
    for stack, slots in given.items():
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int)):
            raise TypeError(f"max_slots must be an integer or None; got {slots!r} for the {stack}")
        if slots is not None and slots < 0:
            raise ValueError(
                f"max_slots must not be negative (0 broadcasts nothing, None has no limit); got {slots}"
            )
    return {"encoder": given.get("encoder"), "decoder": given.get("decoder")}
