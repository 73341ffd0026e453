"""Gated layers on real transformers classes: the mathematics, precision, folding, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from labkit.finetuning import (
    BeamLinear,
    BeamLoraConfig,
    fold_,
    importances,
    load_beam_adapter,
    rank_importance,
    save_beam_adapter,
    silenced,
)
from labkit.testbeds.models import tiny

from .conftest import FAMILIES


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def base(family: str) -> Any:
    return tiny(family, width=32, layers=2, heads=2, vocab=40, seed=0).eval()


def test_a_layer_computes_the_equation() -> None:
    holder = nn.Sequential(nn.Linear(6, 5))
    config = BeamLoraConfig(r=3, lora_alpha=12, target_modules=["0"], beam_temperature=0.1)
    layer = get_peft_model(holder, config).base_model.model[0]  # type: ignore[arg-type]
    assert isinstance(layer, BeamLinear)
    nn.init.normal_(layer.lora_B["default"].weight)
    gate = torch.tensor([0.1, -0.1, 0.05])
    layer.lora_gate["default"].data.copy_(gate)
    a, b = (part["default"].weight.detach().numpy() for part in (layer.lora_A, layer.lora_B))
    e = np.exp(gate.numpy() / 0.1)
    s = 3 * e / e.sum()
    x = torch.randn(4, 2, 6)
    w, bias = layer.base_layer.weight.detach().numpy(), layer.base_layer.bias.detach().numpy()
    expected = x.numpy() @ w.T + bias + 12 / 3 * (x.numpy() @ a.T * s) @ b.T
    np.testing.assert_allclose(layer(x).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(layer.get_delta_weight("default").detach(), 4 * b @ np.diag(s) @ a, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_lora_with_r_more_numbers_a_module(family: str, adapted, batch) -> None:
    model, inputs = adapted(family, live=False), batch(family)
    torch.testing.assert_close(logits(model, inputs), logits(base(family), inputs))
    plain = get_peft_model(base(family), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    plain.load_state_dict(
        {name: value for name, value in model.state_dict().items() if "lora_gate" not in name}
    )
    for net in (model, plain):
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                torch.manual_seed(len(name))
                nn.init.normal_(weight, std=0.3)
    torch.testing.assert_close(logits(model, inputs), logits(plain, inputs), atol=1e-5, rtol=1e-5)
    modules = len(importances(model))
    assert modules >= 8
    assert model.num_parameters(True) - plain.num_parameters(True) == 4 * modules


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_learn_in_every_module(family: str, adapted, batch) -> None:
    model = adapted(family).train()
    model(**batch(family)).loss.backward()
    gates = {name: w.grad for name, w in model.named_parameters() if "lora_gate" in name}
    assert all(grad is not None and grad.abs().max() > 0 for grad in gates.values())
    assert all(w.requires_grad == ("lora_" in name) for name, w in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_and_unmerging(family: str, adapted, batch) -> None:
    model, inputs = adapted(family), batch(family)
    before, plain = logits(model, inputs), logits(base(family), inputs)
    assert (before - plain).abs().max() > 0.1
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(logits(model, inputs), before, atol=1e-4, rtol=1e-4)
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), before, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload(), inputs), before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_peft_loads_the_folded_adapter(family: str, adapted, batch, tmp_path: Path, recwarn) -> None:
    model, inputs = adapted(family), batch(family)
    before = logits(model, inputs)
    save_beam_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model, inputs), before)
    recwarn.clear()
    stock = PeftModel.from_pretrained(base(family), str(tmp_path))
    assert not [w for w in recwarn if "nexpected" in str(w.message) or "missing" in str(w.message).lower()]
    assert not any(isinstance(module, BeamLinear) for module in stock.modules())
    assert (logits(stock, inputs) - before).abs().max() < 1e-5
    ours = load_beam_adapter(base(family), tmp_path)
    assert (logits(ours, inputs) - before).abs().max() < 1e-5


def test_folding_in_place_changes_nothing_but_the_gates(adapted, batch) -> None:
    model, inputs = adapted(), batch()
    before = logits(model, inputs)
    fold_(model)
    assert (logits(model, inputs) - before).abs().max() < 1e-5
    assert all(torch.allclose(s, torch.ones(4)) for s in importances(model).values())


def test_gates_survive_saving_and_loading(adapted, batch, tmp_path: Path) -> None:
    model, inputs = adapted(beam_temperature=0.07, beam_every=6, scope="module"), batch()
    save_beam_adapter(model, tmp_path / "ours", fold=False)
    model.save_pretrained(str(tmp_path / "peft"))
    for folder in ("ours", "peft"):
        again = load_beam_adapter(base("llama"), tmp_path / folder, trainable=True)
        torch.testing.assert_close(logits(again, inputs), logits(model, inputs))
        config = again.peft_config["default"]
        assert (config.beam_temperature, config.beam_every, config.scope) == (0.07, 6, "module")
        assert all(w.requires_grad == ("lora_" in name) for name, w in again.named_parameters())
    tensors = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("ours", "peft")]
    assert tensors[0].keys() == tensors[1].keys()


def test_stock_peft_at_least_warns_of_an_unfolded_adapter(adapted, batch, tmp_path: Path) -> None:
    model, inputs = adapted(), batch()
    save_beam_adapter(model, tmp_path, fold=False)
    with pytest.warns(UserWarning, match="beam_temperature"):
        stock = PeftModel.from_pretrained(base("llama"), str(tmp_path))
    assert (logits(stock, inputs) - logits(model, inputs)).abs().max() > 0.1


def test_a_second_adapter_has_gates_of_its_own(adapted, batch) -> None:
    model, inputs = adapted(), batch()
    first = logits(model, inputs)
    model.add_adapter("other", BeamLoraConfig(r=2, target_modules=["q_proj"], beam_temperature=0.2))
    torch.testing.assert_close(logits(model, inputs), first)
    model.set_adapter("other")
    torch.testing.assert_close(logits(model, inputs), logits(base("llama"), inputs))
    assert len(importances(model, "other")) == 2
    model.set_adapter("default")
    model.delete_adapter("other")
    torch.testing.assert_close(logits(model, inputs), first)
    with pytest.raises(ValueError, match="no BeamLoRA adapter called 'other'"):
        fold_(model, "other")


def test_the_gate_stays_in_float32(batch) -> None:
    half = tiny("llama", width=32, layers=1, heads=2, vocab=40, seed=0).to(torch.bfloat16)
    config = BeamLoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(half, config, autocast_adapter_dtype=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype == torch.bfloat16
    assert layer.lora_gate["default"].dtype == torch.float32
    layer.lora_gate["default"].data[0] = 1e-4  # would be lost beside 1 in bfloat16
    model.half().to(torch.bfloat16).to("cpu")
    assert layer.lora_gate["default"].dtype == torch.float32
    assert layer.lora_gate["default"][0] == torch.tensor(1e-4)
    loss = model(**batch()).loss
    loss.backward()
    assert layer.lora_gate["default"].grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**batch()).loss.isfinite()


def test_dropout_works_on_the_input_and_a_bias_is_scaled_like_the_rest() -> None:
    holder = nn.Sequential(nn.Linear(6, 5))
    config = BeamLoraConfig(r=2, lora_alpha=6, target_modules=["0"], lora_dropout=0.5, lora_bias=True)
    layer = get_peft_model(holder, config).base_model.model[0]  # type: ignore[arg-type]
    nn.init.normal_(layer.lora_B["default"].weight)
    nn.init.normal_(layer.lora_B["default"].bias)
    x = torch.randn(3, 6)
    layer.eval()
    update = layer.get_delta_weight("default") @ x.T
    expected = layer.base_layer(x) + update.T + 3 * layer.lora_B["default"].bias
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    layer.train()
    assert not torch.allclose(layer(x), layer(x))


def test_rank_importance_of_gated_and_plain_lora(adapted) -> None:
    model = adapted()
    table = rank_importance(model)
    assert list(table.columns) == ["module", "rank", "s", "frob"]
    assert len(table) == 4 * len(importances(model))
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    piece = torch.outer(layer.lora_B["default"].weight[:, 2], layer.lora_A["default"].weight[2])
    row = table[(table.module == "model.layers.1.mlp.up_proj") & (table["rank"] == 2)].iloc[0]
    assert row.frob == pytest.approx(float(piece.norm()), rel=1e-5)
    assert row.s == pytest.approx(float(layer.scores()[2]))
    np.testing.assert_allclose(table.groupby("module").s.sum(), 4, rtol=1e-5)
    plain = rank_importance(get_peft_model(base("t5"), LoraConfig(r=2, target_modules=["q"])))
    assert set(plain.s) == {1.0}
    with pytest.raises(ValueError, match="no LoRA adapter called 'x'"):
        rank_importance(model, "x")


def test_silenced_ranks_are_gone_for_a_while(adapted, batch) -> None:
    model, inputs = adapted(), batch()
    before = logits(model, inputs)
    everything = {name: [0, 1, 2, 3] for name in importances(model)}
    with silenced(model, everything):
        torch.testing.assert_close(logits(model, inputs), logits(base("llama"), inputs), atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(model, inputs), before)
    with (
        pytest.raises(ValueError, match="no LoRA module is called 'nowhere'"),
        silenced(model, {"nowhere": [0]}),
    ):
        pass


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"use_dora": True}, NotImplementedError, "set use_dora=False"),
        ({"r": 1}, ValueError, "r=1 leaves nothing to reallocate"),
        ({"rank_pattern": {"q_proj": 1}}, ValueError, "q_proj=1 leaves nothing"),
        ({"beam_every": 3}, ValueError, "every=3 must be an even number"),
        ({"beam_every": 0}, ValueError, "every=0 must be an even number"),
        ({"beam_end": 0}, ValueError, "end=0 must be a positive"),
        ({"beam_p0": 1.5}, ValueError, r"p0=1.5 must lie within \(0, 1\]"),
        ({"beam_temperature": 0.0}, ValueError, "beam_temperature=0.0 must be positive"),
        ({"scope": "layer"}, ValueError, 'scope=\'layer\' must be "global" or "module"'),
        ({"target_parameters": ["experts.up"]}, ValueError, "adapts torch.nn.Linear modules alone"),
    ],
)
def test_configurations_that_cannot_be_meant(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BeamLoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings)


def test_modules_that_are_no_linear_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"model.embed_tokens is a torch.nn.modules.sparse.Embedding.*all-linear"
    ):
        get_peft_model(base("llama"), BeamLoraConfig(r=2, target_modules=["embed_tokens"]))
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    with pytest.raises(TypeError, match="Conv1D"):
        get_peft_model(gpt2, BeamLoraConfig(r=2, target_modules=["c_attn"]))
    whole = nn.Sequential(nn.Linear(4, 4))
    whole[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match="without quantization"):
        get_peft_model(whole, BeamLoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]


def test_folders_that_are_not_what_they_should_be(adapted, tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=r"has no adapter_config.json"):
        load_beam_adapter(base("llama"), tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        save_beam_adapter(model, tmp_path / "file")
    save_beam_adapter(model, tmp_path / "folded")
    facts = json.loads((tmp_path / "folded" / "adapter_config.json").read_text())
    (tmp_path / "folded" / "adapter_config.json").write_text(json.dumps(facts | {"beam_temperature": 0.05}))
    with pytest.raises(ValueError, match="has no gates"):
        load_beam_adapter(base("llama"), tmp_path / "folded")
    plain = get_peft_model(base("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no BeamLoRA adapter called 'default'"):
        save_beam_adapter(plain, tmp_path / "x")
