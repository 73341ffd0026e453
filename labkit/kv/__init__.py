"""Key-value caches: what to keep of them, and how to make them smaller.

NACL (:mod:`labkit.kv.nacl`) evicts once, right after the prefill; the baselines of its paper stand beside it:
one-shot rules (:mod:`labkit.kv.baselines`) and greedy ones that evict token by token (:mod:`labkit.kv.greedy`).
All are context managers on a Hugging Face model, share one eviction core (:mod:`labkit.kv.press`), and keep
caches that are really smaller.

DHA (:mod:`labkit.kv.dha`) makes the cache narrower instead of shorter: it merges the key heads and the value heads of
a checkpoint. Presses work on the result.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "press": ["CachePress", "FullCache"],
        "state": ["LayerStats", "cache_bytes", "decode_inputs"],
        "attention": ["LayerContext"],
        "nacl": ["NACLConfig", "NACLPress", "Split", "nacl_priorities", "nacl_select", "proxy_scores"],
        "dha": [
            "DHAConverter",
            "DHALlamaAttention",
            "DHALlamaConfig",
            "DHALlamaForCausalLM",
            "DHALlamaModel",
            "FusionSchedule",
            "HeadGroups",
            "align_heads",
            "convert_to_gqa",
            "export_to_llama",
            "head_moments",
            "head_similarity",
            "linear_cka",
            "pool_heads",
            "search_groups",
        ],
        "baselines": ["H2OPress", "RandomPress", "SnapKVPress", "StreamingLLMPress"],
        "evaluate": ["answers", "continuation_loss", "decode_logits", "recall_accuracy", "text_loss"],
        "comparison": ["policies"],
        "greedy": ["GreedyEviction", "GreedyH2O", "GreedyMSRNN", "GreedyTOVA", "Scissorhands"],
        "interop": ["nacl_scorer_press", "scorer_press_of"],
        "_kernels": ["compact_kv", "proxy_column_sums"],
    },
)
