"""NACL as a kvpress press: against kvpress where it is installed, else against a stand-in of its interface."""

from __future__ import annotations

import importlib.util
import sys
import types
from dataclasses import dataclass

import pytest
import torch
from transformers import DynamicCache

from labkit.kv import NACLPress, nacl_scorer_press, nacl_select, proxy_scores, scorer_press_of
from labkit.kv.attention import LayerContext

kvpress_installed = importlib.util.find_spec("kvpress") is not None
needs_kvpress = pytest.mark.skipif(not kvpress_installed, reason="kvpress is not installed")


@dataclass
class StandIn:
    """The part of kvpress's ScorerPress that NACL touches."""

    compression_ratio: float = 0.0

    def __post_init__(self):
        assert 0 <= self.compression_ratio < 1

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if self.compression_ratio == 0:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        kept = max(1, int(keys.shape[2] * (1 - self.compression_ratio)))
        index = scores.topk(kept, dim=-1).indices[..., None].expand(-1, -1, -1, module.head_dim)
        return keys.gather(2, index), values.gather(2, index)


@pytest.fixture
def scorer(monkeypatch):
    """nacl_scorer_press on the stand-in, whether or not kvpress is there."""
    stand_in = types.ModuleType("kvpress")
    stand_in.ScorerPress = StandIn
    monkeypatch.setitem(sys.modules, "kvpress", stand_in)
    return nacl_scorer_press


@pytest.fixture
def layer(tiny, prompt):
    """The first attention layer of a model with everything that a press is given."""
    model, ids, seen = tiny(), prompt(50, rows=2), {}
    module = model.model.layers[0].self_attn

    def look(module, args, kwargs, output):
        seen.update(kwargs)

    handle = module.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        cache = model(ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    handle.remove()
    seen["keys"], seen["values"] = cache.layers[0].keys, cache.layers[0].values
    return module, seen


def test_it_is_a_scorer_press_whose_top_k_is_nacl(scorer, layer):
    module, seen = layer
    press = scorer(0.7, proxy_tokens=5, random_share=0.5, sink=2, recent=3, seed=4)
    assert isinstance(press, StandIn)
    assert type(press).__name__ == "KVPressNACL"
    assert type(scorer(0.5)) is type(press)
    with torch.no_grad():
        keys, _ = press.compress(module, seen["hidden_states"], seen["keys"], seen["values"], None, seen)
        cos, sin = (x.expand(2, -1, -1) for x in seen["position_embeddings"])
        context = LayerContext(module, 0, seen["hidden_states"], seen["keys"], seen["values"], cos, sin, None)
        scores = proxy_scores(context.queries(torch.arange(45, 50)), seen["keys"], 5)
    generator = torch.Generator().manual_seed(4 * 1_000_003)
    kept = nacl_select(scores, 15, sink=2, recent=3, random_share=0.5, generator=generator)
    expected = seen["keys"].gather(2, kept[..., None].expand(-1, -1, -1, 8))
    torch.testing.assert_close(keys.sort(dim=2).values, expected.sort(dim=2).values)


def test_a_wrapper_may_set_the_ratio_and_hand_in_a_buffer(scorer, layer):
    module, seen = layer
    press = scorer(0.0, proxy_tokens=4, recent=2)
    assert (
        press.compress(module, seen["hidden_states"], seen["keys"], seen["values"], None, seen)[0].shape[2]
        == 50
    )
    press.compression_ratio = 0.5
    few = {**seen, "position_embeddings": tuple(x[:, -6:] for x in seen["position_embeddings"])}
    keys, _ = press.compress(module, seen["hidden_states"][:, -6:], seen["keys"], seen["values"], None, few)
    assert keys.shape[2] == 25


def test_the_last_queries_of_a_buffer_score_alike(scorer, layer):
    """With all tables at hand, a buffer of the proxies gives what the whole prompt gives without a mask."""
    module, seen = layer
    few = {**seen, "position_embeddings": tuple(x[:, -6:] for x in seen["position_embeddings"])}
    press = NACLPress(0.5, proxy_tokens=4, causal=False, random_share=0.0)
    with torch.no_grad():
        whole = press.score(module, seen["hidden_states"], seen["keys"], seen["values"], None, seen)
        last = press.score(module, seen["hidden_states"][:, -6:], seen["keys"], seen["values"], None, few)
    torch.testing.assert_close(whole, last)


def test_what_kvpress_cannot_express_is_refused(scorer):
    for press in (NACLPress(budget_tokens=20), NACLPress.official(), NACLPress.paper_table(0.2)):
        with pytest.raises(ValueError, match="kvpress budgets are shares"):
            scorer_press_of(press)
    for settings in ({"decode_interval": 4}, {"min_length": 9}):
        with pytest.raises(ValueError, match="decode_interval and min_length are not available"):
            scorer(0.5, **settings)
    assert scorer_press_of(NACLPress(0.5)).compression_ratio == 0.5


def test_without_kvpress_the_way_to_get_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(ImportError, match="pip install kvpress"):
        nacl_scorer_press(0.5)


@needs_kvpress
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_kvpress_runs_it_under_generate(tiny, prompt, family):
    import kvpress

    model, ids = tiny(family), prompt(100)
    press = nacl_scorer_press(0.7, proxy_tokens=5)
    assert isinstance(press, kvpress.ScorerPress)
    with press(model):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=5,
            do_sample=False,
            return_dict_in_generate=True,
        )
    assert out.past_key_values.get_seq_length() == int(100 * (1 - 0.7)) + 4


@needs_kvpress
def test_kvpress_keeps_what_labkit_keeps(tiny, prompt):
    """The same seed and proxies: the same first layer, whichever of the two runs it."""
    model, ids = tiny(), prompt(100)
    settings = {"proxy_tokens": 5, "random_share": 0.5, "seed": 3}
    with torch.no_grad(), nacl_scorer_press(0.75, **settings)(model):
        theirs = model(ids, past_key_values=DynamicCache()).past_key_values.layers[0].keys
    with torch.no_grad(), NACLPress(0.75, **settings)(model):
        ours = model(ids, past_key_values=DynamicCache()).past_key_values.layers[0].keys
    torch.testing.assert_close(theirs.sort(dim=2).values, ours.sort(dim=2).values)


@needs_kvpress
def test_kvpress_wrappers_take_it(tiny, prompt):
    import kvpress

    model, ids = tiny(), prompt(100, rows=3)
    # AdaKV hides entries by masks and keeps the tensors; the others cut them.
    wrappers = {
        "ada": (kvpress.AdaKVPress(nacl_scorer_press(0.5, proxy_tokens=5)), 100),
        "composed": (kvpress.ComposedPress([nacl_scorer_press(0.5, proxy_tokens=5)]), 50),
        "layers": (kvpress.PerLayerCompressionPress(nacl_scorer_press(0.5, proxy_tokens=5), [0.5, 0.5]), 50),
    }
    for name, (press, length) in wrappers.items():
        with press(model), torch.no_grad():
            cache = model(ids, past_key_values=DynamicCache()).past_key_values
        assert cache.get_seq_length() == length, name
    decoding = kvpress.DecodingPress(
        nacl_scorer_press(0.0, proxy_tokens=4), compression_interval=8, target_size=30
    )
    with decoding(model):
        out = model.generate(
            ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=18, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
    assert out.past_key_values.get_seq_length() < 40
