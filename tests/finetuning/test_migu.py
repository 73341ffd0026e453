"""MIGU's masks against the rule written out, on the model classes that people fine-tune."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from labkit.finetuning import MIGU, RandomRowMask, magnitude_mask, mask_overlap, signature, signature_distance
from labkit.testbeds.models import tiny

IDS = torch.arange(2, 26).reshape(2, 12)


def quantile_by_hand(values: list[float], share: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def batch_for(model: nn.Module) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "labels": IDS}


def families() -> list[Any]:
    dropout = dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, **dropout))
    made = {name: tiny(name, vocab=64, seed=0) for name in ("llama", "t5", "roberta", "gpt_neox", "mixtral")}
    return [pytest.param(model.train(), id=name) for name, model in {**made, "gpt2": gpt2}.items()]


# ------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 0.9, 1.0])
def test_mask_is_the_rule_by_hand(share: float) -> None:
    n = torch.rand(23, generator=torch.Generator().manual_seed(1)) + 0.1
    # float32 as torch has it, so that a row that sits on the quantile is judged alike
    theta = torch.tensor(quantile_by_hand(n.tolist(), share), dtype=torch.float32)
    mask = magnitude_mask(n, share)
    clear = (n - theta).abs() > 1e-6
    assert torch.equal(mask[clear], (n > theta)[clear])
    assert torch.equal(mask, magnitude_mask(1000 * n / n.sum(), share))
    assert torch.equal(mask, magnitude_mask(torch.stack([n.flip(0), n]), share)[1])


def test_edges_of_the_threshold_and_ties() -> None:
    n = torch.tensor([4.0, 1.0, 4.0, 2.0])
    assert magnitude_mask(n, 0.0).all()
    assert magnitude_mask(n, 1.0).tolist() == [True, False, True, False]
    assert magnitude_mask(torch.full((9,), 0.3), 0.7).all()
    # quantile 0.5 of 1 2 4 4 is 3; at 2/3 it is 4 itself, and both fours stay
    assert magnitude_mask(n, 0.5).tolist() == [True, False, True, False]


@pytest.mark.parametrize("model", families())
def test_rows_with_large_outputs_learn_and_nothing_else_changes(model: nn.Module) -> None:
    """Outputs recorded by hooks of the test's own; every gradient is that without MIGU, times its mask."""
    outputs: dict[str, list[torch.Tensor]] = {}
    rows = {}
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D"
        if isinstance(module, nn.Linear) or transposed:
            rows[name] = (module, transposed)
            module.register_forward_hook(
                lambda m, i, o, name=name: outputs.setdefault(name, []).append(o.detach())
            )
    model.zero_grad()
    model(**batch_for(model)).loss.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    masks = {}
    for name, (module, transposed) in rows.items():
        if name not in outputs:
            continue
        n = sum(o.double().abs().reshape(-1, o.shape[-1]).sum(0) for o in outputs[name])
        masks[name] = mask = n >= torch.quantile(n, 0.7)
        parameter = next(key for key, p in model.named_parameters() if p is module.weight)
        wanted[parameter] *= mask[None] if transposed else mask[:, None]
    model.zero_grad()
    outputs.clear()
    with MIGU(model) as migu:
        model(**batch_for(model)).loss.backward()
        found = migu.apply()
    assert set(found) == set(masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert all(0.2 < float(mask.float().mean()) < 0.5 for mask in found.values())
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, wanted[name], rtol=1e-6, atol=1e-9)
            assert (p.grad != 0).any(), name
    for module, _ in rows.values():
        module._forward_hooks.clear()


def test_tied_head_masks_rows_of_the_embedding_unless_skipped() -> None:
    model = tiny("t5", vocab=64, seed=0)
    assert model.lm_head.weight is model.shared.weight
    with MIGU(model) as migu:
        model(**batch_for(model)).loss.backward()
        mask = migu.apply()["lm_head"]
    gradient = model.shared.weight.grad
    assert (gradient[~mask] == 0).all()
    model.zero_grad()
    with MIGU(model, skip=("lm_head",)) as migu:
        model(**batch_for(model)).loss.backward()
        assert "lm_head" not in migu.apply()
    assert (model.shared.weight.grad[~mask] != 0).any()


