"""The experts' implementations against the definition, and the definition against arithmetic by hand."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.grouped_experts import grouped_experts
from labkit.kernels.grouped_experts import sorted as sorted_module
from labkit.kernels.grouped_experts.sorted import Plan

from .moe_cases import EXPERT_CASES, assert_experts_agree, expert_inputs, expert_results


def by_hand(x, index, weight, up, down, gated, activation):
    """One token and one choice at a time."""
    act = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "relu": torch.relu,
    }[activation]
    rows = []
    for t in range(len(x)):
        y = torch.zeros(x.shape[1])
        for j, e in enumerate(index[t].tolist()):
            pre = up[e] @ x[t]
            inner = down.shape[2]
            h = act(pre[:inner]) * pre[inner:] if gated else act(pre)
            y = y + weight[t, j] * (down[e] @ h)
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


@pytest.mark.parametrize("case", [c for c in EXPERT_CASES if c[0] < 20], ids=str)
def test_definition(case):
    leaves, index, options = expert_inputs(case, torch.float32)
    x, weight, up, down = leaves
    expected = by_hand(x[:, : up.shape[2]], index, weight, up, down, **options)
    actual = grouped_experts(x[:, : up.shape[2]], index, weight, up, down, backend="reference", **options)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pairs", [False, True], ids=["dense", "pairs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
def test_sorted(case, dtype, pairs):
    assert_experts_agree(case, dtype, "sorted", pairs=pairs)


@pytest.mark.parametrize("pairs", [False, True], ids=["dense", "pairs"])
def test_torch_grouped_mm(pairs):
    leaves, index, options = expert_inputs((17, 4, 3, 8, 8, 2, True, "silu"), torch.float32)
    x, weight, up, down = leaves
    choice = {"expert": index, "weight": weight}
    if pairs:
        keep = torch.rand(index.shape) < 0.6
        token = torch.arange(17)[:, None].expand_as(index)[keep]
        choice = {"expert": index[keep], "weight": weight[keep], "token": token}
    results = []
    for backend in ("reference", "grouped_mm"):
        y = grouped_experts(x[:, :8], up=up, down=down, backend=backend, **choice, **options)
        gradients = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        results.append([y, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("elements", [1, 200, 2000])
def test_blocks_do_not_change_the_result(monkeypatch, elements):
    case = (70, 6, 5, 12, 10, 2, True, "silu")
    whole = expert_results(case, torch.float32, "sorted")
    monkeypatch.setitem(sorted_module.BLOCK_ELEMENTS, "cpu", elements)
    for a, b in zip(whole, expert_results(case, torch.float32, "sorted"), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_against_finite_differences():
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [2, 1], [0, 1]])
    inputs = [
        torch.randn(*s, dtype=torch.float64) for s in [(3, 4), (3, 2), (4, 6, 4), (4, 4, 3), (4, 6), (4, 4)]
    ]
    inputs = [t.requires_grad_() for t in inputs]

    def run(x, w, up, down, up_bias, down_bias):
        return grouped_experts(x, index, w, up, down, up_bias=up_bias, down_bias=down_bias, backend="sorted")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("gated", [False, True])
def test_biases(gated):
    torch.manual_seed(0)
    index = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    inner, outer = 5, 10 if gated else 5
    leaves = [
        torch.randn(*s).requires_grad_()
        for s in [(4, 6), (4, 2), (4, outer, 6), (4, 6, inner), (4, outer), (4, 6)]
    ]
    results = []
    for backend in ("reference", "sorted"):
        x, w, up, down, b, c = leaves
        y = grouped_experts(
            x, index, w, up, down, up_bias=b, down_bias=c, activation="gelu", gated=gated, backend=backend
        )
        results.append([y, *torch.autograd.grad(y.pow(2).sum(), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert results[1][3][3].abs().max() == 0  # the expert that nobody chose


@pytest.mark.parametrize("frozen", [{0}, {1}, {2, 3}, {0, 1, 2}, {0, 1, 3}], ids=str)
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    case = (9, 4, 3, 8, 6, 2, True, "silu")
    whole = expert_results(case, torch.float32, "sorted")
    leaves, index, options = expert_inputs(case, torch.float32)
    for i in frozen:
        leaves[i].requires_grad_(False)
    x, weight, up, down = leaves
    y = grouped_experts(x[:, :8], index, weight, up, down, backend="sorted", **options)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)))
    for i, leaf in enumerate(leaves):
        if i in frozen:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, whole[i + 1])


def test_the_order_within_an_expert_is_the_order_of_tokens():
    plan = Plan.of(torch.tensor([1, 0, 1, 1, 0, 0]), None, 2, 3)
    assert plan.token.tolist() == [0, 2, 2, 0, 1, 1]
    assert plan.counts == [3, 3, 0]
    assert plan.order.tolist() == [1, 4, 5, 0, 2, 3]


def test_transposed_matrices_are_taken_as_views():
    case = (9, 4, 3, 8, 6, 2, True, "silu")
    leaves, index, options = expert_inputs(case, torch.float32)
    x, weight, up, down = leaves
    up_t, down_t = (m.detach().transpose(1, 2).contiguous().requires_grad_() for m in (up, down))
    y = grouped_experts(x[:, :8], index, weight, up_t.transpose(1, 2), down_t.transpose(1, 2), **options)
    expected = grouped_experts(x[:, :8], index, weight, up, down, **options)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(up_t.grad.transpose(1, 2), up.grad)


def test_autocast_multiplies_in_its_dtype_and_keeps_the_gradients_dtype():
    case = (9, 4, 3, 8, 6, 2, True, "silu")
    leaves, index, options = expert_inputs(case, torch.float32)
    x, weight, up, down = leaves
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_experts(x[:, :8], index, weight, up, down, **options)
    assert y.dtype == torch.float32
    exact = grouped_experts(x[:, :8], index, weight, up, down, **options)
    assert 0 < (y - exact).abs().max() < 0.05 * exact.abs().max()
    y.sum().backward()
    assert up.grad.dtype == torch.float32


def test_no_pairs_at_all():
    x = torch.randn(3, 4, requires_grad=True)
    up, down = torch.randn(2, 4, 4, requires_grad=True), torch.randn(2, 4, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    y = grouped_experts(x, none, torch.zeros(0), up, down, token=none)
    assert torch.equal(y, torch.zeros(3, 4))
    y.sum().backward()
    assert torch.equal(up.grad, torch.zeros_like(up))


GOOD = {
    "x": torch.randn(3, 4),
    "expert": torch.tensor([[0], [1], [0]]),
    "weight": torch.ones(3, 1),
    "up": torch.randn(2, 6, 4),
    "down": torch.randn(2, 4, 3),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
        ({"activation": "tanh"}, ValueError, "activation must be one of 'silu'"),
        ({"up": torch.randn(2, 3, 4)}, ValueError, r"gated experts over width 4 need up \(E, 6, 4\)"),
        ({"gated": False}, ValueError, "ungated experts"),
        ({"expert": torch.tensor([[0], [2], [0]])}, ValueError, r"0..1; got values from 0 to 2"),
        ({"expert": torch.zeros(3, 1)}, TypeError, "int64"),
        (
            {"expert": torch.zeros(2, 1, dtype=torch.long), "weight": torch.ones(2, 1)},
            ValueError,
            r"\(3, k\)",
        ),
        ({"weight": torch.ones(3, 2)}, ValueError, "one shape"),
        ({"x": torch.randn(3, 4).bfloat16()}, ValueError, "share a dtype"),
        ({"token": torch.tensor([[0], [1], [2]])}, ValueError, r"must be \(S,\)"),
        ({"up_bias": torch.zeros(2, 3)}, ValueError, r"up_bias must be \(2, 6\)"),
        ({"backend": "grouped_mm"}, ValueError, "multiple of 16 bytes"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        grouped_experts(**{**GOOD, **change})


def test_bad_pairs():
    pairs = {"expert": torch.tensor([0, 1]), "weight": torch.ones(2)}
    with pytest.raises(ValueError, match="order of their tokens"):
        grouped_experts(**{**GOOD, **pairs}, token=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match=r"0..2; got 0 to 3"):
        grouped_experts(**{**GOOD, **pairs}, token=torch.tensor([0, 3]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", EXPERT_CASES, ids=str)
@pytest.mark.parametrize("backend", ["triton", "sorted"])
def test_on_a_gpu(backend, case, dtype):
    leaves, index, options = expert_inputs(case, dtype)
    leaves = [leaf.detach().cuda().requires_grad_() for leaf in leaves]
    x, weight, up, down = leaves
    results = []
    for name in ("reference", backend):
        y = grouped_experts(x[:, : up.shape[2]], index.cuda(), weight, up, down, backend=name, **options)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        scale = max(1.0, float(a.detach().abs().max())) if a.numel() else 1.0
        tolerance = (1e-4 if dtype == torch.float32 else 3e-2) * scale
        torch.testing.assert_close(b.float(), a.float(), atol=tolerance, rtol=1e-3)
