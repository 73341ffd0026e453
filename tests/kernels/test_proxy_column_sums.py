"""Proxy column sums: the definition against a loop, the chunked form against the definition, and bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from labkit.kernels.proxy_column_sums import _choose, proxy_column_sums
from labkit.lab.bench import peak_memory

from .agreement import PROXY_CASES, assert_proxy_agrees, proxy_inputs


def by_loops(q, k, positions, mask, causal, scale):
    """Scores (B, H, S) row by row, with nothing but exponentials."""
    q, k = q.double().numpy(), k.double().numpy()
    batch, heads, n_proxies, _ = q.shape
    group, n_keys = heads // k.shape[1], k.shape[2]
    scores = np.zeros((batch, heads, n_keys))
    for b in range(batch):
        for h in range(heads):
            for p in range(n_proxies):
                at = int(positions[b, p])
                seen = [
                    j
                    for j in range(n_keys)
                    if at >= 0 and (not causal or j <= at) and (mask is None or bool(mask[b, j]))
                ]
                weights = {j: math.exp(scale * float(q[b, h, p] @ k[b, h // group, j])) for j in seen}
                for j, weight in weights.items():
                    scores[b, h, j] += weight / sum(weights.values())
    return torch.from_numpy(scores)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("case", [c for c in PROXY_CASES if c[0] <= 129], ids=str)
def test_agrees_with_loops(case, backend):
    (q, k, positions), arguments = proxy_inputs(case, torch.float32)
    reduction = arguments.pop("head_reduction")
    expected = by_loops(q, k, positions, arguments["key_mask"], arguments["causal"], 0.3)
    if reduction == "mean":
        expected = expected.unflatten(1, (k.shape[1], -1)).mean(2)
    actual = proxy_column_sums(
        q, k, positions, **arguments, scale=0.3, head_reduction=reduction, backend=backend
    )
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("case", PROXY_CASES, ids=str)
def test_chunked_agrees_with_reference(case, dtype):
    assert_proxy_agrees(case, dtype, "chunked")


@pytest.mark.parametrize("masked", [False, True])
def test_many_blocks_agree_with_reference(masked):
    assert_proxy_agrees((5000, 300, 16, 1, 2, True, masked, "mean"), torch.float32, "chunked")


@pytest.mark.parametrize("size", [0.1, 30.0, 3000.0])
def test_logits_of_any_size(size):
    """Small ones are exponentiated as they are, large ones after their maximum is taken off."""
    (q, k, positions), arguments = proxy_inputs((129, 17, 60, 2, 2, True, True, "mean"), torch.float64)
    expected = proxy_column_sums(size * q, k, positions, **arguments, backend="reference")
    actual = proxy_column_sums((size * q).float(), k.float(), positions, **arguments, backend="chunked")
    torch.testing.assert_close(actual.double(), expected, atol=2e-3 if size > 1000 else 1e-4, rtol=1e-4)


def test_sums_to_the_number_of_proxies():
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 20, 8)
    for reduction, heads in (("mean", 2), ("none", 4)):
        scores = proxy_column_sums(q, k, torch.arange(14, 20), head_reduction=reduction)
        assert scores.shape == (1, heads, 20)
        torch.testing.assert_close(scores.sum(-1), torch.full((1, heads), 6.0))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_all_tokens_are_h2o_and_the_last_is_tova(backend):
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    attention = (q @ k.mT / 8**0.5 + torch.full((9, 9), -math.inf).triu(1)).softmax(-1)
    for first in (0, 7, 8):  # all, two neighbours, the last
        scores = proxy_column_sums(q[:, :, first:], k, torch.arange(first, 9), backend=backend)
        torch.testing.assert_close(scores, attention[:, :, first:].sum(2))


def test_padding_scores_zero_and_changes_nothing_else():
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 10, 8)
    plain = proxy_column_sums(q, k, torch.tensor([7, 8, 9]))
    padded = proxy_column_sums(
        torch.cat([torch.randn(1, 2, 1, 8), q], 2),
        torch.cat([torch.randn(1, 1, 4, 8), k], 2),
        torch.tensor([-1, 11, 12, 13]),
        key_mask=torch.arange(14)[None] >= 4,
    )
    torch.testing.assert_close(padded[..., 4:], plain)
    assert not padded[..., :4].any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_live_proxies_score_nothing(backend):
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 10, 8)
    assert not proxy_column_sums(q, k, torch.tensor([-1, -1, -1]), backend=backend).any()
    assert proxy_column_sums(q[:, :, :0], k, torch.arange(0), backend=backend).eq(0).all()
    blind = torch.zeros(1, 10, dtype=torch.bool)
    assert proxy_column_sums(q, k, torch.arange(3), key_mask=blind, backend=backend).eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_reference_is_differentiable(causal, reduction):
    q = torch.randn(1, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    k = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True, True, True]])
    positions = torch.tensor([0, 3, 5])  # the first sees only padding
    assert torch.autograd.gradcheck(
        lambda q, k: proxy_column_sums(
            q, k, positions, key_mask=mask, causal=causal, head_reduction=reduction
        ),
        (q, k),
    )


def test_auto_takes_the_reference_for_gradients_only():
    q, k = torch.randn(1, 8, 64, 4), torch.randn(1, 8, 1024, 4)
    assert _choose(q, k, wants_grad=False) == "chunked"
    assert _choose(q, k, wants_grad=True) == "reference"
    assert _choose(q[:, :, :1], k, wants_grad=False) == "reference"
    assert proxy_column_sums(q[:, :, :2].requires_grad_(), k, torch.arange(2)).requires_grad


def test_chunked_memory_does_not_grow_with_the_proxies():
    k = torch.randn(1, 2, 4096, 16)

    def peak(n_proxies: int, backend: str) -> int:
        q, positions = torch.randn(1, 4, n_proxies, 16), torch.arange(4096 - n_proxies, 4096)
        return peak_memory(lambda: proxy_column_sums(q, k, positions, backend=backend))

    assert peak(1024, "chunked") < 2 * peak(128, "chunked")
    assert peak(1024, "chunked") < 2 << 20
    assert peak(1024, "reference") > 4 * 4 * 1024 * 4096


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.randn(4, 3, 8)}, ValueError, r"\(B, H, P, d\)"),
        ({"q": torch.randn(1, 3, 3, 8)}, ValueError, "multiple of the 2 KV heads"),
        ({"q": torch.randn(1, 4, 3, 7)}, ValueError, "head width"),
        ({"q": torch.randn(1, 4, 3, 8).double()}, ValueError, "one floating dtype"),
        ({"proxy_positions": torch.arange(2)}, ValueError, r"shape \(3,\) or \(1, 3\)"),
        ({"proxy_positions": torch.rand(3)}, TypeError, "integers"),
        ({"proxy_positions": torch.ones(3).bool()}, TypeError, "nonzero"),
        ({"key_mask": torch.ones(1, 6)}, TypeError, "bool"),
        ({"key_mask": torch.ones(6).bool()}, ValueError, r"\(1, 6\)"),
        ({"head_reduction": "sum"}, ValueError, "'mean' or 'none'"),
        ({"backend": "cuda"}, ValueError, "'chunked'"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "q": torch.randn(1, 4, 3, 8),
        "k": torch.randn(1, 2, 6, 8),
        "proxy_positions": torch.arange(3),
    }
    with pytest.raises(error, match=message):
        proxy_column_sums(**{**arguments, **change})


def test_a_backend_without_gradients_says_so():
    q, k = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="no_grad"):
        proxy_column_sums(q, k, torch.arange(3), backend="chunked")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*PROXY_CASES, (4099, 301, 128, 2, 4, True, True, "mean")], ids=str)
@pytest.mark.parametrize("backend", ["triton", "chunked", "auto"])
def test_on_cuda(case, dtype, backend):
    assert_proxy_agrees(case, dtype, backend, "cuda")
