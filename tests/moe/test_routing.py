from __future__ import annotations

import pytest
import torch

from labkit.moe import Pairs, RoutingInfo


def test_from_logits_is_softmax_then_the_largest():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, -1.0]])
    info = RoutingInfo.from_logits(logits, 2)
    probs = logits.softmax(-1)
    assert info.index.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(info.weights.sum(-1), torch.ones(2))
    torch.testing.assert_close(info.weights[0, 0], probs[0, 1] / (probs[0, 1] + probs[0, 2]))
    plain = RoutingInfo.from_logits(logits, 2, renormalize=False)
    torch.testing.assert_close(plain.weights, probs.gather(1, plain.index))
    assert RoutingInfo.from_logits(logits.bfloat16(), 1).probs.dtype == torch.float32


def test_dense_choices_as_pairs_and_back():
    torch.manual_seed(0)
    info = RoutingInfo.from_logits(torch.randn(7, 5), 3)
    pairs = info.csr()
    assert pairs.per_token().tolist() == [3] * 7
    assert pairs.offsets().tolist() == list(range(0, 22, 3))
    dense = pairs.dense_weights()
    torch.testing.assert_close(dense.gather(1, info.index), info.weights)
    assert int((dense > 0).sum()) == 21


def test_dropped_choices_make_no_pair():
    info = RoutingInfo.from_logits(torch.eye(3), 2)
    kept = torch.tensor([[True, False], [False, False], [True, True]])
    pairs = info.replace(kept=kept).csr()
    assert pairs.per_token().tolist() == [1, 0, 2]
    assert pairs.offsets().tolist() == [0, 1, 1, 3]


def test_pairs_replace_the_choice():
    info = RoutingInfo.from_logits(torch.zeros(2, 3), 1)
    everyone = Pairs.from_mask(torch.ones(2, 3, dtype=torch.bool), info.probs)
    assert len(info.replace(pairs=everyone).csr()) == 6
    assert info.csr().per_token().tolist() == [1, 1]


def test_gradients_pass_through_pairs_and_stop_at_detach():
    logits = torch.randn(4, 3, requires_grad=True)
    info = RoutingInfo.from_logits(logits, 2)
    info.csr().dense_weights()[:, 0].sum().backward()
    assert logits.grad.abs().sum() > 0
    still = info.replace(pairs=info.csr()).detach()
    for tensor in (still.weights, still.logits, still.csr().weight):
        assert not tensor.requires_grad


def test_no_tokens():
    info = RoutingInfo.from_logits(torch.zeros(0, 4), 2)
    assert len(info.csr()) == 0
    assert info.csr().offsets().tolist() == [0]
    assert info.csr().per_expert().tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.ones(2)}, TypeError, "bool"),
        ({"mask": torch.ones(1, 2, dtype=torch.bool)}, ValueError, r"reshape\(-1\)"),
        ({"index": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"\(2, k\)"),
        ({"weights": torch.zeros(2, 2)}, ValueError, r"\(2, k\)"),
        ({"probs": torch.zeros(2, 2)}, ValueError, r"\(T, E\)"),
        ({"kept": torch.ones(2, 3).bool()}, ValueError, "kept must be"),
    ],
)
def test_bad_records(change, error, message):
    info = RoutingInfo.from_logits(torch.zeros(2, 3), 1)
    with pytest.raises(error, match=message):
        info.replace(**change)


@pytest.mark.parametrize("k", [0, 4])
def test_bad_top_k(k):
    with pytest.raises(ValueError, match=f"top_k={k}"):
        RoutingInfo.from_logits(torch.zeros(2, 3), k)


def test_bad_pairs():
    with pytest.raises(ValueError, match="one length"):
        Pairs(torch.zeros(2).long(), torch.zeros(3).long(), torch.zeros(2), 2, 3)
