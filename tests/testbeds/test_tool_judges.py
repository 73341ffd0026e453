"""Small judges that call tools: their questions, their base, and that training moves them."""

from __future__ import annotations

import datetime

import pytest
import torch

from labkit.rlhf import ThemisLoss
from labkit.rlhf.themis import Trace, parse_actions
from labkit.testbeds import recorded, tool_judges, tool_judges_sweep
from labkit.testbeds.tool_questions import DAYS, SKIES


def test_no_day_of_the_tests_is_trained_on():
    days = {}
    for test in (False, True):
        rows = tool_judges.questions(300, seed=1, test=test)
        days[test] = {tool_judges._DATE.search(row["question"]).group() for row in rows}
    assert not days[False] & days[True]
    asked = [str(row["pos_answer"]["actions"]) for row in tool_judges.questions(800, seed=1, test=True)]
    assert len(set(asked)) == 800
    with pytest.raises(ValueError, match="got 801"):
        tool_judges.questions(801, seed=1, test=True)
    weekdays = {datetime.date.fromisoformat(day).weekday() for day in days[True]}
    assert weekdays == set(range(7))


def test_the_text_tells_nothing():
    rows = tool_judges.questions(4000, seed=3)
    right = [row["pos_answer"]["answer"] for row in rows]
    wrong = [row["neg_answer"]["answer"] for row in rows]
    for word in (*DAYS, *SKIES):
        said, not_said = right.count(f"It is {word}."), wrong.count(f"It is {word}.")
        assert 0.75 < said / not_said < 1.33


def test_all_words_are_known():
    words = tool_judges.tokenizer()
    texts = [tool_judges.UNSURE, tool_judges._SAID.format("Monday", "Mist", "differ")]
    for row in tool_judges.questions(50, seed=4, test=True):
        texts += [
            row["question"],
            row["pos_answer"]["answer"],
            row["pos_answer"]["score_agent"]["explanation"],
        ]
    ids = [token for text in texts for token in words(f" {text}")["input_ids"]]
    assert words.unk_token_id not in ids


def test_banks():
    rows = tool_judges.questions(40, seed=5, test=True)
    for row in rows:
        step = parse_actions(row["pos_answer"]["actions"])[0]
        right, wrong = (
            row[w]["answer"].removeprefix("It is ").removesuffix(".") for w in tool_judges.ANSWERS
        )
        told = tool_judges.bank().call(step.action, step.action_input)
        assert told == step.observation
        assert right in told
        lie = tool_judges.contradicting_bank(rows).call(step.action, step.action_input)
        assert wrong in lie
        assert right not in lie


def test_a_share_of_the_calls_fails_the_same_ones_each_time():
    rows = tool_judges.questions(300, seed=6, test=True)
    outcomes = []
    for _ in range(2):
        tools = tool_judges.failing_bank(0.2, seed=3)
        for item in tool_judges.examples(rows):
            tools.call("Calendar.week_day", "2020-02-02", item.state())
        outcomes.append(tools.counts["failed"])
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] / 600 == pytest.approx(0.2, abs=0.05)
    assert tool_judges.saying_bank("Mist").call("history_weather", "anything") == "Mist"
    everything = tool_judges.failing_bank(1.0)
    everything.call("history_weather", "Oslo, 2023-01-01", {"question": "?", "answer": "!"})
    assert everything.counts["failed"] == 1


def test_measures():
    rows = tool_judges.questions(2, seed=7, test=True)
    good = [parse_actions(row["pos_answer"]["actions"]) for row in rows]
    judged = [(Trace(steps, reward=1.0), Trace((), reward=0.0)) for steps in good]
    assert tool_judges.exact_calls(rows, judged) == 0.5
    assert tool_judges.accuracy(judged) == 1.0
    assert tool_judges.accuracy([(Trace(reward=None), Trace(reward=0.0))]) == 0.0


@pytest.mark.slow
def test_the_base_compares_two_words():
    model, words = tool_judges.base(rebuild=True), tool_judges.tokenizer()
    names = (*DAYS, *SKIES)
    said = [(a, b) for a in names for b in names]
    texts = [tool_judges._SAID.format(a, b, "agree") for a, b in said]
    ids = words(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -3]
    agree, differ = (
        words(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("agree", "differ")
    )
    assert ids[0, -2] == agree
    gap = logits[:, agree] - logits[:, differ]
    same = torch.tensor([a == b for a, b in said])
    # It has begun to compare; the rest it learns with the tools.
    assert gap[same].mean() > gap[~same].mean() + 0.5


@pytest.mark.slow
def test_training_moves_a_judge_and_depends_on_its_seed_alone():
    made = [tool_judges.train_judge(seed, steps=12, pairs=2, base_steps=0) for seed in (0, 0, 1)]
    heads = [judge.model.v_head.weight for judge in made]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert made[0].log.losses[-1] < made[0].log.losses[0]
    assert set(made[0].log.notes["parts"][0]) == {
        "tool_loss",
        "observation_loss",
        "rationale_loss",
        "rm_loss",
    }
    rows = tool_judges.questions(3, seed=8, test=True)
    pairs = made[0].judge(rows)
    assert len(pairs) == 3
    assert all(isinstance(trace, Trace) for pair in pairs for trace in pair)
    bare = tool_judges.train_judge(
        0, steps=2, pairs=2, base_steps=0, loss=ThemisLoss(form="paper", omega=0.0)
    )
    assert not bare.rationale
    assert bare.judge(rows)[0][0].rationale is None


@pytest.mark.slow
def test_the_plain_reward_model_learns_what_the_wording_tells():
    """It guesses on our questions for want of a cue, not for want of learning."""
    rows = tool_judges.questions(400, seed=10)
    for row in rows:
        row["pos_answer"] = row["pos_answer"] | {"answer": "It is Monday."}
        row["neg_answer"] = row["neg_answer"] | {"answer": "It is Mist."}
    made = tool_judges.train_plain(0, steps=50, pairs=8, rows=rows)
    assert tool_judges.accuracy(made.score_plain(rows[:50])) == 1.0


@pytest.mark.slow
def test_the_plain_reward_model_is_trained_on_text_alone():
    made = tool_judges.train_plain(0, steps=8, pairs=2, base_steps=0)
    rows = tool_judges.questions(4, seed=9, test=True)
    scores = made.score_plain(rows)
    asked, said = rows[0]["question"], rows[0]["pos_answer"]["answer"]
    ids = made.tokenizer(f"Question: {asked}\nAnswer: {said}</s>", return_tensors="pt")["input_ids"]
    again = made.model(ids).rewards.tolist()
    assert scores[0][0] == pytest.approx(again[0], abs=1e-5)


def test_the_record_holds_every_arm_and_seed():
    arms = recorded.read(tool_judges_sweep.RECORD)["arms"]
    assert set(arms) == set(tool_judges_sweep.ARMS)
    for seeds in arms.values():
        assert set(seeds) == {str(seed) for seed in tool_judges_sweep.SEEDS}
        assert all(set(found) == {"calls", "accuracy", "failing"} for found in seeds.values())
