"""Which positions of a forward pass are padding, and which of them a layer sees."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

_OF_ENCODER = ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")


class RealPositions:
    """Reads the attention masks of a model's forward pass, and selects a layer's outputs by them.

    The decoder of an encoder-decoder has the mask ``decoder_attention_mask`` or, without one, the positions whose
    label counts. Layers whose output has no such positions (pooled rows, adapters of a pooler) are counted whole.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature = inspect.signature(model.forward)
        config = getattr(model, "config", None)
        self._two_sides = bool(getattr(config, "is_encoder_decoder", False))
        head = getattr(model, "get_output_embeddings", lambda: None)()
        self._head = id(head) if head is not None else None
        self._masks: dict[str, Tensor | None] = {}

    def read(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the whole model."""
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = given | given.get("kwargs", {})
        own = given.get("attention_mask")
        if own is not None and own.ndim != 2:
            raise ValueError(
                f"ignore_padding needs an attention_mask of shape (batch, tokens), got {tuple(own.shape)}: pass that, "
                "or leave ignore_padding off"
            )
        self._masks = {"encoder": own, "decoder": own}
        if self._two_sides:
            decoder, labels = given.get("decoder_attention_mask"), given.get("labels")
            if decoder is None and labels is not None:
                decoder = labels != -100
            self._masks["decoder"] = decoder

    def select(self, name: str, source: nn.Module, outputs: Tensor) -> Tensor:
        """Outputs at real positions, (N, d_out)."""
        side = "encoder"
        if self._two_sides and (id(source) == self._head or ".decoder." in f".{name}."):
            side = "encoder" if any(f".{part}." in f".{name}." for part in _OF_ENCODER) else "decoder"
        mask = self._masks.get(side)
        flat = outputs.flatten(0, -2)
        if mask is None:
            return flat
        if id(source) == self._head and outputs.ndim == 3 and outputs.shape[1] < mask.shape[1]:
            mask = mask[:, -outputs.shape[1] :]  # logits_to_keep
        if mask.numel() != len(flat):
            return flat
        return flat[mask.reshape(-1).bool()]
