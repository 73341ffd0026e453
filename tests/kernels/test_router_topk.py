"""The router's definition against independent arithmetic."""

from __future__ import annotations

import pytest
import torch

from labkit.kernels.router_topk import router_topk


def test_against_softmax_and_counting():
    torch.manual_seed(0)
    logits = torch.randn(11, 6)
    mask = torch.tensor([True] * 8 + [False] * 3)
    found = router_topk(logits, 3, mask=mask)
    probs = logits.double().softmax(-1)
    for t in range(11):
        best = sorted(range(6), key=lambda e: -probs[t, e])[:3]
        assert found.index[t].tolist() == best
        total = sum(probs[t, e] for e in best)
        for j, e in enumerate(best):
            assert found.weights[t, j].item() == pytest.approx(float(probs[t, e] / total), abs=1e-6)
    torch.testing.assert_close(found.probability_sums.double(), probs[:8].sum(0), atol=1e-5, rtol=1e-5)
    assert found.counts.sum() == 24
    assert found.counts.tolist() == [sum(e in row for row in found.index[:8].tolist()) for e in range(6)]
    torch.testing.assert_close(found.logsumexp, torch.logsumexp(logits, -1))


def test_weights_without_renormalising_are_probabilities():
    logits = torch.randn(5, 4)
    found = router_topk(logits, 2, renormalize=False)
    torch.testing.assert_close(found.weights, logits.softmax(-1).gather(1, found.index))


def test_far_apart_logits_still_have_an_order():
    found = router_topk(torch.tensor([[-500.0, 0.0, -400.0, -300.0]]), 4)
    assert found.index.tolist() == [[1, 3, 2, 0]]
    assert found.weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_gradients_against_finite_differences():
    logits = torch.randn(4, 5, requires_grad=True)
    weights = torch.randn(4, 2)

    def loss(x):
        found = router_topk(x, 2)
        return (found.weights * weights).sum() + found.logsumexp.square().sum() + found.probability_sums[0]

    (gradient,) = torch.autograd.grad(loss(logits), logits)
    numeric = torch.zeros_like(logits)
    step = 1e-2
    for t in range(4):
        for e in range(5):
            moved = torch.zeros(4, 5)
            moved[t, e] = step
            numeric[t, e] = (loss(logits + moved) - loss(logits - moved)).detach() / (2 * step)
    torch.testing.assert_close(gradient, numeric, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(3), 1), {}, ValueError, r"\(T, E\)"),
        ((torch.zeros(3, 4), 5), {}, ValueError, "1..4; got 5"),
        ((torch.zeros(3, 4), 0), {}, ValueError, "1..4; got 0"),
        ((torch.zeros(3, 4), 1), {"mask": torch.ones(3)}, TypeError, "bool"),
        ((torch.zeros(3, 4), 1), {"mask": torch.ones(2).bool()}, ValueError, r"mask must be \(3,\)"),
        ((torch.zeros(3, 4), 1), {"backend": "numpy"}, ValueError, "backend must be one of"),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        router_topk(*arguments, **options)
