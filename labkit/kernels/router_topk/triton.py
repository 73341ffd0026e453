"""The fused router: softmax, choice of k, renormalisation and both statistics in one pass, and their gradient in another.

A program takes a block of tokens and holds their E logits in registers; it finds the k largest by k rounds of arg-max. What
is summed over tokens is summed within the block and written once for each block, so that the result does not depend on the
order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    logits,
    mask,
    weights,
    index,
    lse,
    sums,
    counts,
    stride,
    tokens,
    experts,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)
    inside = (row[:, None] < tokens) & (column[None, :] < experts)
    at = logits + row[:, None].to(tl.int64) * stride + column[None, :]
    x = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    x = tl.where(row[:, None] < tokens, x, 0.0)  # rows past the end: finite, and stored nowhere
    top = tl.max(x, 1)
    total = tl.sum(tl.exp(x - top[:, None]), 1)
    log_total = top + tl.log(total)
    tl.store(lse + row, log_total, mask=row < tokens)
    share = tl.where(row < tokens, 1.0, 0.0)
    if MASKED:
        share = tl.load(mask + row, mask=row < tokens, other=0).to(tl.float32)
    probs = tl.where(inside, tl.exp(x - log_total[:, None]), 0.0)
    tl.store(sums + block * BLOCK_E + column, tl.sum(probs * share[:, None], 0))

    left = tl.where(column[None, :] < experts, x, float("-inf"))
    chosen = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    kept = tl.zeros((BLOCK_T,), tl.float32)
    for _ in tl.static_range(K):
        best = tl.argmax(left, 1)
        hit = column[None, :] == best[:, None]
        kept += tl.exp(tl.max(left, 1) - top)
        chosen += tl.where(hit, 1.0, 0.0)
        left = tl.where(hit, float("-inf"), left)
    tl.store(counts + block * BLOCK_E + column, tl.sum(chosen * share[:, None], 0))

    left = tl.where(column[None, :] < experts, x, float("-inf"))
    for j in tl.static_range(K):
        best = tl.argmax(left, 1)
        value = tl.exp(tl.max(left, 1) - top)
        if RENORMALIZE:
            value = value / kept
        else:
            value = value / total
        tl.store(index + row * K + j, best.to(tl.int64), mask=row < tokens)
        tl.store(weights + row * K + j, value, mask=row < tokens)
        left = tl.where(column[None, :] == best[:, None], float("-inf"), left)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    logits,
    mask,
    weights,
    index,
    lse,
    d_weights,
    d_lse,
    d_sums,
    d_logits,
    stride,
    tokens,
    experts,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, BLOCK_E)
    real = row < tokens
    inside = real[:, None] & (column[None, :] < experts)
    x = tl.load(
        logits + row[:, None].to(tl.int64) * stride + column[None, :], mask=inside, other=float("-inf")
    )
    log_total = tl.load(lse + row, mask=real, other=0.0)
    probs = tl.where(inside, tl.exp(x.to(tl.float32) - log_total[:, None]), 0.0)
    share = tl.where(real, 1.0, 0.0)
    if MASKED:
        share = tl.load(mask + row, mask=real, other=0).to(tl.float32)
    d_probs = tl.load(d_sums + column, mask=column < experts, other=0.0)[None, :] * share[:, None]

    inner = tl.zeros((BLOCK_T,), tl.float32)
    for j in tl.static_range(K):
        w = tl.load(weights + row * K + j, mask=real, other=0.0)
        inner += w * tl.load(d_weights + row * K + j, mask=real, other=0.0)
    direct = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for j in tl.static_range(K):
        hit = column[None, :] == tl.load(index + row * K + j, mask=real, other=0)[:, None]
        dw = tl.load(d_weights + row * K + j, mask=real, other=0.0)
        if RENORMALIZE:
            w = tl.load(weights + row * K + j, mask=real, other=0.0)
            direct += tl.where(hit, (w * (dw - inner))[:, None], 0.0)
        else:
            d_probs += tl.where(hit, dw[:, None], 0.0)
    d_total = tl.load(d_lse + row, mask=real, other=0.0)
    d_x = direct + probs * (d_probs - tl.sum(probs * d_probs, 1)[:, None] + d_total[:, None])
    out = d_logits + row[:, None].to(tl.int64) * experts + column[None, :]
    tl.store(out, d_x.to(d_logits.dtype.element_ty), mask=inside)


def _blocks(experts: int) -> dict[str, int]:
    width = triton.next_power_of_2(experts)
    return {"BLOCK_T": max(1, min(32, 2048 // width)), "BLOCK_E": width}


class _RouterTopK(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, top_k: int, renormalize: bool, mask: Tensor | None
    ) -> tuple[Tensor, ...]:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        tokens, experts = logits.shape
        sizes = _blocks(experts)
        programs = triton.cdiv(tokens, sizes["BLOCK_T"])
        flags = mask.to(torch.uint8) if mask is not None else logits
        weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
        index = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
        lse = torch.empty(tokens, dtype=torch.float32, device=logits.device)
        sums = torch.zeros(programs, sizes["BLOCK_E"], dtype=torch.float32, device=logits.device)
        counts = torch.zeros_like(sums)
        options = {"K": top_k, "RENORMALIZE": renormalize, "MASKED": mask is not None, **sizes}
        if tokens:
            _forward[(programs,)](
                logits, flags, weights, index, lse, sums, counts, logits.stride(0), tokens, experts, **options
            )
        ctx.save_for_backward(logits, flags, weights, index, lse)
        ctx.options = options
        total, count = sums.sum(0)[:experts], counts.sum(0)[:experts]
        ctx.mark_non_differentiable(index, count)
        return weights, index, lse, total, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, d_weights: Tensor, _index: Any, d_lse: Tensor, d_sums: Tensor, _counts: Any
    ) -> tuple[Tensor | None, ...]:
        logits, flags, weights, index, lse = ctx.saved_tensors
        tokens, experts = logits.shape
        d_logits = torch.empty(tokens, experts, dtype=logits.dtype, device=logits.device)
        if tokens:
            _backward[(triton.cdiv(tokens, ctx.options["BLOCK_T"]),)](
                logits,
                flags,
                weights,
                index,
                lse,
                d_weights.contiguous(),
                d_lse.contiguous(),
                d_sums.contiguous(),
                d_logits,
                logits.stride(0),
                tokens,
                experts,
                **ctx.options,
            )
        return d_logits, None, None, None


def router_topk_triton(
    logits: Tensor, top_k: int, *, renormalize: bool, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Run the kernels; arguments and results are those of the reference."""
    return _RouterTopK.apply(logits, top_k, renormalize, mask)  # type: ignore[no-untyped-call, no-any-return]
