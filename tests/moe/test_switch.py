from __future__ import annotations

import pytest
import torch

from labkit.moe import (
    Experts,
    LinearRouter,
    Pairs,
    SwitchBlock,
    SwitchRouter,
    load_moe,
    replace_module,
    save_moe,
)

from .small import small_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def sparse_layers(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__ == "SwitchTransformersSparseMLP"}


@pytest.mark.parametrize("capacity", [0, 2, 64])
def test_stands_in_transformers_switch(capacity):
    """Where transformers counts places by sequence, as it says it does."""
    model = small_model("Switch", expert_capacity=capacity)
    expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    layers = sparse_layers(model)
    assert len(layers) == 2
    for name, mlp in layers.items():
        replace_module(model, name, SwitchBlock.from_transformers(mlp))
    torch.testing.assert_close(
        model(input_ids=IDS, decoder_input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4
    )


def by_hand(block, x, overflow):
    """Sequence by sequence, token by token."""
    out = torch.zeros_like(x)
    for b, sequence in enumerate(x):
        taken = [0] * block.experts.num_experts
        for t, token in enumerate(sequence):
            probs = (block.gate.classifier.weight @ token).softmax(-1)
            e = int(probs.argmax())
            taken[e] += 1
            if taken[e] <= block.expert_capacity:
                y = block.experts.down_proj[e] @ torch.relu(block.experts.up_proj[e] @ token)
            else:
                y = token if overflow == "input" else torch.zeros_like(token)
            out[b, t] = probs[e] * y
    return out


@pytest.mark.parametrize("overflow", ["input", "zero"])
def test_by_hand(overflow):
    experts = Experts(3, 8, 12, activation="relu", gated=False, std=0.4)
    block = SwitchBlock(SwitchRouter(8, 3), experts, expert_capacity=2, overflow=overflow).eval()
    x = torch.randn(4, 7, 8)
    out = block.run(x)
    torch.testing.assert_close(out.hidden, by_hand(block, x, overflow), atol=1e-5, rtol=1e-4)
    assert 0 < int((~out.info.kept).sum()) < 28
    # capacity is of each sequence: a batch is its sequences one by one
    torch.testing.assert_close(out.hidden, torch.cat([block(row[None]) for row in x]))


def test_gradients_reach_everything_through_both_overflows():
    for overflow in ("input", "zero"):
        experts = Experts(2, 8, 12, activation="relu", gated=False, std=0.4)
        block = SwitchBlock(SwitchRouter(8, 2), experts, expert_capacity=1, overflow=overflow)
        block(torch.randn(4, 7, 8)).square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_a_broadcast_token_that_was_dropped_is_computed_once():
    experts = Experts(2, 8, 12, activation="relu", gated=False, std=0.4)
    block = SwitchBlock(SwitchRouter(8, 2), experts, expert_capacity=0, overflow="input").eval()
    x = torch.randn(1, 3, 8)

    def broadcast_last(info):
        chosen = torch.zeros(3, 2, dtype=torch.bool)
        chosen[2] = True
        return info.replace(pairs=Pairs.from_mask(chosen, info.probs))

    block.before_dispatch.append(broadcast_last)
    out = block.run(x)
    torch.testing.assert_close(out.hidden[0, :2], out.info.weights[:2] * x[0, :2])
    everyone = experts(x[0, 2:], torch.arange(2)[None], out.info.probs[2:])
    torch.testing.assert_close(out.hidden[0, 2:], everyone)


def test_padding_takes_no_place():
    experts = Experts(1, 8, 12, activation="relu", gated=False)
    block = SwitchBlock(SwitchRouter(8, 1), experts, expert_capacity=1)
    mask = torch.tensor([[False, True, True]])
    assert block.run(torch.randn(1, 3, 8), mask=mask).info.kept[:, 0].tolist() == [False, True, False]


def test_weights_go_back_into_the_stock_layer():
    model = small_model("Switch")
    mlp = next(iter(sparse_layers(model).values()))
    block = SwitchBlock.from_transformers(mlp)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    block.copy_to(mlp)
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(mlp(x), block.eval()(x), atol=1e-4, rtol=1e-4)


def test_save_and_load(tmp_path):
    model = small_model("Switch")
    for name, mlp in sparse_layers(model).items():
        replace_module(model, name, SwitchBlock.from_transformers(mlp, overflow="input"))
    expected = model(input_ids=IDS, decoder_input_ids=IDS).logits
    again = load_moe(save_moe(model, tmp_path))
    assert torch.equal(again(input_ids=IDS, decoder_input_ids=IDS).logits, expected)


def test_bad_input():
    experts = Experts(4, 8, 12, gated=False)
    with pytest.raises(ValueError, match="one expert; this router chooses 2"):
        SwitchBlock(LinearRouter(8, 4, 2), experts)
    with pytest.raises(ValueError, match="must not be negative"):
        SwitchBlock(SwitchRouter(8, 4), experts, expert_capacity=-1)
    with pytest.raises(ValueError, match="overflow must be one of"):
        SwitchBlock(SwitchRouter(8, 4), experts, overflow="drop")
    with pytest.raises(ValueError, match=r"needs \(B, T, D\)"):
        SwitchBlock(SwitchRouter(8, 4), experts)(torch.randn(5, 8))
    with pytest.raises(TypeError, match="SwitchTransformersSparseMLP; got Linear"):
        SwitchBlock.from_transformers(torch.nn.Linear(2, 2))
