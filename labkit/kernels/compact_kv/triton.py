"""Cache compaction in one Triton launch: an index is read once for a row of K and the row of V beside it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["compact_kv_triton"]


@triton.jit
def _copy_rows(  # type: ignore[no-untyped-def]
    k, v, keep, k_out, v_out,
    k_batch, k_head, k_row, k_dim,
    v_batch, v_head, v_row, v_dim,
    keep_batch, keep_head, keep_row,
    n_heads, n_kept,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // n_heads).to(tl.int64)
    head = (tl.program_id(1) % n_heads).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < n_kept
    source = tl.load(keep + batch * keep_batch + head * keep_head + rows * keep_row, mask=live, other=0)
    target = tl.program_id(1).to(tl.int64) * n_kept + rows

    dims = tl.arange(0, K_BLOCK)
    inside = live[:, None] & (dims < K_WIDTH)[None, :]
    origin = k + batch * k_batch + head * k_head
    tile = tl.load(origin + (source * k_row)[:, None] + (dims * k_dim)[None, :], mask=inside)
    tl.store(k_out + (target * K_WIDTH)[:, None] + dims[None, :], tile, mask=inside)

    dims = tl.arange(0, V_BLOCK)
    inside = live[:, None] & (dims < V_WIDTH)[None, :]
    origin = v + batch * v_batch + head * v_head
    tile = tl.load(origin + (source * v_row)[:, None] + (dims * v_dim)[None, :], mask=inside)
    tl.store(v_out + (target * V_WIDTH)[:, None] + dims[None, :], tile, mask=inside)


def compact_kv_triton(k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Run the kernel; see :func:`labkit.kernels.compact_kv.compact_kv`. No gradient, no range check."""
    batch, heads, n_kept = keep.shape
    k_out = torch.empty(batch, heads, n_kept, k.shape[3], dtype=k.dtype, device=k.device)
    v_out = torch.empty(batch, heads, n_kept, v.shape[3], dtype=v.dtype, device=v.device)
    if keep.numel() == 0 or k.shape[3] == 0 or v.shape[3] == 0:
        return k_out, v_out
    k_block, v_block = (triton.next_power_of_2(x.shape[3]) for x in (k, v))
    block_r = max(1, min(64, 8192 // max(k_block, v_block)))
    _copy_rows[(triton.cdiv(n_kept, block_r), batch * heads)](
        k, v, keep, k_out, v_out, *k.stride(), *v.stride(), *keep.stride(), heads, n_kept,
        K_WIDTH=k.shape[3], V_WIDTH=v.shape[3], K_BLOCK=k_block, V_BLOCK=v_block, BLOCK_R=block_r,
        num_warps=4,
    )  # fmt: skip
    return k_out, v_out