def test_biases_norms_and_embeddings_are_left_alone() -> None:
    model = tiny("gpt_neox", vocab=64, tie_word_embeddings=False, seed=0)
    model(**batch_for(model)).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with MIGU(model) as migu:
        model(**batch_for(model)).loss.backward()
        migu.apply()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.grad, plain[name])}
    assert changed
    assert all(name.endswith(".weight") for name in changed)
    assert not any("norm" in name or "embed_in" in name for name in changed)


# ------------------------------------------------------------------------------------------- a step


def steps_by_hand(model: nn.Module, data: torch.Tensor, *, keep_rows: bool) -> nn.Module:
    """Three AdamW steps on a two-layer perceptron with masks, with the optimizer written out."""
    lr, beta1, beta2, eps, decay = 0.05, 0.9, 0.999, 1e-8, 0.1
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = copy.deepcopy(first)
    for step in range(1, 4):
        x, y = data[step - 1, :, :4], data[step - 1, :, 4:]
        h = x @ model[0].weight.T + model[0].bias
        out = h.relu() @ model[2].weight.T + model[2].bias
        loss = (out - y).square().mean()
        gradients = dict(
            zip(first, torch.autograd.grad(loss, [p for _, p in model.named_parameters()]), strict=True)
        )
        masks = {"0.weight": h.abs().sum(0), "2.weight": out.abs().sum(0)}
        for name, p in model.named_parameters():
            g = gradients[name]
            rows = torch.ones(len(p), dtype=torch.bool)
            if name in masks:
                n = masks[name].detach()
                rows = n >= torch.quantile(n, 0.7)
                g = g * rows[:, None]
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = beta2 * second[name] + (1 - beta2) * g**2
            move = (first[name] / (1 - beta1**step)) / ((second[name] / (1 - beta2**step)).sqrt() + eps)
            with torch.no_grad():
                new = p * (1 - lr * decay) - lr * move
                p.copy_(torch.where(rows[:, None] if p.ndim == 2 else rows, new, p) if keep_rows else new)
    return model


def perceptron() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 6))


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_three_adamw_steps_are_those_by_hand(mode: str) -> None:
    data = torch.randn(3, 16, 10, generator=torch.Generator().manual_seed(2))
    model, masks = perceptron(), []
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    with MIGU(model, mask=mode) as migu:
        for x in data:
            optimizer.zero_grad()
            (model(x[:, :4]) - x[:, 4:]).square().mean().backward()
            masks.append(migu.apply()["0"])
            optimizer.step()
            migu.restore()
    wanted = steps_by_hand(perceptron(), data, keep_rows=mode == "update")
    for name, p in model.state_dict().items():
        torch.testing.assert_close(p, wanted.state_dict()[name], rtol=1e-5, atol=1e-6)
    never = ~(masks[0] | masks[1] | masks[2])
    assert never.any()
    moved = (model[0].weight != start["0.weight"])[never].any()
    # weight decay alone moves a row that was masked in every step, unless it is put back
    assert bool(moved) == (mode == "gradient")


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    model = tiny("llama", vocab=64, seed=0)
    ids = torch.randint(64, (6, 12), generator=torch.Generator().manual_seed(0))
    with MIGU(model) as migu:
        model(input_ids=ids, labels=ids).loss.backward()
        whole, n = migu.apply(), migu.magnitudes(normalize=False)
        model.zero_grad()
        for part in ids.split(2):
            (model(input_ids=part, labels=part).loss / 3).backward()
        parts = migu.magnitudes(normalize=False)
        for name, value in n.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-3)
        assert mask_overlap(migu.apply(), whole) > 0.99


