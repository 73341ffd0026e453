"""Presses on models: positions, masks, batches, bytes, hooks."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from transformers import DynamicCache, StaticCache

from labkit.kv import (
    FullCache,
    H2OPress,
    NACLPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    cache_bytes,
    decode_inputs,
    proxy_scores,
)
from labkit.kv.attention import attention_modules

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"]
ONE_SHOT = {
    "nacl": lambda **s: NACLPress(proxy_tokens=4, **s),
    "h2o": H2OPress,
    "h2o_normalized": lambda **s: H2OPress(normalized=True, **s),
    "snapkv": lambda **s: SnapKVPress(window=8, **s),
    "streaming": StreamingLLMPress,
    "random": RandomPress,
}


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def masked_reference(model, ids, kept, tokens):
    """Greedy decoding with the whole cache and, instead of eviction, a mask for each layer and head."""
    logits = {}

    def hide(module, args, kwargs):
        keep = kept[module.layer_idx].long()  # (1, K, S)
        hidden = kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            return None
        length = kwargs["past_key_values"].get_seq_length(module.layer_idx) + 1
        allowed = torch.zeros(1, keep.shape[1], 1, length)
        allowed[..., ids.shape[1] :] = 1
        allowed.scatter_(3, keep[:, :, None], 1)
        groups = module.num_key_value_groups
        mask = torch.where(allowed > 0, 0.0, torch.finfo(torch.float32).min).repeat_interleave(groups, 1)
        return args, {**kwargs, "attention_mask": mask}

    handles = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in attention_modules(model)]
    try:
        with torch.no_grad():
            out = model(ids)
            following = []
            for _ in range(tokens):
                following.append(out.logits[:, -1].argmax(-1))
                logits = out.logits[:, -1]
                out = model(following[-1][:, None], past_key_values=out.past_key_values)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(following, 1), logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generating_equals_masking_the_evicted_entries(tiny, prompt, decode, family, attention):
    """Positions, masks and grouped heads, all at once: eviction must equal hiding in the whole cache."""
    model, ids = tiny(family, attention), prompt(60)
    press = NACLPress(0.75, proxy_tokens=5, random_share=0.5)
    with press(model):
        tokens, cache = decode(model, ids, tokens=5)
    expected, _ = masked_reference(model, ids, {i: s.kept for i, s in press.stats.items()}, 5)
    assert torch.equal(tokens, expected)
    assert cache.get_seq_length() == 15 + 4
    assert hooks(model) == 0


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_every_press_keeps_its_budget_in_bytes_and_storage(tiny, prompt, name, kv_heads):
    model, ids = tiny(kv_heads=kv_heads), prompt(100, rows=2)
    with torch.no_grad():
        full = cache_bytes(model(ids).past_key_values)
        with ONE_SHOT[name](compression_ratio=0.8)(model):
            cache = model(ids).past_key_values
    assert cache_bytes(cache) * 5 == full  # 20 of 100, exactly
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            assert x.is_contiguous()
            assert x.shape == (2, kv_heads, 20, 8)
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size()  # no view of the old one


def test_earlier_layers_are_small_while_later_ones_work(tiny, prompt):
    model, seen = tiny(layers=3), []
    watched = attention_modules(model)

    def look(module, args, kwargs):
        seen.append([kwargs["past_key_values"].get_seq_length(i) for i in range(3)])

    with NACLPress(budget_tokens=10, proxy_tokens=4)(model), torch.no_grad():
        handles = [m.register_forward_pre_hook(look, with_kwargs=True) for m in watched]
        model(prompt(40), past_key_values=DynamicCache(config=model.config))
        for handle in handles:
            handle.remove()
    assert seen == [[0, 0, 0], [10, 0, 0], [10, 10, 0]]


def test_kept_values_are_those_of_the_whole_cache(tiny, prompt):
    model, ids = tiny(), prompt(50)
    press = RandomPress(budget_tokens=12)
    with torch.no_grad():
        full = model(ids).past_key_values
        with press(model):
            small = model(ids).past_key_values
    first = press.stats[0].kept.long()[..., None].expand(-1, -1, -1, 8)
    torch.testing.assert_close(small.layers[0].keys, full.layers[0].keys.gather(2, first))
    torch.testing.assert_close(small.layers[0].values, full.layers[0].values.gather(2, first))


def test_bare_calls_count_on_from_the_prompt_inside_and_outside(tiny, prompt, decode):
    model, ids = tiny(), prompt(50)

    def by_hand(inside):
        with torch.no_grad():
            with NACLPress(0.8, proxy_tokens=4)(model):
                out = model(ids)
                tokens = [out.logits[:, -1].argmax(-1)]
                while inside and len(tokens) < 6:
                    out = model(tokens[-1][:, None], past_key_values=out.past_key_values)
                    tokens.append(out.logits[:, -1].argmax(-1))
            while len(tokens) < 6:
                out = model(**decode_inputs(out.past_key_values, tokens[-1][:, None]))
                tokens.append(out.logits[:, -1].argmax(-1))
        return torch.stack(tokens, 1)

    with NACLPress(0.8, proxy_tokens=4)(model):
        expected, _ = decode(model, ids)
    assert torch.equal(by_hand(True), expected)
    assert torch.equal(by_hand(False), expected)


def test_generate_hands_the_model_the_positions_behind_the_prompt(tiny, prompt, decode):
    model, positions = tiny(), []
    handle = model.model.register_forward_pre_hook(
        lambda m, a, k: positions.append(k["position_ids"].flatten().tolist()), with_kwargs=True
    )
    with NACLPress(0.8)(model):
        decode(model, prompt(40), tokens=4)
    handle.remove()
    assert positions == [list(range(40)), [40], [41], [42]]


def test_the_base_model_works_too(tiny, prompt):
    model = tiny()
    for whole in (model, model.model):
        with NACLPress(0.8)(whole), torch.no_grad():
            assert model.model(prompt(50)).past_key_values.get_seq_length() == 10
    assert hooks(model) == 0


PADDED = {name: make for name, make in ONE_SHOT.items() if name != "random"}


@pytest.mark.parametrize("how", ["ratio", "tokens"])
@pytest.mark.parametrize("name", PADDED)
def test_a_padded_batch_gives_each_row_what_it_gets_alone(tiny, prompt, decode, name, how):
    model = tiny("qwen3")
    budget = {"compression_ratio": 0.7} if how == "ratio" else {"budget_tokens": 14}
    settings = {"random_share": 0.0} if name == "nacl" else {}
    lengths = [50, 37, 50, 9]
    rows = [prompt(n, seed=n + i) for i, n in enumerate(lengths)]
    batch = torch.cat([torch.nn.functional.pad(row, (50 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (50 - r.shape[1], 0)) for r in rows])
    press = PADDED[name](**budget, **settings)
    with press(model):
        together, cache = decode(model, batch, mask)
        kept = {i: s.kept.clone() for i, s in press.stats.items()}
    for place, row in enumerate(rows):
        with press(model):
            alone, _ = decode(model, row)
        assert torch.equal(together[place], alone[0])
        pad = 50 - row.shape[1]
        for layer, stats in press.stats.items():
            here = kept[layer][place]
            here = here[:, here[0] >= 0]
            assert torch.equal(here - pad, stats.kept[0])
    longest = 15 if how == "ratio" else 14
    assert cache.get_seq_length() == longest + 5
    assert kept[0].shape[-1] == longest


def test_a_padded_batch_of_bare_calls_inside_and_outside(tiny, prompt):
    model = tiny()
    rows = [prompt(30), prompt(21, seed=1)]
    batch = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (9, 0))])
    mask = (batch > 0).long()
    press = NACLPress(0.6, proxy_tokens=4, random_share=0.0)
    new = prompt(3, rows=2, seed=5)
    with torch.no_grad():
        with press(model):
            cache = model(batch, attention_mask=mask).past_key_values
            copied = copy.deepcopy(cache)
            with pytest.warns(UserWarning, match="3 tokens were appended"):
                inside = model(new, past_key_values=cache).logits
        outside = model(**decode_inputs(copied, new)).logits
        alone = []
        for place, row in enumerate(rows):
            with press(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                small = model(row).past_key_values
                alone.append(model(new[place, None], past_key_values=small).logits[0])
    torch.testing.assert_close(inside, torch.stack(alone), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(outside, inside)


def test_a_question_after_the_press_can_be_generated_from(tiny, prompt, decode):
    model, ids, question = tiny(), prompt(50), prompt(4, seed=3)
    with torch.no_grad():
        with NACLPress(0.8, proxy_tokens=4)(model):
            cache = model(ids).past_key_values
        expected = []
        out = model(**decode_inputs(copy.deepcopy(cache), question))
        for _ in range(5):
            expected.append(out.logits[:, -1].argmax(-1))
            out = model(**decode_inputs(out.past_key_values, expected[-1][:, None]))
    # generate takes the new tokens alone, and learns the length of the whole from the mask
    got, _ = decode(model, question, torch.ones(1, 54, dtype=torch.long), tokens=5, past_key_values=cache)
    assert torch.equal(got, torch.stack(expected, 1))


def test_beams_and_sampling_run(tiny, prompt):
    model, ids = tiny(), prompt(40, rows=2)
    with NACLPress(0.8)(model):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=5, do_sample=True
        )
    assert out.shape == (2, 45)


def test_hooks_and_settings_are_gone_after_an_exception(tiny, prompt):
    model = tiny()
    press = NACLPress(0.8, proxy_tokens=lambda ids: 1 / 0)
    with pytest.raises(ZeroDivisionError), press(model), torch.no_grad():
        model(prompt(40))
    assert hooks(model) == 0
    with torch.no_grad():
        assert model(prompt(40)).past_key_values.get_seq_length() == 40
    with pytest.raises(RuntimeError, match="already active"), press(model), press(model):
        pass
    assert hooks(model) == 0


def test_nothing_is_kept_alive(tiny, prompt):
    model, press = tiny(), NACLPress(0.8)
    with press(model), torch.no_grad():
        model(prompt(40))
    gc.collect()
    assert press._prompt is None


def test_seeds_repeat_and_heads_and_layers_differ(tiny, prompt):
    model, ids = tiny(layers=3, kv_heads=4), prompt(100)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())

    def kept(seed, **settings):
        press = NACLPress(0.6, seed=seed, random_share=1.0, sampling="uniform", **settings)
        with press(model), torch.no_grad():
            model(ids)
        return torch.stack([press.stats[i].kept[0] for i in range(3)])  # (layers, K, S)

    first = kept(0)
    assert torch.equal(first, kept(0))
    assert not torch.equal(first, kept(1))
    assert len({tuple(x) for x in first.flatten(0, 1).tolist()}) == 12
    assert len({tuple(x) for x in kept(0, shared_heads=True).flatten(0, 1).tolist()}) == 3


def test_one_entry_draws_anew_for_the_next_prompt(tiny, prompt):
    model, press = tiny(), NACLPress(0.6, random_share=1.0)
    with press(model), torch.no_grad():
        model(prompt(60))
        first = press.stats[0].kept
        model(prompt(60))
    assert not torch.equal(first, press.stats[0].kept)


def test_two_caches_may_be_used_in_turn(tiny, prompt):
    model = tiny()
    first, second = prompt(40), prompt(60, seed=1)
    new = prompt(1, seed=2)
    with NACLPress(0.8, proxy_tokens=4, random_share=0.0)(model), torch.no_grad():
        a, b = model(first).past_key_values, model(second).past_key_values
        mixed = [model(new, past_key_values=a).logits, model(new, past_key_values=b).logits]
    for ids, logits in zip((first, second), mixed, strict=True):
        with NACLPress(0.8, proxy_tokens=4, random_share=0.0)(model), torch.no_grad():
            torch.testing.assert_close(model(new, past_key_values=model(ids).past_key_values).logits, logits)


def test_short_prompts_and_large_budgets_leave_the_cache_whole(tiny, prompt, decode):
    model, ids = tiny(), prompt(30)
    expected, whole = decode(model, ids)
    for press in (
        NACLPress(budget_tokens=30),
        NACLPress(0.5, min_length=30),
        NACLPress.official(),
        NACLPress(0.0),
        FullCache(),
    ):
        with press(model):
            tokens, cache = decode(model, ids)
        assert torch.equal(tokens, expected)
        torch.testing.assert_close(cache.layers[1].keys, whole.layers[1].keys)
    with NACLPress(0.5, min_length=29)(model):
        assert decode(model, ids)[1].get_seq_length() == 15 + 5


def test_scores_are_kept_on_demand_and_equal_the_function(tiny, prompt):
    """Queries recomputed by the press are those that the model used."""
    for family in ("llama", "qwen3", "phi3"):
        model, ids = tiny(family, "eager"), prompt(40)
        press = NACLPress(0.8, proxy_tokens=1.0, keep_scores=True)
        with press(model), torch.no_grad():
            attentions = model(ids, output_attentions=True).attentions
        for layer, attention in enumerate(attentions):
            torch.testing.assert_close(press.scores[layer], attention.sum(2).view(1, 2, 2, 40).mean(2))


def test_nacl_without_chance_is_snapkv_without_pooling(tiny, prompt):
    model, ids = tiny(), prompt(120)
    nacl = NACLPress(budget_tokens=80, proxy_tokens=64, random_share=0.0, sink=0, recent=64)
    snap = SnapKVPress(budget_tokens=80, kernel_size=1)
    for press in (nacl, snap):
        with press(model), torch.no_grad():
            model(ids)
    for layer in range(2):
        assert torch.equal(nacl.stats[layer].kept, snap.stats[layer].kept)


def test_h2o_and_snapkv_by_the_attention_of_the_model(tiny, prompt):
    model, ids = tiny(attention="eager"), prompt(40)
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[0]
    grouped = attention.view(1, 2, 2, 40, 40)
    total = grouped.sum(3).mean(2)
    window = grouped[..., -8:, :].mean(3).mean(2)
    pooled = torch.nn.functional.avg_pool1d(window[..., :-8], 5, 1, 2)
    expected = {
        "h2o": total.topk(10).indices.sort(-1).values,
        "h2o_normalized": (total / torch.arange(40, 0, -1)).topk(10).indices.sort(-1).values,
        "snapkv": torch.cat(
            (pooled.topk(2).indices.sort(-1).values, torch.arange(32, 40).expand(1, 2, 8)), -1
        ),
        "streaming": torch.tensor([0, 1, 2, 3, *range(34, 40)]).expand(1, 2, 10),
    }
    for name, kept in expected.items():
        press = ONE_SHOT[name](budget_tokens=10)
        with press(model), torch.no_grad():
            model(ids)
        assert torch.equal(press.stats[0].kept.long(), kept), name


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("interval", [1, 4])
def test_decode_interval_keeps_the_cache_at_the_budget(tiny, prompt, interval, padded):
    model, ids = tiny(), prompt(40, rows=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :11] = 0
    press = NACLPress(budget_tokens=12, proxy_tokens=4, recent=2, decode_interval=interval)
    lengths = []
    with press(model), torch.no_grad():
        out = model(ids, attention_mask=mask)
        for _ in range(13):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            lengths.append(out.past_key_values.get_seq_length())
    assert max(lengths) <= 12 + interval - (0 if interval > 1 else 1)
    assert lengths[interval - 1 :: interval] == [12] * (13 // interval)
    kept = press.stats[0].kept
    assert kept.shape == (2, 2, 12)
    assert (kept.diff(dim=-1) > 0).all()
    newest = 39 + 13 // interval * interval
    assert (kept[..., -2:] == torch.tensor([newest - 1, newest])).all()
    assert (kept[0, :, :4] == torch.arange(4)).all()
    if padded:
        assert (kept[1, :, :4] == torch.arange(11, 15)).all()
    state = out.past_key_values.labkit_eviction[0]
    assert int(state.next_position[0]) + out.past_key_values.get_seq_length() - state.length == 53


def test_decode_interval_holds_a_budget_that_the_prompt_does_not_fill(tiny, prompt):
    model = tiny()
    with NACLPress(budget_tokens=20, proxy_tokens=4, decode_interval=5)(model), torch.no_grad():
        out = model(prompt(10))
        for _ in range(30):
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values)
            assert out.past_key_values.get_seq_length() <= 25
    assert out.past_key_values.get_seq_length() < 25


def test_decode_eviction_scores_with_the_latest_queries(tiny, prompt):
    """One head kept by score must be the best under the last queries, computed from the model's own attention."""
    model, ids = tiny(attention="eager", kv_heads=4), prompt(30)
    press = NACLPress(budget_tokens=10, proxy_tokens=1, recent=1, sink=0, random_share=0.0, decode_interval=1)
    with press(model), torch.no_grad():
        out = model(ids)
        before = press.stats[0].kept.clone()
        out = model(prompt(1, seed=4), past_key_values=out.past_key_values, output_attentions=True)
    attention = out.attentions[0][:, :, 0]  # (1, H, 11) over the kept ten and the new token
    columns = torch.cat((before, torch.full((1, 4, 1), 30)), -1)
    worst = attention[..., :-1].argmin(-1)
    for head in range(4):
        expected = [c for i, c in enumerate(columns[0, head].tolist()) if i != int(worst[0, head])]
        assert press.stats[0].kept[0, head].tolist() == expected


