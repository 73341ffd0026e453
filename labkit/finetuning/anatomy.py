"""Where a transformers model keeps what: keys and values of its feed-forward layers, attention, norms, routers.

Methods that train a part of a model need the part's parameters, whatever their class calls them. Models are read by
their structure (a module with children ``gate_proj``, ``up_proj`` and ``down_proj`` is a gated feed-forward network),
so that models on the meta device, quantised models, models wrapped by DDP or peft and classes with another head are
read alike.

A feed-forward network is a key-value memory, FFN(h) = f(h K^T) V. Key i is a row of the first linear layer and value i
a column of the second; a gated network has two rows, FFN(h) = (f(h G^T) * (h U^T)) V, called gate and up here.
``Conv1D`` of GPT-2 stores both transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import nn

Role = Literal["gate", "up", "in"]
Stack = Literal["encoder", "decoder"]

SUPPORTED = (
    "Llama, Mistral, Qwen and relatives (gate_proj/up_proj/down_proj), Phi-3 (gate_up_proj), Mixtral and Qwen-MoE "
    "(experts.gate_up_proj), GPT-2 (c_fc/c_proj), GPT-J (fc_in/fc_out), GPT-NeoX (dense_h_to_4h/dense_4h_to_h), "
    "T5 (wi/wo or wi_0/wi_1/wo), BERT and RoBERTa (intermediate.dense/output.dense), OPT (fc1/fc2)"
)

# (keys with their roles, values), paths below the module that holds them. "gate_up" is one matrix with both.
_FFN: tuple[tuple[tuple[tuple[str, str], ...], str], ...] = (
    ((("gate_proj", "gate"), ("up_proj", "up")), "down_proj"),
    ((("gate_up_proj", "gate_up"),), "down_proj"),
    ((("wi_0", "gate"), ("wi_1", "up")), "wo"),
    ((("wi", "in"),), "wo"),
    ((("c_fc", "in"),), "c_proj"),
    ((("fc_in", "in"),), "fc_out"),
    ((("dense_h_to_4h", "in"),), "dense_4h_to_h"),
    ((("intermediate.dense", "in"),), "output.dense"),
    ((("fc1", "in"),), "fc2"),
)
_ATTENTION: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("q_attn", "c_attn", "c_proj"),
    ("c_attn", "c_proj"),
    ("q", "k", "v", "o"),
    ("self.query", "self.key", "self.value", "output.dense"),
)
_ROUTERS = ("gate", "router", "shared_expert_gate")
_HEAD_NORMS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm")


class KeyMatrix(NamedTuple):
    """A matrix of keys: name in ``named_parameters()``, parameter, and role."""

    name: str
    param: nn.Parameter
    role: Role


class ValueMatrix(NamedTuple):
    """A matrix of values: name in ``named_parameters()`` and parameter."""

    name: str
    param: nn.Parameter


@dataclass(frozen=True, eq=False)
class FFNMemory:
    """One feed-forward network, read as a memory.

    Attributes
    ----------
    layer : int
        Number of its layer in its stack.
    stack : {"encoder", "decoder"}
        An encoder-only model has an encoder; a decoder-only model a decoder.
    module : str
        Name of the module that holds keys and values.
    keys : list of KeyMatrix
        One matrix with role ``in``, or two with roles ``gate`` and ``up``. A fused network names its one parameter
        twice; its first half of rows is the gate.
    values : ValueMatrix
        The matrix of values.
    transposed : bool
        Whether weights are stored (in, out), as by ``Conv1D``: key i is then a column and value i a row.
    fused : bool
        Whether gate and up share one parameter.
    experts : bool
        Whether both are stacked over experts, with one more dimension in front.
    bias_of : dict
        Names of biases by the names of their weights.
    """

    layer: int
    stack: Stack
    module: str
    keys: list[KeyMatrix]
    values: ValueMatrix
    transposed: bool = False
    fused: bool = False
    experts: bool = False
    bias_of: dict[str, str] = field(default_factory=dict)

    @property
    def gated(self) -> bool:
        """Whether there are two keys to a value."""
        return len(self.keys) == 2


class Group(NamedTuple):
    """The matrices of one attention: ``self`` or ``cross``, and the parameters' names."""

    label: str
    names: list[str]


