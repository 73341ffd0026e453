"""Proxy column sums in two passes of Triton, without an attention matrix and without atomics.

Pass 1 walks the keys for a block of rows (a row is one proxy query of one head) and leaves the log-sum-exp of each
row; where there are few rows the keys are split among programs and the parts joined afterwards. Pass 2 is turned
round: a program owns a block of keys of one KV head, holds it on chip, walks all rows of the head's group and adds
up ``exp(logit - lse)`` in registers, to be stored once. Both accumulate in float32. Logits and their log-sum-exps
are in base 2.

The block sizes are estimates from shared memory and registers; they have not been tuned on a device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels._dispatch import interpreting

__all__ = ["proxy_column_sums_triton"]


@triton.jit
def _row_logsumexp(  # type: ignore[no-untyped-def]
    q, k, positions, key_mask, out,
    q_batch, q_head, q_row, q_dim,
    k_batch, k_head, k_row, k_dim,
    n_keys, n_proxies, n_programs_heads, group, query_group, split_keys, n_splits, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch = (tl.program_id(2) // n_programs_heads).to(tl.int64)
    first_head = (tl.program_id(2) % n_programs_heads) * group
    kv_head = (first_head // query_group).to(tl.int64)

    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = rows < group * n_proxies
    head = (first_head + rows // n_proxies).to(tl.int64)
    proxy = rows % n_proxies
    dims = tl.arange(0, BLOCK_D)
    position = tl.load(positions + batch * n_proxies + proxy, mask=live, other=-1)
    query = tl.load(
        q + batch * q_batch + (head * q_head + proxy * q_row)[:, None] + (dims * q_dim)[None, :],
        mask=live[:, None] & (dims < WIDTH)[None, :],
        other=0.0,
    )
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    begin = split * split_keys
    end = tl.minimum(begin + split_keys, n_keys)
    if CAUSAL:
        end = tl.minimum(end, tl.max(position, 0) + 1)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        seen = keys < n_keys
        tile = tl.load(
            k + batch * k_batch + kv_head * k_head
            + (keys.to(tl.int64) * k_row)[None, :] + (dims * k_dim)[:, None],
            mask=seen[None, :] & (dims < WIDTH)[:, None],
            other=0.0,
        )  # fmt: skip
        if UPCAST:
            tile = tile.to(tl.float32)
        logits = tl.dot(query, tile, input_precision=PRECISION) * scale
        if MASKED:
            seen = seen & (tl.load(key_mask + batch * n_keys + keys, mask=seen, other=0) != 0)
        visible = seen[None, :] & (position >= 0)[:, None]
        if CAUSAL:
            visible = visible & (keys[None, :] <= position[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top = higher
    # A row that saw nothing keeps total 0 and top -inf.
    result = top + tl.log2(tl.where(total > 0, total, 1.0))
    rows_all = (batch * n_programs_heads * group + head) * n_proxies + proxy
    tl.store(out + rows_all * n_splits + split, result, mask=live)


@triton.jit
def _column_sums(  # type: ignore[no-untyped-def]
    q, k, positions, key_mask, logsumexp, out,
    q_batch, q_head, q_row, q_dim,
    k_batch, k_head, k_row, k_dim,
    n_keys, n_proxies, n_programs_heads, group, query_group, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(1) // n_programs_heads).to(tl.int64)
    first_head = (tl.program_id(1) % n_programs_heads) * group
    kv_head = (first_head // query_group).to(tl.int64)

    keys = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    seen = keys < n_keys
    dims = tl.arange(0, BLOCK_D)
    tile = tl.load(
        k + batch * k_batch + kv_head * k_head
        + (keys.to(tl.int64) * k_row)[None, :] + (dims * k_dim)[:, None],
        mask=seen[None, :] & (dims < WIDTH)[:, None],
        other=0.0,
    )  # fmt: skip
    if UPCAST:
        tile = tile.to(tl.float32)
    counted = seen
    if MASKED:
        counted = seen & (tl.load(key_mask + batch * n_keys + keys, mask=seen, other=0) != 0)
    sums = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, group * n_proxies, BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        live = rows < group * n_proxies
        head = (first_head + rows // n_proxies).to(tl.int64)
        proxy = rows % n_proxies
        position = tl.load(positions + batch * n_proxies + proxy, mask=live, other=-1)
        last_seen = n_keys
        if CAUSAL:
            last_seen = tl.max(position, 0)
        if last_seen >= tl.program_id(0) * BLOCK_N:  # otherwise none of these rows sees any of these keys
            query = tl.load(
                q + batch * q_batch + (head * q_head + proxy * q_row)[:, None] + (dims * q_dim)[None, :],
                mask=live[:, None] & (dims < WIDTH)[None, :],
                other=0.0,
            )
            if UPCAST:
                query = query.to(tl.float32)
            rows_all = (batch * n_programs_heads * group + head) * n_proxies + proxy
            # +inf stands for a row that attends to nothing, so that its probabilities are 0
            norm = tl.load(logsumexp + rows_all, mask=live, other=float("inf"))
            logits = tl.dot(query, tile, input_precision=PRECISION) * scale
            visible = counted[None, :] & live[:, None]
            if CAUSAL:
                visible = visible & (keys[None, :] <= position[:, None])
            sums += tl.sum(tl.exp2(tl.where(visible, logits, float("-inf")) - norm[:, None]), 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * n_keys + keys, sums / group, mask=seen)


def _blocks(rows: int, width: int, wide_dtype: bool) -> tuple[int, int, int, int]:
    """Rows, keys and dims of a tile, and the warps for it."""
    block_d = max(16, triton.next_power_of_2(width))
    most_rows = 32 if block_d > 128 else 64
    block_r = min(most_rows, max(16, triton.next_power_of_2(rows)))
    block_n = 64 if block_d > 128 or (wide_dtype and block_d > 64) else 128
    return block_r, block_n, block_d, 8 if block_r * block_n >= 64 * 128 else 4


def proxy_column_sums_triton(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    key_mask: Tensor | None,
    causal: bool,
    scale: float,
    head_reduction: str,
    splits: int | None = None,
) -> Tensor:
    """Run the two kernels; see :func:`labkit.kernels.proxy_column_sums.proxy_column_sums`. No gradient.

    Parameters
    ----------
    q, k, positions, key_mask, causal, scale, head_reduction
        As there, with ``positions`` of shape ``(B, P)`` and every default filled in.
    splits : int, optional
        Number of parts into which pass 1 cuts the keys. By default enough to occupy the device.

    Returns
    -------
    Tensor
        float32, ``(B, K, S)`` or ``(B, H, S)``.
    """
    batch, heads, n_proxies, width = q.shape
    n_keys, query_group = k.shape[2], heads // k.shape[1]
    group = query_group if head_reduction == "mean" else 1  # heads whose sums one program adds up
    n_programs_heads = heads // group
    out = torch.zeros(batch, n_programs_heads, n_keys, dtype=torch.float32, device=q.device)
    if out.numel() == 0 or n_proxies == 0:
        return out

    rows = group * n_proxies
    block_r, block_n, block_d, warps = _blocks(rows, width, q.dtype == torch.float32)
    row_blocks, key_blocks = triton.cdiv(rows, block_r), triton.cdiv(n_keys, block_n)
    if splits is None:
        units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        splits = triton.cdiv(2 * units, batch * n_programs_heads * row_blocks)
        splits = min(splits, triton.cdiv(key_blocks, 4))  # at least four blocks of keys each
    split_keys = triton.cdiv(key_blocks, max(1, splits)) * block_n
    splits = triton.cdiv(n_keys, split_keys)

    positions = positions.to(torch.int32).contiguous()
    mask = positions if key_mask is None else key_mask.contiguous().view(torch.uint8)
    shared = {
        "CAUSAL": causal,
        "MASKED": key_mask is not None,
        "PRECISION": "ieee",  # float32 inputs stay float32: TF32 would cost three digits
        # Triton 3.9's interpreter multiplies the bit patterns of bfloat16 operands in tl.dot
        "UPCAST": interpreting() and q.dtype == torch.bfloat16,
        "WIDTH": width,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLOCK_N": block_n,
        "num_warps": warps,
        "num_stages": 2,
    }
    layout = (*q.stride(), *k.stride())
    sizes = (n_keys, n_proxies, n_programs_heads, group, query_group)
    scale = scale / math.log(2.0)

    norms = torch.empty(batch, heads, n_proxies, splits, dtype=torch.float32, device=q.device)
    _row_logsumexp[(row_blocks, splits, batch * n_programs_heads)](
        q, k, positions, mask, norms, *layout, *sizes, split_keys, splits, scale, **shared
    )
    if splits > 1:
        norms = torch.logsumexp(norms * math.log(2.0), -1) / math.log(2.0)
    norms = norms.masked_fill_(norms == float("-inf"), float("inf")).contiguous()
    _column_sums[(key_blocks, batch * n_programs_heads)](
        q, k, positions, mask, norms, out, *layout, *sizes, scale, **shared
    )
    return out
