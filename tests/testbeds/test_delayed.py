"""The delayed-pattern task, and the recorded runs on it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from labkit.rlhf import PPOConfig, ValueModel
from labkit.testbeds import delayed_sweep, recorded
from labkit.testbeds.delayed import BEST, DelayedTask


def test_scores_count_the_tokens_that_follow_the_permutation() -> None:
    task = DelayedTask(3, vocab=7, length=10)
    assert sorted(task.follows) == list(range(7))
    right, before = [], 4
    for _ in range(10):
        before = task.follows[before]
        right.append(before)
    assert task.reward([[4]], [right]) == [BEST]
    wrong = list(right)
    wrong[-1] = (wrong[-1] + 1) % 7
    assert task.reward([[1, 4], [4]], [right, wrong]) == [BEST, pytest.approx(0.9 * BEST)]
    other = next(t for t in range(7) if t != 4)
    assert task.reward([[other]], [right]) == [pytest.approx(0.9 * BEST)]


def test_chance_is_one_in_the_vocabulary() -> None:
    task = DelayedTask(0)
    answers = torch.randint(12, (400, 60), generator=torch.Generator().manual_seed(1)).tolist()
    scores = task.reward([[0]] * 400, answers)
    assert sum(scores) / 400 == pytest.approx(BEST / 12, abs=0.03)


def test_the_models_start_from_knowing_nothing() -> None:
    task = DelayedTask(5)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(task.uniform()(input_ids=ids).logits, torch.zeros(1, 12, 12))
        first = task.policy()(input_ids=ids).logits.softmax(-1)
    assert first.max() < 0.2
    again = DelayedTask(5).policy()
    assert all(torch.equal(a, b) for a, b in zip(task.policy().parameters(), again.parameters(), strict=True))
    assert DelayedTask(6).follows != task.follows


def test_the_best_score_maximises_reward_minus_penalty() -> None:
    task = DelayedTask(0, vocab=5, length=20)
    right = torch.linspace(0.2, 0.9999, 4000, dtype=torch.float64)
    wrong = 1 - right
    divergence = right * (5 * right).log() + wrong * (5 * wrong / 4).log()  # to the uniform choice, a token
    for beta in (0.03, 0.1, 0.3):
        best = right[(BEST * right - beta * 20 * divergence).argmax()]
        assert task.best_score(beta) == pytest.approx(float(BEST * best), abs=2e-3)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="kl_coef must be above 0"):
        DelayedTask(0).best_score(0.0)
    with pytest.raises(ValueError, match="vocab=1"):
        DelayedTask(0, vocab=1)
    with pytest.raises(ValueError, match="length=0"):
        DelayedTask(0, length=0)


def test_the_record_holds_all_runs_and_the_code_still_begins_them(monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded.read("ma_rlhf")
    assert record["updates"] == delayed_sweep.UPDATES
    assert {"torch", "commit"} <= set(record["environment"])
    assert list(record["scores"]) == list(delayed_sweep.ARMS)
    shown = [arm for rows in delayed_sweep.ROWS.values() for arm in rows.values()]
    assert sorted(shown) == sorted(delayed_sweep.ARMS)
    for runs in record["scores"].values():
        assert [len(runs[str(seed)]) for seed in delayed_sweep.SEEDS] == [delayed_sweep.UPDATES] * 3
    monkeypatch.setattr(delayed_sweep, "UPDATES", 4)
    again = delayed_sweep.train("n = 5", 1)
    assert again == pytest.approx(record["scores"]["n = 5"]["1"][:4], abs=0.05)


def test_answers_to_a_prompt_are_compared() -> None:
    task = DelayedTask(1, length=10)
    config = PPOConfig(
        iterations=1, batch_size=16, max_new_tokens=10, eos_token_id=None, kl_coef=0.5, device="cpu"
    )
    critic = ValueModel.from_backbone(task.critic())
    before = [weight.clone() for weight in critic.parameters()]
    models = {"ref_model": task.uniform(), "value_model": critic}
    trainer = delayed_sweep.GroupTrainer(task.policy(), task.reward, config, task.prompts, **models)
    batch = trainer.collect(0)
    prompts = batch.prompt_ids[:, -1].tolist()
    assert prompts == [prompts[0]] * 8 + [prompts[8]] * 8
    assert len({tuple(row) for row in batch.tokens.tolist()}) > 8
    for group in (range(8), range(8, 16)):
        worth = [
            float(batch.scores[i] - 0.5 * (batch.logprobs[i] - batch.ref_logprobs[i]).sum()) for i in group
        ]
        mean = sum(worth) / 8
        spread = (sum((value - mean) ** 2 for value in worth) / 7) ** 0.5
        for i, value in zip(group, worth, strict=True):
            assert batch.advantages[i].tolist() == pytest.approx([(value - mean) / spread] * 10, abs=1e-2)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True))


def test_groups_of_a_made_up_language_rise_as_its_table_says() -> None:
    rule = delayed_sweep.BigramPerplexity(vocab=5)
    tokens = torch.randint(5, (3, 12), generator=torch.Generator().manual_seed(0))
    ids = rule(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for row, found in zip(tokens.tolist(), ids.tolist(), strict=True):
        likely = [float(rule.table[a, b]) for a, b in pairwise(row)]
        for place in range(2, 11):  # the last token is alone
            assert (found[place] > found[place - 1]) == (likely[place - 1] < likely[place - 2])
    assert rule.table.exp().sum(1).tolist() == pytest.approx([1.0] * 5)


def test_groups_of_a_made_up_grammar_are_small_constituents_of_its_tree() -> None:
    rule = delayed_sweep.BondParse(vocab=5)
    tokens = torch.randint(5, (3, 30), generator=torch.Generator().manual_seed(0))
    ids = rule(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for row, found in zip(tokens.tolist(), ids.tolist(), strict=True):
        bonds = [float(rule.bonds[a, b]) for a, b in pairwise(row)]
        sizes = []

        def cut(first: int, last: int, bonds: list[float] = bonds, sizes: list[int] = sizes) -> None:
            size = last - first
            if size == 1 and sizes:  # a lone token joins the group before it
                sizes[-1] += 1
            elif size < 5:
                sizes.append(size)
            else:
                loosest = min(bonds[first : last - 1])
                places = [i + 1 for i in range(first, last - 1) if bonds[i] == loosest]
                place = min(places, key=lambda i: abs(2 * i - first - last))
                cut(first, place)
                cut(place, last)

        cut(0, 30)
        expected = [group for group, size in enumerate(sizes) for _ in range(size)]
        if sizes[-1] > 1:  # the last token is alone
            expected[-1] += 1
        assert found == expected
