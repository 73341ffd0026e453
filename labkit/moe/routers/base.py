"""What all routers share: the two ways to call one, and the softmax over experts in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from labkit.moe.routing import RoutingInfo


class Router(nn.Module):
    """A choice of k experts for every token.

    A subclass defines :meth:`scores`. The module can stand in a transformers model as ``block.gate``: :meth:`forward`
    takes ``(..., D)`` and returns ``(logits, weights, index)``, logits before the softmax.

    Parameters
    ----------
    hidden_size, num_experts, top_k : int
        D, E and k.
    renormalize : bool, default True
        Whether a token's k weights are divided by their sum (Mixtral), or stay probabilities over all E (Switch, OLMoE).
    jitter : float, default 0
        In training, what the router reads is multiplied by uniform noise from ``[1 - jitter, 1 + jitter]``.

    Raises
    ------
    ValueError
        For sizes that are not positive, ``top_k`` above ``num_experts``, or ``jitter`` outside ``[0, 1)``.
    """

    kind = ""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = True,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("num_experts", num_experts), ("top_k", top_k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if top_k > num_experts:
            raise ValueError(
                f"top_k={top_k} exceeds num_experts={num_experts}: a token has that many experts at most"
            )
        if not 0.0 <= jitter < 1.0:
            raise ValueError(f"jitter must lie in [0, 1); got {jitter}")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.renormalize = renormalize
        self.jitter = jitter

    def options(self) -> dict[str, Any]:
        """Arguments that build the same router again (without its weights): plain numbers, strings and lists."""
        return {
            "kind": self.kind,
            "hidden_size": self.hidden_size,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "renormalize": self.renormalize,
            "jitter": self.jitter,
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options().items() if name != "kind")

    def scores(self, hidden: Tensor) -> Tensor:
        """Logits ``(T, E)`` of tokens ``(T, D)``."""
        raise NotImplementedError

    def choose(self, logits: Tensor, mask: Tensor | None, layer: int) -> RoutingInfo:
        """Turn logits into a decision."""
        return RoutingInfo.from_logits(
            logits, self.top_k, renormalize=self.renormalize, mask=mask, layer=layer
        )

    def route(
        self,
        hidden: Tensor,
        state: Any = None,
        mask: Tensor | None = None,
        *,
        layer: int = -1,
        **context: Any,
    ) -> tuple[RoutingInfo, Any]:
        """Choose experts, with the record of the choice.

        Parameters
        ----------
        hidden : Tensor
            ``(..., D)``, taken as T tokens.
        state : object, optional
            What the previous layer's router passed on; only :class:`~labkit.moe.RecurrentRouter` reads it.
        mask : Tensor, optional
            ``(..., )`` bool, False at padding.
        layer : int, default -1
            Index of the layer, for the record.
        **context
            What a router needs beside the hidden states (``token_ids`` of :class:`~labkit.moe.HashRouter`).

        Returns
        -------
        RoutingInfo, object
            The decision, and the state for the next layer.
        """
        del context
        tokens = self._tokens(hidden)
        flat = None if mask is None else mask.reshape(-1)
        return self.choose(self.scores(self._jittered(tokens)), flat, layer), state

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``(T, E)``, weights ``(T, k)`` and experts ``(T, k)``, as the gate of a transformers block."""
        info, _ = self.route(hidden_states)
        return info.logits, info.weights, info.index

    def _tokens(self, hidden: Tensor) -> Tensor:
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self).__name__} reads tokens of width {self.hidden_size}; got {tuple(hidden.shape)}"
            )
        return hidden.reshape(-1, self.hidden_size)  # (T, D)

    def _jittered(self, tokens: Tensor) -> Tensor:
        if not (self.training and self.jitter):
            return tokens
        return tokens * torch.empty_like(tokens).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
