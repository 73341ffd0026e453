"""Input that cannot be converted, and what is said about it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaForCausalLM

from labkit.kv.dha import (
    DHAConverter,
    DHALlamaConfig,
    FusionSchedule,
    HeadGroups,
    convert_to_gqa,
    export_to_llama,
    pool_heads,
)
from tests.kv.dha.checkpoints import llama


def both(model, groups, message):
    for call in (lambda: DHAConverter(model, groups), lambda: pool_heads(model, groups)):
        with pytest.raises(ValueError, match=message):
            call()


def test_checkpoints_that_cannot_be_converted(mha, uneven):
    neox = transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32
        )
    )
    both(neox, uneven, "GPTNeoXAttention: its query, key and value projections are one matrix")
    both(pool_heads(mha, uneven), uneven, "DHALlamaAttention; head fusion supports LlamaAttention")
    with pytest.raises(TypeError, match="got str"):
        DHAConverter("llama", uneven)
    quantised = copy.deepcopy(mha)
    quantised.config.quantization_config = {"quant_method": "bitsandbytes"}
    both(quantised, uneven, "of a quantised model")
    adapted = copy.deepcopy(mha)
    adapted.model.layers[1].self_attn.v_proj = nn.utils.parametrizations.weight_norm(
        adapted.model.layers[1].self_attn.v_proj
    )
    both(adapted, uneven, "layer 1, v_proj is a ParametrizedLinear")
    tied = copy.deepcopy(mha)
    tied.model.layers[1].self_attn.k_proj.weight = tied.model.layers[0].self_attn.k_proj.weight
    both(tied, uneven, r"layers.0.self_attn.k_proj.weight and model.layers.1.* are tied")
    with torch.device("meta"):
        both(LlamaForCausalLM(mha.config), uneven, "no weights in memory")
    both(mha, HeadGroups.adjacent(3, 4, 2), "groups are of 3 layers with 4 key-value heads")
    both(llama(kv_heads=2), uneven, "num_key_value_heads=2")


def test_other_bad_arguments(mha, uneven, ids):
    for call, message in (
        (lambda: pool_heads(mha, uneven, "median"), "method must be one of mean"),
        (lambda: convert_to_gqa(mha, 3), r"must divide the 4 heads: \[1, 2, 4\]; got 3"),
        (lambda: export_to_llama(pool_heads(mha, uneven)), "layer 0 has 2 key and 3 value heads"),
        (lambda: export_to_llama(mha), "must be a DHALlamaForCausalLM"),
        (lambda: FusionSchedule(steps=0), "steps must be"),
        (lambda: FusionSchedule(fall=0), "fall is a share"),
        (lambda: FusionSchedule(contract=2), "contract is a share"),
        (lambda: FusionSchedule(penalty=-1), "penalty must not be negative"),
        (lambda: DHAConverter(mha, uneven, operator_lr=0), "operator_lr must be positive"),
        (lambda: DHALlamaConfig(num_hidden_layers=1, key_map=[[0] * 31]), "has 31 entries"),
        (lambda: DHALlamaConfig(num_hidden_layers=2, key_map=[[0] * 32]), "key_map has 1 layers"),
        (lambda: DHALlamaConfig(num_hidden_layers=1, value_map=[[1] * 32]), "without gaps"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    converter = DHAConverter(mha, uneven, schedule=FusionSchedule(steps=5))
    with pytest.raises(RuntimeError, match="batches ended at step 2 of 5"):
        list(converter.fuse([ids] * 2))
