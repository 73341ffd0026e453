"""The released pairs with tools that run: what rewards and planners may read, and whether the record comes back."""

import os
import random
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("sklearn")

from labkit.rlhf.themis import (
    Calculator,
    Calendar,
    Step,
    ToolBank,
    Trace,
    TraceFormat,
    load_tara,
    parse_actions,
    replay,
)
from labkit.testbeds import data, recorded, tara, tara_planner, tara_record, tara_rewards
from labkit.testbeds.tara import Pair
from labkit.testbeds.tara_rewards import BradleyTerry

real = pytest.mark.skipif("LABKIT_DATA" not in os.environ, reason="LABKIT_DATA is not set")


def side(answer, action="Calendar.week_day", given="2015-03-24", thought="I need to search"):
    call = {"Thought": thought, "Action": action, "Action Input": given, "Observation": "STORED"}
    return {"answer": answer, "actions": call, "score_agent": {"explanation": "RATIONALE"}}


def row(question="Which day is 2015-03-24?", **changes):
    return {
        "question": question,
        "pos_answer": side("2015-03-24 is Tuesday", **changes),
        "neg_answer": side("2015-03-24 is Friday", **changes),
    }


TEMPLATES = [
    row(),
    {
        "question": "Tell me the day that is 210 days before 2013-02-26.",
        "pos_answer": side("The day is 2012-07-31", "Calendar.target_day", "2013-02-26, -210", "210 before"),
        "neg_answer": side("The day is 2000-10-16", "Calendar.target_day", "2013-02-26, -210", "210 before"),
    },
    {
        "question": "How many days lie between 2001-08-19 and 2013-06-27?",
        "pos_answer": side("It is 4330", "Calendar.day_difference", "2001-08-19, 2013-06-27"),
        "neg_answer": side("It is 710", "Calendar.day_difference", "2001-08-19, 2013-06-27"),
    },
]


