"""The kernels of mixture-of-experts layers against their definitions, on the CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.grouped_experts import grouped_experts

from ..moe_cases import EXPERT_CASES, ROUTER_CASES, assert_experts_agree, assert_router_agrees, expert_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
def test_grouped_experts(case, dtype):
    assert_experts_agree(case, dtype, "triton")


@pytest.mark.parametrize("case", EXPERT_CASES[:2] + EXPERT_CASES[-2:], ids=str)
def test_any_number_of_experts_a_token(case):
    assert_experts_agree(case, torch.float32, "triton", pairs=True)


def test_transposed_matrices():
    leaves, index, options = expert_inputs(EXPERT_CASES[0], torch.float32)
    x, weight, up, down = leaves
    turned = [m.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for m in (up, down)]
    y = grouped_experts(x[:, :7], index, weight, *turned, backend="triton", **options)
    expected = grouped_experts(x[:, :7], index, weight, up, down, backend="reference", **options)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(y.sum(), turned), torch.autograd.grad(expected.sum(), [up, down]), strict=True
    ):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_biases_are_refused():
    leaves, index, options = expert_inputs(EXPERT_CASES[0], torch.float32)
    x, weight, up, down = leaves
    with pytest.raises(ValueError, match="has no biases"):
        grouped_experts(
            x[:, :7], index, weight, up, down, down_bias=torch.zeros(3, 7), backend="triton", **options
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", ROUTER_CASES, ids=str)
def test_router_topk(case, dtype):
    assert_router_agrees(case, dtype, "triton")
