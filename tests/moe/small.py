"""Small models of real transformers classes."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf


def small_model(name: str, **changes: Any) -> Any:
    """A Mixtral, Qwen-MoE, OLMoE or Switch of width 16 with 4 experts, in eval mode."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }
    common.update(changes)
    if name == "Mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=4, **common)).eval()
    if name == "OLMoE":
        return hf.OlmoeForCausalLM(hf.OlmoeConfig(num_experts=4, **common)).eval()
    if name == "Qwen3-MoE":
        config = hf.Qwen3MoeConfig(
            num_experts=4, moe_intermediate_size=24, head_dim=8, decoder_sparse_step=1, **common
        )
        return hf.Qwen3MoeForCausalLM(config).eval()
    if name == "Qwen2-MoE":
        config = hf.Qwen2MoeConfig(
            num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=8, **common
        )
        return hf.Qwen2MoeForCausalLM(config).eval()
    if name == "Switch":
        config = hf.SwitchTransformersConfig(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            num_experts=4,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            expert_capacity=changes.get("expert_capacity", 3),
            decoder_start_token_id=0,
            initializer_factor=2.0,
        )
        return hf.SwitchTransformersForConditionalGeneration(config).eval()
    raise ValueError(name)
