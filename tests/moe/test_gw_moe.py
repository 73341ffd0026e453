"""The global workspace on labkit's blocks and on real transformers classes."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from labkit.moe import (
    Experts,
    GlobalWorkspace,
    MoEBlock,
    Pairs,
    Redirect,
    SwitchBlock,
    SwitchRouter,
    moe_blocks,
    workspace_slots,
)
from tests.moe import zoo


def entropy(probs):
    """Of the definition, token by token."""
    return torch.tensor([-sum(p * torch.log(p + 1e-5) for p in row) for row in probs])


def hidden(batch=2, length=6, width=32, seed=3):
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def output_of(block, x):
    found = block.module(x)
    return found[0] if isinstance(found, tuple) else found


def between(values):
    """A threshold that about half of the values reach, and none by a rounding error."""
    low, high = values.sort().values[len(values) // 2 - 1 : len(values) // 2 + 1]
    assert high - low > 1e-4
    return float(low + high) / 2


def uncertain_half(block, x):
    """Record, threshold, and which tokens reach it."""
    router_input = x if "Switch" in type(block.module).__name__ else x.reshape(-1, 32)
    info = block.routing(router_input, block.router(router_input)).detach()
    values = entropy(info.probs)
    threshold = between(values)
    return info, threshold, values >= threshold


@pytest.mark.parametrize("name", zoo.NAMES)
def test_broadcast_is_the_sum_over_all_experts_in_every_class(name):
    model = copy.deepcopy(zoo.shared(name))
    block = moe_blocks(model)[-1]
    x = hidden()
    with torch.no_grad():
        info, threshold, chosen = uncertain_half(block, x)
        assert 0 < chosen.sum() < len(chosen)
        before = output_of(block, x)
        outputs = block.expert_outputs(x)  # (T, E, D)
        own = (outputs.gather(1, info.index[..., None].expand(-1, -1, 32)) * info.weights[..., None]).sum(1)
        everyone = (outputs * info.probs[..., None]).sum(1)
        expected = before.view(-1, 32) + torch.where(chosen[:, None], everyone - own, 0.0)
        model.train()
        with GlobalWorkspace(model, threshold=threshold) as workspace:
            found = output_of(block, x)
        again = output_of(block, x)
    torch.testing.assert_close(found.view(-1, 32), expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, before)
    stats = workspace.stats[block.layer]
    assert (stats.tokens, stats.broadcast, int(stats.histogram.sum())) == (12, int(chosen.sum()), 12)
    assert stats.cost == pytest.approx(1 - stats.share + stats.share * 8 / info.top_k)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Olmoe", "JetMoe", "SwitchTransformers"])
def test_evaluation_is_untouched_to_the_bit(name):
    model, given = zoo.shared(name), zoo.inputs(name, padded=2)
    with torch.no_grad():
        with FlopCounterMode(display=False) as plain:
            before = model(**given).logits
        with GlobalWorkspace(model, rule="all") as workspace, FlopCounterMode(display=False) as counted:
            inside = model(**given).logits
    assert torch.equal(before, inside)
    assert plain.get_total_flops() == counted.get_total_flops() > 0
    assert not workspace.stats


def test_slots_are_counted_for_each_sequence_and_skip_padding():
    model = zoo.make("Mixtral").train()
    given = zoo.inputs("Mixtral", batch=2, length=7, padded=4)
    ran = []

    def record(info, call):
        ran.append((call.block.layer, info.csr().per_token()))
        return info

    for padding, expected in ((False, (2, 2)), (True, (2, 2))):
        with GlobalWorkspace(model, threshold=1e-3, max_slots=2, count_padding=padding) as workspace:
            model(**given)
        stats = workspace.stats[0]
        assert stats.tokens == (14 if padding else 10)
        assert stats.sequences == 2
        assert (stats.uncertain, stats.broadcast) == (stats.tokens, sum(expected))
        assert stats.slots == 2.0
    mask = given["attention_mask"].reshape(-1).bool()
    slots = workspace_slots(mask, 2, sequences=2).view(2, 7)
    assert slots.tolist() == [[True] * 2 + [False] * 5, [False] * 4 + [True] * 2 + [False]]
    with Redirect(model, record):
        model(**given)
    assert [layer for layer, _ in ran] == [0, 1, 2]


def test_stacks_have_slots_of_their_own():
    model = zoo.make("SwitchTransformers").train()
    with GlobalWorkspace(model, threshold=1e-3, max_slots={"encoder": 3, "decoder": 1}) as workspace:
        model(**zoo.inputs("SwitchTransformers"))
    assert {layer: stats.slots for layer, stats in workspace.stats.items()} == {1: 3.0, 3: 1.0}


def test_released_rule_gives_the_last_probability_times_the_input():
    for name in ("Mixtral", "SwitchTransformers"):
        model = zoo.make(name).train()
        block = moe_blocks(model)[-1]
        x = hidden()
        info, threshold, chosen = uncertain_half(block, x)
        before = output_of(block, x).view(-1, 32)
        with GlobalWorkspace(model, threshold=threshold, rule="released"):
            found = output_of(block, x).view(-1, 32)
        expected = torch.where(chosen[:, None], info.probs[:, -1:] * x.view(-1, 32), before)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model = zoo.make("Mixtral").train()
    block = moe_blocks(model)[0]
    with GlobalWorkspace(model, threshold=1e-3, rule="released"):
        output_of(block, hidden()).square().sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in block.experts.parameters())
    assert block.router_linear()[0].grad.any()


@pytest.mark.parametrize("rule", ["paper", "released"])
def test_switch_block_with_capacity(rule):
    torch.manual_seed(0)
    experts = Experts(4, 8, 16, activation="relu", gated=False, std=0.5)
    block = SwitchBlock(SwitchRouter(8, 4, jitter=0.0), experts, expert_capacity=1, overflow="input").train()
    x = hidden(2, 5, 8)
    info = block.run(x).info
    chosen = entropy(info.probs.detach()) >= (threshold := between(entropy(info.probs.detach())))
    lost = ~info.kept[:, 0]
    assert (lost & chosen).any()
    assert (lost & ~chosen).any()
    assert (~lost & chosen).any()
    with GlobalWorkspace(block, threshold=threshold, rule=rule) as workspace:
        by_call, by_run = block(x).view(-1, 8), block.run(x)
    rows = x.view(-1, 8)
    for t in range(10):
        if chosen[t] and rule == "paper":
            parts = [
                info.probs[t, e] * experts.down_proj[e] @ (experts.up_proj[e] @ rows[t]).relu()
                for e in range(4)
            ]
            expected = torch.stack(parts).sum(0)
        elif chosen[t]:
            expected = info.probs[t, -1] * rows[t]
        elif lost[t]:
            expected = info.weights[t, 0] * rows[t]
        else:
            e = int(info.index[t, 0])
            expected = info.weights[t, 0] * (experts.down_proj[e] @ (experts.up_proj[e] @ rows[t]).relu())
        torch.testing.assert_close(by_call[t], expected)
    assert torch.equal(by_call, by_run.hidden.view(-1, 8))
    assert workspace.stats[0].sequences == 4


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(1)
    block = MoEBlock.build(
        8, 16, num_experts=4, top_k=2, router_options={"std": 1.0}, expert_options={"std": 0.5}
    ).train()
    x = hidden(1, 6, 8)
    with torch.no_grad():
        values = entropy(block.run(x).info.probs)
    threshold = between(values)
    with GlobalWorkspace(block, threshold=threshold):
        block(x).sin().sum().backward()
    found = {name: p.grad.clone() for name, p in block.named_parameters()}
    block.zero_grad()
    rows = x.view(-1, 8)
    probs = (rows @ block.gate.weight.T).softmax(-1)
    best = probs.topk(2).indices
    chosen = torch.zeros_like(probs).scatter(1, best, 1.0)
    weights = torch.where(
        (values >= threshold)[:, None], probs, probs * chosen / (probs * chosen).sum(1, keepdim=True)
    )
    g, u = torch.einsum("efd,td->tef", block.experts.gate_up_proj, rows).chunk(2, -1)
    outputs = torch.einsum("edf,tef->ted", block.experts.down_proj, nn.functional.silu(g) * u)
    (weights[..., None] * outputs).sum(1).sin().sum().backward()
    for name, p in block.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    given = zoo.inputs("Mixtral", padded=3)
    grads = []
    for checkpointing in (False, True):
        model = zoo.make("Mixtral", router_jitter_noise=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        with GlobalWorkspace(model, threshold=1.7, max_slots=3) as workspace:
            model(**given, labels=given["input_ids"]).loss.backward()
        assert workspace.stats[0].tokens == 11
        assert 0 < workspace.stats[0].broadcast <= 6
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-5)


def test_checkpointing_without_random_state_is_refused_with_jitter():
    model = zoo.make("Mixtral", router_jitter_noise=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    with pytest.raises(ValueError, match="preserve_rng_state"):
        GlobalWorkspace(model, threshold=1.0).attach()


def test_quantile():
    model = zoo.make("Olmoe").train()
    model.model.layers[0].eval()
    given = zoo.inputs("Olmoe", padded=3)
    workspace = GlobalWorkspace(model, quantile=0.75)
    with pytest.raises(RuntimeError, match="calibrate"):
        workspace.attach()
    threshold = workspace.calibrate([given, given])
    assert workspace.threshold == threshold
    assert model.training
    assert not model.model.layers[0].training
    with workspace:
        model.train()(**given)
    # 3 layers of 11 real tokens, without dropout the same in training; each value stands twice in the two batches
    first = workspace.stats[0].uncertain
    assert first <= 11
    assert first + sum(workspace.stats[i].uncertain for i in (1, 2)) == 33 - int(0.75 * 66) // 2
    alone = GlobalWorkspace(model, quantile=0.75, layers=[0])
    alone.calibrate(given)
    with alone:
        model(**given)
    assert alone.stats[0].uncertain == 11 - int(0.75 * 11)
    assert set(alone.stats) == {0}


def test_trainer_switches_it_on_and_off(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 64, (8, 6))]
    ends = {}
    for rule in (None, "paper"):
        model = zoo.make("Mixtral")
        workspace = GlobalWorkspace(model, threshold=1.0) if rule else None
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", eval_strategy="steps", eval_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, args, train_dataset=data, eval_dataset=data, callbacks=[workspace] if workspace else []
        )
        trainer.train()
        ends[rule] = model.state_dict()
    assert workspace.stats[0].tokens == 2 * 4 * 6
    assert workspace.stats[0].broadcast > 0
    assert any(not torch.equal(ends[None][key], ends["paper"][key]) for key in ends[None])
    assert ends[None].keys() == ends["paper"].keys()
    workspace.stats.clear()
    model.train()(**zoo.inputs("Mixtral"))
    assert not workspace.stats


def test_threshold_above_all_entropies_and_no_slots_change_nothing():
    model, given = zoo.make("Qwen2Moe").train(), zoo.inputs("Qwen2Moe")
    before = model(**given).logits
    for options in ({"threshold": 2.0793}, {"rule": "all", "max_slots": 0}):
        with GlobalWorkspace(model, **options) as workspace:
            assert torch.equal(model(**given).logits, before)
        assert workspace.stats[0].broadcast == 0


def test_lora_on_the_experts():
    given = zoo.inputs("Mixtral", padded=2)
    base = zoo.make("Mixtral").train()
    with GlobalWorkspace(base, threshold=1.95):
        expected = base(**given).logits
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=[], target_parameters=targets))
    with GlobalWorkspace(model, threshold=1.95) as workspace:
        logits = model(**given).logits
        logits.square().mean().backward()
    torch.testing.assert_close(logits, expected)
    assert 0 < workspace.stats[0].broadcast < workspace.stats[0].tokens == 12
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
    with pytest.raises(ValueError, match="merge_and_unload"):
        moe_blocks(model)[0].matrices(0)


def test_autocast():
    model, given = zoo.make("Mixtral").train(), zoo.inputs("Mixtral")
    with torch.autocast("cpu", torch.bfloat16), GlobalWorkspace(model, threshold=1.0):
        loss = model(**given, labels=given["input_ids"]).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_rule_may_give_a_token_no_expert_and_hooks_go_even_after_an_error():
    model, given = zoo.make("Qwen3Moe"), zoo.inputs("Qwen3Moe")
    before = model(**given).logits
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def nobody(info, call):
        return info.replace(pairs=Pairs.from_mask(torch.zeros_like(info.probs).bool(), info.probs))

    def broken(info, call):
        raise ZeroDivisionError

    block = moe_blocks(model)[0].module
    with Redirect(model, nobody):
        assert not block(hidden()).any()
    with pytest.raises(ZeroDivisionError), Redirect(model, broken):
        model(**given)
    with Redirect(model, nobody), Redirect(model, nobody), pytest.raises(RuntimeError, match="two rules"):
        model(**given)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert torch.equal(model(**given).logits, before)


def test_bad_input():
    model = zoo.shared("Mixtral")
    for options, message in [
        ({}, "neither"),
        ({"threshold": 1.0, "quantile": 0.9}, "both"),
        ({"threshold": 2.08}, "no token can be uncertain .* at most 2.07936"),
        ({"threshold": 0.0}, "rule='all'"),
        ({"threshold": float("nan")}, "must be positive"),
        ({"quantile": 1.0}, "strictly between"),
        ({"threshold": 1.0, "max_slots": -1}, "0 broadcasts nothing"),
        ({"threshold": 1.0, "max_slots": {"both": 1}}, "'encoder' and 'decoder'"),
        ({"threshold": 1.0, "rule": "code"}, "rule must be one of"),
        ({"threshold": 1.0, "rule": "all"}, "neither threshold"),
        ({"threshold": 1.0, "layers": [7]}, r"\[7\] have no MoE block"),
    ]:
        with pytest.raises(ValueError, match=message):
            GlobalWorkspace(model, **options)
    with pytest.raises(TypeError, match="integer"):
        GlobalWorkspace(model, threshold=1.0, max_slots=1.5)
    with pytest.raises(ValueError, match="no mixture-of-experts block"):
        GlobalWorkspace(nn.Linear(2, 2), threshold=1.0)
    with pytest.raises(ValueError, match="needs a quantile"):
        GlobalWorkspace(model, threshold=1.0).calibrate(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="no real token"):
        GlobalWorkspace(model, quantile=0.5).calibrate([])
    with pytest.raises(RuntimeError, match="on already"), GlobalWorkspace(model, rule="all") as workspace:
        workspace.attach()
    with pytest.raises(ValueError, match="no 2 sequences"):
        workspace_slots(torch.ones(3).bool(), 1, sequences=2)


def test_experts_called_one_by_one_are_refused():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 2, bias=False)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    with pytest.raises(ValueError, match="one by one"):
        GlobalWorkspace(nn.Sequential(Listed()), rule="all")
