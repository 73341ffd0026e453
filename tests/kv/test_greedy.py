"""Greedy eviction, against a model that is really run token by token on a cache that is really cut."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from labkit.kv import (
    GreedyEviction,
    GreedyH2O,
    GreedyMSRNN,
    GreedyTOVA,
    Scissorhands,
    cache_bytes,
    decode_inputs,
)


def step_by_step(model, ids, budget, rule, window=6, recent=None):
    """One prompt: decode steps of an eager model, then lists and loops."""
    cache = DynamicCache(config=model.config)
    layers = model.config.num_hidden_layers
    heads = model.config.num_key_value_heads
    spared = int(budget * (0.5 if recent is None else recent) + 0.5) if rule in ("h2o", "scissorhands") else 0
    columns = [[[] for _ in range(heads)] for _ in range(layers)]
    history = [[{} for _ in range(heads)] for _ in range(layers)]  # column -> what the rule remembers
    logits = []
    for t in range(ids.shape[1]):
        with torch.no_grad():
            out = model(
                ids[:, t : t + 1],
                past_key_values=cache,
                position_ids=torch.tensor([[t]]),
                output_attentions=True,
            )
        logits.append(out.logits[0, 0])
        for i, attention in enumerate(out.attentions):
            grouped = attention[0, :, 0].view(heads, -1, attention.shape[-1]).mean(1)  # (K, S)
            keep = []
            for h in range(heads):
                columns[i][h].append(t)
                held = columns[i][h]
                for slot, column in enumerate(held):
                    value = float(grouped[h, slot])
                    past = history[i][h].setdefault(column, [])
                    past.append((t, value, value < 1 / len(held)))
                slots = list(range(len(held)))
                if len(held) > budget:

                    def badness(slot, held=held, h=h, i=i, grouped=grouped, t=t):
                        past = history[i][h][held[slot]]
                        if rule == "h2o":
                            return sum(value for _, value, _ in past)
                        if rule == "msrnn":
                            return past[-1][1]
                        if rule == "tova":
                            return float(grouped[:, slot].mean())
                        return -sum(below for when, _, below in past if when > t - window)

                    slots.remove(min((s for s in slots if held[s] <= t - spared), key=badness))
                keep.append(slots)
                columns[i][h] = [held[s] for s in slots]
            index = torch.tensor(keep)[None, :, :, None]
            layer = cache.layers[i]
            layer.keys = layer.keys.gather(2, index.expand(-1, -1, -1, layer.keys.shape[3]))
            layer.values = layer.values.gather(2, index.expand(-1, -1, -1, layer.values.shape[3]))
    return torch.stack(logits), columns, cache


@pytest.mark.parametrize("rule", ["h2o", "tova", "msrnn", "scissorhands"])
@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 4), ("qwen3", 2), ("phi3", 1)])
def test_greedy_eviction_is_that_of_a_model_run_token_by_token(tiny, prompt, rule, family, kv_heads):
    model, ids = tiny(family, "eager", kv_heads=kv_heads), prompt(40)
    press = GreedyEviction(rule, budget_tokens=9, window=6)
    with press(model), torch.no_grad():
        out = model(ids)
    logits, columns, cache = step_by_step(model, ids, 9, rule)
    torch.testing.assert_close(out.logits[0], logits, atol=1e-4, rtol=1e-4)
    for i in range(2):
        assert press.stats[i].kept[0].tolist() == columns[i]
        torch.testing.assert_close(
            out.past_key_values.layers[i].keys, cache.layers[i].keys, atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(
            out.past_key_values.layers[i].values, cache.layers[i].values, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("rule", ["h2o", "tova", "msrnn", "scissorhands"])
def test_a_prompt_in_pieces_or_in_one_piece_is_the_same(tiny, prompt, rule):
    model, ids = tiny("qwen2"), prompt(40)
    with torch.no_grad(), GreedyEviction(rule, budget_tokens=9)(model):
        whole = model(ids)
        cache = DynamicCache(config=model.config)
        parts = [
            model(piece, past_key_values=cache).logits for piece in ids.split([3, 10, 1, 1, 20, 5], dim=1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        cache.layers[1].keys, whole.past_key_values.layers[1].keys, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("rule", ["h2o", "tova", "msrnn", "scissorhands"])
@pytest.mark.parametrize("how", ["ratio", "tokens"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(tiny, prompt, decode, rule, how):
    model = tiny("qwen3")
    budget = {"compression_ratio": 0.7} if how == "ratio" else {"budget_tokens": 12}
    lengths = [50, 37, 50, 9]
    rows = [prompt(n, seed=n + i) for i, n in enumerate(lengths)]
    batch = torch.cat([torch.nn.functional.pad(row, (50 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(r), (50 - r.shape[1], 0)) for r in rows])
    press = GreedyEviction(rule, **budget)
    with press(model):
        together, cache = decode(model, batch, mask, tokens=8)
        kept = press.stats[1].kept
    for place, row in enumerate(rows):
        with press(model):
            alone, _ = decode(model, row, tokens=8)
        assert torch.equal(together[place], alone[0])
        here = kept[place]
        here = here[:, here[0] >= 0]
        assert torch.equal(here - (50 - row.shape[1]), press.stats[1].kept[0])
    assert cache.get_seq_length() == (15 if how == "ratio" else 12)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral"])
def test_generate_holds_the_budget_in_bytes(tiny, prompt, decode, family):
    model, ids = tiny(family), prompt(50, rows=3)
    with GreedyH2O(budget_tokens=10)(model):
        _, cache = decode(model, ids, tokens=12)
    assert cache_bytes(cache) == 2 * 2 * 3 * 2 * 10 * 8 * 4
    assert model.config._attn_implementation == "sdpa"


def test_a_budget_as_long_as_the_text_changes_nothing(tiny, prompt, decode):
    model, ids = tiny(), prompt(40)
    expected, _ = decode(model, ids)
    for rule in ("h2o", "tova", "msrnn", "scissorhands"):
        with GreedyEviction(rule, budget_tokens=60)(model):
            assert torch.equal(decode(model, ids)[0], expected)


def test_tova_has_one_set_and_msrnn_one_for_each_head(tiny, prompt):
    model, ids = tiny(kv_heads=4), prompt(60)
    sets = {}
    for press in (GreedyTOVA(0.8), GreedyMSRNN(0.8)):
        with press(model), torch.no_grad():
            model(ids)
        sets[press.rule] = len({tuple(x) for x in press.stats[0].kept[0].tolist()})
    assert sets["tova"] == 1
    assert sets["msrnn"] > 1


def test_the_recent_half_of_h2o_is_kept(tiny, prompt):
    model, ids = tiny(), prompt(60)
    for press in (GreedyH2O(budget_tokens=12), Scissorhands(budget_tokens=12)):
        with press(model), torch.no_grad():
            model(ids)
        assert (press.stats[0].kept[..., -6:] == torch.arange(54, 60)).all()


def test_going_on_after_the_press_and_the_reasons(tiny, prompt):
    model, ids = tiny(), prompt(30)
    press = GreedyH2O(budget_tokens=8)
    with press(model), torch.no_grad():
        cache = model(ids).past_key_values
    arguments = decode_inputs(cache, prompt(1))
    assert arguments["position_ids"].tolist() == [[30]]
    with torch.no_grad():
        assert model(**arguments).past_key_values.get_seq_length() == 9
    stats = press.stats[0]
    assert stats.reason.shape == (1, 2, 30)
    assert torch.equal(stats.reason.nonzero()[:, 2].view(1, 2, 8), stats.kept.long())


def test_settings_are_restored_after_an_exception(tiny):
    model = tiny(attention="eager")
    with GreedyH2O(0.5)(model):
        assert model.config._attn_implementation == "labkit_greedy"
    with pytest.raises(IndexError), GreedyH2O(0.5)(model):
        model(torch.tensor([[99]]))
    assert model.config._attn_implementation == "eager"
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_greedy_refuses_what_it_cannot_do(tiny, prompt):
    with pytest.raises(ValueError, match="rule must be one of h2o, tova, msrnn, scissorhands; got 'lru'"):
        GreedyEviction("lru", 0.5)
    with pytest.raises(ValueError, match=r"recent .* got 1.5"):
        GreedyH2O(0.5, recent=1.5)
    with pytest.raises(ValueError, match="window must be at least 1; got 0"):
        Scissorhands(0.5, window=0)
    model = tiny()
    with torch.no_grad():
        cache = model(prompt(10)).past_key_values
        with pytest.raises(RuntimeError, match="from its first token on"), GreedyH2O(0.5)(model):
            model(prompt(1), past_key_values=cache)
    sliding = tiny("mistral", sliding_window=16)
    with pytest.raises(RuntimeError, match="plain DynamicCache"), GreedyH2O(0.5)(sliding), torch.no_grad():
        sliding(prompt(20))
