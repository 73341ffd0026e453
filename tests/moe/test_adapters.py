"""Every block read through its adapter computes what the block computes, and swaps leave no trace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.moe import (
    MoEBlock,
    RoutingInfo,
    capture_inputs,
    capture_routing,
    iter_moe_blocks,
    moe_blocks,
    swap_router,
)
from tests.moe import zoo

LAYERS = {key: [0, 1, 2] for key in zoo.NAMES} | {
    "Qwen3Moe": [1, 2],
    "DeepseekV2": [1, 2],
    "DeepseekV3": [1, 2],
    "SwitchTransformers": [1, 3],
}


class TopK(nn.Module):
    """A router of the common contract."""

    def __init__(self, block, top_k, seed=0):
        super().__init__()
        draw = torch.randn(block.num_experts, block.width, generator=torch.Generator().manual_seed(seed))
        self.matrix, self.top_k = nn.Parameter(draw), top_k

    def forward(self, hidden):
        info = RoutingInfo.from_logits(
            F.linear(hidden.reshape(-1, hidden.shape[-1]), self.matrix), self.top_k
        )
        return info.logits, info.weights, info.index


def with_block_outputs(model, given):
    outputs = []

    def keep(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.module.register_forward_hook(keep) for block in moe_blocks(model)]
    with capture_inputs(model) as forwards, torch.no_grad():
        model(**given)
    for handle in handles:
        handle.remove()
    return list(zip(forwards[0], outputs, strict=True))


def by_hand(seen):
    """The block's output from the adapter's parts: weighted experts, shared experts, bias."""
    block, hidden = seen.block, seen.hidden
    total = torch.einsum(
        "te,ted->td", seen.routing.csr().dense_weights().float(), block.expert_outputs(hidden)
    )
    for expert in block.shared_experts:
        scale = getattr(block.module, "shared_expert_gate", None)
        total = total + expert(hidden) * (1 if scale is None else scale(hidden).sigmoid())
    return total + getattr(block.module, "bias", 0)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_parts_make_up_the_block(name):
    model = zoo.shared(name)
    for seen, output in with_block_outputs(model, zoo.inputs(name)):
        torch.testing.assert_close(by_hand(seen), output.reshape(seen.hidden.shape), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_layers_sizes_and_names(name):
    model = zoo.shared(name)
    found = list(iter_moe_blocks(model))
    assert [layer for layer, _, _ in found] == LAYERS[name]
    modules = dict(model.named_modules())
    for layer, path, block in found:
        assert modules[path] is block.module
        assert layer == block.layer
        assert (block.num_experts, block.width) == (8, 32)
        assert block.top_k == (1 if name == "SwitchTransformers" else 2)
        assert len(block.shared_experts) == (name in ("Qwen2Moe", "DeepseekV2", "DeepseekV3"))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_matrices_compute_the_expert(name):
    """act(W_act x) * W_up x through W_down, written out here, is the expert's output (GPT-OSS has its own formula)."""
    block = moe_blocks(zoo.shared(name))[-1]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    weights = block.matrices(3)
    assert weights.up.shape == (24, 32)
    assert weights.down.shape == (32, 24)
    states = block.activated(3, x)
    if name == "GptOss":
        up = (x @ weights.up.T).clamp(-7, 7) + 1  # the biases are 0 at the start
        gate = (x @ weights.act.T).clamp(max=7)
        torch.testing.assert_close(states, gate * torch.sigmoid(1.702 * gate))
        states = states * up
    elif name == "SwitchTransformers":
        assert weights.act is None
        torch.testing.assert_close(states, F.relu(x @ weights.up.T))
    else:
        torch.testing.assert_close(states, F.silu(x @ weights.act.T))
        states = states * (x @ weights.up.T)
    torch.testing.assert_close(states @ weights.down.T, block.expert_output(3, x), atol=1e-6, rtol=1e-4)
    assert not any(matrix.requires_grad for matrix in weights.named().values())


def test_shared_experts_have_their_own_width():
    (shared,) = moe_blocks(zoo.shared("Qwen2Moe"))[0].shared_matrices()
    assert shared.up.shape == (40, 32)
    (shared,) = moe_blocks(zoo.shared("DeepseekV2"))[0].shared_matrices()
    assert shared.down.shape == (32, 48)  # two of 24, stored as one


class RemoteExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.down_proj, self.act_fn = nn.Linear(4, 8, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RemoteGate(nn.Module):
    """The form of a router whose code came with the checkpoint: index first, no logits."""

    def __init__(self):
        super().__init__()
        self.top_k, self.weight = 2, nn.Parameter(torch.randn(3, 8))

    def forward(self, hidden):
        weights, index = F.linear(hidden.reshape(-1, 8), self.weight).softmax(-1).topk(2, sorted=False)
        return index, weights, None


class RemoteBlock(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.top_k, self.norm_topk_prob = 2, False
        self.gate, self.experts = gate, nn.ModuleList(RemoteExpert() for _ in range(3))

    def forward(self, hidden):
        self.gate(hidden)
        return hidden


@pytest.mark.parametrize("gate", [RemoteGate, lambda: nn.Linear(8, 3, bias=False)])
def test_blocks_with_a_list_of_experts(gate):
    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([RemoteBlock(gate())])})
    block = moe_blocks(model)[0]
    assert (block.layer, block.num_experts, block.width, block.top_k) == (0, 3, 8, 2)
    x = torch.randn(6, 8)
    torch.testing.assert_close(block.expert_outputs(x)[:, 1], block.module.experts[1](x))
    torch.testing.assert_close(block.activated(1, x), F.silu(x @ block.matrices(1).act.T))
    with capture_routing(block.module) as forwards:
        block.module(x)
    info = forwards[0][0]
    torch.testing.assert_close(info.logits, x @ block.module.gate.weight.T)
    torch.testing.assert_close(info.weights, info.probs.topk(2).values)
    assert torch.equal(info.index, info.probs.topk(2).indices)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_swapped_routers_are_used_and_recorded_and_leave_no_trace(name):
    model, given = zoo.make(name), zoo.inputs(name)
    keys, modules = list(model.state_dict()), [block.router for block in moe_blocks(model)]
    k = 1 if name == "SwitchTransformers" else 3
    with torch.no_grad():
        before = model(**given).logits
        with swap_router(model, lambda block: TopK(block, k, seed=block.layer)) as swap:
            for seen, output in with_block_outputs(model, given):
                torch.testing.assert_close(
                    by_hand(seen), output.reshape(seen.hidden.shape), atol=1e-5, rtol=1e-4
                )
                router = swap.routers[[b.layer for b in swap.blocks].index(seen.block.layer)]
                torch.testing.assert_close(seen.routing.logits, seen.hidden @ router.matrix.T)
                assert seen.routing.index.shape[1] == k
                assert torch.equal(seen.routing.index, seen.routing.logits.topk(k).indices)
            assert not torch.allclose(model(**given).logits, before)
        assert torch.equal(model(**given).logits, before)
    assert list(model.state_dict()) == keys
    assert all(old is block.router for old, block in zip(modules, moe_blocks(model), strict=True))


def test_a_swap_after_the_first_forward_is_recorded_and_trains():
    model, given = zoo.make("Mixtral"), zoo.inputs("Mixtral")
    model(**given, output_router_logits=True)  # transformers installs its own recorders here
    with (
        swap_router(model, lambda block: TopK(block, 2), layers=[1]) as swap,
        capture_routing(model, detach=False) as f,
    ):
        model(**given).logits.sum().backward()
    assert swap.routers[0].matrix.grad.abs().sum() > 0
    assert [info.layer for info in f[0]] == [0, 1, 2]


def test_attach_keeps_the_change_and_shared_routers_stay_shared():
    model = zoo.make("Olmoe")
    one = TopK(moe_blocks(model)[0], 2)
    swap = swap_router(model, lambda block: one).attach()
    assert {id(block.router) for block in moe_blocks(model)} == {id(one)}
    with pytest.raises(RuntimeError, match="attached already"):
        swap.attach()
    later = swap_router(model, lambda block: TopK(block, 2)).attach()
    with pytest.raises(RuntimeError, match="undo the later swap first"):
        swap.detach()
    later.detach()
    swap.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        swap.detach()


def test_swaps_are_undone_after_an_error():
    model = zoo.make("Mixtral")
    old = moe_blocks(model)[0].router
    with pytest.raises(KeyError), swap_router(model, lambda block: TopK(block, 2)):
        raise KeyError
    assert moe_blocks(model)[0].router is old


