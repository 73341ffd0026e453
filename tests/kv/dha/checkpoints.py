"""Tiny Llama checkpoints."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def llama(kv_heads=4, heads=4, layers=2, seed=1, **settings):
    fields = {
        "vocab_size": 64, "hidden_size": 8 * heads, "intermediate_size": 32, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "initializer_range": 0.3,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 256,
        **settings,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # Llama starts them at 0, where nothing could be seen of them
            torch.nn.init.normal_(parameter, std=0.3)
    return model
