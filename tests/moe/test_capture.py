"""What the recorder says is what the router did, in every class and every way a model is run."""

import pytest
import torch
from torch.nn import functional as F

from labkit.moe import capture_inputs, capture_routing, moe_blocks
from tests.moe import zoo


def recorded(model, given, **options):
    with capture_routing(model, **options) as forwards, torch.no_grad():
        model(**given)
    return forwards[0]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_logits_are_raw_and_the_choice_is_the_models(name):
    model = zoo.shared(name)
    seen = []

    def router_hook(module, args, output):
        seen.append((args[0].detach().clone(), output))

    handles = [block.router.register_forward_hook(router_hook) for block in moe_blocks(model)]
    infos = recorded(model, zoo.inputs(name))
    for handle in handles:
        handle.remove()
    assert len(infos) == len(seen)
    for info, (hidden, output), block in zip(infos, seen, moe_blocks(model), strict=True):
        router = block.router
        linear = next(
            m
            for m in (router, getattr(router, "classifier", None), getattr(router, "layer", None))
            if isinstance(getattr(m, "weight", None), torch.Tensor)
        )
        expected = F.linear(hidden.reshape(-1, 32), linear.weight, getattr(linear, "bias", None))
        torch.testing.assert_close(info.logits, expected)
        torch.testing.assert_close(info.probs, expected.softmax(-1))
        assert info.layer == block.layer
        assert not info.logits.requires_grad
        if name in ("JetMoe", "SwitchTransformers"):
            continue  # their routers return another form; test_adapters compares what the blocks make of it
        weights, index = output[1:] if output[0].is_floating_point() else output[1::-1]
        for token in range(len(index)):
            assert dict(zip(index[token].tolist(), weights[token].tolist(), strict=True)) == pytest.approx(
                dict(zip(info.index[token].tolist(), info.weights[token].tolist(), strict=True))
            )


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Olmoe", "JetMoe", "SwitchTransformers"])
def test_masks_follow_the_stack(name):
    infos = recorded(zoo.shared(name), zoo.inputs(name, padded=3))
    expected = torch.ones(2, 7, dtype=torch.bool)
    expected[1, :3] = False
    for info in infos:
        shape = expected[:, :5] if info.num_tokens == 10 else expected
        assert torch.equal(info.mask, shape.reshape(-1))
    if name != "SwitchTransformers":
        assert all(
            i.mask is None for i in recorded(zoo.shared(name), {"input_ids": torch.ones(1, 4, dtype=int)})
        )


def test_a_mask_given_by_position_counts():
    model = zoo.shared("Mixtral")
    mask = torch.tensor([[0, 1, 1]])
    with capture_routing(model) as forwards, torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.long), mask)
    assert forwards[0][0].mask.tolist() == [False, True, True]


def test_generation_is_recorded_step_by_step_with_the_new_tokens_mask():
    model = zoo.shared("Qwen3Moe")
    given = zoo.inputs("Qwen3Moe", padded=2)
    with capture_routing(model) as forwards:
        model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert [len(step) for step in forwards] == [2, 2, 2]
    assert [step[0].num_tokens for step in forwards] == [14, 2, 2]
    assert forwards[0][0].mask.sum() == 12
    assert forwards[1][0].mask.all()


def test_capacity_is_seen():
    """Switch drops tokens beyond an expert's capacity: they keep their choice and compute nothing."""
    model, given = (
        zoo.make("SwitchTransformers", expert_capacity=1),
        zoo.inputs("SwitchTransformers", batch=1),
    )
    given |= {"input_ids": torch.full((1, 7), 5), "decoder_input_ids": torch.full((1, 5), 5)}
    (encoder, *_) = recorded(model, given)
    assert encoder.kept.dtype == torch.bool
    assert encoder.index.shape == (7, 1)
    if encoder.num_tokens - int(encoder.kept.sum()):  # transformers before 5.18 never dropped a token
        kept_per_expert = encoder.csr().per_expert()
        assert kept_per_expert.max() == 1


def test_under_autocast_logits_stay_float32():
    model, given = zoo.shared("Mixtral"), zoo.inputs("Mixtral")
    with torch.autocast("cpu", dtype=torch.bfloat16), capture_inputs(model) as forwards, torch.no_grad():
        model(**given)
    for seen in forwards[0]:
        assert seen.routing.logits.dtype == torch.float32
        exact = seen.hidden.double() @ seen.block.router.weight.double().T
        torch.testing.assert_close(seen.routing.logits.double(), exact, atol=1e-5, rtol=1e-5)


def test_bfloat16_models():
    model = zoo.make("Olmoe").bfloat16()
    for info in recorded(model, zoo.inputs("Olmoe")):
        assert info.logits.dtype == torch.float32
        assert info.weights.dtype == torch.bfloat16


def test_with_the_graph_kept_losses_reach_the_router():
    model, given = zoo.make("Mixtral"), zoo.inputs("Mixtral")
    with capture_routing(model, detach=False) as forwards:
        model(**given)
    sum(info.logits.logsumexp(-1).square().mean() for info in forwards[0]).backward()
    for block in moe_blocks(model):
        assert block.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_recorded_once(reentrant):
    model, given = zoo.make("Mixtral").train(), zoo.inputs("Mixtral")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with capture_routing(model) as forwards:
        model(**given).logits.sum().backward()
    assert [len(step) for step in forwards] == [3]
    assert moe_blocks(model)[0].experts.down_proj.grad.abs().sum() > 0
    with (
        pytest.raises(ValueError, match="gradient checkpointing throws away"),
        capture_routing(model, detach=False),
    ):
        pass


def test_hooks_are_gone_afterwards_and_failed_forwards_leave_nothing():
    model = zoo.make("Mixtral")
    with capture_routing(model) as forwards:
        with pytest.raises(IndexError):
            model(torch.tensor([[1, 999]]))
        model(torch.tensor([[1, 2]]))
        model.model(torch.tensor([[1, 2]]))  # not a call of the model itself
    assert len(forwards) == 1
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_recording_changes_nothing():
    model, given = zoo.shared("DeepseekV3"), zoo.inputs("DeepseekV3")
    with torch.no_grad():
        before = model(**given).logits
        with capture_routing(model, cpu=True):
            during = model(**given).logits
    assert torch.equal(before, during)


def test_inputs_that_a_block_changes_in_place_are_kept_as_read():
    """Jitter multiplies the block's input in place; what was recorded is what the router read."""
    model = zoo.make("Mixtral", router_jitter_noise=0.5).train()
    with capture_inputs(model) as forwards, torch.no_grad():
        model(**zoo.inputs("Mixtral"))
    for seen in forwards[0]:
        torch.testing.assert_close(seen.routing.logits, seen.hidden @ seen.block.router.weight.T)


def test_models_without_experts_are_refused():
    with (
        pytest.raises(ValueError, match="no mixture-of-experts block"),
        capture_routing(torch.nn.Linear(2, 2)),
    ):
        pass