def test_only_training_passes_count() -> None:
    model = tiny("llama", vocab=64, seed=0)
    with MIGU(model) as migu:
        loss = model(**batch_for(model)).loss
        before = migu.magnitudes(normalize=False)
        with torch.no_grad():
            model(input_ids=IDS + 1)
        model.eval()
        model(input_ids=IDS + 2)
        model.generate(input_ids=IDS[:, :3], max_new_tokens=2, do_sample=False)
        model.train()
        after = migu.magnitudes(normalize=False)
        assert all(torch.equal(before[name], after[name]) for name in before)
        loss.backward()
        migu.apply()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_masks(reentrant: bool) -> None:
    model = tiny("llama", vocab=64, seed=0)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with MIGU(model) as migu:
            for part in IDS.split(1):
                model(input_ids=part, labels=part, use_cache=False).loss.backward()
            found.append(migu.apply())
    assert set(found[0]) == set(found[1])
    assert mask_overlap(*found) > 0.999


def test_layers_that_did_not_run_and_frozen_weights_are_not_masked() -> None:
    model = nn.ModuleDict({"used": nn.Linear(4, 8), "idle": nn.Linear(4, 8), "frozen": nn.Linear(8, 8)})
    model["frozen"].requires_grad_(False)
    with MIGU(model) as migu:
        model["idle"].weight.grad = torch.ones(8, 4)
        model["frozen"](model["used"](torch.randn(3, 4))).sum().backward()
        assert set(migu.apply()) == {"used"}
    assert (model["idle"].weight.grad == 1).all()


def test_half_precision_is_summed_in_single() -> None:
    """70,000 outputs of 1 overflow float16, and stop growing at 256 in bfloat16."""
    for dtype in (torch.bfloat16, torch.float16):
        model = nn.Linear(1, 2, bias=False).to(dtype)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0], [0.5]]))
        with MIGU(model) as migu:
            model(torch.ones(70_000, 1, dtype=dtype)).sum().backward()
            assert migu.magnitudes(normalize=False)[""].tolist() == [70_000, 35_000]


@pytest.mark.parametrize("family", ["llama", "t5", "roberta"])
def test_padding_counts_as_the_authors_have_it_or_not(family: str) -> None:
    model = tiny(family, vocab=64, pad_token_id=0, seed=0)
    ids = torch.cat([IDS, torch.zeros(2, 5, dtype=torch.long)], 1)
    labels = torch.where(ids > 0, ids, -100)
    padded = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    alone = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}

    def sums(batch: dict[str, torch.Tensor], ignore: bool) -> dict[str, torch.Tensor]:
        with MIGU(model, ignore_padding=ignore) as migu:
            model(**batch)
            return migu.magnitudes(normalize=False)

    wanted, found, faithful = sums(alone, False), sums(padded, True), sums(padded, False)
    for name, n in wanted.items():
        torch.testing.assert_close(found[name], n, rtol=2e-4, atol=1e-3)
        assert (faithful[name] >= n * (1 - 1e-4)).all()
    larger = [name for name, n in wanted.items() if faithful[name].sum() > 1.05 * n.sum()]
    assert len(larger) > len(wanted) / 2


def test_padding_of_kept_logits_and_of_a_mask_that_is_no_table() -> None:
    model = tiny("llama", vocab=64, pad_token_id=0, seed=0)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with MIGU(model, ignore_padding=True) as migu:
        model(input_ids=IDS, attention_mask=mask, logits_to_keep=10)
        kept = migu.magnitudes(normalize=False)["lm_head"]
    logits = model(input_ids=IDS, attention_mask=mask).logits.detach()
    real = torch.cat([logits[0, 4:], logits[1, 2:]])
    torch.testing.assert_close(kept, real.abs().sum(0), rtol=1e-4, atol=1e-3)
    with (
        MIGU(model, ignore_padding=True),
        pytest.raises(ValueError, match=r"attention_mask of shape \(batch, tokens\), got \(2, 1, 12, 12\)"),
    ):
        model(input_ids=IDS, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))


def test_first_task_is_trained_without_masks() -> None:
    model = tiny("llama", vocab=64, seed=0)
    model(**batch_for(model)).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    migu = MIGU()
    for index in (0, 1):
        model.zero_grad()
        with migu.stage(model, index):
            model(**batch_for(model)).loss.backward()
            migu.before_step(model)
        same = all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
        assert same == (index == 0)
        assert bool(migu.masks()) == (index == 1)
    with MIGU(mask_first_task=True).stage(model, 0) as masked:
        assert masked.active


