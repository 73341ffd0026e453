"""Where models keep what, on the meta device, for every supported class."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    Qwen2MoeConfig,
    T5Config,
)

from labkit.finetuning import ffn_parts, layer_matrices
from labkit.testbeds.models import tiny

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def on_meta(name: str) -> nn.Module:
    """A two-layer model of width 32 without weights."""
    gpt = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 50} | IDS
    common = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 50} | IDS
    with torch.device("meta"):
        if name == "gpt2":
            return AutoModelForCausalLM.from_config(GPT2Config(**gpt))
        if name == "gpt2_cross":
            return AutoModelForCausalLM.from_config(GPT2Config(**gpt, add_cross_attention=True))
        if name == "gptj":
            return AutoModelForCausalLM.from_config(GPTJConfig(**gpt, rotary_dim=8))
        if name == "t5_gated":
            sizes = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 50}
            return AutoModelForSeq2SeqLM.from_config(T5Config(**sizes, feed_forward_proj="gated-gelu"))
        if name == "bert":
            return BertForMaskedLM(BertConfig(**common | {"pad_token_id": 0}, intermediate_size=64))
        if name == "opt":
            opt = {"ffn_dim": 64, "word_embed_proj_dim": 32} | common | {"pad_token_id": 1}
            return AutoModelForCausalLM.from_config(OPTConfig(**opt))
        if name == "qwen2_moe":
            moe = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24}
            return AutoModelForCausalLM.from_config(
                Qwen2MoeConfig(**common, **moe, num_key_value_heads=2, intermediate_size=64)
            )
        return tiny(name, width=32, heads=2, vocab=50, layers=2)


MODELS = {
    "llama": ("mlp.gate_proj.weight:gate mlp.up_proj.weight:up", "mlp.down_proj.weight"),
    "mistral": ("mlp.gate_proj.weight:gate mlp.up_proj.weight:up", "mlp.down_proj.weight"),
    "qwen3": ("mlp.gate_proj.weight:gate mlp.up_proj.weight:up", "mlp.down_proj.weight"),
    "phi3": ("mlp.gate_up_proj.weight:gate mlp.gate_up_proj.weight:up", "mlp.down_proj.weight"),
    "mixtral": ("mlp.experts.gate_up_proj:gate mlp.experts.gate_up_proj:up", "mlp.experts.down_proj"),
    "gpt2": ("mlp.c_fc.weight:in", "mlp.c_proj.weight"),
    "gptj": ("mlp.fc_in.weight:in", "mlp.fc_out.weight"),
    "gpt_neox": ("mlp.dense_h_to_4h.weight:in", "mlp.dense_4h_to_h.weight"),
    "t5": ("DenseReluDense.wi.weight:in", "DenseReluDense.wo.weight"),
    "t5_gated": ("DenseReluDense.wi_0.weight:gate DenseReluDense.wi_1.weight:up", "DenseReluDense.wo.weight"),
    "bert": ("intermediate.dense.weight:in", "output.dense.weight"),
    "roberta": ("intermediate.dense.weight:in", "output.dense.weight"),
    "opt": ("fc1.weight:in", "fc2.weight"),
}


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_the_two_linear_layers_of_the_ffn(name: str) -> None:
    model = on_meta(name)
    parameters = dict(model.named_parameters())
    stacks = 2 if name.startswith("t5") else 1
    parts = ffn_parts(model)
    assert [part.layer for part in parts] == [0, 1] * stacks
    want_keys, want_values = MODELS[name]
    for part in parts:
        assert part.values.name.endswith(want_values)
        assert "attention" not in part.values.name
        listed = [f"{key.name}:{key.role}" for key in part.keys]
        assert len(listed) == len(want_keys.split())
        assert all(got.endswith(want) for got, want in zip(listed, want_keys.split(), strict=True))
        assert part.gated == (len(listed) == 2)
        assert part.fused == (name in ("phi3", "mixtral"))
        assert part.experts == (name == "mixtral")
        assert part.transposed == (name == "gpt2")
        for key in part.keys:
            assert key.param is parameters[key.name]
        assert part.values.param is parameters[part.values.name]
        width = part.values.param.shape[1 if part.transposed else -2]
        assert width == 32
        assert part.keys[0].param.shape[0 if part.transposed else -1] == 32
        for weight, bias in part.bias_of.items():
            assert parameters[bias].shape[0] in parameters[weight].shape
        has_biases = name in ("gpt2", "gptj", "gpt_neox", "bert", "roberta", "opt")
        assert len(part.bias_of) == (2 if has_biases else 0)


def test_stacks() -> None:
    assert [p.stack for p in ffn_parts(on_meta("t5"))] == ["encoder", "encoder", "decoder", "decoder"]
    assert {p.stack for p in ffn_parts(on_meta("roberta"))} == {"encoder"}
    assert {p.stack for p in ffn_parts(on_meta("llama"))} == {"decoder"}


LAYERS = {  # matrices of each attention, of the FFN; norms; biases
    "llama": ([4], 3, 2, 0),
    "mistral": ([4], 3, 2, 0),
    "qwen2": ([4], 3, 2, 3),
    "qwen3": ([4], 3, 2, 0),
    "phi3": ([2], 2, 2, 0),
    "mixtral": ([4], 2, 2, 0),
    "gpt2": ([2], 2, 2, 6),
    "gptj": ([4], 2, 1, 3),
    "gpt_neox": ([2], 2, 2, 6),
    "bert": ([4], 2, 2, 8),
    "roberta": ([4], 2, 2, 8),
    "opt": ([4], 2, 2, 8),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_divided_completely_and_without_overlap(name: str) -> None:
    model = on_meta(name)
    layers = layer_matrices(model)
    attention, ffn, norms, biases = LAYERS[name]
    assert [layer.layer for layer in layers] == [0, 1]
    for layer in layers:
        assert [len(group.names) for group in layer.attention] == attention
        assert len(layer.ffn) == ffn
        assert len(layer.norms) == norms
        assert len(layer.bias_of) == biases
        assert all(label == "self" for label, _ in layer.attention)
        assert len(layer.other) == (2 if name == "qwen3" else 0)  # norms of queries and keys
    listed = list(itertools.chain.from_iterable(layer.names() for layer in layers))
    inside = [n for n, _ in model.named_parameters() if any(part.isdigit() for part in n.split("."))]
    assert sorted(listed) == sorted(inside)


@pytest.mark.parametrize(("name", "ffn"), [("t5", 2), ("t5_gated", 3)])
def test_t5_has_two_stacks_and_cross_attention(name: str, ffn: int) -> None:
    layers = layer_matrices(on_meta(name))
    assert [layer.stack for layer in layers] == ["encoder"] * 2 + ["decoder"] * 2
    assert [[g.label for g in layer.attention] for layer in layers] == [["self"]] * 2 + [
        ["self", "cross"]
    ] * 2
    assert [len(layer.norms) for layer in layers] == [2, 2, 3, 3]
    assert all(len(layer.ffn) == ffn and len(layer.attention[0].names) == 4 for layer in layers)
    assert [bool(layer.other) for layer in layers] == [True, False, True, False]
    assert layers[0].other[0].endswith("relative_attention_bias.weight")


def test_cross_attention_of_gpt2_is_a_group_of_its_own() -> None:
    layer = layer_matrices(on_meta("gpt2_cross"))[1]
    assert [group.label for group in layer.attention] == ["self", "cross"]
    assert len(layer.attention[1].names) == 3


def test_routers_and_shared_experts() -> None:
    assert layer_matrices(on_meta("mixtral"))[0].router == ["model.layers.0.mlp.gate.weight"]
    model = on_meta("qwen2_moe")
    layer = layer_matrices(model)[1]
    below = "model.layers.1.mlp."
    assert layer.router == [f"{below}gate.weight", f"{below}shared_expert_gate.weight"]
    assert len(layer.ffn) == 5
    routed, shared = (part for part in ffn_parts(model) if part.layer == 1)
    assert (routed.module, routed.fused, routed.experts) == (f"{below}experts", True, True)
    assert (shared.module, shared.fused, shared.experts) == (f"{below}shared_expert", False, False)


def test_llama_2_7b_without_its_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=32, intermediate_size=11008))
    layers = layer_matrices(model)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 6_738_415_616
    assert len(layers) == 32
    assert sum(sizes[name] for name in layers[17].names()) == 202_383_360


def test_other_heads_and_wrappers_are_read_alike() -> None:
    plain = [part.values.name for part in ffn_parts(tiny("roberta"))]
    other = [part.values.name for part in ffn_parts(tiny("roberta", head="classification"))]
    assert plain == other
    wrapped = nn.ModuleDict({"module": tiny("gpt_neox")})
    assert ffn_parts(wrapped)[1].values.name == "module.gpt_neox.layers.1.mlp.dense_4h_to_h.weight"


def test_base_layers_under_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj", "down_proj"]))
    parameters = dict(model.named_parameters())
    parts = ffn_parts(model)
    assert [p.values.name for p in parts] == [
        f"base_model.model.model.layers.{i}.mlp.down_proj.base_layer.weight" for i in (0, 1)
    ]
    assert parts[0].values.param is parameters[parts[0].values.name]
    layer = layer_matrices(model)[0]
    assert layer.attention[0].names[0].endswith("q_proj.base_layer.weight")
    assert not layer.other


def test_interleaved_experts_are_not_taken_for_halves() -> None:
    config = GptOssConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_local_experts=2, vocab_size=50,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, **IDS,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"no feed-forward network recognised in GptOss.*Supported: Llama"):
        ffn_parts(model)


def test_unknown_models_say_what_was_looked_at() -> None:
    layers = nn.ModuleList([nn.ModuleDict({"first": nn.Linear(2, 4), "second": nn.Linear(4, 2)})])
    with pytest.raises(ValueError, match=r"looked at 0\(first, second\).*T5 \(wi/wo"):
        ffn_parts(layers)
    with pytest.raises(ValueError, match="it has no numbered layers"):
        ffn_parts(nn.Linear(2, 2))
    mlp = nn.ModuleDict({"fc1": nn.Linear(2, 4), "fc2": nn.Linear(4, 2), "mixer": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="no attention in 0 recognised"):
        layer_matrices(nn.ModuleList([mlp]))
