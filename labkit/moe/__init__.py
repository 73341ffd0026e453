"""Mixture-of-experts layers, routers, and what happens inside them."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "block": ["MoEBlock", "MoEOutput", "SharedExpert", "collect_routing"],
        "capacity": ["expert_capacity", "within_capacity"],
        "experts": ["Experts", "labkit_experts_forward", "use_labkit_experts"],
        "losses": ["importance_cv2", "load_balancing_loss", "load_cv2", "router_z_loss"],
        "routers": [
            "ROUTERS",
            "CosineRouter",
            "FrozenRandomRouter",
            "HashRouter",
            "HyperRouter",
            "LinearRouter",
            "MLPRouter",
            "RecurrentCell",
            "RecurrentRouter",
            "Router",
            "RouterState",
            "SwitchRouter",
            "make_router",
        ],
        "routing": ["Pairs", "RoutingInfo"],
        "saving": ["load_moe", "replace_module", "save_moe"],
        "stats": ["RoutingStats", "cross_layer_information", "moe_stats", "router_entropy"],
        "switch": ["SwitchBlock"],
    },
)
