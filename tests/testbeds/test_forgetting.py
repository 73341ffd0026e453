"""Learning a new task at the price of old facts, and recorded results."""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from labkit.testbeds import recorded
from labkit.testbeds.digits import DigitTask
from labkit.testbeds.facts import FactsWorld, facts_model
from labkit.testbeds.forgetting import Lesson, learn, step_costs


def test_learning_costs_facts_and_frozen_weights_stay() -> None:
    model, world, task = facts_model(0), FactsWorld(0), DigitTask("reverse")
    model.model.layers[0].requires_grad_(False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    lesson = learn(model, world, task, lr=2e-3, most=60, every=30)
    assert [step for step, _, _ in lesson.course] == [30, 60]
    assert lesson.steps == 60
    assert lesson.kept < 0.95
    assert lesson.skill > lesson.course[0][1]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("layers.0." in name), name


def test_stops_at_the_goal_and_repeats_exactly() -> None:
    def run(goal: float | None) -> Lesson:
        return learn(facts_model(0), FactsWorld(0), DigitTask("reverse"), goal=goal, most=40, every=10)

    whole = run(None)
    stopped = run(0.05)
    assert whole.steps == 40
    assert stopped.steps < 40
    assert stopped.course == whole.course[: len(stopped.course)]
    with pytest.raises(ValueError, match="most and every must be at least 1"):
        learn(facts_model(0), FactsWorld(0), DigitTask("reverse"), most=0)


def test_facts_at_equal_skill() -> None:
    lesson = Lesson(facts_model(0), [(20, 0.4, 0.9), (40, 0.8, 0.7), (60, 0.7, 0.6)])
    assert lesson.kept_at(0.5) == 0.7
    assert lesson.kept_at(0.9) is None
    assert (lesson.steps, lesson.skill, lesson.kept) == (60, 0.7, 0.6)


def test_costs_count_the_numbers_that_are_trained() -> None:
    @contextmanager
    def only(model, part):
        for name, p in model.named_parameters():
            p.requires_grad_(part in name)
        yield

    model = facts_model(0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    arms = {part: partial(only, part=part) for part in ("mlp", "")}
    costs = step_costs(model, arms, DigitTask("sort"), rounds=1, steps=1, batch=4)
    trained = sum(p.numel() for name, p in model.named_parameters() if "mlp" in name)
    assert costs["mlp"][1] == 2 * trained
    assert costs[""][1] == 2 * model.num_parameters()
    assert all(seconds > 0 for seconds, _ in costs.values())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_recorded_results_say_where_they_were_measured(tmp_path, monkeypatch) -> None:
    record = recorded.read("hft")
    assert {"python", "processor", "torch"} <= set(record["environment"])
    for course in record["sweep"]["HFT"]["0.001"]:
        assert all(0 <= skill <= 1 and 0 <= kept <= 1 for _, skill, kept in course)
    assert all(not math.isnan(s) for run in record["sequences"]["full"] for row in run for s in row)
    with pytest.raises(ValueError, match="no record is called 'nothing'"):
        recorded.read("nothing")
    monkeypatch.setattr(recorded, "FOLDER", tmp_path)
    recorded.write("mine", {"values": [1]}, {"torch": "x"})
    assert recorded.read("mine") == {"values": [1], "environment": {"torch": "x"}}
