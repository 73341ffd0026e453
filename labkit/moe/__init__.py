"""Mixture-of-experts layers, routers, and what happens inside them."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "routing": ["Pairs", "RoutingInfo"],
    },
)
