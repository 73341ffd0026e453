"""Cache compaction: against indexing by hand, every path against the definition, storage and bad input."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.compact_kv import compact_kv

from .agreement import COMPACT_CASES, assert_compact_agrees, compact_inputs


@pytest.mark.parametrize("backend", ["reference", "rows"])
@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_agrees_with_indexing(case, backend):
    k, v, keep = compact_inputs(case, torch.float32)
    for source, got in zip((k, v), compact_kv(k, v, keep, backend=backend), strict=True):
        for b in range(k.shape[0]):
            for h in range(k.shape[1]):
                assert torch.equal(got[b, h], source[b, h][keep[b, h]])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"]
)
@pytest.mark.parametrize("case", COMPACT_CASES, ids=str)
def test_rows_agree_with_reference(case, dtype):
    assert_compact_agrees(case, dtype, "rows")


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x[:, :, 3:],
        lambda x: x[:, ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),  # a row's elements lie apart
        lambda x: x[..., :5],  # a row's length does not divide the strides
        lambda x: x[:, :1].expand(-1, 4, -1, -1),  # heads share storage
    ],
    ids=["contiguous", "sliced", "strided", "columns", "narrow", "expanded"],
)
def test_rows_read_any_layout(view):
    x = view(torch.randn(2, 4, 12, 8))
    keep = torch.randint(0, x.shape[2], (2, x.shape[1], 5))
    for got, wanted in zip(
        compact_kv(x, x, keep, backend="rows"), compact_kv(x, x, keep, backend="reference"), strict=True
    ):
        assert torch.equal(got, wanted)


def test_reference_is_differentiable():
    k = torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([[[0, 2], [3, 4]]])
    assert torch.autograd.gradcheck(lambda k, v: compact_kv(k, v, keep), (k, v))
    with pytest.raises(ValueError, match="no_grad"):
        compact_kv(k, v, keep, backend="rows")
    with torch.no_grad():
        assert not compact_kv(k, v, keep, backend="rows")[0].requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.randn(2, 6, 4)}, ValueError, r"\(B, K, S, d\)"),
        ({"v": torch.randn(1, 2, 5, 4)}, ValueError, "same B, K and S"),
        ({"keep": torch.zeros(1, 3, 2).long()}, ValueError, r"\(1, 2, S'\)"),
        ({"keep": torch.zeros(1, 2, 2).int()}, TypeError, "int64"),
        ({"keep": torch.full((1, 2, 2), 6)}, ValueError, r"0\.\.5; got values from 6 to 6"),
        ({"keep": torch.full((1, 2, 2), -1)}, ValueError, "from -1"),
        ({"backend": "chunked"}, ValueError, "'rows'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "k": torch.randn(1, 2, 6, 4),
        "v": torch.randn(1, 2, 6, 4),
        "keep": torch.zeros(1, 2, 2).long(),
    }
    with pytest.raises(error, match=message):
        compact_kv(**{**arguments, **change})


def test_triton_on_the_cpu_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="labkit\\[gpu\\]|backend='auto'"):
        compact_kv(x, x, torch.zeros(1, 1, 1).long(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*COMPACT_CASES, (2, 8, 5000, 1111, 128, 128)], ids=str)
@pytest.mark.parametrize("backend", ["triton", "rows", "auto"])
def test_on_cuda(case, dtype, backend):
    assert_compact_agrees(case, dtype, backend, "cuda")
