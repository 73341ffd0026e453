"""Tiny models made from configs, one for each supported family."""

from __future__ import annotations

import pytest
import torch
import transformers

FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.5}),
    "mixtral": ("Mixtral", {"num_local_experts": 2, "sliding_window": None}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}),
}


@pytest.fixture
def tiny():
    """Factory: tiny(family="llama", attention="sdpa", kv_heads=2, **config) -> model in eval mode."""

    def make(family="llama", attention="sdpa", kv_heads=2, layers=2, **config):
        name, extra = FAMILIES[family]
        torch.manual_seed(1)
        settings = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": kv_heads,
            "head_dim": 8,
            "initializer_range": 0.4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "max_position_embeddings": 512,
            **extra,
            **config,
        }
        if settings.get("partial_rotary_factor"):
            share = settings.pop("partial_rotary_factor")
            settings["rope_parameters"] = {
                "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share,
            }  # fmt: skip
        made = getattr(transformers, f"{name}Config")(**settings)
        made._attn_implementation = attention
        return getattr(transformers, f"{name}ForCausalLM")(made).eval()

    return make


@pytest.fixture
def prompt():
    """prompt(n, rows=1, seed=0) -> random token ids without the special ones."""

    def make(n, rows=1, seed=0):
        return torch.randint(2, 64, (rows, n), generator=torch.Generator().manual_seed(seed))

    return make


def decoded(model, ids, mask=None, tokens=6, **settings):
    """Tokens that greedy decoding appends, and the cache it leaves."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    return out.sequences[:, ids.shape[1] :], out.past_key_values


@pytest.fixture
def decode():
    return decoded
