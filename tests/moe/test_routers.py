from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from labkit.moe import (
    ROUTERS,
    CosineRouter,
    FrozenRandomRouter,
    HashRouter,
    HyperRouter,
    LinearRouter,
    MLPRouter,
    SwitchRouter,
    make_router,
)

OPTIONS = {
    "hash": {"vocab_size": 50},
    "recurrent": {"state_size": 6},
    "mlp": {"width": 5},
    "cosine": {"reduce": 3},
}


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_every_router_keeps_the_contract(kind):
    k = 1 if kind == "switch" else 2
    router = make_router(kind, 8, 4, k, **OPTIONS.get(kind, {})).eval()
    hidden = torch.randn(2, 5, 8)
    context = {"token_ids": torch.randint(0, 50, (2, 5))} if kind == "hash" else {}
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False
    info, _ = router.route(hidden, mask=mask, layer=3, **context)
    assert info.logits.shape == (10, 4)
    assert info.logits.dtype == torch.float32
    assert info.index.shape == info.weights.shape == (10, k)
    assert info.layer == 3
    assert info.mask.tolist() == mask.reshape(-1).tolist()
    assert torch.equal(info.index, info.logits.topk(k).indices) or kind == "hash"
    if kind != "switch":
        torch.testing.assert_close(info.weights.sum(-1), torch.ones(10))
    if kind != "hash":
        logits, weights, index = router(hidden)
        assert torch.equal(logits, info.logits)
        assert torch.equal(weights, info.weights)
        assert torch.equal(index, info.index)
    again = make_router(**router.options())
    again.load_state_dict(router.state_dict())
    torch.testing.assert_close(again.eval().route(hidden, **context)[0].logits, info.logits)


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - {"hash", "random"}))
def test_every_learned_router_learns(kind):
    k = 1 if kind == "switch" else 2
    router = make_router(kind, 8, 4, k, **OPTIONS.get(kind, {}))
    _, weights, _ = router(torch.randn(6, 8))
    (weights[:, 0].square()).sum().backward()
    for name, parameter in router.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0 or name.endswith("weight_hh"), name  # h_0 = 0


def test_linear():
    router = LinearRouter(8, 4, 2, bias=True)
    torch.nn.init.normal_(router.bias)
    x = torch.randn(5, 8)
    torch.testing.assert_close(router.scores(x), x @ router.weight.T + router.bias)


def test_mlp():
    router = MLPRouter(8, 4, 2, width=7)
    x = torch.randn(5, 8)
    inner = F.gelu(x @ router.inner.weight.T + router.inner.bias)
    torch.testing.assert_close(router.scores(x), inner @ router.outer.weight.T + router.outer.bias)


def test_frozen_is_reproducible_and_never_trained():
    one, two = (FrozenRandomRouter(8, 4, 2, seed=3) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert not list(one.parameters())
    assert "weight" in one.state_dict()


def test_hyper_generates_its_weight_from_one_vector():
    router = HyperRouter(8, 4, 2, width=6)
    flat = router.outer(torch.relu(router.inner(router.vector)))
    x = torch.randn(5, 8)
    expected = x @ flat[:32].view(4, 8).T + flat[32:]
    torch.testing.assert_close(router.scores(x), expected)
    router.scores(x).sum().backward()
    assert router.vector.grad.abs().sum() > 0
    assert router.outer.weight.grad is None


@pytest.mark.parametrize("reduce", [None, 3])
def test_cosine(reduce):
    router = CosineRouter(8, 4, 2, reduce=reduce, temperature=0.5)
    x = torch.randn(5, 8)
    z = x if reduce is None else x @ router.projection.weight.T
    expected = F.cosine_similarity(z[:, None], router.centres[None], dim=-1) / 0.5
    torch.testing.assert_close(router.scores(x), expected)
    assert router.scores(torch.zeros(1, 8)).isfinite().all()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_hash_loads_are_equal_and_experts_distinct(k):
    router = HashRouter(8, 5, k, vocab_size=100)
    ids = torch.arange(100)
    info, _ = router.route(torch.randn(100, 8), token_ids=ids)
    assert info.csr().per_expert().tolist() == [20 * k] * 5
    assert all(len(set(row)) == k for row in info.index.tolist())
    torch.testing.assert_close(info.probs.gather(1, info.index), torch.full((100, k), 1 / k))


def test_switch_router_computes_in_float32():
    router = SwitchRouter(8, 4).bfloat16().eval()
    x = torch.randn(5, 8).bfloat16()
    logits, weights, _ = router(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, x.float() @ router.classifier.weight.float().T)
    torch.testing.assert_close(weights[:, 0], logits.softmax(-1).amax(-1))


def test_jitter_is_for_training_and_leaves_its_input_alone():
    router = LinearRouter(8, 4, 2, jitter=0.3)
    x = torch.ones(5, 8)
    noisy = router(x)[0]
    assert torch.equal(x, torch.ones(5, 8))
    router.eval()
    assert not torch.allclose(noisy, router(x)[0])
    assert torch.equal(router(x)[0], router(x)[0])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((8, 4, 5), {}, "top_k=5 exceeds num_experts=4"),
        ((8, 0, 1), {}, "num_experts must be at least 1; got 0"),
        ((8, 4, 0), {}, "top_k must be at least 1"),
        ((8, 4, 1), {"jitter": 1.0}, "jitter"),
    ],
)
def test_bad_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        LinearRouter(*arguments, **options)


def test_other_bad_input():
    with pytest.raises(ValueError, match="kind must be one of"):
        make_router("soft", 8, 4, 1)
    with pytest.raises(ValueError, match="width must be at least 1"):
        MLPRouter(8, 4, 1, width=0)
    with pytest.raises(ValueError, match="temperature"):
        CosineRouter(8, 4, 1, temperature=0)
    with pytest.raises(ValueError, match="pass token_ids"):
        HashRouter(8, 4, 1, vocab_size=5)(torch.randn(3, 8))
    with pytest.raises(ValueError, match="must name 3 tokens; got 2"):
        HashRouter(8, 4, 1, vocab_size=5).route(torch.randn(3, 8), token_ids=torch.zeros(2).long())
    with pytest.raises(ValueError, match="tokens of width 8"):
        LinearRouter(8, 4, 1)(torch.randn(3, 7))
