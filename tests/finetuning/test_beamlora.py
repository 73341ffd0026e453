"""The arithmetic of BeamLoRA against loops written from its description; layers and trainers are in the folder beside."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.finetuning import beam_scores, beam_threshold, expand, prune_counts, pruned_and_top


def draw(seed: int, modules: int, rank: int, spread: float = 0.1) -> list[torch.Tensor]:
    gates = spread * torch.randn(modules, rank, generator=torch.Generator().manual_seed(seed))
    return [beam_scores(gate) for gate in gates]


def by_loop(scores: list[list[float]], p: float, cap: float | None) -> list[int]:
    """Walk down the sorted scores of all modules and count what lies past the share p of the sum."""
    items = sorted(((s, m) for m, row in enumerate(scores) for s in row), key=lambda item: -item[0])
    total, running, lost = sum(map(len, scores)), 0.0, [0] * len(scores)
    for score, module in items:
        running += score
        if running > p * total:
            lost[module] += 1
    if cap is not None:
        lost = [min(k, math.floor(cap * len(row))) for k, row in zip(lost, scores, strict=True)]
    return lost


def test_scores_are_a_softmax_that_sums_to_the_rank() -> None:
    gate = torch.tensor([0.1, -0.02, 0.0])
    expected = [math.exp(g / 0.05) for g in gate.tolist()]
    expected = [3 * e / sum(expected) for e in expected]
    np.testing.assert_allclose(beam_scores(gate, 0.05), expected, rtol=1e-5)
    assert beam_scores(torch.zeros(6)).tolist() == pytest.approx([1] * 6)


def test_the_threshold_rises_from_p0_to_one_along_half_a_cosine() -> None:
    for k in (0, 7, 50, 99):
        h = (1 - 0.8) * (1 + math.cos(math.pi * k / 100)) / 2
        assert beam_threshold(k, 0.8, 100) == pytest.approx(1 - h)
    assert beam_threshold(0, 0.95, 100) == pytest.approx(0.95)
    assert beam_threshold(50, 0.95, 100) == pytest.approx(0.975)
    assert beam_threshold(100, 0.95, 100) == beam_threshold(5000, 0.95, 100) == 1.0
    path = [beam_threshold(k, 0.5, 40) for k in range(60)]
    assert path == sorted(path)


@pytest.mark.parametrize("cap", [None, 0.5, 0.25])
@pytest.mark.parametrize("p", [0.3, 0.8, 0.95, 0.99])
@pytest.mark.parametrize("seed", range(4))
def test_counts_over_all_modules_and_for_each_alone(seed: int, p: float, cap: float | None) -> None:
    scores = draw(seed, 5, 8)
    rows = [row.tolist() for row in scores]
    assert prune_counts(scores, p, "global", cap) == by_loop(rows, p, cap)
    assert prune_counts(scores, p, "module", cap) == [by_loop([row], p, cap)[0] for row in rows]


def test_modules_of_different_rank_share_a_budget() -> None:
    scores = [*draw(0, 2, 8), *draw(1, 2, 4)]
    assert prune_counts(scores, 0.9, cap=None) == by_loop([row.tolist() for row in scores], 0.9, None)


@pytest.mark.parametrize(("p", "expected"), [(0.95, 3), (0.5, 21), (1.0, 0)])
def test_equal_scores_lose_as_many_as_the_share_says(p: float, expected: int) -> None:
    """40 ranks: the first whose running sum exceeds 40 p, and all after it; at 1 none, whatever rounding says."""
    flat = [torch.ones(8)] * 5
    counts = prune_counts(flat, p, cap=None)
    assert sum(counts) == (expected if p == 1 else 40 - math.floor(40 * p))
    assert prune_counts(flat, p, cap=None) == counts


@given(st.integers(0, 10_000), st.integers(2, 12), st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_the_capped_half_never_overlaps_and_the_weakest_fall(seed: int, rank: int, p: float) -> None:
    scores = draw(seed, 3, rank, spread=0.2)
    for row, count in zip(scores, prune_counts(scores, p), strict=True):
        pruned, top = pruned_and_top(row, count)
        assert count <= rank // 2
        assert not set(pruned.tolist()) & set(top.tolist())
        assert pruned.tolist() == sorted(pruned.tolist())
        if count:
            rest = [s for i, s in enumerate(row.tolist()) if i not in pruned.tolist()]
            assert max(row[pruned].tolist()) <= min(rest)
            assert row[top].tolist() == sorted(row.tolist(), reverse=True)[:count]


def test_expand_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    a, old_a = torch.randn(2, 6, 5, generator=generator)
    b, old_b = torch.randn(2, 7, 6, generator=generator)
    gate = torch.randn(6, generator=generator)
    pruned, top = torch.tensor([1, 4]), torch.tensor([5, 0])
    new_a, new_b, new_gate = expand(a, b, gate, old_a, old_b, pruned, top)
    for slot in range(6):
        source = {1: 5, 4: 0}.get(slot)
        assert torch.equal(new_a[slot], a[slot] if source is None else old_a[source])
        assert torch.equal(new_b[:, slot], b[:, slot] if source is None else old_b[:, source])
    for one, other in ((1, 5), (4, 0)):
        assert new_gate[one] == new_gate[other] == (gate[one] + gate[other]) / 2
    assert torch.equal(new_gate[[2, 3]], gate[[2, 3]])


def test_exact_copies_with_equal_gates_share_the_work_of_one() -> None:
    """Two copies of a rank, each at the mean score, do what one rank did at twice that score."""
    a, b = torch.randn(4, 3), torch.randn(5, 4)
    gate = torch.tensor([0.2, 0.1, 0.0, 0.0])
    new_a, new_b, new_gate = expand(a, b, gate, a, b, torch.tensor([3]), torch.tensor([0]))
    scores = beam_scores(new_gate, 1.0)
    update = (new_b * scores) @ new_a
    rest = (b[:, 1:3] * scores[1:3]) @ a[1:3]
    torch.testing.assert_close(update, rest + 2 * scores[0] * torch.outer(b[:, 0], a[0]))
