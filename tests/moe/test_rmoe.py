"""The recurrent router in real transformers classes."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import pytest
import torch
import transformers as hf
from torch import nn

from labkit.moe import (
    MoEBlock,
    RecurrentSettings,
    attach_recurrent_router,
    capture_inputs,
    capture_routing,
    load_balancing_loss,
    load_recurrent,
    save_recurrent,
)
from tests.moe import zoo

CLASSES = ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe"]
RELATIVES = [*CLASSES, "DeepseekV3", "GptOss", "Phimoe", "GraniteMoe"]
TOKENS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def routed(name="Mixtral", p=6, seed=0, changes=(), **settings):
    model = zoo.make(name, **dict(changes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        routing = attach_recurrent_router(model, p, **settings)
        for gate in routing.gates:  # sharper than at initialisation, so that the state decides something
            nn.init.normal_(gate.head.weight)
            nn.init.normal_(gate.projector.weight) if hasattr(gate, "projector") else None
    return model, routing


def loss_of(model):
    return model(TOKENS, labels=TOKENS).loss


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_decisions_are_those_of_torchs_cell_over_depth(name, kind):
    model, routing = routed(name, cell=kind)
    own = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}[kind](6, 6)
    own.load_state_dict(routing.shared.cell.state_dict())
    with capture_inputs(model) as forwards, torch.no_grad():
        model(TOKENS)
        h = None
        for seen, gate in zip(forwards[0], routing.gates, strict=True):
            h = own(seen.hidden @ gate.projector.weight.T, h)
            logits = (h[0] if kind == "lstm" else h) @ gate.head.weight.T
            torch.testing.assert_close(seen.routing.logits, logits)
            probs, index = logits.softmax(-1).topk(gate.top_k)
            if gate.renormalize:
                probs = probs / probs.sum(-1, keepdim=True)
            assert torch.equal(seen.routing.index, index)
            torch.testing.assert_close(seen.routing.weights, probs * gate.scale)
    # the first layer of two of them is dense: the state begins at the first MoE layer
    assert len(forwards[0]) == len(routing.gates) == (2 if name in ("Qwen3Moe", "DeepseekV3") else 3)
    assert {gate.scale for gate in routing.gates} == {getattr(model.config, "routed_scaling_factor", 1.0)}


def test_the_models_own_rule_of_normalising_is_kept():
    olmoe, _ = routed("Olmoe")
    assert not olmoe.model.layers[0].mlp.gate.renormalize
    olmoe, _ = routed("Olmoe", renormalize=True, top_k=3)
    with capture_routing(olmoe) as forwards:
        olmoe(TOKENS)
    assert forwards[0][1].top_k == 3
    torch.testing.assert_close(forwards[0][1].weights.sum(-1), torch.ones(TOKENS.numel()))


@pytest.mark.parametrize("name", RELATIVES)
def test_prefill_and_decoding_equal_one_forward(name):
    model, _ = routed(name)
    with torch.no_grad():
        whole = model(TOKENS).logits
        past, parts = None, []
        for piece in (TOKENS[:, :5], TOKENS[:, 5:6], TOKENS[:, 6:]):
            out = model(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_generation_is_greedy_decoding_without_a_cache():
    model, _ = routed()
    made = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    slow = TOKENS
    for _ in range(5):
        slow = torch.cat([slow, model(slow).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_left_padding_changes_nothing(name):
    model, _ = routed(name)
    mask = torch.ones_like(TOKENS)
    mask[0, :4] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(TOKENS, attention_mask=mask, position_ids=places).logits[0, 4:]
        alone = model(TOKENS[:1, 4:]).logits[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "reached"),
    [
        ({}, [True, True]),
        ({"passing": "detach"}, [False, False]),
        ({"passing": "none"}, [False, False]),
        ({"passing": "none", "logit_residual": 0.5}, [False, True]),
        ({"passing": "none", "logit_residual": 0.5, "detach_logits": True}, [False, False]),
        ({"passing": "none", "logit_residual": 0.5, "residual_of": "scores"}, [False, True]),
    ],
)
def test_the_recurrent_gradient(settings, reached):
    """With the way through the hidden states cut, the last router reaches earlier projectors by the state alone."""
    model, routing = routed(**settings)
    for gate in routing.gates:
        gate.register_forward_pre_hook(lambda _, args: (args[0].detach(),))
    with capture_routing(model, detach=False) as forwards:
        model(TOKENS)
    weights = [gate.projector.weight for gate in routing.gates]
    found = torch.autograd.grad(forwards[0][2].logits.square().sum(), weights, allow_unused=True)
    assert [g is not None and bool(g.abs().sum() > 0) for g in found] == [*reached, True]


def test_strength_is_how_much_is_passed():
    model, routing = routed()
    alone, other = routed(passing="none")
    alone.load_state_dict(model.state_dict())
    assert other.settings.passing == "none"
    with torch.no_grad():
        full = model(TOKENS).logits
        routing.strength = 0.0
        none = model(TOKENS).logits
        routing.strength = 1.0
        assert torch.equal(model(TOKENS).logits, full)
        torch.testing.assert_close(none, alone(TOKENS).logits)
    assert not torch.allclose(none, full)
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\]; got 2"):
        routing.strength = 2


def test_detached_state_computes_the_same_forward():
    model, _ = routed()
    detached, _ = routed(passing="detach")
    detached.load_state_dict(model.state_dict())
    assert torch.equal(model(TOKENS).logits, detached(TOKENS).logits)


def test_a_shared_projector_is_one():
    model, _ = routed(shared_projector=True)
    names = [name for name, _ in model.named_parameters() if "projector" in name]
    assert names == ["model.recurrent_router.projector.weight"]
    loss_of(model).backward()
    assert model.model.recurrent_router.projector.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", RELATIVES)
@pytest.mark.parametrize("passing", ["full", "detach"])
def test_checkpointing_gives_the_same_gradients(name, passing):
    model, _ = routed(name, passing=passing)
    model.train()
    loss_of(model).backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    first, second = loss_of(model), loss_of(model)  # two graphs at once: each finds its own states
    second.backward()
    model.zero_grad()
    first.backward()
    again = gradients(model)
    assert again.keys() == plain.keys()
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, atol=1e-6, rtol=1e-4, msg=key)
    assert plain["model.recurrent_router.cell.weight_hh"].abs().sum() > 0


def test_checkpointing_with_an_lstm_and_a_residual():
    model, _ = routed(cell="lstm", logit_residual=0.5)
    model.train()
    loss_of(model).backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss_of(model).backward()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-4, msg=key)


def test_backward_in_another_thread_finds_its_states():
    """As on a GPU, where the autograd engine has threads of its own."""
    model, _ = routed()
    model.train()
    loss_of(model).backward()
    plain = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    loss = loss_of(model)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    for key, value in gradients(model).items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-4, msg=key)
    assert gradients(model).keys() == plain.keys()


def test_a_forward_without_backward_leaves_no_graph_behind():
    model, routing = routed()
    model.train()
    model.gradient_checkpointing_enable()
    passes = []

    def look(_, args, kwargs):
        passes.append(weakref.ref(kwargs["routing_pass"]))

    model.model.register_forward_pre_hook(look, with_kwargs=True)
    loss = loss_of(model)
    assert passes[0]().owner is routing.shared
    del loss
    gc.collect()
    assert passes[0]() is None


def test_reentrant_checkpointing_is_refused():
    model, _ = routed()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="'use_reentrant': False"):
        loss_of(model)
    model.eval()
    assert torch.isfinite(loss_of(model))


def test_an_error_in_the_middle_leaves_nothing_behind():
    model, routing = routed()
    before = model(TOKENS).logits

    def fail(*_):
        raise KeyError("stop")

    handle = model.model.layers[1].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stop"):
        model(TOKENS)
    handle.remove()
    with pytest.raises(RuntimeError, match="call the model"):
        routing.gates[1](torch.randn(3, 32))
    assert torch.equal(model(TOKENS).logits, before)


def test_threads_and_nested_forwards_keep_their_own_state():
    model, _ = routed()
    other = TOKENS.flip(0)[:, :4]
    with torch.no_grad():
        expected, inner = model(TOKENS).logits, model(other).logits
        found = []

        def nested(*_):
            if not found:
                found.append(None)
                found[0] = model(other).logits

        handle = model.model.layers[1].register_forward_pre_hook(nested)
        assert torch.equal(model(TOKENS).logits, expected)
        handle.remove()
        assert torch.equal(found[0], inner)

        results: dict[int, bool] = {}

        def work(number):
            mine, right = (TOKENS, expected) if number % 2 else (other, inner)
            with torch.no_grad():
                results[number] = all(torch.equal(model(mine).logits, right) for _ in range(5))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == dict.fromkeys(range(4), True)


def test_a_layer_or_router_alone_is_refused():
    model, routing = routed()
    with pytest.raises(RuntimeError, match="call the model .or its base model., not a layer"):
        model.model.layers[0].mlp(torch.randn(1, 3, 32))
    _, state = routing.gates[0].route(torch.randn(3, 32))
    with pytest.raises(RuntimeError, match="call the whole model"):
        routing.gates[1].route(torch.randn(4, 32), state)


def test_a_layer_called_twice_is_refused():
    model, _ = routed()
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(RuntimeError, match="called twice"):
        model(TOKENS)


def test_detach_puts_the_model_back():
    model = zoo.make("Mixtral")
    before, names = model(TOKENS).logits, list(model.state_dict())
    with attach_recurrent_router(model, 4):
        assert not torch.equal(model(TOKENS).logits, before)
        with pytest.raises(ValueError, match="already"):
            attach_recurrent_router(model, 4)
    assert torch.equal(model(TOKENS).logits, before)
    assert list(model.state_dict()) == names
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_copy_is_a_model_of_its_own():
    model, routing = routed()
    twin = copy.deepcopy(model)
    before = model(TOKENS).logits
    assert torch.equal(twin(TOKENS).logits, before)
    with torch.no_grad():
        twin.model.recurrent_router.cell.weight_ih.add_(1.0)
    assert torch.equal(model(TOKENS).logits, before)
    assert not torch.equal(twin(TOKENS).logits, before)
    assert twin.model.layers[0].mlp.gate.recurrent_cell is twin.model.recurrent_router is not routing.shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_keep_float32_routing(dtype):
    model, _ = routed()
    model.to(dtype)
    with capture_routing(model) as forwards, torch.no_grad():
        out = model(TOKENS).logits
    assert out.dtype == dtype
    assert forwards[0][2].logits.dtype == torch.float32
    # a float32 logit of a narrow state would repeat after rounding to the narrow dtype
    assert not torch.equal(forwards[0][2].logits, forwards[0][2].logits.to(dtype).float())


def test_autocast():
    model, _ = routed()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert model.model.recurrent_router.cell.weight_hh.grad.dtype == torch.float32


def test_training_with_the_balancing_loss():
    model, routing = routed("Qwen2Moe")
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        with capture_routing(model, detach=False) as forwards:
            loss = loss_of(model)
        balance = load_balancing_loss(forwards[0])
        (loss + 0.01 * balance).backward()
        assert routing.gates[0].projector.weight.grad.abs().sum() > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_models_own_balancing_loss_is_refused():
    model, _ = routed()
    with pytest.raises(ValueError, match=r"capture_routing\(model, detach=False\)"):
        model(TOKENS, labels=TOKENS, output_router_logits=True)


@pytest.mark.parametrize("name", CLASSES)
def test_saved_and_loaded(name, tmp_path):
    model, _ = routed(
        name, cell="rnn", bias=True, shared_projector=True, top_k=3, residual_of="scores", logit_residual=0.5
    )
    again = load_recurrent(save_recurrent(model, tmp_path))
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert sum("weight_hh" in key for key in again.state_dict()) == 1
    assert {path.name for path in tmp_path.iterdir()} >= {
        "config.json",
        "labkit_rmoe.json",
        "model.safetensors",
    }


def test_saved_in_its_dtype(tmp_path):
    model, _ = routed(head="cosine", temperature=0.7)
    model.bfloat16()
    again = load_recurrent(save_recurrent(model, tmp_path))
    assert again.dtype == torch.bfloat16
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_loading_and_saving_of_other_things(tmp_path):
    with pytest.raises(FileNotFoundError, match="not written by save_recurrent"):
        load_recurrent(tmp_path)
    with pytest.raises(ValueError, match="save_pretrained"):
        save_recurrent(zoo.make("Mixtral"), tmp_path)
    save_recurrent(routed()[0], tmp_path)
    path = tmp_path / "labkit_rmoe.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ValueError, match="reads format 1"):
        load_recurrent(tmp_path)
    path.write_text(text.replace("MixtralForCausalLM", "set_seed"))
    with pytest.raises(ValueError, match="has no model 'set_seed'"):
        load_recurrent(tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"state_size": 0}, ValueError, "state_size must be at least 1 .* got 0"),
        ({"state_size": -3}, ValueError, "got -3"),
        ({"state_size": None}, TypeError, "state_size must be a whole number .* got None"),
        ({"state_size": 4.0}, TypeError, "whole number"),
        ({"cell": "mamba"}, ValueError, "cell must be one of 'gru', 'rnn', 'lstm'; got 'mamba'"),
        ({"passing": "half"}, ValueError, "passing must be one of"),
        ({"residual_of": "x"}, ValueError, "residual_of must be one of 'logits', 'scores'; got 'x'"),
        ({"head": "mlp"}, ValueError, "head must be one of"),
        ({"bias": 1}, TypeError, "bias must be True or False; got 1"),
        ({"logit_residual": "much"}, TypeError, "must be a number; got 'much'"),
        ({"logit_residual": float("nan")}, ValueError, "finite"),
        ({"logit_residual": -1.0, "residual_of": "scores"}, ValueError, "must not be negative"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive; got 0.0"),
        ({"jitter": 1.0}, ValueError, r"jitter must lie in \[0, 1\); got 1.0"),
        ({"top_k": 9}, ValueError, r"top_k must lie in 1\.\.8.* got 9"),
        ({"top_k": 0}, ValueError, "got 0"),
        ({"states": 3}, TypeError, "states: no setting of a recurrent router; there are state_size, cell"),
    ],
)
def test_bad_settings_change_nothing(settings, error, message):
    model = zoo.shared("Mixtral")
    with pytest.raises(error, match=message):
        attach_recurrent_router(model, **settings)
    assert "Recurrent" not in type(model.model.layers[0].mlp.gate).__name__
    assert not hasattr(model.model, "recurrent_router")


@pytest.mark.parametrize("name", ["SwitchTransformers", "JetMoe"])
def test_blocks_of_another_form_are_refused(name):
    with pytest.raises(ValueError, match="does not take .logits, weights, index. from its router"):
        attach_recurrent_router(zoo.shared(name), 4)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="PreTrainedModel; got Linear"):
        attach_recurrent_router(nn.Linear(2, 2), 4)
    llama = hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )
    with pytest.raises(ValueError, match="no mixture-of-experts block"):
        attach_recurrent_router(llama, 4)
    mixed = zoo.make("Mixtral")
    mixed.model.layers[1].mlp = MoEBlock.build(32, 24, 8, 2)
    with pytest.raises(ValueError, match="a layer of labkit"):
        attach_recurrent_router(mixed, 4)


def test_one_layer_warns():
    with pytest.warns(UserWarning, match="nothing to pass on"):
        attach_recurrent_router(zoo.make("Mixtral", num_hidden_layers=1), 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_recurrent_router(zoo.make("Mixtral", num_hidden_layers=2), 4)


def test_base_models_other_heads_and_embeddings():
    base = zoo.make("Mixtral").model
    attach_recurrent_router(base, 4)
    out = base(TOKENS).last_hidden_state
    assert torch.equal(base(inputs_embeds=base.embed_tokens(TOKENS)).last_hidden_state, out)
    config = zoo.make("Mixtral").config
    config.pad_token_id = 0
    classifier = hf.MixtralForSequenceClassification(config)
    attach_recurrent_router(classifier, 4)
    assert classifier(TOKENS).logits.shape == (2, 2)


def test_low_rank_adapters_on_top():
    peft = pytest.importorskip("peft")
    model, routing = routed("Olmoe")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2)).train()
    routing.shared.requires_grad_(True)
    loss_of(wrapped).backward()
    assert routing.shared.cell.weight_hh.grad.abs().sum() > 0
    model, _ = routed("Olmoe")
    chosen = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["gate", "recurrent_router"])
    with pytest.raises(RuntimeError, match="modules_to_save of peft"):
        peft.get_peft_model(model, chosen)(TOKENS)


def test_settings_go_through_json():
    settings = RecurrentSettings(state_size=3, cell="lstm", bias=True)
    assert RecurrentSettings.named(**settings.to_dict()) == settings
