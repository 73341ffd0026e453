"""Both kernels against their definitions, on the CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.proxy_column_sums import proxy_column_sums

from ..agreement import (
    COMPACT_CASES,
    PROXY_CASES,
    assert_compact_agrees,
    assert_proxy_agrees,
    proxy_inputs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", PROXY_CASES, ids=str)
def test_proxy_column_sums(case, dtype):
    assert_proxy_agrees(case, dtype, "triton")


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_keys_split_among_programs(splits):
    from labkit.kernels.proxy_column_sums.triton import proxy_column_sums_triton

    inputs, arguments = proxy_inputs((300, 3, 16, 1, 2, True, True, "mean"), torch.float32)
    expected = proxy_column_sums(*inputs, **arguments, backend="reference")
    actual = proxy_column_sums_triton(*inputs, **arguments, scale=0.25, splits=splits)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


def test_large_logits_do_not_overflow():
    inputs, arguments = proxy_inputs((63, 3, 16, 1, 1, True, False, "mean"), torch.float32)
    q, k, positions = inputs
    expected = proxy_column_sums(q * 100, k, positions, **arguments, backend="reference")
    actual = proxy_column_sums(q * 100, k, positions, **arguments, backend="triton")
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_compact_kv(case, dtype):
    assert_compact_agrees(case, dtype, "triton")
