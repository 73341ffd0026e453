from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from labkit.moe import (
    Pairs,
    RoutingInfo,
    cross_layer_information,
    importance_cv2,
    load_balancing_loss,
    load_cv2,
    moe_stats,
    router_entropy,
    router_z_loss,
)


def records(layers=3, tokens=12, experts=5, k=2, **options):
    return [
        RoutingInfo.from_logits(torch.randn(tokens, experts) * 2, k, layer=i, **options)
        for i in range(layers)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_balance_equals_transformers_on_raw_logits(masked):
    infos = records()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]) if masked else None
    expected = load_balancing_loss_func(tuple(i.logits for i in infos), 5, 2, mask)
    torch.testing.assert_close(load_balancing_loss(infos, mask), expected)
    if masked:
        own = [i.replace(mask=mask.reshape(-1).bool()) for i in infos]
        torch.testing.assert_close(load_balancing_loss(own), expected)


def test_balance_by_layer_does_not_let_layers_make_up_for_one_another():
    left = RoutingInfo.from_logits(torch.tensor([[9.0, 0.0]] * 4), 1)
    right = RoutingInfo.from_logits(torch.tensor([[0.0, 9.0]] * 4), 1)
    assert load_balancing_loss([left, right]).item() == pytest.approx(1.0)
    assert load_balancing_loss([left, right], over="layer").item() == pytest.approx(2.0, abs=1e-3)


def test_balance_extremes():
    assert load_balancing_loss(RoutingInfo.from_logits(torch.zeros(6, 4), 4)).item() == pytest.approx(4.0)
    sure = RoutingInfo.from_logits(torch.tensor([[50.0, 0.0, 0.0, 0.0]] * 6), 1)
    assert load_balancing_loss(sure).item() == pytest.approx(4.0)


def test_balance_pushes_towards_balance():
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 6, requires_grad=True)
    load_balancing_loss(RoutingInfo.from_logits(logits, 1)).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_z_loss_by_hand():
    infos = records(layers=2, tokens=3, experts=2, k=1)
    mask = torch.tensor([True, True, False])
    values = [math.log(sum(math.exp(v) for v in row)) ** 2 for i in infos for row in i.logits[:2].tolist()]
    assert router_z_loss(infos, mask).item() == pytest.approx(sum(values) / 4, rel=1e-5)


def test_cv2_by_hand():
    info = RoutingInfo.from_logits(torch.tensor([[3.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 3.0, 1.0]]), 2)
    given = np.zeros(3)
    for row, weights in zip(info.index.tolist(), info.weights.tolist(), strict=True):
        given[row] += weights
    assert importance_cv2(info).item() == pytest.approx(given.var(ddof=1) / given.mean() ** 2, rel=1e-5)
    assert load_cv2(info).item() == pytest.approx(np.var([2, 1, 3], ddof=1) / 4)
    masked = importance_cv2(info, torch.tensor([True, True, False]))
    assert masked.item() == pytest.approx(importance_cv2(RoutingInfo.from_logits(info.logits[:2], 2)).item())
    assert importance_cv2(RoutingInfo.from_logits(torch.zeros(3, 1), 1)).item() == 0


@pytest.mark.parametrize("loss", [load_balancing_loss, router_z_loss, importance_cv2, load_cv2])
def test_padding_changes_nothing(loss):
    """Whatever stands at padding, the loss is that of the real tokens."""
    real = torch.randn(7, 5)
    padded = torch.cat([torch.randn(2, 5) * 100, real])
    mask = torch.arange(9) >= 2
    expected = loss(RoutingInfo.from_logits(real, 2))
    torch.testing.assert_close(loss(RoutingInfo.from_logits(padded, 2, mask=mask)), expected)
    torch.testing.assert_close(loss(RoutingInfo.from_logits(padded, 2), mask.view(1, 9)), expected)


def test_all_padding_is_zero_not_nan():
    info = RoutingInfo.from_logits(torch.randn(3, 4), 2, mask=torch.zeros(3, dtype=torch.bool))
    assert load_balancing_loss(info).item() == 0
    assert router_z_loss(info).item() == 0


def test_entropy():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [900.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(router_entropy(logits), torch.tensor([math.log(4), 0.0]))
    # the form with a guard inside the logarithm: its maximum for 8 experts is 2.07936, not ln 8
    assert router_entropy(torch.zeros(8), eps=1e-5).item() == pytest.approx(2.07936, abs=5e-6)


def test_stats_by_hand():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0]])
    info = RoutingInfo.from_logits(logits, 1, layer=4, mask=torch.tensor([True, True, False]))
    [stats] = moe_stats(info)
    probs = logits[:2].double().softmax(-1)
    assert (stats.layer, stats.tokens, stats.experts_per_token, stats.drop_rate) == (4, 2, 1.0, 0.0)
    assert stats.entropy == pytest.approx(float(-(probs * probs.log()).sum(-1).mean()), rel=1e-5)
    assert stats.inner_balance == pytest.approx(math.e, rel=1e-4)  # torch's median of two is the lower
    assert stats.outer_balance == pytest.approx(float(probs.amax(-1).min()), rel=1e-5)
    assert stats.load.tolist() == [0.5, 0.5, 0.0]


def test_stats_of_drops_and_broadcasts():
    info = RoutingInfo.from_logits(torch.eye(4)[:, :3] * 3, 2)
    kept = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    [stats] = moe_stats(info.replace(kept=kept))
    assert stats.drop_rate == pytest.approx(3 / 8)
    assert stats.experts_per_token == pytest.approx(5 / 4)
    everyone = Pairs.from_mask(torch.ones(4, 3, dtype=torch.bool), info.probs)
    [stats] = moe_stats(info.replace(pairs=everyone))
    assert (stats.drop_rate, stats.experts_per_token) == (0.0, 3.0)


@pytest.mark.parametrize("kind", ["experts", "scores"])
def test_information_equals_sklearn(kind):
    infos = records(layers=2, tokens=30, experts=6)
    a, b = (i.probs.double().numpy() for i in infos)
    if kind == "experts":
        expected = mutual_info_score(a.argmax(1), b.argmax(1))
    else:
        edges = np.linspace(0, 1, 100)
        pairs = zip(np.digitize(a, edges), np.digitize(b, edges), strict=True)
        expected = np.mean([mutual_info_score(x, y) for x, y in pairs])
    found = cross_layer_information(infos, kind=kind)
    assert found[0, 1].item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(found, found.T)


def test_independent_layers_share_nothing():
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    infos = [RoutingInfo.from_logits(torch.eye(4)[column] * 5, 1) for column in grid.T]
    assert cross_layer_information(infos)[0, 1].item() == pytest.approx(0.0, abs=1e-12)


def test_bad_input():
    with pytest.raises(ValueError, match="the list is empty"):
        load_balancing_loss([])
    with pytest.raises(ValueError, match=r"differ in their number of experts: \[5, 4\]"):
        load_balancing_loss([*records(1), *records(1, experts=4)])
    with pytest.raises(ValueError, match="12 entries"):
        router_z_loss(records(1), torch.ones(3))
    with pytest.raises(ValueError, match="over must be"):
        load_balancing_loss(records(1), over="token")
    with pytest.raises(ValueError, match="no real token"):
        moe_stats(records(1), torch.zeros(12))
    with pytest.raises(ValueError, match="same tokens"):
        cross_layer_information([*records(1), *records(1, tokens=5)])
    with pytest.raises(ValueError, match="kind must be"):
        cross_layer_information(records(1), kind="tokens")
