"""Each kind of bad input has its error, that names the value, what is allowed, and the way out."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from labkit.kv import (
    FullCache,
    GreedyH2O,
    H2OPress,
    NACLConfig,
    NACLPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    decode_inputs,
    nacl_select,
    proxy_scores,
)
from labkit.kv.nacl import resolve_proxies


@pytest.mark.parametrize(
    "press", [NACLPress, RandomPress, H2OPress, SnapKVPress, StreamingLLMPress, GreedyH2O]
)
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_compression_ratio_outside_its_range(press, ratio):
    with pytest.raises(ValueError, match=rf"compression_ratio .* \[0, 1\); got {ratio}"):
        press(ratio)


@pytest.mark.parametrize(
    "press", [NACLPress, RandomPress, H2OPress, SnapKVPress, StreamingLLMPress, GreedyH2O]
)
def test_one_budget_and_only_one(press):
    with pytest.raises(ValueError, match="either compression_ratio or budget_tokens"):
        press()
    with pytest.raises(ValueError, match="either compression_ratio or budget_tokens"):
        press(0.5, budget_tokens=10)
    with pytest.raises(TypeError, match=r"budget_tokens must be an int; got 0.2"):
        press(budget_tokens=0.2)
    with pytest.raises(ValueError, match="budget_tokens must be at least 1; got 0"):
        press(budget_tokens=0)
    with pytest.raises(ValueError, match="min_length must not be negative; got -1"):
        press(0.5, min_length=-1)


def test_budget_tokens_without_room_for_sink_recent_and_one_more(tiny, prompt):
    with pytest.raises(ValueError, match=r"sink \+ recent \+ 1; got budget_tokens=6, sink=4, recent=2"):
        NACLPress(budget_tokens=6, sink=4, recent=2)
    NACLPress(budget_tokens=7, sink=4, recent=2)
    model = tiny()
    share = NACLPress(budget_tokens=6, sink=4, recent=0.1)
    with pytest.raises(ValueError, match="got budget_tokens=6, sink=4, recent=10"), share(model):
        model(prompt(100))
    with pytest.raises(ValueError, match="sink=4, budget_tokens=4"):
        StreamingLLMPress(budget_tokens=4)


@pytest.mark.parametrize(
    ("proxies", "error", "message"),
    [
        (0, ValueError, "proxies are empty: the last 0 tokens"),
        (-3, ValueError, "proxies are empty"),
        (0.0, ValueError, r"must lie in \(0, 1\]; got 0.0"),
        (1.5, ValueError, r"must lie in \(0, 1\]; got 1.5"),
        (torch.tensor([], dtype=torch.long), ValueError, "at least one position"),
        (torch.tensor([3, -1]), ValueError, r"0\.\.\d+ .* got -1"),
        (torch.tensor([0.5]), TypeError, "must be integers; got torch.float32"),
        (torch.tensor([True]), TypeError, "must be integers"),
        (True, TypeError, "got True"),
        ("end", TypeError, "got 'end'"),
    ],
)
def test_proxies_empty_outside_or_of_the_wrong_type(proxies, error, message):
    with pytest.raises(error, match=message):
        resolve_proxies(proxies, 10)
    with pytest.raises(error, match=message):
        NACLPress(0.5, proxy_tokens=proxies)


def test_proxies_at_or_past_the_end(tiny, prompt):
    q = torch.zeros(1, 2, 10, 8)
    with pytest.raises(ValueError, match=r"0\.\.9 for a prompt of 10 tokens; got 10"):
        proxy_scores(q, q, torch.tensor([10]))
    with pytest.raises(ValueError, match="need input_ids"):
        proxy_scores(q, q, lambda ids: ids)
    with pytest.raises(ValueError, match="all 10 tokens or of the 2 proxies; got 3"):
        proxy_scores(q[:, :, :3], q, 2)
    with pytest.raises(ValueError, match="head_reduction must be one of mean, head_index, none; got 'sum'"):
        proxy_scores(q, q, 2, head_reduction="sum")
    model = tiny()
    for proxies in (torch.tensor([40]), lambda ids: torch.tensor([99])):
        with pytest.raises(ValueError, match=r"0\.\.39"), NACLPress(0.5, proxy_tokens=proxies)(model):
            model(prompt(40))
    press = NACLPress(0.5, proxy_tokens=lambda ids: [1])
    with pytest.raises(TypeError, match="callable that returns one"), press(model):
        model(prompt(40))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_share": 1.2}, r"random_share must lie in \[0, 1\]; got 1.2"),
        ({"random_share": -0.1}, r"random_share must lie in \[0, 1\]; got -0.1"),
        ({"random_temperature": 0.0}, "random_temperature must be positive; got 0.0"),
        ({"sampling": "topk"}, "sampling must be one of probability, uniform; got 'topk'"),
        ({"sink": -1}, "sink must be an int of at least 0; got -1"),
        ({"recent": -1}, "recent must be"),
        ({"recent": 1.0}, r"recent must be .* got 1.0"),
        ({"head_reduction": "none"}, "head_reduction must be 'mean' or 'head_index'; got 'none'"),
        ({"decode_interval": 0}, "decode_interval must be at least 1"),
        ({"split": lambda n: None}, "split states the budget already"),
    ],
)
def test_settings_outside_their_range(settings, message):
    with pytest.raises(ValueError, match=message):
        NACLConfig(0.5, **settings)


def test_official_and_table_settings():
    with pytest.raises(ValueError, match=r"proxy_token_keep_ratio must lie in \[0, 1\]; got 2"):
        NACLPress.official(proxy_token_keep_ratio=2)
    with pytest.raises(ValueError, match="sink_tokens must not be negative"):
        NACLPress.official(sink_tokens=-1)
    with pytest.raises(ValueError, match=r"total must be one of 0.1, 0.2, 0.3; got 0.5"):
        NACLPress.paper_table(0.5)


def test_selection_arguments():
    scores = torch.zeros(1, 1, 10)
    with pytest.raises(ValueError, match="at least sink [+] recent; got budget=3, sink=2, recent=2"):
        nacl_select(scores, 3, sink=2, recent=2)
    with pytest.raises(ValueError, match=r"scores must be floating, \(B, K, n\)"):
        nacl_select(scores[0], 3)
    with pytest.raises(ValueError, match=r"by_random must lie in 0\.\.4"):
        nacl_select(scores, 5, sink=0, by_random=5)
    with pytest.raises(ValueError, match="must not be negative"):
        nacl_select(scores, 5, sink=-1)


@pytest.mark.parametrize("press", [NACLPress(0.5), GreedyH2O(0.5), FullCache()])
def test_training_mode_and_a_switched_off_cache(tiny, prompt, press):
    model = tiny()
    model.train()
    with pytest.raises(RuntimeError, match="no cache to evict: the model is in training mode"), press(model):
        pass
    model.eval()
    with pytest.raises(RuntimeError, match="no cache to evict: use_cache is False"), press(model):
        model(prompt(20), use_cache=False)
    with pytest.raises(RuntimeError, match="no cache to evict: use_cache is False"), press(model):
        model.generate(prompt(20), use_cache=False, max_new_tokens=2)
    model.config.use_cache = False
    with pytest.raises(RuntimeError, match="no cache to evict: use_cache is False"), press(model):
        pass


@pytest.mark.parametrize("press", [NACLPress(0.5), GreedyH2O(0.5)])
def test_padding_that_is_not_a_left_margin(tiny, prompt, press):
    model, ids = tiny(), prompt(20, rows=2)
    for hole in (slice(15, 20), slice(4, 6)):
        mask = torch.ones_like(ids)
        mask[1, hole] = 0
        with pytest.raises(ValueError, match=r"row 1; .*padding_side = 'left'"), press(model):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="row 0 of attention_mask is all padding"), press(model):
        model(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"2-D attention_mask .* shape \(2, 1, 20, 20\)"), press(model):
        model(ids, attention_mask=torch.zeros(2, 1, 20, 20))
    with pytest.raises(ValueError, match=r"must be \(2, 20\)"), press(model):
        model(ids, attention_mask=torch.ones(2, 7))


def test_tokens_appended_in_a_piece_warn_once(tiny, prompt):
    model = tiny()
    with NACLPress(0.5)(model), torch.no_grad():
        cache = model(prompt(20)).past_key_values
        with pytest.warns(UserWarning, match="5 tokens were appended to a cache of 10 entries"):
            model(prompt(5), past_key_values=cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(prompt(5), past_key_values=cache)


def test_models_that_are_not_supported():
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=32)
    ).eval()
    press = NACLPress(0.5)
    with (
        pytest.raises(ValueError, match="GPT2Attention; cache eviction supports LlamaAttention, Mi"),
        press(gpt2),
    ):
        pass
    with pytest.raises(ValueError, match="no attention layers"), NACLPress(0.5)(torch.nn.Linear(2, 2).eval()):
        pass


def test_baseline_settings():
    with pytest.raises(ValueError, match="window must be at least 1; got 0"):
        SnapKVPress(0.5, window=0)
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        SnapKVPress(0.5, kernel_size=4)
    with pytest.raises(ValueError, match=r"recent .* got 2"):
        H2OPress(0.5, recent=2)


def test_decode_inputs_of_a_cache_that_no_press_has_touched():
    with pytest.raises(ValueError, match="not made smaller by a labkit press"):
        decode_inputs(transformers.DynamicCache(), torch.zeros(1, 1, dtype=torch.long))
