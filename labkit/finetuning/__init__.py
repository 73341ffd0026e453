"""Fine-tuning that keeps what a model knew, and that says which weights it moves."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "hft": [
            "HalfFineTuningCallback",
            "HalfMask",
            "HalfSelector",
            "check_optimizer",
            "half_finetuning",
            "half_reset_",
        ],
        "migu": [
            "EWC",
            "MIGU",
            "IncLoRA",
            "MIGUCallback",
            "MIGUOptimizer",
            "OLoRA",
            "RandomRowMask",
            "magnitude_mask",
            "mask_overlap",
            "signature",
            "signature_distance",
        ],
        "sequential": [
            "GEM",
            "Method",
            "Replay",
            "ScoreMatrix",
            "Task",
            "combine",
            "gem_projection",
            "sequential_finetune",
        ],
        "anatomy": ["FFNMemory", "LayerMatrices", "ffn_parts", "layer_matrices"],
    },
)