def test_embeddings_instead_of_tokens(tiny, prompt):
    model, ids = tiny(), prompt(40)
    with NACLPress(0.8)(model), torch.no_grad():
        cache = model(inputs_embeds=model.get_input_embeddings()(ids)).past_key_values
    assert cache.get_seq_length() == 8


def test_bfloat16_models(tiny, prompt, decode):
    model = tiny().bfloat16()
    with NACLPress(0.8)(model):
        _, cache = decode(model, prompt(60))
    assert cache.layers[0].keys.dtype == torch.bfloat16
    assert cache.get_seq_length() == 12 + 5


def test_sliding_layers_are_left_whole_with_one_warning(tiny, prompt):
    mixed = tiny(
        "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1, layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    ids = prompt(40)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with NACLPress(0.8)(mixed), torch.no_grad():
            cache = mixed(ids).past_key_values
            mixed(ids)
            mixed(prompt(1), past_key_values=cache)
    assert len([w for w in caught if "left whole" in str(w.message)]) == 1
    assert [layer.keys.shape[2] for layer in cache.layers] == [9, 15, 9]
    sliding = tiny("mistral", sliding_window=16)
    with pytest.raises(RuntimeError, match="nothing was evicted"), NACLPress(0.8)(sliding), torch.no_grad():
        sliding(ids)
    assert hooks(sliding) == 0


def test_static_caches_are_refused(tiny, prompt):
    model = tiny()
    cache = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(RuntimeError, match="nothing was evicted"), NACLPress(0.8)(model), torch.no_grad():
        model(prompt(40), past_key_values=cache)


def test_proxy_positions_count_from_the_first_real_token(tiny, prompt):
    model = tiny()
    rows = [prompt(30), prompt(21, seed=1)]
    batch = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (9, 0))])
    seen = []

    def question(ids):
        seen.append(tuple(ids.shape))
        return torch.tensor([0, 5])

    for proxies in (torch.tensor([0, 5]), question):
        press = NACLPress(0.6, proxy_tokens=proxies, random_share=0.0, keep_scores=True)
        with press(model), torch.no_grad():
            model(batch, attention_mask=(batch > 0).long())
            score = press.scores[0][1, :, 9:]
            model(rows[1])
        torch.testing.assert_close(press.scores[0][0], score)
    assert (1, 21) in seen


def test_proxy_scores_reaches_the_kernel_with_the_scale_of_the_model(tiny):
    q = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    a = proxy_scores(q, q, 2, scale=0.1)
    assert not torch.allclose(a, proxy_scores(q, q, 2))
    torch.testing.assert_close(a.sum(-1), torch.full((1, 2), 2.0))
