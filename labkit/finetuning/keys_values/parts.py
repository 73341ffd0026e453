"""One side of the memories: which modules they are, and training them alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from labkit.finetuning.anatomy import FFNMemory, ffn_parts, layer_matrices

PARTS = ("keys", "key_gate", "key_up", "values")
_ROLE = {"key_gate": "gate", "key_up": "up"}


@dataclass(frozen=True, eq=False)
class Chosen:
    """One matrix to train, and which of its rows where gate and up share it."""

    memory: FFNMemory
    name: str
    param: nn.Parameter
    half: int | None = None

    def mask(self) -> torch.Tensor | None:
        """1 where it is trained, of the parameter's shape up to broadcasting; None for all of it."""
        if self.half is None:
            return None
        rows = self.param.shape[-2]
        mask = self.param.new_zeros(rows, 1)
        mask[self.half * rows // 2 : (self.half + 1) * rows // 2] = 1
        return mask


def choose(model: nn.Module, part: str, layers: Sequence[int] | None = None) -> list[Chosen]:
    """Matrices of one side of the memories.

    Raises
    ------
    ValueError
        For an unknown part, a gate where there is none, an unknown layer, or a model that is not understood.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}; got {part!r}")
    memories = ffn_parts(model)
    if part in _ROLE and not all(memory.gated for memory in memories):
        plain = next(memory for memory in memories if not memory.gated)
        raise ValueError(
            f"part={part!r} needs a gated feed-forward network; that of {type(model).__name__} has one matrix of keys "
            f"({plain.keys[0].name}). Take part='keys'"
        )
    if layers is not None:
        memories = _of_layers(memories, layers)
    chosen = []
    for memory in memories:
        if part == "values":
            chosen.append(Chosen(memory, *memory.values))
            continue
        for key in memory.keys:
            if part == "keys" and memory.fused:
                chosen.append(Chosen(memory, key.name, key.param))
                break
            if part == "keys" or key.role == _ROLE[part]:
                half = ("gate", "up").index(key.role) if memory.fused else None
                chosen.append(Chosen(memory, key.name, key.param, half))
    return chosen


def _of_layers(memories: list[FFNMemory], layers: Sequence[int]) -> list[FFNMemory]:
    wanted = [layers] if isinstance(layers, int) else list(layers)
    if not wanted:
        raise ValueError("layers is empty: name at least one layer, or leave it out for all")
    known = sorted({memory.layer for memory in memories})
    for layer in wanted:
        if isinstance(layer, bool) or layer not in known:
            raise ValueError(f"layers holds {layer!r}; the model has layers {known[0]} to {known[-1]}")
    return [memory for memory in memories if memory.layer in wanted]


def target_modules(model: nn.Module, part: str, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the linear layers that hold one side of the memories.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, quantised or not, on any device.
    part : {"keys", "key_gate", "key_up", "values"}
        Side. On gated networks ``keys`` is both matrices.
    layers : sequence of int, optional
        Layers, counted from 0 in each stack; all by default.

    Returns
    -------
    list of str
        Full module names, in the order of the model.

    Raises
    ------
    ValueError
        As for `train_only`; and where the matrices are no modules of their own (fused experts, fused gates). The
        message says what to use instead.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> target_modules(tiny("roberta"), "values", layers=[1])
    ['roberta.encoder.layer.1.output.dense']
    """
    chosen = choose(model, part, layers)
    for one in chosen:
        if one.half is not None:
            raise ValueError(
                f"{one.name} holds gate and up in one matrix, so {part} is no module of its own. Take part='keys', or "
                f"train_only, which trains half of a matrix"
            )
        if one.memory.experts:
            raise ValueError(
                f"{one.name} is a stack of experts and no linear layer. For LoRA give peft its "
                f"LoraConfig(target_parameters=[{one.name!r}, ...]); to train it, take train_only"
            )
    return [one.name.removesuffix(".weight").removesuffix(".base_layer") for one in chosen]


def lora_targets(model: nn.Module, part: str, attention: Sequence[str] = ("q_proj", "v_proj")) -> list[str]:
    """Modules for ``peft.LoraConfig``: some of the attention and one side of the memories.

    A LoRA of rank r has r (D + m) parameters on a matrix of keys and as many on the values, so both sides are
    compared at an equal number.

    Parameters
    ----------
    model : torch.nn.Module
        As for `target_modules`.
    part : {"keys", "key_gate", "key_up", "values"}
        Side; the paper takes one matrix at a time (``key_gate``, ``key_up`` or ``values``).
    attention : sequence of str
        Last names of attention matrices; empty for none.

    Returns
    -------
    list of str
        Full module names.

    Raises
    ------
    ValueError
        As for `target_modules`, and if the attention has no matrix of a given name.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> lora_targets(tiny("gpt_neox", layers=1), "keys", attention=["query_key_value"])
    ['gpt_neox.layers.0.attention.query_key_value', 'gpt_neox.layers.0.mlp.dense_h_to_4h']
    """
    if isinstance(attention, str):
        raise TypeError(
            f"attention must be a sequence of names, got the string {attention!r}: put it in a list"
        )
    targets = target_modules(model, part)
    if not attention:
        return targets
    names = [
        name.removesuffix(".weight").removesuffix(".base_layer")
        for layer in layer_matrices(model)
        for group in layer.attention
        for name in group.names
    ]
    have = {name.rpartition(".")[2] for name in names}
    missing = sorted(set(attention) - have)
    if missing:
        raise ValueError(
            f"no attention matrix of {type(model).__name__} is called {', '.join(missing)}; there are "
            f"{', '.join(sorted(have))}. Give attention=[...] of these, or () for none"
        )
    return [name for name in names if name.rpartition(".")[2] in attention] + targets


@dataclass(frozen=True, eq=False)
class TrainedPart:
    """What `train_only` left trainable.

    Attributes
    ----------
    part : str
        Side.
    names : list of str
        Parameters with a gradient, biases of keys among them.
    parameters : list of torch.nn.Parameter
        The same, for an optimizer.
    count, total : int
        Entries that are trained, and entries of the model.
    halves : dict
        Names of parameters of which only one half is trained, with the mask of that half.
    """

    part: str
    names: list[str]
    parameters: list[nn.Parameter]
    count: int
    total: int
    halves: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def fraction(self) -> float:
        """Share of the model's parameters that is trained."""
        return self.count / self.total


@contextmanager
def train_only(
    model: nn.Module, part: str, layers: Sequence[int] | None = None, *, biases: bool = True
) -> Iterator[TrainedPart]:
    """Let only one side of the memories have a gradient; at the end everything is as it was.

    Enter it before the optimizer is made, and give the optimizer ``trained.parameters``: frozen parameters then have
    neither gradient nor optimizer state, and no weight decay reaches them. There is nothing random in it, so that
    every process of a distributed run freezes the same parameters; enter it before the model is wrapped.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model.
    part : {"keys", "key_gate", "key_up", "values"}
        Side.
    layers : sequence of int, optional
        Layers, counted from 0 in each stack; all by default.
    biases : bool
        Whether the biases of keys are trained with them. The bias of the second linear layer belongs to no key and is
        never trained.

    Yields
    ------
    TrainedPart

    Raises
    ------
    ValueError
        If the part or a layer is unknown, a gate is asked for where there is none, the model is not understood, or
        its weights are quantised.

    Notes
    -----
    Where gate and up are one matrix (Mixtral's experts, Phi-3) and one of them is asked for, the other half's
    gradient is set to zero. Take an optimizer without weight decay then: decay would still shrink that half.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", layers=4)
    >>> with train_only(model, "values", layers=[1, 2]) as trained:
    ...     print(trained.names, trained.count == sum(p.numel() for p in model.parameters() if p.requires_grad))
    ['model.layers.1.mlp.down_proj.weight', 'model.layers.2.mlp.down_proj.weight'] True
    >>> all(p.requires_grad for p in model.parameters())
    True
    """
    chosen = choose(model, part, layers)
    refuse_quantised(chosen)
    parameters = dict(model.named_parameters())
    trained = {one.name: one.param for one in chosen}
    if biases and part != "values":
        found = (one.memory.bias_of.get(one.name) for one in chosen)
        trained |= {name: parameters[name] for name in found if name is not None}
    count = sum(p.numel() for p in trained.values())
    halves = {one.name: mask for one in chosen if (mask := one.mask()) is not None}
    count -= sum(parameters[name].numel() // 2 for name in halves)
    before = {name: p.requires_grad for name, p in parameters.items()}
    with ExitStack() as stack:
        for name, mask in halves.items():
            stack.callback(parameters[name].register_hook(_masked(mask)).remove)
        try:
            for name, p in parameters.items():
                p.requires_grad_(name in trained)
            total = sum(p.numel() for p in parameters.values())
            yield TrainedPart(part, list(trained), list(trained.values()), count, total, halves)
        finally:
            for name, p in parameters.items():
                p.requires_grad_(before[name])


def _masked(mask: torch.Tensor) -> Any:
    return lambda gradient: gradient * mask.to(gradient)


def refuse_quantised(chosen: Iterable[Chosen]) -> None:
    """Raise if a weight is stored in a form that has no gradient."""
    for one in chosen:
        if not one.param.is_floating_point() or hasattr(one.param, "quant_state"):
            raise ValueError(
                f"{one.name} is quantised ({one.param.dtype}), so it can't be trained or edited itself. Train a LoRA "
                f"on it (lora_targets), or load the model unquantised"
            )


class KeysOrValues(TrainerCallback):
    """Train one side of the memories with ``transformers.Trainer``, or with a trainer of trl.

    ``Trainer(..., callbacks=[KeysOrValues("keys")])``. It freezes the rest when the trainer is made, hence before
    there is an optimizer, and gives everything back when training has ended.

    Parameters
    ----------
    part, layers, biases
        As for `train_only`.

    Attributes
    ----------
    trained : TrainedPart or None
        What is trained, from the making of the trainer on.

    Raises
    ------
    ValueError
        As `train_only`, when the trainer is made; when training begins, if the optimizer holds other parameters
        (because the callback was added after the trainer had made it) or decays a matrix that is half trained.

    Examples
    --------
    >>> callback = KeysOrValues("values", layers=[1, 2])
    >>> callback.trained is None
    True
    """

    def __init__(self, part: str, layers: Sequence[int] | None = None, *, biases: bool = True) -> None:
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(map(repr, PARTS))}; got {part!r}")
        self.part, self.layers, self.biases = part, layers, biases
        self.trained: TrainedPart | None = None
        self._open: ExitStack | None = None

    def _freeze(self, model: nn.Module) -> None:
        if self._open is None:
            stack = ExitStack()
            self.trained = stack.enter_context(train_only(model, self.part, self.layers, biases=self.biases))
            self._open = stack

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze the rest, before there is an optimizer."""
        self._freeze(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Freeze again if training was ended before, and check the optimizer."""
        self._freeze(kwargs["model"])
        optimizer = kwargs.get("optimizer")
        if optimizer is None or self.trained is None:
            return
        groups = optimizer.param_groups
        stray = sum(1 for group in groups for p in group["params"] if not p.requires_grad)
        if stray:
            raise ValueError(
                f"the optimizer holds {stray} tensors besides the {self.part}: it was made before KeysOrValues froze "
                f"them. Give the callback to the trainer's constructor (callbacks=[...]) and leave the optimizer to it"
            )
        if self.trained.halves and any(group.get("weight_decay", 0.0) for group in groups):
            raise ValueError(
                f"gate and up share a matrix here, and weight decay would shrink the frozen half too: train "
                f"{self.part} with weight_decay=0, or part='keys'"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give back what was frozen."""
        if self._open is not None:
            self._open.close()
            self._open = None
