"""Fine-tuning that keeps what a model knew, and that says which weights it moves."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "beamlora": [
            "BeamEvent",
            "BeamLinear",
            "BeamLoraConfig",
            "BeamScheduler",
            "BeamSearchCallback",
            "BeamVariant",
            "RankHistory",
            "beam_scores",
            "beam_threshold",
            "expand",
            "fold_",
            "importances",
            "load_beam_adapter",
            "prune_counts",
            "pruned_and_top",
            "rank_importance",
            "save_beam_adapter",
            "silenced",
        ],
    },
)