@dataclass(frozen=True)
class LayerMatrices:
    """Names of the parameters of one layer, by what they are for.

    Attributes
    ----------
    layer : int
        Number of the layer in its stack.
    stack : {"encoder", "decoder"}
    attention : list of Group
        Self-attention, and cross-attention where there is one.
    ffn : list of str
        Matrices of keys and values, of routed and shared experts too.
    norms : list of str
        Scales of the norms on the residual stream.
    router : list of str
        What chooses or weighs experts.
    bias_of : dict
        Names of biases by the names of their weights, of matrices and of norms.
    other : list of str
        The rest: relative position biases, norms of queries and keys.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> layer_matrices(tiny("gpt_neox", layers=1))[0].attention
    [Group(label='self', names=['gpt_neox.layers.0.attention.query_key_value.weight',
    'gpt_neox.layers.0.attention.dense.weight'])]
    """

    layer: int
    stack: Stack
    attention: list[Group]
    ffn: list[str]
    norms: list[str]
    router: list[str]
    bias_of: dict[str, str] = field(default_factory=dict)
    other: list[str] = field(default_factory=list)

    def names(self) -> list[str]:
        """All of them."""
        matrices = [name for group in self.attention for name in group.names]
        return [*matrices, *self.ffn, *self.norms, *self.router, *self.bias_of.values(), *self.other]


def ffn_parts(model: nn.Module) -> list[FFNMemory]:
    """Find the keys and the values of every feed-forward network.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, on any device, wrapped by DDP or peft or not.

    Returns
    -------
    list of FFNMemory
        In the order of the model; a layer with shared and routed experts has several.

    Raises
    ------
    ValueError
        If no feed-forward network is recognised. The message names what was looked at and what is supported.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> memory = ffn_parts(tiny("llama", layers=1))[0]
    >>> [(name, role) for name, _, role in memory.keys]
    [('model.layers.0.mlp.gate_proj.weight', 'gate'), ('model.layers.0.mlp.up_proj.weight', 'up')]
    >>> memory.values.name
    'model.layers.0.mlp.down_proj.weight'
    """
    found = []
    for path, module in model.named_modules():
        place = _place(path)
        if place is None:
            continue
        memory = _memory(path, module, *place)
        if memory is not None:
            found.append(memory)
    if not found:
        raise ValueError(_unknown(model, "feed-forward network"))
    return found


def layer_matrices(model: nn.Module) -> list[LayerMatrices]:
    """List the parameters of every layer by what they are for.

    Parameters
    ----------
    model : torch.nn.Module
        As for `ffn_parts`.

    Returns
    -------
    list of LayerMatrices
        In the order of the model.

    Raises
    ------
    ValueError
        If attention or feed-forward network of a layer is not recognised.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> layer = layer_matrices(tiny("t5", layers=2))[-1]
    >>> layer.layer, layer.stack, [group.label for group in layer.attention], len(layer.norms)
    (1, 'decoder', ['self', 'cross'], 3)
    """
    layers: dict[str, LayerMatrices] = {}
    for memory in ffn_parts(model):
        root = _root(memory.module)
        made = layers.setdefault(root, LayerMatrices(memory.layer, memory.stack, [], [], [], []))
        made.ffn.extend(dict.fromkeys([*(key.name for key in memory.keys), memory.values.name]))
        made.bias_of.update(memory.bias_of)
    for path, module in model.named_modules():
        root = _root(path)
        if root not in layers:
            continue
        made = layers[root]
        group = _attention(path, module, made.bias_of)
        if group is not None:
            made.attention.append(group)
        if _is_norm(module) and path.rpartition(".")[2] not in _HEAD_NORMS:
            made.norms.append(f"{path}.weight")
            if getattr(module, "bias", None) is not None:
                made.bias_of[f"{path}.weight"] = f"{path}.bias"
        if _child(module, "experts") is not None:
            for name in _ROUTERS:
                child = _child(module, name)
                if child is not None:
                    made.router.extend(f"{path}.{name}.{leaf}" for leaf, _ in child.named_parameters())
    without = [root for root, made in layers.items() if not made.attention]
    if without:
        raise ValueError(_unknown(model, f"attention in {without[0]}"))
    placed = {root: set(made.names()) for root, made in layers.items()}
    for name, _ in model.named_parameters():
        root = _root(name)
        if root in layers and name not in placed[root] and ".lora_" not in name:
            layers[root].other.append(name)
    return list(layers.values())


