"""Logged gates, and other rules run on them."""

from __future__ import annotations

import pytest
import torch

from labkit.finetuning import BeamScheduler, RankHistory, importances
from labkit.finetuning.beamlora.rule import beam_scores

from .test_schedule import EVERY, STEPS, optimizer_of, update


@pytest.fixture
def run(adapted):
    """A history of a run with the scheduler that made it."""
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, p0=0.8)
    history = RankHistory(model)
    for step in range(STEPS):
        update(model, optimizer, step)
        history.record(step + 1)
        beam.step()
    return model, beam, history


def test_the_run_s_own_rule_gives_its_own_counts(run) -> None:
    _, beam, history = run
    counts = history.replay(p0=0.8, every=EVERY, end=beam.end, total_steps=STEPS)
    for event in beam.events:
        part = counts[counts.step == event.step].set_index("module")["count"]
        assert {name: k for name, k in part.items() if k} == {n: len(v) for n, v in event.pruned.items()}
    after = counts[~counts.step.isin([event.step for event in beam.events])]
    assert (after["count"] == 0).all()  # where p is 1


def test_other_rules(run) -> None:
    _, beam, history = run
    common = {"every": EVERY, "end": beam.end, "total_steps": STEPS}
    strict, loose = (history.replay(p0=p0, **common)["count"].sum() for p0 in (0.6, 0.99))
    assert strict > loose
    flat = history.replay(p0=0.9, temperature=1e6, scope="module", **common)
    first = flat[flat.step == EVERY]["count"]
    assert first.nunique() == 1  # equal scores lose equally
    assert list(history.replay(p0=0.9, every=5, end=20, total_steps=STEPS).step.unique()) == [5, 10, 15]


def test_records_are_copies(run) -> None:
    model, _, history = run
    name = next(iter(importances(model)))
    torch.testing.assert_close(history.scores(STEPS)[name], importances(model)[name])
    hot = history.scores(STEPS, temperature=1.0)[name]
    torch.testing.assert_close(hot, beam_scores(history.gates[STEPS][name], 1.0))
    assert not torch.equal(history.gates[1][name], history.gates[STEPS][name])


def test_bars_show_every_rank_once_in_the_state_of_its_event(run) -> None:
    _, beam, history = run
    event = beam.events[0]
    figure = history.bars(event.step, beam.events, only="layers.1.")
    shown = {trace.name: sum(v is not None for v in trace.y) for trace in figure.data}
    pruned = sum(len(v) for name, v in event.pruned.items() if "layers.1." in name)
    copied = {(n, r) for n, v in event.sources.items() if "layers.1." in n for r in v}
    assert shown == {"falls": pruned, "is copied": len(copied), "stays": 28 - pruned - len(copied)}
    falls = next(trace for trace in figure.data if trace.name == "falls")
    arrows = [int(text[1:]) - 1 for text in falls.text if text]
    assert arrows == [r for n, v in event.sources.items() if "layers.1." in n for r in v]
    assert f"{event.count} ranks of the model fall" in figure.layout.title.text
    assert "fall" not in history.bars(1).layout.title.text


def test_bad_input(run) -> None:
    _, _, history = run
    with pytest.raises(ValueError, match="step 99 was not logged; there are 1, 2"):
        history.scores(99)
    with pytest.raises(ValueError, match="no BeamLoRA adapter called 'default'"):
        RankHistory(torch.nn.Linear(2, 2))
