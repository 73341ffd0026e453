"""Grouped products over sorted pairs, with the gather, the activation and the weights inside; forward and backward.

Sorted pairs are cut into tiles of at most ``BLOCK_M`` rows of one expert. Four products share that scheme:

- ``_up``: gathers tokens, multiplies by both halves of the first matrix, stores the products and the weighted hidden units;
- ``_rows``: rows times an expert's matrix, scattered to the order of the given pairs (second matrix, and its transposed use
  for the gradient of the tokens);
- ``_hidden_gradient``: gathers the gradient of the outputs, multiplies by the second matrix, and turns the result into the
  gradient of the first product and partial gradients of the weights;
- ``_matrix_gradient``: sums over an expert's rows, for the gradient of either matrix.

``_by_token`` then adds the rows of each token in their order. There are no atomics, so results are deterministic. Products
accumulate in float32; float32 inputs are multiplied in full precision. The cut into tiles is made on the host from the
counts, which waits for the device once a call. Block sizes are estimates and have not been tuned on a device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels._dispatch import interpreting
from labkit.kernels.grouped_experts.sorted import Plan

__all__ = ["grouped_experts_triton"]

ACTIVATION_CODES = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}
BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 32


@triton.jit
def _value(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == 0:
        y = x * tl.sigmoid(x)
    elif ACT == 1:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == 2:
        # tanh(v) = 2 sigmoid(2 v) - 1
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _slope(x, ACT: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACT == 0:
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == 1:
        y = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 2:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        y = tl.where(x > 0, 1.0, 0.0)
    return y


@triton.jit
def _tile(ptr, rows, columns, row_stride, column_stride, rows_in, columns_in, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    at = ptr + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tile = tl.load(at, mask=rows_in[:, None] & columns_in[None, :], other=0.0)
    if UPCAST:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _up(  # type: ignore[no-untyped-def]
    x, token, weight, up, pre, hidden, tile_expert, tile_first, tile_last,
    x_row, up_expert, up_row, up_column, width, inner,
    ACT: tl.constexpr, GATED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    expert = tl.load(tile_expert + which).to(tl.int64)
    row = tl.load(tile_first + which) + tl.arange(0, BLOCK_M)
    live = row < tl.load(tile_last + which)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < inner
    source = tl.load(token + row, mask=live, other=0)
    matrix = up + expert * up_expert
    first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = _tile(x, source, k, x_row, 1, live, k < width, UPCAST)
        b = _tile(matrix, k, column, up_column, up_row, k < width, valid, UPCAST)
        first += tl.dot(a, b, input_precision=PRECISION)
        if GATED:
            b = _tile(matrix + inner * up_row, k, column, up_column, up_row, k < width, valid, UPCAST)
            second += tl.dot(a, b, input_precision=PRECISION)
    inside = live[:, None] & valid[None, :]
    outer = inner * 2 if GATED else inner
    at = pre + row.to(tl.int64)[:, None] * outer + column[None, :]
    tl.store(at, first.to(pre.dtype.element_ty), mask=inside)
    h = _value(first, ACT)
    if GATED:
        tl.store(at + inner, second.to(pre.dtype.element_ty), mask=inside)
        h = h * second
    h = h * tl.load(weight + row, mask=live, other=0.0)[:, None]
    tl.store(
        hidden + row.to(tl.int64)[:, None] * inner + column[None, :],
        h.to(hidden.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    a_ptr, matrix, target, out, tile_expert, tile_first, tile_last,
    b_expert, b_k, b_column, depth, columns,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    expert = tl.load(tile_expert + which).to(tl.int64)
    row = tl.load(tile_first + which) + tl.arange(0, BLOCK_M)
    live = row < tl.load(tile_last + which)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = _tile(a_ptr, row, k, depth, 1, live, k < depth, UPCAST)
        b = _tile(matrix + expert * b_expert, k, column, b_k, b_column, k < depth, valid, UPCAST)
        total += tl.dot(a, b, input_precision=PRECISION)
    to = tl.load(target + row, mask=live, other=0).to(tl.int64)
    at = out + to[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=live[:, None] & valid[None, :])


@triton.jit
def _hidden_gradient(  # type: ignore[no-untyped-def]
    dy, token, weight, down, pre, d_pre, d_weight, tile_expert, tile_first, tile_last,
    dy_row, down_expert, down_row, down_column, width, inner, parts,
    ACT: tl.constexpr, GATED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    expert = tl.load(tile_expert + which).to(tl.int64)
    row = tl.load(tile_first + which) + tl.arange(0, BLOCK_M)
    live = row < tl.load(tile_last + which)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = column < inner
    source = tl.load(token + row, mask=live, other=0)
    d_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = _tile(dy, source, k, dy_row, 1, live, k < width, UPCAST)
        b = _tile(down + expert * down_expert, k, column, down_row, down_column, k < width, valid, UPCAST)
        d_h += tl.dot(a, b, input_precision=PRECISION)
    inside = live[:, None] & valid[None, :]
    outer = inner * 2 if GATED else inner
    at = row.to(tl.int64)[:, None] * outer + column[None, :]
    g = tl.load(pre + at, mask=inside, other=0.0).to(tl.float32)
    value = _value(g, ACT)
    h = value
    if GATED:
        u = tl.load(pre + at + inner, mask=inside, other=0.0).to(tl.float32)
        h = value * u
    partial = tl.sum(tl.where(inside, d_h * h, 0.0), 1)
    tl.store(d_weight + row.to(tl.int64) * parts + tl.program_id(1), partial, mask=live)
    d_h = d_h * tl.load(weight + row, mask=live, other=0.0)[:, None]
    d_g = d_h * _slope(g, ACT)
    if GATED:
        d_g = d_g * u
        tl.store(d_pre + at + inner, (d_h * value).to(d_pre.dtype.element_ty), mask=inside)
    tl.store(d_pre + at, d_g.to(d_pre.dtype.element_ty), mask=inside)


@triton.jit
def _matrix_gradient(  # type: ignore[no-untyped-def]
    left, left_index, right, right_index, out, ends,
    left_row, right_row, out_expert, out_row, out_column, height, columns,
    LEFT_GATHER: tl.constexpr, RIGHT_GATHER: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    begin = tl.load(ends + expert)
    end = tl.load(ends + expert + 1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        live = row < end
        left_at = row
        right_at = row
        if LEFT_GATHER:
            left_at = tl.load(left_index + row, mask=live, other=0)
        if RIGHT_GATHER:
            right_at = tl.load(right_index + row, mask=live, other=0)
        a = _tile(left, m, left_at, 1, left_row, m < height, live, UPCAST)
        b = _tile(right, right_at, n, right_row, 1, live, n < columns, UPCAST)
        total += tl.dot(a, b, input_precision=PRECISION)
    at = out + expert.to(tl.int64) * out_expert + m.to(tl.int64)[:, None] * out_row + n[None, :] * out_column
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < height)[:, None] & (n < columns)[None, :])


@triton.jit
def _by_token(rows, starts, ends, out, columns, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    # starts and ends are int64, and so is row
    for row in range(tl.load(starts + token), tl.load(ends + token)):
        total += tl.load(rows + row * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, total.to(out.dtype.element_ty), mask=column < columns)


class _Tiles:
    """Tiles of at most ``BLOCK_M`` sorted pairs of one expert, and where each expert begins."""

    def __init__(self, counts: list[int], device: torch.device) -> None:
        experts, firsts, lasts, ends = [], [], [], [0]
        for expert, count in enumerate(counts):
            begin = ends[-1]
            for first in range(begin, begin + count, BLOCK_M):
                experts.append(expert)
                firsts.append(first)
                lasts.append(begin + count)
            ends.append(begin + count)
        self.number = len(experts)
        self.expert, self.first, self.last = torch.tensor(
            [experts, firsts, lasts], dtype=torch.int32, device=device
        )
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device)


def _sizes(dtype: torch.dtype) -> dict[str, Any]:
    return {
        # Triton's interpreter multiplies no bfloat16
        "UPCAST": dtype != torch.float32 and interpreting(),
        "PRECISION": "ieee",
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
    }


def _sum(rows: Tensor, starts: Tensor, ends: Tensor, tokens: int) -> Tensor:
    out = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(rows.shape[1]))
    _by_token[(tokens, triton.cdiv(rows.shape[1], block))](
        rows, starts, ends, out, rows.shape[1], BLOCK_N=block
    )
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        plan: Plan,
        starts: Tensor,
        ends: Tensor,
        activation: str,
        gated: bool,
    ) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        tiles = _Tiles(plan.counts, x.device)
        pairs, width, inner, outer = len(plan.order), x.shape[1], down.shape[2], up.shape[1]
        sizes = _sizes(x.dtype)
        w = weight.float().index_select(0, plan.order)
        pre = x.new_empty(pairs, outer)
        hidden = x.new_empty(pairs, inner)
        grid = (tiles.number, triton.cdiv(inner, BLOCK_N))
        _up[grid](
            x, plan.token, w, up, pre, hidden, tiles.expert, tiles.first, tiles.last,
            x.stride(0), *up.stride(), width, inner,
            ACT=ACTIVATION_CODES[activation], GATED=gated, **sizes,
        )  # fmt: skip
        rows = x.new_empty(pairs, width)
        grid = (tiles.number, triton.cdiv(width, BLOCK_N))
        _rows[grid](
            hidden, down, plan.order, rows, tiles.expert, tiles.first, tiles.last,
            down.stride(0), down.stride(2), down.stride(1), inner, width, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, w, up, down, pre, hidden, starts, ends)
        ctx.plan, ctx.tiles, ctx.activation, ctx.gated = plan, tiles, activation, gated
        ctx.weight_dtype = weight.dtype
        return _sum(rows, starts, ends, x.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, up, down, pre, hidden, starts, ends = ctx.saved_tensors
        plan, tiles = ctx.plan, ctx.tiles
        pairs, width, inner, outer = len(plan.order), x.shape[1], down.shape[2], up.shape[1]
        sizes = _sizes(x.dtype)
        dy = dy.contiguous()
        parts = triton.cdiv(inner, BLOCK_N)
        d_pre = torch.empty_like(pre)
        partial = torch.empty(pairs, parts, dtype=torch.float32, device=x.device)
        _hidden_gradient[(tiles.number, parts)](
            dy, plan.token, w, down, pre, d_pre, partial, tiles.expert, tiles.first, tiles.last,
            dy.stride(0), *down.stride(), width, inner, parts,
            ACT=ACTIVATION_CODES[ctx.activation], GATED=ctx.gated, **sizes,
        )  # fmt: skip
        d_weight = torch.empty_like(w).index_copy_(0, plan.order, partial.sum(1)).to(ctx.weight_dtype)
        d_x = d_up = d_down = None
        if ctx.needs_input_grad[0]:
            rows = x.new_empty(pairs, width)
            _rows[(tiles.number, triton.cdiv(width, BLOCK_N))](
                d_pre, up, plan.order, rows, tiles.expert, tiles.first, tiles.last,
                up.stride(0), up.stride(1), up.stride(2), outer, width, **sizes,
            )  # fmt: skip
            d_x = _sum(rows, starts, ends, x.shape[0])
        if ctx.needs_input_grad[2]:
            d_up = torch.empty_like(up)
            grid = (triton.cdiv(outer, BLOCK_M), triton.cdiv(width, BLOCK_N), up.shape[0])
            _matrix_gradient[grid](
                d_pre, plan.token, x, plan.token, d_up, tiles.ends,
                d_pre.stride(0), x.stride(0), *d_up.stride(), outer, width,
                LEFT_GATHER=False, RIGHT_GATHER=True, **sizes,
            )  # fmt: skip
        if ctx.needs_input_grad[3]:
            d_down = torch.empty_like(down)
            grid = (triton.cdiv(width, BLOCK_M), triton.cdiv(inner, BLOCK_N), up.shape[0])
            _matrix_gradient[grid](
                dy, plan.token, hidden, plan.token, d_down, tiles.ends,
                dy.stride(0), hidden.stride(0), *d_down.stride(), width, inner,
                LEFT_GATHER=True, RIGHT_GATHER=False, **sizes,
            )  # fmt: skip
        return d_x, d_weight, d_up, d_down, None, None, None, None, None


def grouped_experts_triton(
    x: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    plan: Plan,
    starts: Tensor | None,
    *,
    activation: str,
    gated: bool,
) -> Tensor:
    """Run the kernels on pairs that ``plan`` has sorted; ``starts`` is each token's first pair, or None for ``(T, k)``."""
    tokens, pairs = x.shape[0], len(plan.order)
    if starts is None:
        starts = torch.arange(0, pairs, pairs // tokens, device=x.device)
    ends = torch.cat([starts[1:], starts.new_full((1,), pairs)])
    return _Experts.apply(x, weight, up, down, plan, starts, ends, activation, gated)  # type: ignore[no-untyped-call, no-any-return]
