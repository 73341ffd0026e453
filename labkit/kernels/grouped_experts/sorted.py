"""Experts on sorted pairs in plain PyTorch, with a backward pass of its own.

Pairs are sorted by expert and worked through in blocks of neighbouring experts that stay in a core's cache: rows are
gathered, multiplied by each expert's matrix in place of a slice of the block, and activated for the whole block at once.
Nothing of size ``(S, D)`` but the experts' outputs is held, and of the forward pass only the products with the first
matrix are kept. The weight of a pair multiplies the hidden units, not the outputs, so that its gradient is a product of
two vectors of width f and the outputs need not be kept.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.kernels.grouped_experts.activations import ACTIVATIONS

# Elements of the widest buffer of a block. On the CPU 1 MiB in float32: a core's second-level cache.
BLOCK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 26}


@dataclass
class Plan:
    """Pairs in the order of their experts.

    Attributes
    ----------
    order : Tensor
        ``(S,)``, position among the given pairs of each sorted pair; stable, so that an expert sees its tokens in order.
    token : Tensor
        ``(S,)``, token of each sorted pair.
    number : Tensor
        ``(E,)`` int64, pairs of each expert.
    """

    order: Tensor
    token: Tensor
    number: Tensor

    @functools.cached_property
    def counts(self) -> list[int]:
        """Pairs of each expert on the host; waits for the device."""
        return [int(n) for n in self.number.tolist()]

    @classmethod
    def of(cls, expert: Tensor, token: Tensor | None, slots: int, num_experts: int) -> Plan:
        """Sort pairs; without ``token``, pair i belongs to token ``i // slots``.

        On the CPU an expert out of range is refused; on CUDA it is not looked for, as that would wait for the device.
        """
        ordered, order = torch.sort(expert, stable=True)
        if expert.device.type == "cpu":
            low, high = (int(ordered[0]), int(ordered[-1])) if len(ordered) else (0, 0)
            if low < 0 or high >= num_experts:
                raise ValueError(f"expert must lie in 0..{num_experts - 1}; got values from {low} to {high}")
        number = torch.bincount(expert, minlength=num_experts)
        tokens = order // slots if token is None else token.index_select(0, order)
        return cls(order, tokens, number)

    def blocks(self, most: int) -> Iterator[tuple[int, int, list[int], list[int]]]:
        """Runs of experts with at most ``most`` pairs (or one expert): first pair, last, experts, their counts."""
        start, rows = 0, 0
        experts: list[int] = []
        sizes: list[int] = []
        for expert, count in enumerate(self.counts):
            if not count:
                continue
            if experts and rows + count > most:
                yield start, start + rows, experts, sizes
                start, rows, experts, sizes = start + rows, 0, [], []
            rows += count
            experts.append(expert)
            sizes.append(count)
        if experts:
            yield start, start + rows, experts, sizes


def _sum_by_token(rows: Tensor, plan: Plan, starts: Tensor | None, tokens: int) -> Tensor:
    """Add the sorted rows of each token, in the order of its pairs: ``(T, D)``."""
    place = torch.empty_like(plan.order)
    place[plan.order] = torch.arange(len(plan.order), device=place.device)
    if starts is None:
        return torch.nn.functional.embedding_bag(place.view(tokens, -1), rows, mode="sum")
    return torch.nn.functional.embedding_bag(place, rows, starts, mode="sum")


class SortedExperts(torch.autograd.Function):
    """``y[t] = sum over pairs (t, e, w) of w * expert_e(x[t])``; see the module."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        up: Tensor,
        down: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        plan: Plan,
        starts: Tensor | None,
        activation: str,
        gated: bool,
    ) -> Tensor:
        act = ACTIVATIONS[activation]
        pairs, width, inner = len(plan.order), x.shape[1], down.shape[2]
        outer = up.shape[1]
        keep = any(ctx.needs_input_grad)
        most = max(1, BLOCK_ELEMENTS.get(x.device.type, 1 << 18) // max(width, outer))
        blocks = list(plan.blocks(most))
        largest = max(last - first for first, last, _, _ in blocks)
        w = weight.index_select(0, plan.order)[:, None]
        pre = x.new_empty(pairs if keep else largest, outer)
        rows_buffer, hidden_buffer = x.new_empty(largest, width), x.new_empty(largest, inner)
        y = x.new_empty(pairs, width)
        ups, downs = up.transpose(1, 2).unbind(0), down.transpose(1, 2).unbind(0)
        for first, last, experts, sizes in blocks:
            n = last - first
            rows = torch.index_select(x, 0, plan.token[first:last], out=rows_buffer[:n])
            a = pre[first:last] if keep else pre[:n]
            for e, source, target in zip(experts, rows.split(sizes), a.split(sizes), strict=True):
                if up_bias is None:
                    torch.mm(source, ups[e], out=target)
                else:
                    torch.addmm(up_bias[e], source, ups[e], out=target)
            h = hidden_buffer[:n]
            if gated:
                act.into(a[:, :inner], h)
                h.mul_(a[:, inner:])
            else:
                act.into(a, h)
            h.mul_(w[first:last])
            out = y[first:last]
            for e, source, target in zip(experts, h.split(sizes), out.split(sizes), strict=True):
                torch.mm(source, downs[e], out=target)
            if down_bias is not None:
                for e, target, share in zip(
                    experts, out.split(sizes), w[first:last, 0].split(sizes), strict=True
                ):
                    target.addr_(share, down_bias[e])
        ctx.save_for_backward(x, w, up, down, up_bias, down_bias, pre if keep else None, starts)
        ctx.plan, ctx.blocks, ctx.largest = plan, blocks, largest
        ctx.activation, ctx.gated = activation, gated
        return _sum_by_token(y, plan, starts, x.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, up, down, up_bias, down_bias, pre, starts = ctx.saved_tensors
        wants_x, wants_w, wants_up, wants_down, wants_up_bias, wants_down_bias = ctx.needs_input_grad[:6]
        plan, largest, gated = ctx.plan, ctx.largest, ctx.gated
        act = ACTIVATIONS[ctx.activation]
        pairs, width, inner, outer = len(plan.order), x.shape[1], down.shape[2], up.shape[1]
        first_matrix = wants_x or wants_up or wants_up_bias

        def buffer(columns: int) -> Tensor:
            return x.new_empty(largest, columns)

        x_buffer, dy_buffer = buffer(width), buffer(width)
        h_buffer, dh_buffer, act_buffer, da_buffer = (
            buffer(inner),
            buffer(inner),
            buffer(inner),
            buffer(outer),
        )
        dx_rows = x.new_empty(pairs, width) if wants_x else None
        dw = w.new_empty(pairs) if wants_w else None
        d_up = _gradient_of(up, plan) if wants_up else None
        d_down = _gradient_of(down, plan) if wants_down else None
        d_up_bias = torch.zeros_like(up_bias) if wants_up_bias else None
        d_down_bias = torch.zeros_like(down_bias) if wants_down_bias else None
        ups, downs = up.unbind(0), down.unbind(0)
        d_ups = None if d_up is None else d_up.unbind(0)
        d_downs = None if d_down is None else d_down.unbind(0)
        dy = dy.contiguous()
        for first, last, experts, sizes in ctx.blocks:
            n = last - first
            token, share, a = plan.token[first:last], w[first:last], pre[first:last]
            dy_rows = torch.index_select(dy, 0, token, out=dy_buffer[:n])
            dy_parts = dy_rows.split(sizes)
            dh = dh_buffer[:n]
            for e, source, target in zip(experts, dy_parts, dh.split(sizes), strict=True):
                torch.mm(source, downs[e], out=target)
            g = a[:, :inner] if gated else a
            value, h = act_buffer[:n], h_buffer[:n]
            act.into(g, value)
            if gated:
                torch.mul(value, a[:, inner:], out=h)
            else:
                h = value
            if dw is not None:
                torch.linalg.vecdot(dh, h, out=dw[first:last])
                if down_bias is not None:
                    for e, source, target in zip(experts, dy_parts, dw[first:last].split(sizes), strict=True):
                        target.add_(source @ down_bias[e])
            if d_downs is not None:
                weighted = torch.mul(h, share, out=h_buffer[:n])
                for e, left, right in zip(experts, dy_parts, weighted.split(sizes), strict=True):
                    torch.mm(left.t(), right, out=d_downs[e])
            if d_down_bias is not None:
                for e, left, right in zip(experts, dy_parts, share.split(sizes), strict=True):
                    torch.mv(left.t(), right[:, 0], out=d_down_bias[e])
            if not first_matrix:
                continue
            dh.mul_(share)
            da = da_buffer[:n]
            if gated:
                torch.mul(dh, value, out=da[:, inner:])
                dh.mul_(a[:, inner:])
            act.backward_into(dh, g, da[:, :inner] if gated else da)
            da_parts = da.split(sizes)
            if d_ups is not None:
                rows = torch.index_select(x, 0, token, out=x_buffer[:n])
                for e, left, right in zip(experts, da_parts, rows.split(sizes), strict=True):
                    torch.mm(left.t(), right, out=d_ups[e])
            if d_up_bias is not None:
                for e, source in zip(experts, da_parts, strict=True):
                    torch.sum(source, 0, out=d_up_bias[e])
            if dx_rows is not None:
                for e, source, target in zip(
                    experts, da_parts, dx_rows[first:last].split(sizes), strict=True
                ):
                    torch.mm(source, ups[e], out=target)
        dx = None if dx_rows is None else _sum_by_token(dx_rows, plan, starts, x.shape[0])
        if dw is not None:
            dw = torch.empty_like(dw).index_copy_(0, plan.order, dw)
        return dx, dw, d_up, d_down, d_up_bias, d_down_bias, None, None, None, None


def _gradient_of(weight: Tensor, plan: Plan) -> Tensor:
    """Memory for the gradient of stacked matrices, zero for the experts without tokens."""
    gradient = torch.empty_like(weight)
    for expert, count in enumerate(plan.counts):
        if not count:
            gradient[expert].zero_()
    return gradient


def grouped_mm_experts(
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
    """Compute the same with ``torch.nn.functional.grouped_mm`` and torch's own derivatives."""
    act = ACTIVATIONS[activation].value
    ends = plan.number.cumsum(0, dtype=torch.int32)
    pre = torch.nn.functional.grouped_mm(x[plan.token], up.transpose(1, 2), offs=ends)
    inner = down.shape[2]
    h = act(pre[:, :inner]) * pre[:, inner:] if gated else act(pre)
    h = h * weight[plan.order, None].to(h.dtype)
    y = torch.nn.functional.grouped_mm(h, down.transpose(1, 2), offs=ends)
    # the sum has float32 sums inside; embedding_bag on CUDA would not for bfloat16
    if starts is None:
        place = torch.empty_like(plan.order)
        place[plan.order] = torch.arange(len(plan.order), device=place.device)
        return y[place].view(x.shape[0], -1, x.shape[1]).sum(1)
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return out.index_add(0, plan.token, y.to(out.dtype)).to(x.dtype)
