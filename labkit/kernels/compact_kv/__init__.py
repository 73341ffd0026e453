"""Make a key-value cache smaller: keep chosen positions, chosen separately for every KV head."""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels._dispatch import check_backend, check_triton, triton_installed
from labkit.kernels.compact_kv.reference import compact_kv_reference, compact_kv_rows

__all__ = ["BACKENDS", "compact_kv", "compact_kv_reference", "compact_kv_rows"]

BACKENDS = ("auto", "reference", "rows", "triton")

# The rule of backend="auto":
#   1. a gradient is wanted                                          -> reference (the others have none)
#   2. CUDA in float32, float16 or bfloat16 with triton installed    -> triton
#   3. fewer than MIN_ROWS_ELEMENTS elements kept of K, on the CPU   -> reference: making row numbers costs more
#   4. otherwise                                                     -> rows
# Rule 2 rests on counting, not yet on a measurement: one launch and one read of the index, against several launches
# and a temporary of the index's size. Rule 3 was measured on one core.
MIN_ROWS_ELEMENTS = 1 << 13


def _check(k: Tensor, v: Tensor, keep: Tensor) -> None:
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(
            "k and v must be (B, K, S, d) with the same B, K and S (d may differ); "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if keep.ndim != 3 or keep.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"keep must be ({k.shape[0]}, {k.shape[1]}, S'), positions for every batch row and KV head; "
            f"got {tuple(keep.shape)}"
        )
    if keep.dtype != torch.int64:
        raise TypeError(
            f"keep must be int64; got {keep.dtype} (use keep.long(), or mask.nonzero() for a mask)"
        )
    if not (k.device == v.device == keep.device):
        raise ValueError(f"k, v and keep must share a device; got {k.device}, {v.device} and {keep.device}")
    if keep.device.type == "cpu" and keep.numel():
        low, high = (int(x) for x in keep.aminmax())
        if low < 0 or high >= k.shape[2]:
            raise ValueError(f"keep must lie in 0..{k.shape[2] - 1}; got values from {low} to {high}")


def _choose(k: Tensor, v: Tensor, keep: Tensor, *, wants_grad: bool) -> str:
    if wants_grad:
        return "reference"
    if k.is_cuda:
        fits = all(x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in (k, v))
        return "triton" if fits and triton_installed() else "rows"
    return "rows" if keep.numel() * k.shape[3] >= MIN_ROWS_ELEMENTS else "reference"


def compact_kv(k: Tensor, v: Tensor, keep: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Keep the rows ``keep`` of a cache's keys and values.

    Parameters
    ----------
    k, v : Tensor
        Keys and values, ``(B, K, S, d)``; the two may differ in d. They need not be contiguous.
    keep : Tensor
        Positions to keep, ``(B, K, S')`` int64, ascending so that the cache stays in order (any order is
        followed, and not checked). On the CPU positions are checked to lie in 0..S-1; on CUDA they are not,
        as that would wait for the device.
    backend : {"auto", "reference", "rows", "triton"}, default "auto"
        ``"auto"`` takes Triton on CUDA, whole-row copies elsewhere, and the reference for tiny caches and
        wherever a gradient is wanted.

    Returns
    -------
    k, v : Tensor
        ``(B, K, S', d)``, contiguous and with storage of their own, so that the full cache can be freed.

    Raises
    ------
    ValueError
        For shapes or devices that do not fit, a position outside the cache (CPU), or a backend without
        gradients where one is wanted.
    TypeError
        If ``keep`` is not int64.

    Examples
    --------
    >>> import torch
    >>> from labkit.kernels.compact_kv import compact_kv
    >>> k = torch.arange(8.0).reshape(1, 2, 4, 1)
    >>> kept, _ = compact_kv(k, k, torch.tensor([[[0, 3], [1, 2]]]))
    >>> kept.squeeze(-1)
    tensor([[[0., 3.],
             [5., 6.]]])
    """
    check_backend(backend, BACKENDS)
    _check(k, v, keep)
    wants_grad = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if backend == "auto":
        backend = _choose(k, v, keep, wants_grad=wants_grad)
    if wants_grad and backend != "reference":
        raise ValueError(
            f"backend={backend!r} gives no gradient, and k or v requires one: call it under torch.no_grad(), "
            "or use backend='reference'"
        )
    if backend == "triton":
        check_triton(k.device, (k.dtype, v.dtype))
        from labkit.kernels.compact_kv.triton import compact_kv_triton

        return compact_kv_triton(k, v, keep)
    return compact_kv_rows(k, v, keep) if backend == "rows" else compact_kv_reference(k, v, keep)
