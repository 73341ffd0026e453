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
        "routing": ["Pairs", "RoutingInfo"],
    },
)
