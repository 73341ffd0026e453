r"""How much attention a few proxy queries pay to every key, summed over the proxies.

.. math:: F_{hj} = \sum_{p \in P} \mathrm{softmax}_j\!\left(q_{hp} \cdot k_{hj} \cdot \text{scale}\right)

Three implementations agree: ``reference`` (the definition; differentiable; holds the attention matrix),
``chunked`` (plain PyTorch in O(S) additional memory) and ``triton`` (no attention matrix at all).
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels._dispatch import check_backend, check_triton, triton_installed
from labkit.kernels.proxy_column_sums.reference import (
    block_elements,
    proxy_column_sums_chunked,
    proxy_column_sums_reference,
)

__all__ = ["BACKENDS", "proxy_column_sums", "proxy_column_sums_chunked", "proxy_column_sums_reference"]

BACKENDS = ("auto", "reference", "chunked", "triton")

# The rule of backend="auto":
#   1. a gradient is wanted                                -> reference (the others have none)
#   2. CUDA, float32/16/bfloat16, d <= 256, B*H*P*S >= TRITON_MIN_LOGITS, triton installed -> triton
#   3. B*H*P*S <= block_elements(device): one block       -> reference: one batched product, no loop
#   4. otherwise                                           -> chunked
# The threshold of 2 is an estimate, not yet a measurement: 4M logits are 16 MiB in float32, about where the
# reference's passes over the logits begin to cost more than the launches of its handful of kernels.
TRITON_MIN_LOGITS = 1 << 22
TRITON_MAX_WIDTH = 256


def _choose(q: Tensor, k: Tensor, *, wants_grad: bool) -> str:
    logits = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if wants_grad:
        return "reference"
    if (
        q.is_cuda
        and logits >= TRITON_MIN_LOGITS
        and q.shape[3] <= TRITON_MAX_WIDTH
        and q.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and triton_installed()
    ):
        return "triton"
    return "reference" if logits <= block_elements(q.device) else "chunked"


def _checked_positions(q: Tensor, k: Tensor, positions: Tensor, key_mask: Tensor | None) -> Tensor:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"q must be (B, H, P, d) and k (B, K, S, d); got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    batch, heads, n_proxies, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width:
        raise ValueError(
            f"q and k must agree in batch and head width; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"the {heads} query heads of q must be a multiple of the {k.shape[1]} KV heads of k")
    if not q.is_floating_point() or q.dtype != k.dtype or q.device != k.device:
        raise ValueError(
            "q and k must share one floating dtype and one device; "
            f"got {q.dtype} on {q.device} and {k.dtype} on {k.device}"
        )
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise TypeError(
            f"proxy_positions must hold integers; got {positions.dtype} (for a mask, pass mask.nonzero())"
        )
    if positions.shape not in ((n_proxies,), (batch, n_proxies)):
        raise ValueError(
            f"proxy_positions must have shape ({n_proxies},) or ({batch}, {n_proxies}), one for each query; "
            f"got {tuple(positions.shape)}"
        )
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(
                f"key_mask must be bool with False at padding; got {key_mask.dtype} (use mask.bool())"
            )
        if key_mask.shape != (batch, k.shape[2]):
            raise ValueError(f"key_mask must have shape ({batch}, {k.shape[2]}); got {tuple(key_mask.shape)}")
    return positions.to(q.device).expand(batch, n_proxies)


def proxy_column_sums(
    q: Tensor,
    k: Tensor,
    proxy_positions: Tensor,
    *,
    key_mask: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    head_reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Sum, over proxy queries, of their attention to each key.

    Parameters
    ----------
    q : Tensor
        Queries of the proxies, after rotary embedding, ``(B, H, P, d)``.
    k : Tensor
        Keys, ``(B, K, S, d)``, of the same dtype; H is a multiple of K, and query head h reads KV head
        ``h // (H // K)``.
    proxy_positions : Tensor
        Index among the keys of each proxy, ``(P,)`` or ``(B, P)``, integers in any order. A negative entry
        is no proxy (padding) and adds nothing; one at or past S sees every key.
    key_mask : Tensor, optional
        ``(B, S)`` bool, False at padding. A padded key takes no part in the softmax and scores 0: a caller
        who selects keys by score must exclude it, for instance by setting it to minus infinity.
    causal : bool, default True
        Whether the proxy at position p sees the keys 0..p only.
    scale : float, optional
        Factor of the logits; ``d ** -0.5`` by default.
    head_reduction : {"mean", "none"}, default "mean"
        ``"mean"`` averages the g = H/K query heads of a KV head, ``"none"`` keeps them apart.
    backend : {"auto", "reference", "chunked", "triton"}, default "auto"
        ``"auto"`` takes the kernel on CUDA when the problem is large enough, the chunked form elsewhere, and
        the reference for small problems and wherever a gradient is wanted (the rule stands above
        ``TRITON_MIN_LOGITS`` in this module). Only the reference is differentiable: scoring a cache for
        eviction belongs under ``torch.no_grad()``.

    Returns
    -------
    Tensor
        Scores in float32 (float64 for float64 inputs), ``(B, K, S)``, or ``(B, H, S)`` with
        ``head_reduction="none"``. Each live proxy that sees a key distributes a total of 1.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit together, an unknown ``head_reduction`` or ``backend``,
        and a backend without gradients where one is wanted.
    TypeError
        For positions that are not integers, or a mask that is not bool.

    Notes
    -----
    The score of NACL's proxy-token eviction, ``F`` in arXiv 2408.03675. With all tokens as proxies it is the
    accumulated attention of H2O, with the last token alone that of TOVA.

    Examples
    --------
    >>> import torch
    >>> from labkit.kernels.proxy_column_sums import proxy_column_sums
    >>> q, k = torch.zeros(1, 2, 2, 8), torch.randn(1, 1, 4, 8)
    >>> proxy_column_sums(q, k, torch.tensor([1, 3]))   # zero queries attend evenly to what they see
    tensor([[[0.7500, 0.7500, 0.2500, 0.2500]]])
    """
    check_backend(backend, BACKENDS)
    if head_reduction not in ("mean", "none"):
        raise ValueError(f"head_reduction must be 'mean' or 'none'; got {head_reduction!r}")
    positions = _checked_positions(q, k, proxy_positions, key_mask)
    wants_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    chosen = _choose(q, k, wants_grad=wants_grad) if backend == "auto" else backend
    if wants_grad and chosen != "reference":
        raise ValueError(
            f"backend={chosen!r} gives no gradient, and q or k requires one: call it under torch.no_grad(), "
            "detach the inputs, or use backend='reference'"
        )
    arguments = {
        "key_mask": key_mask,
        "causal": causal,
        "scale": q.shape[-1] ** -0.5 if scale is None else float(scale),
        "head_reduction": head_reduction,
    }
    if chosen == "triton":
        check_triton(q.device, (q.dtype,))
        from labkit.kernels.proxy_column_sums.triton import proxy_column_sums_triton

        return proxy_column_sums_triton(q, k, positions, **arguments)  # type: ignore[arg-type]
    if chosen == "chunked":
        return proxy_column_sums_chunked(q, k, positions, **arguments)  # type: ignore[arg-type]
    return proxy_column_sums_reference(q, k, positions, **arguments)  # type: ignore[arg-type]
