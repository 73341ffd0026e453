"""Eviction on top of decoupled heads: both make the cache smaller."""

from __future__ import annotations

import pytest
import torch

from labkit.kv import NACLPress, RandomPress, SnapKVPress, StreamingLLMPress, cache_bytes
from labkit.kv.dha import HeadGroups, convert_to_gqa, pool_heads
from labkit.kv.greedy import GreedyH2O


@pytest.mark.parametrize("press", [
    NACLPress(0.75, proxy_tokens=4), NACLPress(budget_tokens=8, proxy_tokens=4, decode_interval=2),
    SnapKVPress(0.75, window=4), StreamingLLMPress(0.75), RandomPress(0.75),
], ids=lambda p: type(p).__name__)  # fmt: skip
def test_presses_evict_decoupled_heads(press, mha, uneven):
    ids = torch.randint(2, 64, (1, 40), generator=torch.Generator().manual_seed(1))
    small = pool_heads(mha, uneven)
    with press(small), torch.no_grad():
        cache = small(ids).past_key_values
        kept = press.budget(40)
        assert cache_bytes(cache) == small.config.cache_bytes_per_token(4) * kept
        for index, layer in enumerate(cache.layers):
            assert layer.keys.shape[:3] == (1, (2, 3)[index], kept)
            assert layer.values.shape[:3] == (1, (3, 1)[index], kept)
        out = small.generate(ids, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 45)


@torch.no_grad()
def test_evicting_equals_masking_with_decoupled_heads(mha):
    """Keys and values of a query head keep the same entries, and components differ."""
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    groups = HeadGroups(keys=[[[0, 1], [2, 3]]] * 2, values=[[[0], [1], [2, 3]]] * 2, heads=4)
    small = pool_heads(mha, groups)
    sites = [small.model.layers[la].self_attn.layout.site_of_query for la in (0, 1)]
    assert sites[0] == (0, 0, 1, 1)
    press = NACLPress(0.7, proxy_tokens=4)
    with press(small):
        cache = small(ids).past_key_values
        got = small(ids[:, :1], past_key_values=cache).logits
    assert press.stats[1].kept.shape == (2, 2, 12)
    assert not torch.equal(press.stats[1].kept[0, 0], press.stats[1].kept[0, 1])
    small.set_attn_implementation("eager")
    full = small(ids).past_key_values

    def hide(module, args, kwargs):
        allowed = torch.zeros(2, 4, 1, 41)
        allowed[..., 40] = 1
        kept = press.stats[module.layer_idx].kept.long()
        for head, site in enumerate(module.layout.site_of_query):
            allowed[:, head, 0].scatter_(1, kept[:, site], 1)
        return args, {
            **kwargs,
            "attention_mask": torch.where(allowed > 0, 0.0, torch.finfo(torch.float32).min),
        }

    for layer in small.model.layers:
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
    wanted = small(ids[:, :1], past_key_values=full).logits
    assert torch.allclose(got, wanted, atol=1e-4)


def test_what_presses_refuse(mha, uneven, ids):
    small = pool_heads(mha, uneven)
    with pytest.raises(ValueError, match="has them decoupled"), GreedyH2O(0.5)(small):
        pass
    with (
        pytest.raises(ValueError, match="head_index"),
        NACLPress(0.5, head_reduction="head_index")(small),
        torch.no_grad(),
    ):
        small(ids)
    with pytest.raises(ValueError, match="2 key and 3 value heads"):
        small.generate(ids, max_new_tokens=2, cache_implementation="static")


@torch.no_grad()
def test_where_the_groups_are_those_of_gqa_the_same_entries_are_kept(mha):
    ids = torch.randint(2, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    kept = []
    for model in (pool_heads(mha, HeadGroups.adjacent(2, 4, 2)), convert_to_gqa(mha, 2)):
        press = NACLPress(0.7, proxy_tokens=4)
        with press(model):
            model(ids)
        kept.append([press.stats[layer].kept for layer in (0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))
