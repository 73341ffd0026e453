"""Sending tokens to other experts."""

import pytest
import torch

from labkit.moe import (
    GlobalWorkspace,
    MoEBlock,
    capture_inputs,
    moe_blocks,
    reroute,
    router_entropy,
    uncertain_tokens,
)
from tests.moe import zoo


def ran(model, given, *args, **kwargs):
    """What the experts of every block were given, under reroute."""
    found = {}

    def see(layer):
        return lambda _, a, k: found.__setitem__(layer, [*a, *k.values()][1:])

    with reroute(model, *args, **kwargs) as sent:
        handles = [
            block.experts.register_forward_pre_hook(see(block.layer), with_kwargs=True)
            for block in moe_blocks(model)
        ]
        with torch.no_grad():
            model(**given)
    for handle in handles:
        handle.remove()
    return found, sent


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe"])
def test_bottom(name):
    model, given = zoo.shared(name), zoo.inputs(name, padded=2)
    with capture_inputs(model) as forwards, torch.no_grad():
        model(**given)
    first = forwards[0][0].routing
    found, sent = ran(model, given, "all", "bottom")
    index, weights = found[0]
    real = given["attention_mask"].reshape(-1).bool()
    assert sent == {0: 12, 1: 12, 2: 12}
    lowest = first.probs.sort(-1).indices[:, :2]
    assert torch.equal(index[real].sort(-1).values, lowest[real].sort(-1).values)
    assert torch.equal(index[~real], first.index[~real])
    torch.testing.assert_close(weights.sum(-1), first.weights.sum(-1))
    torch.testing.assert_close(
        (weights[:, 0] / weights[:, 1])[real],
        (first.probs.gather(1, index)[:, 0] / first.probs.gather(1, index)[:, 1])[real],
    )


def test_certain_and_uncertain_split_the_tokens():
    model, given = zoo.shared("Mixtral"), zoo.inputs("Mixtral", padded=2)
    threshold = 1.9
    with capture_inputs(model) as forwards, torch.no_grad():
        model(**given)
    first = forwards[0][0].routing
    high = router_entropy(first.logits, eps=1e-5) >= threshold
    fixed = uncertain_tokens(model, given, threshold)
    assert torch.equal(fixed[0], high & first.real())
    assert 0 < fixed[0].sum() < 12
    found, sent = ran(model, given, "uncertain", "bottom", threshold=threshold)
    assert sent[0] == int(fixed[0].sum())
    assert torch.equal(found[0][0][~fixed[0]], first.index[~fixed[0]])
    _, others = ran(model, given, "certain", threshold=threshold)
    assert others[0] == 12 - sent[0]
    same, by_mask = ran(model, given, fixed, "bottom")
    assert torch.equal(same[0][0], found[0][0])
    assert by_mask == {k: int(v.sum()) for k, v in fixed.items()}


def test_random_is_even_without_repeats_and_the_same_for_all_models():
    model, given = zoo.shared("Mixtral"), zoo.inputs("Mixtral", batch=20, length=50)
    one, _ = ran(model, given, "all", seed=1)
    two, _ = ran(zoo.make("Mixtral", seed=5), given, "all", seed=1)
    other, _ = ran(model, given, "all", seed=2)
    assert torch.equal(one[2][0], two[2][0])
    assert not torch.equal(one[2][0], other[2][0])
    assert (one[0][0][:, 0] != one[0][0][:, 1]).all()
    counts = torch.bincount(one[0][0].reshape(-1), minlength=8)
    assert ((counts - 250).abs() < 5 * (250 * 7 / 8) ** 0.5).all()


def test_worst_is_farthest_from_the_own_output():
    torch.manual_seed(0)
    block = MoEBlock.build(8, 16, 4, 1, expert_options={"std": 0.5}).eval()
    x = torch.randn(1, 5, 8)
    seen = []
    block.before_dispatch.append(lambda info: seen.append(info) or info)
    own = block(x).detach()
    outputs = moe_blocks(block)[0].expert_outputs(x).detach()
    with reroute(block, "all", "worst"):
        moved = block(x)
        with pytest.raises(RuntimeError, match="as a module"):
            block.run(x)
    for t in range(5):
        plain = outputs[t, seen[0].index[t, 0]]
        farthest = max(range(4), key=lambda e: float((outputs[t, e] - plain).norm()))
        torch.testing.assert_close(moved[0, t], outputs[t, farthest])
        torch.testing.assert_close(own[0, t], plain)


def test_switch_keeps_its_weight_and_capacity():
    model = zoo.make("SwitchTransformers", expert_capacity=1)
    given = zoo.inputs("SwitchTransformers", length=12)
    block = moe_blocks(model)[0]
    with capture_inputs(model) as forwards, torch.no_grad():
        model(**given)
    info = forwards[0][0].routing
    assert not info.kept.all()
    found, _ = ran(model, given, "all", "bottom")
    chosen, weights = found[block.layer]
    assert torch.equal(chosen.sum((1, 2)).bool(), info.kept[:, 0])
    assert torch.equal(chosen[info.kept[:, 0], 0].argmax(-1), info.probs.argmin(-1)[info.kept[:, 0]])
    torch.testing.assert_close(weights, info.weights)


def test_jetmoe():
    model, given = zoo.make("JetMoe"), zoo.inputs("JetMoe")
    x = torch.randn(1, 6, 32)
    block = moe_blocks(model)[0]
    with torch.no_grad():
        info = block.routing(x.view(-1, 32), block.router(x.view(-1, 32)))
        with reroute(model, "all", "bottom"):
            found = block.module(x).view(-1, 32)
        outputs = block.expert_outputs(x)
        lowest = (-info.probs).topk(2).indices
        weights = info.probs.gather(1, lowest)
        weights = weights / weights.sum(1, keepdim=True)
        expected = (outputs.gather(1, lowest[..., None].expand(-1, -1, 32)) * weights[..., None]).sum(1)
        torch.testing.assert_close(found, expected + block.module.bias, atol=1e-5, rtol=1e-4)
        before = model(**given).logits
        with reroute(model, "all"):
            assert not torch.equal(model(**given).logits, before)
        assert torch.equal(model(**given).logits, before)


def test_another_rule_on_the_same_layers_is_noticed():
    block = MoEBlock.build(8, 16, 4, 1).train()
    with (
        GlobalWorkspace(block, rule="all"),
        reroute(block, "all"),
        pytest.raises(RuntimeError, match="another rule"),
    ):
        block(torch.randn(1, 5, 8))


def test_bad_input():
    model, given = zoo.shared("Mixtral"), zoo.inputs("Mixtral")
    for args, options, message in [
        (("some",), {}, "tokens must be one of"),
        (("uncertain",), {}, "needs a threshold"),
        (("all",), {"threshold": 1.0}, "takes no threshold"),
        (("all", "best"), {}, "how must be one of"),
        (("all",), {"layers": [9]}, "have no MoE block"),
        (({0: torch.ones(3)},), {"threshold": 1.0}, "take no threshold"),
        (({0: torch.ones(3)},), {"layers": [1]}, "no mask for the layers"),
    ]:
        with pytest.raises(ValueError, match=message), reroute(model, *args, **options):
            pass
    with pytest.raises(TypeError, match="dict of masks"), reroute(model, torch.ones(3)):
        pass
    with pytest.raises(ValueError, match="3 tokens and the batch 14"), reroute(model, {0: torch.ones(3)}):
        model(**given)
    with pytest.raises(TypeError, match="mapping"):
        uncertain_tokens(model, [given], 1.0)