def test_what_cannot_be_swapped_is_refused_before_anything_changes():
    model = zoo.make("Mixtral")
    old = [block.router for block in moe_blocks(model)]
    with pytest.raises(TypeError, match="lambda block: router"):
        swap_router(model, 3)
    with pytest.raises(TypeError, match="must return a torch module, got int"):
        swap_router(model, lambda block: 3)
    with pytest.raises(ValueError, match=r"layers \[7\] have no MoE block; the MoE layers are \[0, 1, 2\]"):
        swap_router(model, lambda block: TopK(block, 2), layers=[1, 7])

    class Wrong(nn.Module):
        def forward(self, hidden):
            return hidden, hidden, hidden

    with pytest.raises(ValueError, match=r"must return logits \(T, 8\).*returned \[\(2, 32\)"):
        swap_router(model, lambda block: Wrong())
    assert [block.router for block in moe_blocks(model)] == old
    switch = zoo.make("SwitchTransformers")
    with (
        pytest.raises(ValueError, match="one expert; the new router chose 2"),
        swap_router(switch, lambda block: TopK(block, 2)),
    ):
        switch(**zoo.inputs("SwitchTransformers"))


def test_bad_models():
    with pytest.raises(TypeError, match="torch module, got str"):
        next(iter_moe_blocks("mixtral"))
    with pytest.raises(ValueError, match="Linear has no mixture-of-experts block of a known form"):
        moe_blocks(nn.Linear(2, 2))


def test_weights_that_cannot_be_read():
    model = zoo.make("Mixtral")
    block = moe_blocks(model)[0]
    block.experts.down_proj = nn.Parameter(
        block.experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(ValueError, match="quantised"):
        block.matrices(0)
    with torch.device("meta"):
        empty = zoo._made("Mixtral", {})
    with pytest.raises(ValueError, match="meta device"):
        moe_blocks(empty)[0].matrices(0)


def test_routers_that_are_not_linear_say_so():
    model = zoo.make("Mixtral")
    with (
        swap_router(model, lambda block: TopK(block, 2)),
        pytest.raises(ValueError, match="TopK is no linear"),
    ):
        moe_blocks(model)[0].router_logits(torch.zeros(2, 32))


# ------------------------------------------------------------------------------------------- labkit's own parts


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "Qwen2Moe", "SwitchTransformers", "JetMoe"])
@pytest.mark.parametrize("kind", ["linear", "mlp", "cosine", "random"])
def test_routers_by_name(name, kind):
    model, given = zoo.make(name), zoo.inputs(name)
    with swap_router(model, kind) as swap:
        for seen, output in with_block_outputs(model, given):
            torch.testing.assert_close(by_hand(seen), output.reshape(seen.hidden.shape), atol=1e-5, rtol=1e-4)
            assert (
                seen.routing.index.shape[1] == seen.block.top_k == (1 if name == "SwitchTransformers" else 2)
            )
            if name in ("Mixtral", "Olmoe"):  # OLMoE leaves the weights as they are
                summed = seen.routing.weights.sum(-1)
                assert torch.allclose(summed, torch.ones(())) == (name == "Mixtral")
    assert all(router.num_experts == 8 for router in swap.routers)


def test_routers_by_name_that_need_more_are_refused():
    model = zoo.shared("Mixtral")
    with pytest.raises(ValueError, match="reads the state of the layer before"):
        swap_router(model, "recurrent")
    with pytest.raises(ValueError, match="reads token ids"):
        swap_router(model, "hash")
    with pytest.raises(ValueError, match="got 'cosin'"):
        swap_router(model, "cosin")
    with pytest.raises(TypeError, match="width belong to a router given by name"):
        swap_router(model, lambda block: TopK(block, 2), width=3)


def test_labkits_own_layers_are_read_recorded_and_swapped():
    torch.manual_seed(0)
    options = {"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "top_k": 2}
    layers = nn.ModuleList([MoEBlock.build(**options), MoEBlock.build(**options, router="cosine")])
    layers.append(MoEBlock.build(**options, capacity_factor=0.5, shared_size=24))
    model = nn.Sequential()
    model.layers = layers
    model.forward = lambda x: layers[2](layers[1](layers[0](x)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 5, 16)
    hooks = [list(block.after) for block in layers]
    with capture_inputs(model) as forwards, torch.no_grad():
        model(x)
    assert [seen.routing.layer for seen in forwards[0]] == [0, 1, 2]
    hidden = x
    for seen, layer in zip(forwards[0], layers, strict=True):
        torch.testing.assert_close(seen.hidden, hidden.reshape(-1, 16))
        hidden = layer(hidden)
        torch.testing.assert_close(by_hand(seen), hidden.reshape(-1, 16), atol=1e-6, rtol=1e-4)
    assert not forwards[0][2].routing.kept.all()
    assert [list(block.after) for block in layers] == hooks
    with swap_router(model, "mlp", layers=[1]), torch.no_grad():
        assert not torch.allclose(model(x), hidden)
    torch.testing.assert_close(model(x), hidden)
    with pytest.raises(TypeError, match="is a layer of labkit, whose routers have a method route"):
        swap_router(model, lambda block: TopK(block, 2))
