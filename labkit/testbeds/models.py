"""Tiny models of real transformers classes, made from a configuration and never downloaded.

A model of 64 or 128 features does not train with the defaults of its big relatives. The one setting that
decides is ``initializer_range``: 0.02 is meant for a width of a thousand and more; at width 64 it leaves
attention logits near zero and learning crawls. ``init="auto"`` takes ``0.35 / sqrt(width)``, which is 0.044
at width 64.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

Head = Literal["lm", "classification", "base"]

_DECODERS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "gpt_neox")
_LM_CLASSES: dict[str, Any] = {
    **dict.fromkeys(_DECODERS, AutoModelForCausalLM),
    "t5": AutoModelForSeq2SeqLM,
    "roberta": AutoModelForMaskedLM,
}
FAMILIES: tuple[str, ...] = tuple(_LM_CLASSES)
"""Families that `tiny` builds."""

_EXPLICIT_HEAD_DIM = {"llama", "mistral", "qwen3", "mixtral"}
_GROUPED = {"llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral"}


def nearest(name: str, allowed: Iterable[str], what: str) -> str:
    """Return `name` if it is allowed, else raise with the allowed names and the nearest of them.

    Raises
    ------
    ValueError
        When `name` is not in `allowed`.

    Examples
    --------
    >>> nearest("lama", ["llama", "t5"], "family")
    Traceback (most recent call last):
    ...
    ValueError: unknown family 'lama'; did you mean 'llama'? Allowed: llama, t5
    """
    allowed = list(allowed)
    if name in allowed:
        return name
    close = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown {what} {name!r}{hint} Allowed: {', '.join(allowed)}")


def tiny_config(
    family: str = "llama",
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    vocab: int = 256,
    init: float | Literal["auto"] = "auto",
    **config: Any,
) -> PreTrainedConfig:
    """Make the configuration of a tiny model.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    width : int
        Width D of the residual stream, a multiple of `heads`.
    layers, heads : int
        Number of layers (T5: of the encoder and of the decoder) and of query heads H.
    kv_heads : int, optional
        Number of key-value heads K, a divisor of `heads`; by default as many as query heads. GPT-NeoX, T5 and
        RoBERTa have no grouped heads and refuse a smaller number.
    vocab : int
        Vocabulary size V.
    init : float or "auto"
        Standard deviation of the initial weights; "auto" is ``0.35 / sqrt(width)``. T5 scales its initial
        weights with the width by itself: there a number is taken as ``initializer_factor``, and "auto" leaves
        1.
    **config
        Any field of the family's own configuration class, under its own name, plus two common ones:
        ``rope_theta`` (base of the rotary frequencies) and ``attention`` ("sdpa" or "eager"; eager returns
        attention maps).

    Returns
    -------
    transformers.PreTrainedConfig

    Raises
    ------
    ValueError
        For an unknown family or field (the nearest name is given), or head counts that do not divide.

    Notes
    -----
    Special-token ids are None, so that no id points beyond a small vocabulary. T5 and RoBERTa need a padding
    id and get 0. Give ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` when a tokenizer defines them.

    Examples
    --------
    >>> tiny_config("llama", width=64, kv_heads=2).num_key_value_heads
    2
    """
    nearest(family, FAMILIES, "family")
    kv_heads = heads if kv_heads is None else kv_heads
    counts = {"width": width, "layers": layers, "heads": heads, "kv_heads": kv_heads, "vocab": vocab}
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{name} must be a positive whole number, got {count!r}")
    if width % heads:
        raise ValueError(f"width ({width}) must be a multiple of heads ({heads})")
    if heads % kv_heads:
        raise ValueError(f"kv_heads ({kv_heads}) must divide heads ({heads})")
    if kv_heads != heads and family not in _GROUPED:
        raise ValueError(
            f"{family} has no grouped heads: leave kv_heads out, or take one of {sorted(_GROUPED)}"
        )
    if init != "auto" and not (isinstance(init, int | float) and init > 0):
        raise ValueError(f'init must be "auto" or a positive number, got {init!r}')

    attention = config.pop("attention", None)
    theta = config.pop("rope_theta", None)
    fields: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 5 * width // 2,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "t5":
        for common, own in {
            "hidden_size": "d_model",
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "intermediate_size": "d_ff",
        }.items():
            fields[own] = fields.pop(common)
        fields |= {
            "d_kv": width // heads,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        }
        fields["initializer_factor"] = 1.0 if init == "auto" else float(init)
    else:
        fields["initializer_range"] = 0.35 / math.sqrt(width) if init == "auto" else float(init)
        fields["max_position_embeddings"] = 2048
    if family in _GROUPED:
        fields["num_key_value_heads"] = kv_heads
    if family in _EXPLICIT_HEAD_DIM:
        fields["head_dim"] = width // heads
    if family == "mixtral":
        fields |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if family in {"gpt_neox", "roberta"}:
        fields["intermediate_size"] = 4 * width
    if family == "roberta":
        fields |= {"pad_token_id": 0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        fields |= {"max_position_embeddings": 514, "type_vocab_size": 1}

    own_class = type(AutoConfig.for_model(family))
    known = {name for name in vars(own_class()) if not name.startswith("_")} | {"output_attentions"}
    known |= {"num_labels", "problem_type", "decoder_start_token_id", "dtype"}
    for name in config:
        nearest(name, sorted(known), f"field of {own_class.__name__}")
    rope: dict[str, Any]
    if theta is not None:
        if "rope_parameters" not in known:
            raise ValueError(f"{family} has no rotary positions, so no rope_theta")
        rope = {"rope_theta": float(theta), "rope_type": "default"}
        if family == "gpt_neox":
            rope["partial_rotary_factor"] = 1.0
        config = {"rope_parameters": rope, **config}
    elif family == "gpt_neox":  # a quarter of a 16-wide head would leave two rotary frequencies
        rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0}
        config = {"rope_parameters": rope, **config}
    made: PreTrainedConfig = own_class(**(fields | config))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        given = getattr(made, name, None)
        for token in given if isinstance(given, list) else [given]:
            if token is not None and not 0 <= token < vocab:
                raise ValueError(f"{name}={token} must be None or lie in 0..{vocab - 1}")
    if attention is not None:
        made._attn_implementation = nearest(attention, ["sdpa", "eager", "flex_attention"], "attention")
    return made


def tiny(
    family: str = "llama",
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    vocab: int = 256,
    init: float | Literal["auto"] = "auto",
    head: Head = "lm",
    seed: int | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Make a tiny, freshly initialised model of a real transformers class.

    Parameters
    ----------
    family, width, layers, heads, kv_heads, vocab, init, **config
        As for `tiny_config`.
    head : {"lm", "classification", "base"}
        Output head: language model (causal; T5 sequence to sequence, RoBERTa masked), sequence classification
        (``num_labels=1`` gives a reward model), or none.
    seed : int, optional
        Seed of the initial weights. The global generator is left as it was. None draws from the global
        generator.

    Returns
    -------
    transformers.PreTrainedModel
        In float32, in training mode, on the CPU.

    Raises
    ------
    ValueError
        As `tiny_config`, and for an unknown head.

    Examples
    --------
    >>> model = tiny("llama", width=64, layers=2, vocab=104, seed=0)
    >>> type(model).__name__, model.num_parameters()
    ('LlamaForCausalLM', 101184)
    >>> tiny("lama")
    Traceback (most recent call last):
    ...
    ValueError: unknown family 'lama'; did you mean 'llama'? Allowed: llama, mistral, qwen2, qwen3, ...
    """
    made = tiny_config(
        family, width=width, layers=layers, heads=heads, kv_heads=kv_heads, vocab=vocab, init=init, **config
    )
    nearest(head, ["lm", "classification", "base"], "head")
    factory: Any = {
        "lm": _LM_CLASSES[family],
        "classification": AutoModelForSequenceClassification,
        "base": AutoModel,
    }[head]
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model: PreTrainedModel = factory.from_config(made)
    return model.train()
