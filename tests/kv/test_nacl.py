"""The mathematics of NACL, against loops written from the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.kv import NACLConfig, NACLPress, Split, nacl_priorities, nacl_select, proxy_scores
from labkit.kv.nacl import nacl_reasons, official_split, paper_split, resolve_proxies


def loops(q, k, proxies, causal):
    """F for every query head, one softmax at a time: q (H, n, d), k (K, n, d) as numpy."""
    heads, n, d = q.shape
    group = heads // k.shape[0]
    total = np.zeros((heads, n))
    for h in range(heads):
        for p in proxies:
            last = p + 1 if causal else n
            logits = [float(q[h, p] @ k[h // group, j]) / d**0.5 for j in range(last)]
            top = max(logits)
            weights = [np.exp(x - top) for x in logits]
            for j in range(last):
                total[h, j] += weights[j] / sum(weights)
    return total


@pytest.fixture
def qk():
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2, 4, 11, 8, generator=generator)
    k = torch.randn(2, 2, 11, 8, generator=generator)
    return q, k


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("proxies", [3, 0.5, torch.tensor([2, 7, 10])])
def test_scores_are_the_sum_over_proxies_and_the_mean_over_a_group(qk, causal, proxies):
    q, k = qk
    where = resolve_proxies(proxies, 11).tolist()
    for row in range(2):
        expected = loops(q[row].numpy(), k[row].numpy(), where, causal).reshape(2, 2, 11).mean(1)
        got = proxy_scores(q, k, proxies, causal)[row]
        np.testing.assert_allclose(got, expected, atol=1e-5)
        few = proxy_scores(q[:, :, where], k, torch.tensor(where), causal)[row]
        np.testing.assert_allclose(few, expected, atol=1e-5)


def test_head_index_scores_a_kv_head_with_the_query_head_of_its_number(qk):
    q, k = qk
    each = proxy_scores(q, k, 4, head_reduction="none")
    assert each.shape == (2, 4, 11)
    torch.testing.assert_close(proxy_scores(q, k, 4, head_reduction="head_index"), each[:, :2])
    torch.testing.assert_close(proxy_scores(q, k, 4), each.view(2, 2, 2, 11).mean(2))


def test_all_tokens_as_proxies_is_h2o_and_the_last_one_is_tova(qk):
    q, k = qk
    logits = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    attention = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    torch.testing.assert_close(proxy_scores(q, k, 1.0, head_reduction="none"), attention.sum(2))
    torch.testing.assert_close(proxy_scores(q, k, 1, head_reduction="none"), attention[:, :, -1])


def test_rows_may_have_proxies_of_their_own_and_a_callable_sees_the_tokens(qk):
    q, k = qk
    ids = torch.tensor([[0] * 11, [0] * 11])
    ids[0, 3] = ids[1, 8] = 9
    own = proxy_scores(q, k, lambda x: (x == 9).nonzero()[:, 1:], input_ids=ids)
    torch.testing.assert_close(own[0], proxy_scores(q, k, torch.tensor([3]))[0])
    torch.testing.assert_close(own[1], proxy_scores(q, k, torch.tensor([8]))[1])


def test_selection_by_hand():
    scores = torch.tensor([[[0.5, 0.1, 0.9, 0.2, 0.8, 0.0, 0.0, 0.7]]])
    kept = nacl_select(scores, 5, sink=1, recent=2, random_share=0.0)
    assert kept.tolist() == [[[0, 2, 4, 6, 7]]]
    assert nacl_select(scores, 8).tolist() == [[list(range(8))]]
    assert nacl_select(scores, 99).tolist() == [[list(range(8))]]


def test_equal_scores_keep_the_lower_index():
    kept = nacl_select(torch.zeros(1, 3, 50), 12, sink=2, recent=3, random_share=0.0)
    assert kept[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 47, 48, 49]
    assert (kept == kept[:, :1]).all()


def test_reasons_say_which_part_kept_an_entry():
    scores = torch.zeros(1, 2, 20)
    scores[..., 11] = 1.0
    reason = nacl_reasons(scores, Split(2, 3, 1, 4), generator=torch.Generator().manual_seed(0))
    assert reason[0, 0, [0, 1]].tolist() == [1, 1]
    assert reason[0, 0, [17, 18, 19]].tolist() == [2, 2, 2]
    assert reason[0, 0, 11] == 3
    assert ((reason == 4).sum(-1) == 4).all()
    assert ((reason > 0).sum(-1) == 10).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_kept_sets_are_sorted_unique_of_the_right_size_and_hold_the_protected(data):
    n = data.draw(st.integers(1, 40))
    sink, recent = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    budget = data.draw(st.integers(max(1, sink + recent), max(1, sink + recent) + 40))
    share = data.draw(st.floats(0, 1))
    levels = data.draw(st.integers(1, 4))  # few levels: ties
    seed = data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (2, 3, n), generator=generator).float()
    kept = nacl_select(
        scores,
        budget,
        sink=sink,
        recent=recent,
        random_share=share,
        sampling=data.draw(st.sampled_from(["probability", "uniform"])),
        shared_heads=data.draw(st.booleans()),
        generator=generator,
    )
    assert kept.shape == (2, 3, min(budget, n))
    assert (kept.diff(dim=-1) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < n
    for head in kept.flatten(0, 1).tolist():
        assert set(range(min(sink, n))) <= set(head)
        assert set(range(max(0, n - recent), n)) <= set(head)


def test_the_draw_is_sampling_without_replacement_from_softmax():
    """Inclusion of one, then two of four, against the exact sums over ordered draws."""
    scores = torch.tensor([0.0, 0.5, 1.0, 2.0])
    weights = (scores / 0.7).softmax(-1).double().numpy()
    exact = np.zeros(4)
    for i in range(4):
        for j in range(4):
            if i != j:
                chance = weights[i] * weights[j] / (1 - weights[i])
                exact[[i, j]] += chance
    rows = 40_000
    kept = nacl_select(
        scores.expand(rows, 1, 4),
        2,
        sink=0,
        recent=0,
        by_random=2,
        random_temperature=0.7,
        generator=torch.Generator().manual_seed(3),
    )
    got = torch.bincount(kept.flatten(), minlength=4).double().numpy() / rows
    np.testing.assert_allclose(got, exact, atol=4 * (0.25 / rows) ** 0.5)


def test_uniform_sampling_ignores_the_scores_and_probability_does_not():
    scores = torch.zeros(20_000, 1, 10)
    scores[..., 4] = 3.0
    share = {}
    for sampling in ("uniform", "probability"):
        kept = nacl_select(
            scores, 3, sink=0, recent=0, random_share=1.0, sampling=sampling,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        share[sampling] = float((kept == 4).any(-1).float().mean())
    assert abs(share["uniform"] - 0.3) < 0.02
    assert share["probability"] > 0.9


def test_heads_differ_unless_they_share_a_set():
    scores = torch.rand(1, 4, 100, generator=torch.Generator().manual_seed(0))
    own = nacl_select(scores, 20, generator=torch.Generator().manual_seed(1))
    shared = nacl_select(scores, 20, shared_heads=True, generator=torch.Generator().manual_seed(1))
    again = nacl_select(scores, 20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(own, again)
    assert len({tuple(head) for head in own[0].tolist()}) == 4
    assert len({tuple(head) for head in shared[0].tolist()}) == 1


def test_half_precision_scores_are_drawn_in_float32():
    scores = torch.zeros(1, 1, 4000, dtype=torch.bfloat16)
    noise = nacl_priorities(scores, Split(0, 0, 0, 10), generator=torch.Generator().manual_seed(0))
    assert noise.dtype == torch.float32
    assert noise.unique().numel() > 3990


def test_the_top_k_of_the_priorities_is_the_selection():
    scores = torch.rand(2, 3, 60, generator=torch.Generator().manual_seed(0))
    for shared in (False, True):
        split = Split(3, 2, 6, 9)
        priorities = nacl_priorities(
            scores, split, shared_heads=shared, generator=torch.Generator().manual_seed(5)
        )
        reason = nacl_reasons(scores, split, shared_heads=shared, generator=torch.Generator().manual_seed(5))
        kept = reason.nonzero()[:, 2].view(2, 3, 20)
        assert torch.equal(priorities.topk(20, dim=-1).indices.sort(-1).values, kept)


@pytest.mark.parametrize("n", [25_700, 30_000, 128_000])
def test_the_official_split_truncates_every_product(n):
    split = official_split(n)
    assert split == Split(256, int(0.01 * n) - 256, int(0.12 * n), int(0.07 * n))


@pytest.mark.parametrize("n", [1, 5, 100, 2049, 4096, 25_600])
def test_the_official_split_holds_its_total_where_the_authors_code_crashes(n):
    split = official_split(n)
    assert split.budget == max(1, int(0.01 * n) + int(0.12 * n) + int(0.07 * n))
    assert split.recent >= 1
    assert min(split.sink, split.by_score, split.by_random) >= 0


def test_the_official_press_has_the_official_proxies_and_minimum():
    press = NACLPress.official()
    assert press.budget(2048) == 2048
    assert press.budget(30_000) == 6000
    assert resolve_proxies(press.config.proxy_tokens, 2999).tolist() == list(range(2999 - 29, 2999))


@pytest.mark.parametrize(
    ("total", "expected", "proxies"),
    [(0.1, (10, 20, 70), 40), (0.2, (20, 60, 120), 200), (0.3, (15, 105, 180), 215)],
)
def test_the_paper_table(total, expected, proxies):
    press = NACLPress.paper_table(total)
    split = press.config.split_for(1000)
    assert (split.recent, split.by_score, split.by_random) == expected
    assert split.sink == 0
    assert split.budget == round(1000 * total)
    assert resolve_proxies(press.config.proxy_tokens, 1000).numel() == proxies
    for n in (1, 3, 17, 113):
        assert paper_split(n, total).budget == max(1, int(n * total + 0.5))


def test_budgets_are_rounded_and_split():
    press = NACLPress(0.8)
    assert press.budget(100) == 20  # int(100 * (1 - 0.8)) is 19
    assert NACLConfig(0.8, random_share=0.5).split_for(113) == Split(4, 2, 8, 9)  # 8.5 rounds up
    assert NACLConfig(0.95).split_for(20) == Split(0, 1, 0, 0)  # too small for sinks: they are clamped
    assert NACLConfig(budget_tokens=30, sink=1, recent=2, random_share=0.0).split_for(113) == Split(
        1, 2, 27, 0
    )
