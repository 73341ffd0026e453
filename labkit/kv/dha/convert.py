"""From a Llama checkpoint and mixing weights to a model with fewer key and value heads; and the pooling baselines."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.kv.dha.align import aligned_weights
from labkit.kv.dha.checks import attention_layers, check_fits
from labkit.kv.dha.groups import HeadGroups
from labkit.kv.dha.model import DHALlamaConfig, DHALlamaForCausalLM
from labkit.kv.dha.similarity import HeadMoments

METHODS = ("mean", "first", "random", "align")


def _mixed(mix: Tensor, weight: Tensor) -> Tensor:
    """Combine heads: mix (G, K) of weight (K d, D), or of a bias (K d,)."""
    heads = weight.view(mix.shape[1], -1)
    return (mix.to(weight) @ heads).view(-1, *weight.shape[1:])


def _permuted(weight: Tensor, order: Sequence[int], dim: int) -> Tensor:
    """Reorder the query heads along a dimension of H d."""
    parts = weight.unflatten(dim, (len(order), -1))
    return parts.index_select(dim, torch.tensor(order, device=weight.device)).flatten(dim, dim + 1)


@torch.no_grad()
def collapsed(
    model: Any,
    groups: HeadGroups,
    mixes: Sequence[dict[str, Tensor]],
    weights: Sequence[dict[str, Tensor]] | None = None,
) -> DHALlamaForCausalLM:
    """Build the small model, head c of a layer being a combination of the heads in group c.

    Query heads are sorted by key head, then by value head, together with the columns of the output projection,
    which changes nothing.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint; left as it is.
    groups : HeadGroups
        Of its key-value heads.
    mixes : sequence of dict
        For every layer ``{"k": (G_K, K), "v": (G_V, K)}``.
    weights : sequence of dict, optional
        For every layer the attention weights by name (``"q_proj.weight"``, ...), where not those of the model.
    """
    layers = model.model.layers
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    per_query = model.config.num_attention_heads // groups.heads
    maps: dict[str, list[list[int]]] = {"k": [], "v": []}
    for index in range(len(layers)):
        found = dict(layers[index].self_attn.state_dict()) if weights is None else dict(weights[index])
        own = {kind: [g for g in groups.maps(kind)[index] for _ in range(per_query)] for kind in ("k", "v")}
        places = list(zip(own["k"], own["v"], strict=True))
        order = sorted(range(len(places)), key=places.__getitem__)  # stable
        for kind in ("k", "v"):
            maps[kind].append([own[kind][i] for i in order])
            for part in ("weight", "bias"):
                name = f"{kind}_proj.{part}"
                if name in found:
                    found[name] = _mixed(mixes[index][kind], found[name])
        for name in ("q_proj.weight", "q_proj.bias"):
            if name in found:
                found[name] = _permuted(found[name], order, 0)
        found["o_proj.weight"] = _permuted(found["o_proj.weight"], order, 1)
        state |= {f"model.layers.{index}.self_attn.{name}": x for name, x in found.items()}
    fields = _fields(model.config)
    config = DHALlamaConfig(**fields, key_map=maps["k"], value_map=maps["v"])
    return _built(DHALlamaForCausalLM, config, state, model)  # type: ignore[no-any-return]


def _fields(config: Any) -> dict[str, Any]:
    left_out = {"model_type", "architectures", "key_map", "value_map", "num_key_value_heads", "_name_or_path"}
    return {k: v for k, v in config.to_dict().items() if k not in left_out}


def _built(kind: Any, config: Any, state: dict[str, Tensor], source: Any) -> Any:
    config._attn_implementation = source.config._attn_implementation
    with torch.random.fork_rng(
        devices=[]
    ):  # initial weights are overwritten; the caller's seed is not used up
        made = kind(config)
    made.to(device=source.device, dtype=source.dtype)
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(source.generation_config)
    made.train(source.training)
    return made


def pool_heads(
    model: Any,
    groups: HeadGroups,
    method: str = "mean",
    *,
    moments: list[HeadMoments] | None = None,
    seed: int = 0,
) -> DHALlamaForCausalLM:
    """Merge the heads of every group at once, without training: the baseline of fusion.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint; left as it is.
    groups : HeadGroups
        From :func:`search_groups` or :meth:`HeadGroups.adjacent`.
    method : {"mean", "first", "random", "align"}, default "mean"
        ``"mean"`` averages, ``"first"`` and ``"random"`` keep one head of each group, ``"align"`` averages in a
        common basis (:func:`align_heads`) and scales the result to the mean norm of its members.
    moments : list of HeadMoments, optional
        For ``"align"``: align what heads say on calibration tokens; without, their weights.
    seed : int, default 0
        For ``"random"``.

    Returns
    -------
    DHALlamaForCausalLM

    Raises
    ------
    ValueError
        For an unknown method, an unsupported model, or groups of another one.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import HeadGroups, convert_to_gqa, pool_heads
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=1, num_attention_heads=4))
    >>> small = pool_heads(model, HeadGroups(keys=[[[0, 2], [1, 3]]], values=[[[0, 1, 2, 3]]], heads=4))
    >>> small.config.key_map, small.config.value_map
    ([[0, 0, 1, 1]], [[0, 0, 0, 0]])
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    layers = attention_layers(model)
    check_fits(groups, layers)
    generator = torch.Generator().manual_seed(seed)
    weights = aligned_weights(model, groups, moments) if method == "align" else None
    mixes = []
    for index, layer in enumerate(layers):
        mix = {}
        for kind in ("k", "v"):
            parts = groups.of(kind)[index]
            table = torch.zeros(len(parts), groups.heads)
            for number, members in enumerate(parts):
                if method in ("mean", "align"):
                    table[number, list(members)] = 1 / len(members)
                else:
                    pick = int(torch.randint(len(members), (), generator=generator))
                    table[number, members[pick if method == "random" else 0]] = 1
            if weights is not None:
                table = _renormed(table, weights[index][f"{kind}_proj.weight"])
            mix[kind] = table.to(layer.k_proj.weight.device)
        mixes.append(mix)
    return collapsed(model, groups, mixes, weights)