def told_pairs(count, seed):
    """Pairs that nothing but the observation orders."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        right, wrong = rng.choice(np.arange(10, 99), 2, replace=False)
        out.append(
            Pair(
                "calendar",
                f"Question {number + 1000}?",
                (f"It is {right}", f"It is {wrong}"),
                (f"{right}",) * 2,
            )
        )
    return out


def test_overlap_counts_what_the_question_lacks():
    assert tara_rewards.overlap(
        "on 2023-06-19?", "2023-06-19: 27.0(C)", "temperature: 27.0(C); 2023-06-19"
    ) == [
        1.0,
        1.0,
        1.0,
        1.0,
    ]
    found = tara_rewards.overlap("", "one two 3 4", "two 3")
    assert found == [2 / 4, 0.0, 1 / 2, 1.0]
    assert tara_rewards.overlap("a b", "a b", "a b") == [0.0, 0.0, 0.0, 0.0]


def test_observations_are_made_now():
    bank = ToolBank([Calendar(), Calculator(strict=True)])
    assert tara.observe("calendar", row(), "neg_answer", bank) == "Tuesday"
    sums = row("2 + 3?")
    sums["neg_answer"] = side("<<2+3=5>>5\n#### 6", "calculator", "<<1+1=2>>2")
    said = tara.observe("calculator", sums, "neg_answer", bank)
    assert said.startswith("The calculation process is correct, but the resulting answer 5")


def test_only_the_observation_orders_these_pairs():
    train, test = told_pairs(200, 0), told_pairs(100, 1)
    assert BradleyTerry(True).fit(train).accuracy(test) == 1.0
    assert 0.35 < BradleyTerry(False).fit(train).accuracy(test) < 0.65
    control = BradleyTerry(True).fit(tara.shuffled(train, 0))
    assert 0.35 < control.accuracy(tara.shuffled(test, 1)) < 0.65


def test_without_tools_the_observation_is_not_read():
    train = told_pairs(50, 0)
    plain = BradleyTerry(False).fit(train)
    assert np.array_equal(plain.margins(train), plain.margins(tara.shuffled(train)))


def test_it_is_the_bradley_terry_model():
    """At the optimum w = C Σ σ(−w·x) x over the differences x, which have no mirror images and no intercept."""
    train = told_pairs(60, 2)
    model = BradleyTerry(True).fit(train)
    x = (model._features(train, 0) - model._features(train, 1)).toarray()
    pull = model.strength * (x / (1 + np.exp(x @ model.weights))[:, None]).sum(0)
    assert np.allclose(pull, model.weights, atol=0.02 * np.abs(model.weights).max())
    mirrored = [Pair(p.task, p.question, p.answers[::-1], p.observations[::-1]) for p in train]
    assert np.allclose(model.margins(mirrored), -model.margins(train))


def test_a_tie_is_half_right():
    train = told_pairs(40, 0)
    same = Pair("calendar", "Which?", ("It is so", "It is so"), ("x", "x"))
    assert BradleyTerry(True).fit(train).accuracy([same]) == 0.5
    with pytest.raises(ValueError, match="at least 10 pairs"):
        BradleyTerry(True).fit(train[:9])


def test_shuffled_deals_the_same_observations():
    pairs = told_pairs(30, 0)
    other = tara.shuffled(pairs, 4)
    assert [p.answers for p in other] == [p.answers for p in pairs]
    assert sorted(o for p in other for o in p.observations) == sorted(
        o for p in pairs for o in p.observations
    )
    assert sum(a.observations == b.observations for a, b in zip(pairs, other, strict=True)) < 5


@pytest.mark.parametrize(
    ("task", "question", "answers", "observations", "wanted"),
    [
        ("code", "?", ("a", "b"), ("good", "bad"), ("bad", "good")),
        ("calculator", "?", ("a", "b"), ("good", "bad"), ("bad", "good")),
        ("calendar", "?", ("d is Sunday", "d is Monday"), ("Sunday", "Sunday"), ("Monday", "Monday")),
        (
            "weather",
            "What is the wind speed in Oslo on 2023-06-19?",
            ("14.4(kph)", "On 2023-06-19 it is 9.0(kph)."),
            ("temperature: 9.0(C); wind speed: 14.4(kph), 8.9(mph); humidity: 1.0.",) * 2,
            ("temperature: 9.0(C); wind speed: 9.0(kph), 8.9(mph); humidity: 1.0.",) * 2,
        ),
        (
            "multi_tools",
            "What is the overall weather like in Oslo on the 2 days after 2023-06-19?",
            ("It is Sunny", "It is ['Light rain']."),
            ("2023-06-21\noverall weather: Sunny; UV index: 1.0.",) * 2,
            ("2023-06-21\noverall weather: Light rain; UV index: 1.0.",) * 2,
        ),
    ],
)
def test_swapped_supports_the_worse(task, question, answers, observations, wanted):
    pair = tara.swapped(Pair(task, question, answers, observations))
    assert pair.observations == wanted
    assert pair.answers == answers


def test_misuse(monkeypatch):
    with pytest.raises(ValueError, match="no value can be read"):
        tara.swapped(Pair("weather", "What is the humidity in Oslo on 2023-06-19?", ("1.0", "dry"), ("", "")))
    with pytest.raises(ValueError, match="task must be one of calendar"):
        tara.read("cooking", "test", ToolBank([]))
    with pytest.raises(ValueError, match="they must be the same"):
        tara_rewards.judged({"calendar": []}, {"code": []})
    with pytest.raises(ValueError, match="single and mixed, got \\['double'\\]"):
        tara_rewards.judged({}, {}, ["double"])
    monkeypatch.delenv("LABKIT_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="themis: tool-augmented reward data"):
        tara_record.measure()


@pytest.mark.parametrize("template", TEMPLATES, ids=["week_day", "target_day", "day_difference"])
def test_questions_made_anew(template):
    rng = random.Random(0)
    bank = ToolBank([Calendar()])
    made = [tara_planner.anew(template, rng) for _ in range(30)]
    assert len({one["question"] for one in made}) == 30
    for one in made:
        (step,) = parse_actions(one["pos_answer"]["actions"])
        assert step.observation == bank.call(step.action, step.action_input)
        right, wrong = one["pos_answer"]["answer"], one["neg_answer"]["answer"]
        assert right.endswith(f" {step.observation}")
        assert wrong.rsplit(" ", 1)[0] == right.rsplit(" ", 1)[0]
        assert wrong != right
        for fact in step.action_input.replace(" -", " ").split(", "):
            assert fact in one["question"]
        # The sign of the offset belongs to the wording, not to the number.
        assert (", -" in step.action_input) == ("before" in one["question"])


def test_the_planner_learns(monkeypatch):
    monkeypatch.setattr(tara_planner, "BATCH", 8)
    model, collator, losses = tara_planner.train(TEMPLATES, seed=100, steps=25)
    assert losses[-1] < 0.5 * losses[0]
    batch = collator([tara_planner.anew(TEMPLATES[1], random.Random(1))])
    assert not (batch["input_ids"] == collator.tokenizer.unk_token_id).any()
    # Neither the questions nor the answers are learned, and there is no rationale.
    assert set(batch["parts"][batch["labels"] != -100].tolist()) == {2, 3}
    found = tara_planner.tried(model, collator, TEMPLATES[:1])
    assert [set(one) for one in found] == [{"right", "action", "calls", "observation"}] * 2


def test_every_call_must_be_the_stored_one(monkeypatch):
    good = Step("t", "Calendar.week_day", "2015-03-24", "Tuesday")
    other = Step("t", "Calendar.week_day", "2015-03-25", "Wednesday")
    traces = [(good,), (other,), (good, good), ()]
    monkeypatch.setattr(tara_planner, "run_traces", lambda *args, **kwargs: [Trace(t) for t in traces])
    found = tara_planner.tried(None, SimpleNamespace(tokenizer=None), [row(), row()])
    assert [one["right"] for one in found] == [True, False, False, False]
    assert [one["action"] for one in found] == [True, True, False, False]
    assert found[2]["observation"] == "Tuesday\nTuesday"


def test_every_reply_of_the_calculator_is_counted_once():
    bank = ToolBank([Calculator(strict=True)])
    answers = {
        "nothing wrong": "<<2+3=5>>5\n#### 5",
        "right sums, another end": "<<2+3=5>>5\n#### 6",
        "wrong sums": "<<2+3=6>>6\n#### 5",
        "wrong sums, another end": "<<2+3=6>>6\n#### 6",
        "no number": "<<2+3=5>>5\n#### five",
    }
    told = {name: bank.call("calculator", text, {"answer": text}) for name, text in answers.items()}
    for name, reply in told.items():
        counted = tara_record._replies([Pair("calculator", "?", ("", ""), (reply, told["no number"]))])
        assert [key for key, (better, _) in counted.items() if better] == [name]
        assert [key for key, (_, worse) in counted.items() if worse] == ["no number"]


def test_the_record():
    record = recorded.read("themis")
    for part in ("train", "test"):
        facts = record["facts"]["calculator"][part]
        assert [sum(counts) for counts in zip(*facts["replies"].values(), strict=True)] == [
            facts["pairs"]
        ] * 2
    assert set(record["judged"]["single"]) == {*tara.TASKS, "average"}
    assert {line["task"] for line in record["replay"]} >= {"calendar_test", "calculator_train", "code_test"}
    assert len(record["planner"]["exact"]) == len(record["planner"]["seeds"]) == 3
    assert record["environment"]["data"].startswith("TARA")


@pytest.fixture(scope="module")
def fresh():
    """Real pairs of the tasks whose tools take no time."""
    bank = tara.bank()
    tasks = ("calendar", "calculator", "weather", "multi_tools")
    return {part: {task: tara.read(task, part, bank) for task in tasks} for part in ("train", "test")}


@pytest.mark.realdata
@real
def test_replay_comes_back():
    record = {(line["task"], line["action"]): line for line in recorded.read("themis")["replay"]}
    table = replay(data.find("themis"), ["calendar", "calculator"])
    assert tara_record._lines(table.to_dict("records")) == [
        record[key] for key in zip(table.task, table.action, strict=True)
    ]


@pytest.mark.realdata
@real
def test_rewards_come_back(fresh):
    record = recorded.read("themis")["judged"]
    tasks = ("calendar", "multi_tools")
    chosen = [{task: fresh[part][task] for task in tasks} for part in ("train", "test")]
    found = tara_rewards.judged(*chosen, ["single"])
    for task in tasks:
        assert found["single"][task] == pytest.approx(record["single"][task], abs=0.03)
        assert found["swapped"]["single"][task] == pytest.approx(record["swapped"]["single"][task], abs=3)


@pytest.mark.realdata
@real
def test_the_calculator_is_told_the_right_number(fresh):
    record = recorded.read("themis")
    given = tara.read("calculator", "train", tara.bank(), given=True)
    stored = tara_record._stored(fresh["train"]["calculator"], given)
    assert stored == record["facts"]["calculator"]["stored"]
    assert stored["given number"] > 1.5 * stored["own number"]
    for name, pairs in (("judged", fresh["train"]["calculator"]), ("judged, given", given)):
        kept = record[name]
        strength = kept["strengths"]["single"]["tool"]["calculator"]
        found = BradleyTerry(True, (strength,)).fit(pairs).accuracy(fresh["test"]["calculator"])
        assert found == pytest.approx(kept["single"]["calculator"]["tool"], abs=0.03)


@pytest.mark.realdata
@real
def test_the_calculators_replies_come_back(fresh):
    facts = recorded.read("themis")["facts"]["calculator"]
    for part in ("train", "test"):
        assert tara_record._replies(fresh[part]["calculator"]) == facts[part]["replies"]


@pytest.mark.realdata
@real
def test_the_observation_alone_orders_nothing(fresh):
    """Where both answers have the same one, its words cancel."""
    for part in fresh.values():
        for task in ("calendar", "weather", "multi_tools"):
            assert all(pair.observations[0] == pair.observations[1] for pair in part[task])


@pytest.mark.realdata
@real
def test_the_planner_knows_the_words_of_the_test():
    folder = data.find("themis")
    model, collator = tara_planner.planner(load_tara(folder, "calendar_train"), seed=0)
    tokenizer = collator.tokenizer
    for one in load_tara(folder, "calendar_test"):
        for which in tara.ANSWERS:
            text = TraceFormat().prompt(one["question"], one[which]["answer"])
            assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert sum(weight.numel() for weight in model.parameters()) < 120_000
