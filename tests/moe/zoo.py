"""Tiny models of real transformers classes, one of each way to build a mixture of experts."""

import functools

import torch
import transformers

DECODERS = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen2Moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [],
    },
    "Qwen3Moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [0]},
    "Olmoe": {"num_experts": 8},
    "DeepseekV2": {"n_group": 2, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None},
    "DeepseekV3": {"n_group": 2, "topk_group": 1, "q_lora_rank": 16},
    "GraniteMoe": {"num_local_experts": 8},
    "GptOss": {"num_local_experts": 8, "head_dim": 8},
    "Phimoe": {"num_local_experts": 8},
    "JetMoe": {"num_local_experts": 8, "kv_channels": 8},
}
DEEPSEEK = {
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
NAMES = [*DECODERS, "SwitchTransformers"]


def make(name, seed=0, **changes):
    """A random model of 8 experts and width 32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _made(name, changes).eval()


def _made(name, changes):
    if name == "SwitchTransformers":
        config = transformers.SwitchTransformersConfig(
            **{
                "vocab_size": 64,
                "d_model": 32,
                "d_kv": 8,
                "d_ff": 24,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_sparse_encoder_layers": 1,
                "num_sparse_decoder_layers": 1,
                "num_heads": 4,
                "num_experts": 8,
                "expert_capacity": 64,
                "dropout_rate": 0.0,
                "decoder_start_token_id": 0,
                "pad_token_id": 0,
                "router_jitter_noise": 0.0,
            }
            | changes
        )
        return transformers.SwitchTransformersForConditionalGeneration(config)
    fields = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    fields |= DEEPSEEK if name.startswith("Deepseek") else {}
    fields |= DECODERS[name] | changes
    if name == "JetMoe":
        del fields["num_attention_heads"]
    config = getattr(transformers, f"{name}Config")(**fields)
    return getattr(transformers, f"{name}ForCausalLM")(config)


@functools.cache
def shared(name):
    """The same model for every test that leaves it as it is."""
    return make(name)


def inputs(name, batch=2, length=7, padded=0):
    """Random token ids and an attention mask whose last row begins with padding."""
    tokens = torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[-1, :padded] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    if name == "SwitchTransformers":
        given |= {"decoder_input_ids": tokens[:, :5], "decoder_attention_mask": mask[:, :5]}
    return given
