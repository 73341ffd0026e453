from __future__ import annotations

import copy

import pytest
import torch

from labkit.moe import (
    Experts,
    HashRouter,
    LinearRouter,
    MoEBlock,
    Pairs,
    RecurrentRouter,
    SharedExpert,
    collect_routing,
    load_balancing_loss,
    load_moe,
    replace_module,
    save_moe,
)

from .small import small_model

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


def block_of(mlp, config):
    """labkit's block with the weights of a Mixtral block."""
    gate = LinearRouter(config.hidden_size, mlp.gate.num_experts, mlp.gate.top_k)
    gate.load_state_dict(mlp.gate.state_dict())
    experts = Experts.from_config(config)
    experts.load_state_dict(mlp.experts.state_dict())
    return MoEBlock(gate, experts)


def test_stands_in_a_mixtral_unchanged():
    model = small_model("Mixtral")
    changed = copy.deepcopy(model)
    for layer in changed.model.layers:
        layer.mlp = block_of(layer.mlp, model.config)
    assert list(changed.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(changed(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)
    expected = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(changed.generate(IDS, max_new_tokens=4, do_sample=False), expected)


def by_hand(block, x):
    """The layer's definition, token by token."""
    out = []
    info, _ = block.gate.route(x)
    inner = block.experts.intermediate_size
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for e, w in zip(info.index[t].tolist(), info.weights[t], strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ token).split(inner)
            y = y + w * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        out.append(y)
    return torch.stack(out)


def test_by_hand():
    block = MoEBlock.build(8, 12, 5, 3, expert_options={"std": 0.4})
    x = torch.randn(7, 8)
    torch.testing.assert_close(block(x), by_hand(block, x), atol=1e-5, rtol=1e-4)
    assert block(x.view(1, 7, 8)).shape == (1, 7, 8)


@pytest.mark.parametrize("gate", [False, True])
def test_shared_expert_is_added(gate):
    block = MoEBlock.build(8, 12, 5, 2, expert_options={"std": 0.4})
    x = torch.randn(2, 3, 8)
    before = block(x)
    block.shared_expert = SharedExpert(8, 6, gate=gate, scale=0.5)
    shared = block.shared_expert
    own = shared.down_proj(torch.nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x))
    if gate:
        own = torch.sigmoid(x @ shared.shared_gate.weight.T) * own
    torch.testing.assert_close(block(x), before + 0.5 * own)


def test_capacity_drops_the_later_tokens():
    block = MoEBlock.build(8, 12, 2, 1, capacity_factor=1.0, expert_options={"std": 0.4})
    with torch.no_grad():
        block.gate.weight.zero_()
        block.gate.weight[0] = 1.0
    x = torch.rand(6, 8)  # all tokens want expert 0, which has 3 places
    out = block.run(x)
    assert out.info.kept[:, 0].tolist() == [True] * 3 + [False] * 3
    assert torch.equal(out.hidden[3:], torch.zeros(3, 8))
    mask = torch.tensor([False, True, True, True, True, False])
    out = block.run(x, mask=mask)
    assert out.info.kept[:, 0].tolist() == [False, True, True, True, False, False]


def test_hooks_change_what_is_computed():
    block = MoEBlock.build(8, 12, 4, 1, expert_options={"std": 0.4})
    x = torch.randn(5, 8)
    plain = block(x)

    def broadcast_first(info):
        chosen = torch.zeros(5, 4, dtype=torch.bool).scatter(1, info.index, True)
        weights = torch.zeros(5, 4).scatter(1, info.index, info.weights)
        chosen[0], weights[0] = True, info.probs[0]
        return info.replace(pairs=Pairs.from_mask(chosen, weights))

    block.before_dispatch.append(broadcast_first)
    block.after.append(lambda y, info, tokens: y + 2 * tokens)
    changed = block(x)
    torch.testing.assert_close(changed[1:], plain[1:] + 2 * x[1:])
    everyone = block.experts(x[:1], torch.arange(4)[None], block.gate.route(x[:1])[0].probs)
    torch.testing.assert_close(changed[:1], everyone + 2 * x[:1])


def test_collecting_gives_gradients_and_leaves_no_trace():
    model = torch.nn.Sequential(*(MoEBlock.build(8, 12, 4, 2, layer=i) for i in range(2)))
    with collect_routing(model) as infos:
        model(torch.randn(2, 3, 8))
    assert [info.layer for info in infos] == [0, 1]
    load_balancing_loss(infos).backward()
    assert all(block.gate.weight.grad.abs().sum() > 0 for block in model)
    assert not any(block.before_dispatch for block in model)
    with collect_routing(model, detach=True) as infos:
        model(torch.randn(2, 3, 8))
    assert not infos[0].logits.requires_grad
    with (
        pytest.raises(ValueError, match="holds no labkit.moe.MoEBlock"),
        collect_routing(torch.nn.Linear(2, 2)),
    ):
        pass


def test_states_pass_through_blocks():
    blocks = [
        MoEBlock.build(8, 12, 4, 2, router="recurrent", router_options={"state_size": 5}) for _ in range(2)
    ]
    x = torch.randn(2, 3, 8)
    state = blocks[0].run(x).state
    fresh, passed = blocks[1].run(x).info, blocks[1].run(x, state=state).info
    assert not torch.allclose(fresh.logits, passed.logits)


def test_token_ids_reach_the_router():
    block = MoEBlock(HashRouter(8, 4, 1, vocab_size=9), Experts(4, 8, 12))
    ids = torch.tensor([[1, 1, 2]])
    index = block.run(torch.randn(1, 3, 8), token_ids=ids).info.index
    assert index[0] == index[1]


@pytest.mark.parametrize("mode", ["no tokens", "one expert", "k = E"])
def test_edges(mode):
    experts, k, tokens = {"no tokens": (4, 2, 0), "one expert": (1, 1, 5), "k = E": (3, 3, 5)}[mode]
    block = MoEBlock.build(8, 12, experts, k, expert_options={"std": 0.4})
    x = torch.randn(tokens, 8, requires_grad=True)
    y = block(x)
    assert y.shape == x.shape
    y.sum().backward()
    if tokens:
        torch.testing.assert_close(y, by_hand(block, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", ["linear", "mlp", "random", "hyper", "cosine", "recurrent"])
def test_save_and_load_with_replaced_layers(router, tmp_path):
    model = small_model("Mixtral", tie_word_embeddings=True)
    for i, layer in enumerate(model.model.layers):
        layer.mlp = MoEBlock.build(
            16,
            12,
            3,
            2,
            router=router,
            shared_size=8,
            capacity_factor=2.0,
            layer=i,
            expert_options={"std": 0.4},
        )
    expected = model(IDS).logits
    again = load_moe(save_moe(model, tmp_path / "saved"))
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "labkit_moe.json",
        "model.safetensors",
    ]
    assert torch.equal(again(IDS).logits, expected)
    assert again.model.layers[1].mlp.capacity_factor == 2.0
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = small_model("Mixtral")
    with pytest.raises(ValueError, match="save it with model.save_pretrained"):
        save_moe(model, tmp_path)
    first = RecurrentRouter(16, 4, 2, state_size=6)
    shared = RecurrentRouter(16, 4, 2, state_size=6, cell=first.cell)
    replace_module(model, "model.layers.0.mlp", MoEBlock(shared, Experts(4, 16, 8)))
    with pytest.raises(ValueError, match="shares its cell"):
        save_moe(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="not written by save_moe"):
        load_moe(tmp_path)


def test_bad_options():
    with pytest.raises(ValueError, match="share hidden_size; got 8 and 9"):
        MoEBlock(LinearRouter(8, 4, 2), Experts(4, 9, 8))
    with pytest.raises(ValueError, match="share num_experts; got 4 and 5"):
        MoEBlock(LinearRouter(8, 4, 2), Experts(5, 8, 8))
    with pytest.raises(ValueError, match="capacity_factor must be positive"):
        MoEBlock.build(8, 8, 4, 2, capacity_factor=0)
    with pytest.raises(ValueError, match="drop_order"):
        MoEBlock.build(8, 8, 4, 2, drop_order="worst")