def _renormed(mix: Tensor, weight: Tensor) -> Tensor:
    """Scale averages so that each has the mean norm of its members."""
    heads = weight.detach().float().cpu().view(mix.shape[1], -1)
    wanted = mix @ heads.norm(dim=1)
    got = (mix @ heads).norm(dim=1)
    return mix * (wanted / got.clamp_min(1e-12))[:, None]


def convert_to_gqa(
    model: Any,
    num_key_value_heads: int,
    method: str = "mean",
    *,
    moments: list[HeadMoments] | None = None,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Grouped-query attention from a checkpoint by pooling neighbouring heads: a plain ``LlamaForCausalLM``.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint; left as it is.
    num_key_value_heads : int
        Heads that stay in each layer, a divisor of the checkpoint's.
    method, moments, seed
        As for :func:`pool_heads`.

    Raises
    ------
    ValueError
        As :func:`pool_heads`, and for a number that does not divide.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from labkit.kv import HeadGroups, convert_to_gqa, pool_heads
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
    ...     num_hidden_layers=1, num_attention_heads=4))
    >>> convert_to_gqa(model, 2).config.num_key_value_heads
    2
    """
    layers = attention_layers(model)
    groups = HeadGroups.adjacent(len(layers), layers[0].config.num_key_value_heads, num_key_value_heads)
    return export_to_llama(pool_heads(model, groups, method, moments=moments, seed=seed))


def export_to_llama(model: DHALlamaForCausalLM) -> LlamaForCausalLM:
    """Turn a model whose groups are those of grouped-query attention into a stock ``LlamaForCausalLM``; exact.

    Raises
    ------
    ValueError
        If keys and values are grouped apart, in unequal groups, or differently many in different layers: then
        no stock model computes the same.
    """
    if not isinstance(model, DHALlamaForCausalLM):
        raise ValueError(f"model must be a DHALlamaForCausalLM; got {type(model).__name__}")
    layouts = [layer.self_attn.layout for layer in model.model.layers]
    heads = {layout.key_heads for layout in layouts}
    for index, layout in enumerate(layouts):
        if not layout.stock or layout.key_heads != layout.value_heads or len(heads) > 1:
            raise ValueError(
                f"layer {index} has {layout.key_heads} key and {layout.value_heads} value heads, and a stock model "
                "needs equal groups of neighbours, the same for keys and values and in all layers: keep the "
                "DHALlamaForCausalLM, or search with method='per_layer', decoupled=False"
            )
    config = LlamaConfig(**_fields(model.config), num_key_value_heads=heads.pop())
    return _built(LlamaForCausalLM, config, model.state_dict(), model)  # type: ignore[no-any-return]
