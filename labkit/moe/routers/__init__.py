"""Routers: how a token's experts are chosen. All share :class:`~labkit.moe.routers.base.Router`'s two calls."""

from __future__ import annotations

from typing import Any

from labkit.moe.routers.base import Router
from labkit.moe.routers.cosine import CosineRouter
from labkit.moe.routers.hashing import HashRouter
from labkit.moe.routers.projections import (
    FrozenRandomRouter,
    HyperRouter,
    LinearRouter,
    MLPRouter,
    SwitchRouter,
)
from labkit.moe.routers.recurrent import RecurrentCell, RecurrentRouter, RouterState

__all__ = [
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
]

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "mlp": MLPRouter,
    "random": FrozenRandomRouter,
    "hyper": HyperRouter,
    "cosine": CosineRouter,
    "recurrent": RecurrentRouter,
    "hash": HashRouter,
    "switch": SwitchRouter,
}


def make_router(kind: str, hidden_size: int, num_experts: int, top_k: int, **options: Any) -> Router:
    """Build a router by name.

    Parameters
    ----------
    kind : str
        A key of ``ROUTERS``: linear, mlp, random, hyper, cosine (XMoE with ``reduce=16``), recurrent, hash or switch.
    hidden_size, num_experts, top_k : int
        D, E and k.
    **options
        The router's own arguments.

    Raises
    ------
    ValueError
        For an unknown kind, or options out of range.

    Examples
    --------
    >>> make_router("mlp", 16, 4, 2, width=8).num_experts
    4
    """
    if kind not in ROUTERS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, ROUTERS))}; got {kind!r}")
    return ROUTERS[kind](hidden_size, num_experts, top_k, **options)