def test_leaving_the_context_removes_all_hooks() -> None:
    model = tiny("llama", vocab=64, seed=0)
    migu = MIGU(model, ignore_padding=True)
    with pytest.raises(RuntimeError, match="no forward pass"), migu:
        migu.apply()
    with migu:
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_signatures_of_equal_data_agree_and_of_other_data_do_not() -> None:
    model = tiny("llama", vocab=64, seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(low, low + 32, (64, 12), generator=generator) for low in (0, 0, 32)]
    one, again, other = (signature(model, {"input_ids": ids}) for ids in batches)
    assert signature_distance(one, one) == 0.0
    assert signature_distance(one, again) < 0.5 * signature_distance(one, other)
    assert not any(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="same layers.*lm_head"):
        signature_distance(one, {name: n for name, n in one.items() if name != "lm_head"})


# ------------------------------------------------------------------------------------------- the control


def test_random_masks_have_as_many_rows_and_repeat_by_seed() -> None:
    model = tiny("llama", vocab=64, seed=0)
    drawn = []
    for seed in (3, 3, 4):
        with RandomRowMask(model, 0.7, seed=seed) as control:
            for _ in range(2):
                model.zero_grad()
                model(**batch_for(model)).loss.backward()
                drawn.append(control.apply())
                for name, mask in drawn[-1].items():
                    assert int((~mask).sum()) == int(0.7 * len(mask))
                    assert (model.get_submodule(name).weight.grad[~mask] == 0).all()
    assert mask_overlap(drawn[0], drawn[2]) == 1.0
    assert mask_overlap(drawn[0], drawn[1]) < 0.5
    assert mask_overlap(drawn[0], drawn[4]) < 0.5


def test_random_masks_go_on_where_they_were() -> None:
    model = nn.Linear(2, 40)
    one, other = RandomRowMask(seed=1), RandomRowMask(seed=1)
    model(torch.ones(1, 2)).sum().backward()
    one.attach(model)
    first, second = one.apply(), one.apply()
    other.load_state_dict({"step": 1})
    other.attach(model)
    assert torch.equal(other.apply()[""], second[""])
    assert one.state_dict() == other.state_dict() == {"step": 2}
    assert not torch.equal(first[""], second[""])


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("threshold", [-0.1, 1.01, float("nan"), "0.7", True])
def test_threshold_must_be_a_share(threshold: Any) -> None:
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\]"):
        MIGU(nn.Linear(2, 2), threshold=threshold)


def test_settings_that_fit_nothing_are_refused() -> None:
    model = tiny("llama", vocab=64, seed=0)
    with pytest.raises(ValueError, match="mask must be \"gradient\".*got 'weights'"):
        MIGU(model, mask="weights")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"called 'lmhead'; did you mean 'lm_head'\? There are down_proj"):
        MIGU(model, skip=("lmhead",))
    with pytest.raises(TypeError, match=r'write \("lm_head",\)'):
        MIGU(model, skip="lm_head")
    with pytest.raises(ValueError, match="Embedding has no linear layer"):
        MIGU(nn.Embedding(3, 4))
    with pytest.raises(ValueError, match="MIGU needs a model"):
        MIGU().attach()


def test_steps_out_of_order_are_refused() -> None:
    model = nn.Linear(4, 8)
    migu = MIGU(model)
    with pytest.raises(RuntimeError, match="MIGU is on no model"):
        migu.apply()
    with migu:
        with pytest.raises(RuntimeError, match="on a model already"):
            migu.attach()
        with pytest.raises(RuntimeError, match="no forward pass in training mode"):
            migu.apply()
        model(torch.randn(2, 4)).sum().backward()
        migu.apply()
        with pytest.raises(RuntimeError, match="once per optimizer step"):
            migu.apply()
        model.zero_grad()
        model(torch.randn(2, 4))
        with pytest.raises(RuntimeError, match=r"no linear weight has a gradient.*ZeRO"):
            migu.apply()
    with MIGU(model, mask="update") as migu:
        for expected in (True, False):
            model(torch.randn(2, 4)).sum().backward()
            if expected:
                migu.apply()
        with pytest.raises(RuntimeError, match="needs restore"):
            migu.apply()
