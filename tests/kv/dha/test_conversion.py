"""From a checkpoint to a smaller model, against attention written out head by head."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from labkit.kv import cache_bytes
from labkit.kv.dha import (
    DHAConverter,
    DHALlamaForCausalLM,
    FusionCallback,
    FusionSchedule,
    HeadGroups,
    align_heads,
    convert_to_gqa,
    export_to_llama,
    fusion_loss,
    head_moments,
    pool_heads,
    register,
)
from tests.kv.dha.checkpoints import llama

CASES = {
    "mha": {},
    "bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "gqa": {"heads": 8},
}


def written_out(model, groups, ids, mixes):
    """Logits of a Llama whose head i uses the combination ``mixes[layer][kind][group of i]``: loops, no cache."""
    config, base = model.config, model.model
    width, share = config.head_dim, config.num_attention_heads // groups.heads
    x = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[:, None].float()
    frequency = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
    spin = torch.polar(torch.ones(ids.shape[1], width // 2), positions * frequency)

    def rotate(y):  # planes (j, j + d/2) as complex numbers
        z = torch.complex(*y.chunk(2, -1)) * spin
        return torch.cat((z.real, z.imag), -1)

    for index, layer in enumerate(base.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        out = 0
        for head in range(config.num_attention_heads):
            at = slice(head * width, (head + 1) * width)
            rows = {"q": attention.q_proj(h)[..., at]}
            for kind in ("k", "v"):
                owner = groups.maps(kind)[index][head // share]
                full = getattr(attention, f"{kind}_proj")(h).unflatten(-1, (groups.heads, width))
                rows[kind] = torch.einsum("j,btjd->btd", mixes[index][kind][owner], full)
            logits = rotate(rows["q"]) @ rotate(rows["k"]).transpose(1, 2) / math.sqrt(width)
            hidden = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
            mixed = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ rows["v"]
            out = out + mixed @ attention.o_proj.weight[:, at].T
        x = x + out + (0 if attention.o_proj.bias is None else attention.o_proj.bias)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(base.norm(x))


def means(groups):
    return [
        {
            kind: torch.stack([torch.eye(groups.heads)[list(g)].mean(0) for g in groups.of(kind)[index]])
            for kind in "kv"
        }
        for index in range(groups.layers)
    ]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_collapse_equals_attention_written_out(case, attention, uneven, ids):
    model = llama(kv_heads=4, **{"heads": 4, **CASES[case]})
    model.set_attn_implementation(attention)
    small = pool_heads(model, uneven)
    wanted = written_out(model, uneven, ids, means(uneven))
    assert torch.allclose(small(ids).logits, wanted, atol=2e-4)
    # Token by token too: the cache, and the path for one token.
    cache, got = None, []
    for t in range(ids.shape[1]):
        step = small(ids[:, t : t + 1], past_key_values=cache)
        cache = step.past_key_values
        got.append(step.logits)
    assert torch.allclose(torch.cat(got, 1), wanted, atol=2e-4)
    for index, layer in enumerate(cache.layers):
        assert layer.keys.shape == (2, (2, 3)[index], 24, 8)
        assert layer.values.shape == (2, (3, 1)[index], 24, 8)


@pytest.mark.parametrize("long", [1, 10**6])
@pytest.mark.parametrize("groups", [
    HeadGroups([[[0, 3, 2], [1]]] * 2, [[[0], [1, 2, 3]]] * 2, 4),
    HeadGroups.adjacent(2, 4, 2),
    HeadGroups([[[0, 1], [2, 3]]] * 2, [[[0, 2], [1, 3]]] * 2, 4),
    HeadGroups([[[0], [1], [2], [3]]] * 2, [[[0, 3], [1, 2]]] * 2, 4),
    HeadGroups([[[0, 1, 2, 3]]] * 2, [[[0, 1, 2, 3]]] * 2, 4),
])  # fmt: skip
@torch.no_grad()
def test_every_layout_decodes_as_it_prefills(groups, long, ids, mha, monkeypatch):
    monkeypatch.setattr("labkit.kv.dha.attention.LONG", long)
    small = pool_heads(mha, groups)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    whole = small(ids, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp(min=0)).logits[:, -1]
    out = small(
        ids[:, :-1], attention_mask=mask[:, :-1], position_ids=mask[:, :-1].cumsum(1).sub(1).clamp(min=0)
    )
    last = mask.sum(1, keepdim=True) - 1
    step = small(ids[:, -1:], attention_mask=mask, position_ids=last, past_key_values=out.past_key_values)
    assert torch.allclose(step.logits[:, -1], whole, atol=1e-4)


def test_bytes_fall_by_the_stated_factor(mha, uneven, ids):
    small = pool_heads(mha, uneven)
    with torch.no_grad():
        full, fewer = (cache_bytes(m(ids).past_key_values) for m in (mha, small))
    assert fewer / full == uneven.kept == 9 / 16
    assert fewer == small.config.cache_bytes_per_token(4) * ids.numel()


def test_saving_loading_generating(tmp_path, uneven, ids):
    small = pool_heads(llama(attention_bias=True, tie_word_embeddings=True), uneven)
    small.save_pretrained(tmp_path)
    register()
    for kind in (DHALlamaForCausalLM, AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path)
        assert type(again) is DHALlamaForCausalLM
        assert again.config.key_map == small.config.key_map
        assert torch.equal(again(ids).logits, small(ids).logits)
    settings = {"max_new_tokens": 6, "do_sample": False}
    greedy = again.generate(ids, **settings)
    stepwise = ids
    for _ in range(6):
        stepwise = torch.cat((stepwise, small(stepwise, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(greedy, stepwise)
    assert again.generate(ids, num_beams=3, **settings).shape == (2, 30)
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("align", [False, True])
def test_fused_at_the_identity_is_the_checkpoint(case, align, uneven, ids):
    model = llama(kv_heads=4, **{"heads": 4, **CASES[case]})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    converter = DHAConverter(model, uneven, align=align)
    with torch.no_grad():
        assert torch.allclose(
            converter.prepare()(ids).logits, model(ids).logits, atol=2e-4 if align else 1e-5
        )
    assert abs(converter.fusion_loss().item() - 1) < 1e-6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("case", ["bias", "gqa"])
def test_fusing_ends_at_zero_and_the_collapse_changes_nothing(case, uneven, ids):
    model = llama(kv_heads=4, **{"heads": 4, **CASES[case]})
    converter = DHAConverter(model, uneven, schedule=FusionSchedule(steps=30))
    steps = list(converter.fuse([ids] * 30, lr=1e-3))
    assert [s.number for s in steps] == list(range(30))
    # The last target is 0 and the last contraction whole.
    assert steps[-1].fusion_loss < 1e-10 < 0.1 < steps[5].fusion_loss
    fused = converter.prepare().eval()
    small = converter.collapse().eval()
    with torch.no_grad():
        assert torch.allclose(small(ids).logits, fused(ids).logits, atol=1e-4)
    # The operators learned something: the heads are not plain means.
    mix = converter.operators()[0]["k"][0]
    assert float((mix[[0, 2, 3]] - 1 / 3).abs().max()) > 1e-3
    assert float(mix[1]) == 0


def test_collapse_refuses_heads_that_are_apart(mha, uneven, ids):
    converter = DHAConverter(mha, uneven, schedule=FusionSchedule(steps=4))
    with pytest.raises(RuntimeError, match="fusion loss 1 after 0 of 4 steps"):
        converter.collapse()
    list(converter.fuse([ids] * 4))
    with torch.no_grad():
        converter.prepare().model.layers[0].self_attn.k_proj.omega[0, 0] += 0.1
    with pytest.warns(UserWarning, match="not merged yet"):
        converter.collapse()


def test_fusion_loss_by_hand(uneven):
    omega = torch.randn(4, 4)
    group = omega[[0, 2, 3]]
    wanted = ((group - group.mean(0)) ** 2).sum()
    assert torch.allclose(fusion_loss(omega, uneven.keys[0]), wanted)
    assert float(fusion_loss(torch.eye(4), uneven.keys[0])) == pytest.approx(2)


def test_a_loop_of_ones_own_is_the_same_fusion(mha, uneven, ids):
    paths = []
    for own in (False, True):
        converter = DHAConverter(mha, uneven, schedule=FusionSchedule(steps=6))
        if own:
            model = converter.prepare().train()
            optimizer = torch.optim.AdamW(
                converter.parameter_groups(1e-3), betas=(0.9, 0.95), weight_decay=0.0
            )
            for _ in range(6):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                optimizer.zero_grad()
                (loss + converter.penalty()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                converter.advance()
        else:
            list(converter.fuse([ids] * 6, lr=lambda step: 1e-3))
        paths.append(converter.collapse().eval()(ids).logits)
    assert torch.allclose(*paths, atol=1e-4)


@pytest.mark.parametrize("calibrated", [False, True])
@torch.no_grad()
def test_alignment_keeps_the_function_and_undoes_a_turned_basis(calibrated, ids):
    model = llama(attention_bias=True)
    moments = head_moments(model, [ids]) if calibrated else None
    everything = HeadGroups.adjacent(2, 4, 1)
    turned = align_heads(model, everything, moments)
    assert torch.allclose(turned(ids).logits, model(ids).logits, atol=2e-4)
    # Heads that are copies in another basis: after the alignment, pooling loses nothing.
    copies = llama()
    angles = torch.rand(4, 4) * 6
    for layer in copies.model.layers:
        attention = layer.self_attn
        for head in range(1, 4):
            at = slice(8 * head, 8 * head + 8)
            rotation = torch.linalg.qr(torch.randn(8, 8)).Q
            planes = torch.zeros(8, 8)
            for j in range(4):
                c, s = angles[head, j].cos(), angles[head, j].sin()
                planes[[j, j, j + 4, j + 4], [j, j + 4, j, j + 4]] = torch.stack((c, -s, s, c))
            attention.v_proj.weight[at] = rotation @ attention.v_proj.weight[:8]
            attention.k_proj.weight[at] = planes @ attention.k_proj.weight[:8]
    moments = head_moments(copies, [ids]) if calibrated else None
    wanted = copies(ids).logits
    aligned, plain = (
        pool_heads(copies, everything, how, moments=moments)(ids).logits for how in ("align", "mean")
    )
    assert torch.allclose(aligned, wanted, atol=1e-3)
    assert (plain - wanted).abs().max() > 0.1


@torch.no_grad()
def test_gqa_is_a_stock_model(ids, mha):
    for method in ("mean", "first", "random", "align"):
        gqa = convert_to_gqa(mha, 2, method)
        assert type(gqa) is LlamaForCausalLM
        assert gqa.config.num_key_value_heads == 2
        twin = pool_heads(mha, HeadGroups.adjacent(2, 4, 2), method)
        assert torch.allclose(gqa(ids).logits, twin(ids).logits, atol=1e-5)
    key = convert_to_gqa(mha, 2).model.layers[0].self_attn.k_proj.weight
    source = mha.model.layers[0].self_attn.k_proj.weight
    assert torch.allclose(key[:8], (source[:8] + source[8:16]) / 2)
    assert torch.equal(convert_to_gqa(mha, 2, "first").model.layers[1].self_attn.v_proj.weight[8:], mha.model.layers[
        1].self_attn.v_proj.weight[16:24])  # fmt: skip
    crossed = pool_heads(mha, HeadGroups([[[0, 3], [1, 2]]] * 2, [[[0, 3], [1, 2]]] * 2, 4))
    assert torch.allclose(export_to_llama(crossed)(ids).logits, crossed(ids).logits, atol=1e-5)


def test_seed_of_the_caller_is_left_alone(mha, uneven):
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    pool_heads(mha, uneven)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_trainer_runs_the_same_fusion(parts, mha, uneven, ids, tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in ids[:1].repeat(12, 1)]  # alike, as they are shuffled
    logits = []
    for trainer in (False, True):
        converter = DHAConverter(mha, uneven, schedule=FusionSchedule(steps=6))
        if trainer:
            callback, model = FusionCallback(converter), converter.prepare()
            arguments = transformers.TrainingArguments(
                str(tmp_path), max_steps=6, per_device_train_batch_size=2 // parts, report_to=[], use_cpu=True,
                gradient_accumulation_steps=parts, save_strategy="no", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            optimizer = torch.optim.AdamW(
                converter.parameter_groups(1e-3), betas=(0.9, 0.95), weight_decay=0.0
            )
            constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
            transformers.Trainer(
                model, arguments, train_dataset=rows, callbacks=[callback], optimizers=(optimizer, constant)
            ).train()
            assert converter.step == 6
            assert not model._forward_hooks
        else:
            batch = {"input_ids": ids[:1], "labels": ids[:1]}
            list(converter.fuse([batch] * 6, lr=1e-3))
        logits.append(converter.collapse()(ids).logits)
    assert torch.allclose(*logits, atol=2e-3)


def test_the_lagrangian_by_hand(mha, uneven, ids):
    converter = DHAConverter(
        mha, uneven, schedule=FusionSchedule(steps=10, penalty=3.0, dual_rate=0.1, contract=0)
    )
    fusion, multiplier = 1.0, 0.0  # the operators are not trained here
    for k in range(4):
        excess, weight = fusion - max(0, 1 - k / 7) ** 2, 3 * (1 + k / 5)
        wanted = multiplier * excess + weight / 2 * max(excess, 0) ** 2
        assert converter.penalty().item() == pytest.approx(wanted, abs=1e-5)
        converter.advance()
        multiplier = max(0, multiplier + 0.1 * weight * excess)
    assert multiplier > 0.1


@torch.no_grad()
def test_aligned_heads_have_the_mean_norm_of_their_members(mha):
    groups = HeadGroups.adjacent(2, 4, 2)
    small = pool_heads(mha, groups, "align")
    for kind in ("k_proj", "v_proj"):
        source, merged = (
            getattr(m.model.layers[1].self_attn, kind).weight.view(-1, 8 * 32).norm(dim=1)
            for m in (mha, small)
        )
        assert torch.allclose(merged, source.view(2, 2).mean(1), rtol=1e-4)
