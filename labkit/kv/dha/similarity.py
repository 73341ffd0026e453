r"""How alike heads are: linear CKA of what they make of the same tokens.

.. math::

    \mathrm{CKA}(i, j) = \frac{\lVert X_i^\top X_j \rVert_F^2}
                              {\lVert X_i^\top X_i \rVert_F \, \lVert X_j^\top X_j \rVert_F}

with X_i the centred outputs of head i, ``(m, d)``; keys before the rotary embedding. It does not see a rotation of a
head's basis. ``metric="cosine"`` does, :math:`\mathrm{tr}(X_i^\top X_j)` over the norms, and so tells which heads can
be averaged as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.kv.dha.checks import attention_layers

METRICS = ("cka", "cosine")
Similarity = dict[int, dict[str, np.ndarray]]


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two sets of features of the same m tokens, ``(m, d)`` and ``(m, d')``; 0 without variance.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
    >>> turned = x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    >>> round(linear_cka(x, turned), 4), linear_cka(x, torch.ones(3, 2))
    (1.0, 0.0)
    """
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise ValueError(
            f"x and y must be (m, d) of the same m tokens; got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).norm() ** 2 / scale) if scale > 0 else 0.0


@dataclass
class HeadMoments:
    """Second moments of a layer's head outputs over a calibration set.

    Attributes
    ----------
    sums : dict of str to Tensor
        ``"k"`` and ``"v"``: sum of the outputs over tokens, ``(K d,)``.
    products : dict of str to Tensor
        Sum of the outer products, ``(K d, K d)`` float64 (float32 on devices without).
    tokens : int
        Tokens seen.
    heads : int
        Key-value heads K.
    """

    sums: dict[str, Tensor]
    products: dict[str, Tensor]
    tokens: int
    heads: int

    def blocks(self, kind: str, *, centred: bool) -> Tensor:
        """Cross moments of the heads, ``(K, K, d, d)``: entry [i, j] is the mean of x_i x_j^T over tokens."""
        total = self.products[kind] / self.tokens
        if centred:
            mean = self.sums[kind] / self.tokens
            total = total - torch.outer(mean, mean)
        width = total.shape[0] // self.heads
        return total.view(self.heads, width, self.heads, width).transpose(1, 2)


@torch.no_grad()
def head_moments(model: Any, batches: Iterable[Any], *, max_tokens: int = 16_384) -> list[HeadMoments]:
    """Run calibration tokens through a model and collect the moments of its key and value heads.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint.
    batches : iterable
        Token ids ``(B, T)``, pairs whose first part they are, or mappings with ``input_ids`` and, where there is
        padding, ``attention_mask``.
    max_tokens : int, default 16384
        No further batch is read once so many tokens were seen.

    Returns
    -------
    list of HeadMoments
        One for each layer.

    Raises
    ------
    ValueError
        If there are no batches, or the model is not supported.
    """
    layers = attention_layers(model)
    heads = layers[0].config.num_key_value_heads
    moments = [HeadMoments({}, {}, 0, heads) for _ in layers]
    real: list[Tensor | None] = [None]

    def listen(record: HeadMoments, kind: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            rows = output.detach().flatten(0, 1)
            if real[0] is not None:
                rows = rows[real[0]]
            rows = rows.to(torch.float64 if rows.device.type != "mps" else torch.float32)
            record.sums[kind] = record.sums.get(kind, 0) + rows.sum(0)
            record.products[kind] = record.products.get(kind, 0) + rows.T @ rows
            if kind == "k":
                record.tokens += len(rows)

        return hook

    handles = []
    was_training = model.training
    model.eval()
    try:
        for layer, record in zip(layers, moments, strict=True):
            handles.append(layer.k_proj.register_forward_hook(listen(record, "k")))
            handles.append(layer.v_proj.register_forward_hook(listen(record, "v")))
        for batch in batches:
            ids, mask = _tokens(batch)
            ids = ids.to(model.device)
            real[0] = None if mask is None else mask.to(model.device).bool().flatten()
            model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
            if moments[0].tokens >= max_tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if not moments[0].tokens:
        raise ValueError("no calibration tokens: batches must yield token ids (B, T), and yielded none")
    return moments


def _tokens(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], Tensor):
        return batch[0], None
    if hasattr(batch, "keys") and "input_ids" in batch:
        return batch["input_ids"], batch.get("attention_mask")
    raise TypeError(
        f"a batch must be token ids (B, T), a pair starting with them, or have input_ids; got {type(batch).__name__}"
    )


def head_similarity(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    metric: str = "cka",
    moments: list[HeadMoments] | None = None,
    max_tokens: int = 16_384,
) -> Similarity:
    """Similarity of the key heads and of the value heads of every layer.

    Parameters
    ----------
    model : LlamaForCausalLM
        The checkpoint; not used where ``moments`` are given.
    batches, max_tokens
        Calibration tokens, as for :func:`head_moments`.
    metric : {"cka", "cosine"}, default "cka"
        See the module.
    moments : list of HeadMoments, optional
        What :func:`head_moments` collected, instead of ``batches``.

    Returns
    -------
    dict of int to dict
        ``{layer: {"k": (K, K) array, "v": (K, K) array}}``, float64.

    Raises
    ------
    ValueError
        For an unknown metric, no calibration tokens, or an unsupported model.

    Warns
    -----
    UserWarning
        For heads whose output never changes; their similarity to all heads is 0.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {metric!r}")
    if moments is None:
        if batches is None:
            raise ValueError("give calibration batches, or moments from head_moments")
        moments = head_moments(model, batches, max_tokens=max_tokens)
    table: Similarity = {}
    dead = []
    for layer, record in enumerate(moments):
        table[layer] = {}
        for kind in ("k", "v"):
            blocks = record.blocks(kind, centred=True)  # (K, K, d, d)
            if metric == "cka":
                cross = blocks.square().sum((-1, -2))
            else:
                cross = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
            own = cross.diagonal().clamp(min=0).sqrt()
            floor = record.products[kind].diagonal().amax() / record.tokens * 1e-12
            alive = own > (floor if metric == "cka" else floor.sqrt())
            dead += [f"layer {layer} {kind}{h}" for h in (~alive).nonzero().flatten().tolist()]
            scale = torch.where(alive, own, torch.ones_like(own))
            value = cross / scale[:, None] / scale
            table[layer][kind] = (value * alive[:, None] * alive).cpu().numpy()
    if dead:
        warnings.warn(
            f"heads without variance, counted as like no other: {', '.join(dead[:8])}", stacklevel=2
        )
    return table
