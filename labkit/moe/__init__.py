"""Mixture-of-experts layers, routers, and what happens inside them."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "adapters": [
            "BlockAdapter",
            "ExpertMatrices",
            "RouterSwap",
            "iter_moe_blocks",
            "moe_blocks",
            "swap_router",
        ],
        "capture": ["BlockInput", "capture_inputs", "capture_routing"],
        "look_into_moes": [
            "CapturedExperts",
            "Checkpoint",
            "ExpertAtlas",
            "MoEReport",
            "NeuronMatch",
            "active_share",
            "average_similarity",
            "capture_experts",
            "match_neurons",
            "matrix_pca",
            "matrix_similarity",
            "neuron_pca",
            "norm_score_counts",
            "output_similarity",
            "random_gain",
            "rotated_gain",
            "top_agreement",
        ],
        "routing": ["Pairs", "RoutingInfo"],
    },
)