def _place(path: str) -> tuple[int, Stack] | None:
    """Number and stack of the layer that a module lies in: its first number names the layer."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return None
    return int(parts[number]), "encoder" if "encoder" in parts[:number] else "decoder"


def _root(path: str) -> str:
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _child(module: nn.Module, path: str) -> nn.Module | None:
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def _weight(parent: nn.Module, path: str, name: str) -> tuple[str, nn.Parameter, nn.Module] | None:
    """Parameter called `name` below `parent`: of a linear layer, of one that peft wraps, or bare (experts)."""
    own = parent._parameters.get(name)
    if own is not None:
        return f"{path}.{name}", own, parent
    child = _child(parent, name)
    if child is None:
        return None
    at = f"{path}.{name}"
    base = child._modules.get("base_layer")
    if base is not None:
        child, at = base, f"{at}.base_layer"
    weight = child._parameters.get("weight")
    return None if weight is None else (f"{at}.weight", weight, child)


def _memory(path: str, module: nn.Module, layer: int, stack: Stack) -> FFNMemory | None:
    for key_names, value_name in _FFN:
        pairs = ((_weight(module, path, name), role) for name, role in key_names)
        keys = [(found, role) for found, role in pairs if found is not None]
        values = _weight(module, path, value_name)
        if values is None or len(keys) < len(key_names):
            continue
        listed: list[KeyMatrix] = []
        biases: dict[str, str] = {}
        for (name, param, holder), role in keys:
            roles: tuple[Role, ...] = ("gate", "up") if role == "gate_up" else (role,)  # type: ignore[assignment]
            listed += [KeyMatrix(name, param, one) for one in roles]
            _add_bias(biases, name, holder)
        _add_bias(biases, values[0], values[2])
        experts = values[2] is module
        # Other models interleave gate and up, or stack experts transposed, under the same names.
        first, last = listed[0].param, values[1]
        if experts and first.shape[1:] != (2 * last.shape[2], last.shape[1]):
            continue
        return FFNMemory(
            layer,
            stack,
            path,
            listed,
            ValueMatrix(*values[:2]),
            transposed=type(values[2]).__name__ == "Conv1D",
            fused=len(listed) > len(keys),
            experts=experts,
            bias_of=biases,
        )
    return None


def _add_bias(biases: dict[str, str], name: str, holder: nn.Module) -> None:
    if name.endswith(".weight") and holder._parameters.get("bias") is not None:
        biases[name] = name.removesuffix("weight") + "bias"


def _attention(path: str, module: nn.Module, biases: dict[str, str]) -> Group | None:
    for names in _ATTENTION:
        found = [_weight(module, path, name) for name in names]
        if all(one is not None for one in found):
            listed = [one for one in found if one is not None]
            for name, _, holder in listed:
                _add_bias(biases, name, holder)
            low = path.lower()
            cross = any(word in low for word in ("cross", "encdec", "encoder_attn"))
            return Group("cross" if cross else "self", [name for name, _, _ in listed])
    return None


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and module._parameters.get("weight") is not None


def _unknown(model: nn.Module, what: str) -> str:
    layers: Iterator[str] = (
        f"{path.rpartition('.')[2]}({', '.join(dict(module.named_children()))})"
        for path, module in model.named_modules()
        if _place(path) is not None and any(True for _ in module.named_children())
    )
    seen = list(dict.fromkeys(layers))[:8]
    where = f"looked at {'; '.join(seen)}" if seen else "it has no numbered layers"
    return f"no {what} recognised in {type(model).__name__}: {where}. Supported: {SUPPORTED}"
