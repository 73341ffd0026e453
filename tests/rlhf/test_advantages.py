"""Credit: against loops written from the definition, and cases whose answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.rlhf import FixedNgram, PPOConfig, gae, macro_gae, masked_mean, token_segments, whiten
from labkit.rlhf.segments import from_starts


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values with rubbish on padding, and the mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 2)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    rewards, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return rewards.masked_fill(~mask, 7.0), values.masked_fill(~mask, -9.0), mask


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t as the sum over all later steps of (gamma lambda)^l delta, without recursion."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_its_definition_on_ragged_rows(gamma: float, lam: float) -> None:
    rewards, values, mask = ragged([5, 1, 9])
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate([5, 1, 9]):
        own = by_definition(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(own, abs=1e-12)
        assert not advantages[row, length:].any()
        assert not returns[row, length:].any()
    torch.testing.assert_close((returns - values)[mask], advantages[mask])


def groups_by_hand(
    rewards: list[float],
    values: list[float],
    groups: list[list[int]],
    gamma: float,
    lam: float,
    pooling: str,
    total: bool,
) -> tuple[list[float], list[float]]:
    """Macro GAE of one row from lists of token indices."""
    pooled, paid = [], []
    for group in groups:
        weights = {
            "equal": [1.0] * len(group),
            "unit": [0.0] * (len(group) - 1) + [1.0],
            "position": [1 / (i + 1) for i in range(len(group))],
        }[pooling]
        weights = [w / sum(weights) for w in weights]
        pooled.append(sum(w * values[t] for w, t in zip(weights, group, strict=True)))
        paid.append(sum(rewards[t] * (1 if total else w) for w, t in zip(weights, group, strict=True)))
    own = by_definition(paid, pooled, gamma, lam)
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for group, a, v in zip(groups, own, pooled, strict=True):
        for t in group:
            advantages[t], returns[t] = a, a + v
    return advantages, returns


@pytest.mark.parametrize("pooling", ["equal", "unit", "position"])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_macro_gae_is_a_loop_over_groups(pooling: str, how: str) -> None:
    lengths = [11, 1, 7, 4]
    rewards, values, mask = ragged(lengths, seed=1)
    starts = torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.4
    segments = from_starts(starts, mask)
    advantages, returns = macro_gae(
        rewards, values, segments, mask, gamma=0.9, lam=0.7, value_pooling=pooling, macro_reward=how
    )
    for row, length in enumerate(lengths):
        ids = segments[row, :length].tolist()
        groups = [[t for t, i in enumerate(ids) if i == k] for k in range(max(ids) + 1)]
        own = groups_by_hand(
            rewards[row, :length].tolist(),
            values[row, :length].tolist(),
            groups,
            0.9,
            0.7,
            pooling,
            how == "sum",
        )
        assert advantages[row, :length].tolist() == pytest.approx(own[0], abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(own[1], abs=1e-12)
        assert not advantages[row, length:].any()


@pytest.mark.parametrize("pooling", ["equal", "unit", "position"])
@pytest.mark.parametrize("how", ["sum", "mean"])
def test_groups_of_one_token_are_token_ppo_to_the_bit(pooling: str, how: str) -> None:
    rewards, values, mask = ragged([6, 3, 12], seed=3)
    rewards, values = rewards.float(), values.float()
    tokens = gae(rewards, values, mask, 0.99, 0.95)
    segments = FixedNgram(1)(torch.zeros(mask.shape, dtype=torch.long), mask)
    assert torch.equal(segments, token_segments(mask))
    options = {"gamma": 0.99, "lam": 0.95, "value_pooling": pooling, "macro_reward": how}
    macro = macro_gae(rewards, values, segments, mask, **options)
    assert torch.equal(tokens[0], macro[0])
    assert torch.equal(tokens[1], macro[1])


def official(
    rewards: Tensor, values: Tensor, prompt: int, n: int, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """What the authors' code does to one row: positions in the whole text, empty groups included.

    Values and rewards of a text of ``prompt + R`` tokens are those of the predictions at ``prompt - 1`` and after. Groups
    are the spans between boundaries, and what is left from the last boundary on; an empty one has value and reward 0.
    """
    start, count = prompt - 1, len(rewards)
    bounds = list(range(start, start + count, n))
    bounds.append(start + count - 1)
    shifted_r = torch.cat([torch.zeros(start), rewards])
    shifted_v = torch.cat([torch.zeros(start), values])
    spans = [(a, b) for a, b in zip(bounds, [*bounds[1:], start + count], strict=True)]
    paid = [float(shifted_r[a:b].mean()) if b > a else 0.0 for a, b in spans]
    pooled = [float(shifted_v[a:b].mean()) if b > a else 0.0 for a, b in spans]
    running, out = 0.0, []
    for k in reversed(range(len(spans))):
        following = pooled[k + 1] if k + 1 < len(spans) else 0.0
        running = paid[k] + gamma * following - pooled[k] + gamma * lam * running
        out.append((running, running + pooled[k]))
    advantages, returns = torch.zeros(count), torch.zeros(count)
    for (a, b), (advantage, total) in zip(spans, reversed(out), strict=True):
        advantages[a - start : b - start] = advantage
        returns[a - start : b - start] = total
    return advantages, returns


@pytest.mark.parametrize(("count", "n"), [(23, 5), (21, 5), (21, 10), (7, 1), (12, 100), (2, 1)])
def test_the_official_code_is_there_with_its_flags(count: int, n: int) -> None:
    generator = torch.Generator().manual_seed(count * n)
    rewards, values = (torch.randn(1, count, generator=generator) for _ in range(2))
    mask = torch.ones(1, count, dtype=torch.bool)
    tokens = torch.zeros(1, count, dtype=torch.long)
    segments = FixedNgram(n, phantom=True)(tokens, mask)
    found = macro_gae(rewards, values, segments, mask, lam=0.95, macro_reward="mean", allow_empty=True)
    expected = official(rewards[0], values[0], 6, n, 1.0, 0.95)
    torch.testing.assert_close(found[0][0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1][0], expected[1], atol=1e-5, rtol=1e-5)
    ours = macro_gae(rewards, values, FixedNgram(n)(tokens, mask), mask, lam=0.95, macro_reward="mean")
    # they part only where a boundary falls on the last token, and then everywhere before it
    same = torch.allclose(ours[0][0], expected[0], atol=1e-5)
    assert same == bool((count - 1) % n)
    assert float(ours[0][0, -1]) == pytest.approx(float(expected[0][-1]), abs=1e-6)


def test_a_perfect_value_function_leaves_no_advantage() -> None:
    rewards, _, mask = ragged([5, 8], seed=4)
    rewards = torch.where(mask, rewards, 0)
    for gamma in (1.0, 0.9):
        values = torch.zeros_like(rewards)
        running = torch.zeros(2, dtype=rewards.dtype)
        for t in range(rewards.shape[1] - 1, -1, -1):
            running = rewards[:, t] + gamma * running
            values[:, t] = running
        for lam in (0.0, 0.95, 1.0):
            advantages, returns = gae(rewards, values, mask, gamma, lam)
            assert advantages.abs().max() < 1e-12
            torch.testing.assert_close(returns, torch.where(mask, values, 0))
    segments = from_starts(torch.arange(rewards.shape[1]).expand(rewards.shape) % 3 == 0, mask)
    values = torch.zeros_like(rewards)
    for row in range(2):
        for k in range(int(segments[row].max()), -1, -1):
            values[row, segments[row] == k] = rewards[row, segments[row] >= k].sum()
    for pooling in ("equal", "unit", "position"):
        advantages, _ = macro_gae(rewards, values, segments, mask, lam=0.6, value_pooling=pooling)
        assert advantages.abs().max() < 1e-12


def test_expected_advantages_of_a_chain_with_known_values() -> None:
    """A random walk on four states that pays at its right end: with the true values A averages to 0 in each state."""
    generator = torch.Generator().manual_seed(5)
    true = torch.tensor([1 / 5, 2 / 5, 3 / 5, 4 / 5])
    rows, steps = 4000, 120
    position = torch.randint(0, 4, (rows,), generator=generator)
    alive = torch.ones(rows, dtype=torch.bool)
    states, rewards, mask = [], [], []
    for _ in range(steps):
        states.append(position.clone())
        mask.append(alive.clone())
        position = position + 2 * torch.randint(0, 2, (rows,), generator=generator) - 1
        rewards.append(((position == 4) & alive).float())
        alive = alive & (position >= 0) & (position < 4)
        position = position.clamp(0, 3)
    state, reward, real = (torch.stack(x, 1) for x in (states, rewards, mask))
    assert not alive.any()
    values = true[state]
    for lam in (0.0, 0.9, 1.0):
        advantages, returns = gae(reward, values, real, lam=lam)
        for s in range(4):
            here = real & (state == s)
            assert abs(float(advantages[here].mean())) < 0.02
            assert float(returns[here].mean()) == pytest.approx(float(true[s]), abs=0.02)


def test_rows_do_not_touch_each_other_and_padding_is_nothing() -> None:
    rewards, values, mask = ragged([5, 2, 9], seed=6)
    segments = from_starts(torch.rand(mask.shape) < 0.5, mask)
    whole = macro_gae(rewards, values, segments, mask)
    for row, length in enumerate([5, 2, 9]):
        cut = slice(row, row + 1), slice(0, length)
        alone = macro_gae(rewards[cut], values[cut], segments[cut], mask[cut])
        assert torch.equal(alone[0][0], whole[0][row, :length])
        assert torch.equal(alone[1][0], whole[1][row, :length])


def test_whitening_counts_real_tokens_of_all_processes() -> None:
    x, mask = torch.randn(4, 6) * 3 + 2, torch.rand(4, 6) < 0.7
    found = whiten(x, mask)
    assert found[mask].mean() == pytest.approx(0, abs=1e-6)
    assert found[mask].std(correction=0) == pytest.approx(1, abs=1e-5)
    assert not found[~mask].any()
    kept = whiten(x, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(float(x[mask].mean()), abs=1e-5)
    assert not whiten(torch.full((3,), 5.0)).any()
    # two processes: each sees half, and what the sum over both would be
    halves = [(x[:2], mask[:2]), (x[2:], mask[2:])]
    answers: list[list[Tensor]] = [[], []]

    def noting(place: int):
        return lambda sums: answers[place].append(sums) or sums

    for place, (part, real) in enumerate(halves):
        whiten(part, real, reduce=noting(place))
    first = answers[0][0] + answers[1][0]
    mean = first[0] / first[1]
    second = sum(torch.where(m, p - mean, 0).square().sum() for p, m in halves)
    for part, (half, real) in enumerate(halves):
        sums = iter([first, second])
        own = whiten(half, real, reduce=lambda _, sums=sums: next(sums))
        torch.testing.assert_close(own, found[2 * part : 2 * part + 2], atol=1e-5, rtol=1e-5)


def test_an_empty_mask_has_mean_zero_and_no_credit() -> None:
    assert masked_mean(torch.tensor([5.0]), torch.tensor([False])) == 0
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    advantages, _ = gae(torch.ones(2, 3), torch.ones(2, 3), nothing)
    assert not advantages.any()
    advantages, _ = macro_gae(torch.ones(2, 3), torch.ones(2, 3), torch.full((2, 3), -1), nothing)
    assert not advantages.any()


def test_rules_have_second_names() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[1.0, -3.0, 5.0, 7.0]])
    ids = torch.tensor([[0, 0, 0, 1]])
    by = {
        name: macro_gae(rewards, values, ids, value_pooling=name)[0]
        for name in ("equal", "mean", "unit", "last", "position", "harmonic")
    }
    for one, other in (("equal", "mean"), ("unit", "last"), ("position", "harmonic")):
        assert torch.equal(by[one], by[other])
        assert PPOConfig(iterations=1, batch_size=1, value_pooling=other).value_pooling == one
    assert not any(torch.equal(by[a], by[b]) for a, b in (("equal", "unit"), ("unit", "position")))
    assert PPOConfig(iterations=1, batch_size=1, segmenter=len, ratio="macro").ratio == "joint"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"value_pooling": "median"},
            "value_pooling must be 'equal', 'unit' or 'position', got 'median'",
        ),
        ({"macro_reward": "max"}, "macro_reward must be 'sum' or 'mean', got 'max'"),
        ({"segments": torch.tensor([[0, 2, 2]])}, "skip from 0 to 2 at position 1"),
        ({"segments": torch.tensor([[1, 1, 2]])}, "start at 1 at position 0"),
        ({"segments": torch.tensor([[0, 1, 0]])}, "decrease from 1 to 0 at position 2"),
        ({"mask": torch.tensor([[1, 1, 0]])}, "covers padding in row 0 at position 2"),
        ({"segments": torch.tensor([[0, -1, 1]]), "mask": torch.ones(1, 3)}, "-1 on a real token"),
    ],
)
def test_bad_segments_are_named(change: dict[str, object], message: str) -> None:
    given = {"segments": torch.tensor([[0, 0, 1]])} | change
    with pytest.raises(ValueError, match=message):
        macro_gae(torch.zeros(1, 3), torch.zeros(1, 3), **given)


def test_misshaped_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"mask and numbers must both be \(B, T\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"values must be \(2, 3\)"):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 3))
    with pytest.raises(ValueError, match="row 1 has padding before a real token"):
        gae(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([[1, 0], [0, 1]]))
    with pytest.raises(TypeError, match="whole numbers"):
        macro_gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
