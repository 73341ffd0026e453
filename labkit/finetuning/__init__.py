"""Fine-tuning that keeps what a model knew, and that says which weights it moves."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "anatomy": ["FFNMemory", "LayerMatrices", "ffn_parts", "layer_matrices"],
        "keys_values": [
            "EditEvaluator",
            "EditRequest",
            "EditResult",
            "EditScores",
            "KeysOrValues",
            "MemoryTrace",
            "TrainedPart",
            "as_pair",
            "edit_by_gradient",
            "harmonic_mean",
            "key_covariance",
            "lora_targets",
            "memory_trace",
            "rome_edit",
            "rome_update",
            "target_log_probs",
            "target_modules",
            "token_ids",
            "train_only",
            "without_memory",
        ],
    },
)
