"""Remembering and reallocating in a plain loop, against a re-run of the events by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from labkit.finetuning import BeamScheduler, beam_scores
from labkit.finetuning.beamlora.rule import prune_counts, pruned_and_top

STEPS, EVERY = 24, 4


def optimizer_of(model: Any, kind: type = torch.optim.AdamW, lr: float = 1e-2, **settings: Any) -> Any:
    return kind([p for p in model.parameters() if p.requires_grad], lr=lr, **settings)


def update(model: Any, optimizer: Any, seed: int) -> None:
    ids = torch.randint(4, 40, (4, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def snapshot(model: Any, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Every adapter weight with its moments."""
    return {
        name: {"value": weight.detach().clone()}
        | {
            m: optimizer.state[weight][m].clone()
            for m in ("exp_avg", "exp_avg_sq")
            if m in optimizer.state.get(weight, {})
        }
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def follow(model: Any, optimizer: Any, beam: BeamScheduler, steps: int = STEPS) -> dict[int, dict[str, Any]]:
    """Train; the state after each update and before the reallocation."""
    course = {}
    for step in range(steps):
        update(model, optimizer, step)
        course[step + 1] = snapshot(model, optimizer)
        beam.step()
        course[-step - 1] = snapshot(model, optimizer)  # after it
    return course


@pytest.mark.parametrize("state", ["copy", "keep", "zero"])
@pytest.mark.parametrize("source", ["cached", "current"])
def test_an_event_does_what_the_method_says(adapted, state: str, source: str) -> None:
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(
        model, optimizer, STEPS, every=EVERY, p0=0.7, optimizer_state=state, source=source  # type: ignore[arg-type]
    )  # fmt: skip
    course = follow(model, optimizer, beam)
    assert [event.step for event in beam.events] == [4, 8, 12, 16]
    assert all(event.count for event in beam.events)
    for event in beam.events:
        n = event.step
        # remembered in the step that began with n - T/2 finished ones, so after n - T/2 + 1 updates
        old = course[n - EVERY // 2 + 1] if source == "cached" else course[n]
        before, after = course[n], course[-n]
        h = 0.3 * (1 + math.cos(math.pi * (n - 1) / 16)) / 2
        assert event.p == pytest.approx(1 - h)
        for module in event.scores:
            key = f"base_model.model.{module}"
            a, b, gate = (
                f"{key}.lora_A.default.weight",
                f"{key}.lora_B.default.weight",
                f"{key}.lora_gate.default",
            )
            np.testing.assert_allclose(event.scores[module], beam_scores(before[gate]["value"]), rtol=1e-5)
            pairs = dict(zip(event.pruned.get(module, []), event.sources.get(module, []), strict=True))
            best = np.argsort(-np.array(event.scores[module]), kind="stable").tolist()
            assert set(pairs.values()) == set(best[: len(pairs)])
            assert set(pairs) == set(best[4 - len(pairs) :])
            for slot in range(4):
                rank = pairs.get(slot)
                for name, pick in ((a, lambda t, i: t[i]), (b, lambda t, i: t[:, i])):
                    wanted = before if rank is None else old
                    origin = slot if rank is None else rank
                    assert torch.equal(pick(after[name]["value"], slot), pick(wanted[name]["value"], origin))
                    for m in ("exp_avg", "exp_avg_sq"):
                        expected = pick(before[name][m], slot)
                        if rank is not None and state == "copy":
                            expected = pick(old[name][m], rank)
                        if rank is not None and state == "zero":
                            expected = torch.zeros_like(expected)
                        assert torch.equal(pick(after[name][m], slot), expected)
                if rank is not None:
                    mean = (before[gate]["value"][slot] + before[gate]["value"][rank]) / 2
                    assert after[gate]["value"][slot] == after[gate]["value"][rank] == mean
            for m in ("exp_avg", "exp_avg_sq"):
                expected = torch.zeros(4) if pairs else before[gate][m]
                assert torch.equal(after[gate][m], expected)


def test_counts_are_those_of_the_rule_and_the_gate_scores_decide(adapted) -> None:
    model = adapted(scope="module").train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, p0=0.8)
    follow(model, optimizer, beam)
    for event in beam.events:
        scores = [torch.tensor(row) for row in event.scores.values()]
        counts = prune_counts(scores, event.p, "module")
        assert counts == [len(event.pruned.get(name, [])) for name in event.scores]
        for (name, row), count in zip(event.scores.items(), counts, strict=True):
            assert event.pruned.get(name, []) == pruned_and_top(torch.tensor(row), count)[0].tolist()


def test_defaults_follow_the_scaled_rule_and_the_configuration(adapted) -> None:
    model = adapted(beam_p0=0.9, scope="module")
    beam = BeamScheduler(model, optimizer_of(model), 240)
    assert (beam.every, beam.end, beam.p0, beam.scope) == (20, 160, 0.9, "module")
    model = adapted(beam_every=6, beam_end=50)
    beam = BeamScheduler(model, optimizer_of(model), 240, every=8)
    assert (beam.every, beam.end) == (8, 50)
    assert BeamScheduler(model, optimizer_of(model), 37_030, every=3000, end=24_688).end == 24_688


def test_ablations(adapted) -> None:
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, reallocate=False)
    follow(model, optimizer, beam)
    assert beam.events == []
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, fixed=1)
    follow(model, optimizer, beam)
    assert {len(slots) for event in beam.events for slots in event.pruned.values()} == {1}
    assert all(len(event.pruned) == len(event.scores) for event in beam.events)


def test_draws_come_from_the_seed_alone(adapted) -> None:
    runs: list[int] = []

    def sources(seed: int) -> Any:
        torch.manual_seed(0)
        model = adapted(r=8).train()
        torch.manual_seed(seed + len(runs))  # the global generator must not matter
        runs.append(seed)
        optimizer = optimizer_of(model)
        beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, fixed=4, seed=seed)
        follow(model, optimizer, beam, EVERY)
        return beam.events[0].sources

    first = sources(0)
    assert sources(0) == first
    assert sources(1) != first
    assert len({tuple(np.argsort(row)) for row in first.values()}) > 1  # modules draw apart


def test_resuming_goes_on_to_the_bit(adapted, tmp_path) -> None:
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, p0=0.7)
    for step in range(STEPS):
        update(model, optimizer, step)
        beam.step()
        if step + 1 == 7:  # between remembering and the event at 8
            assert beam.needs_cache
            beam.save(tmp_path)
            weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    again = adapted().train()
    optimizer = optimizer_of(again)
    again.load_state_dict(weights)
    optimizer.load_state_dict(moments)
    resumed = BeamScheduler(again, optimizer, STEPS, every=EVERY, p0=0.7)
    resumed.restore(tmp_path)
    for step in range(7, STEPS):
        update(again, optimizer, step)
        resumed.step()
    assert resumed.events == beam.events
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_is_remembered_is_let_go(adapted) -> None:
    model = adapted().train()
    optimizer = optimizer_of(model)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY)
    held = []
    for step in range(STEPS):
        update(model, optimizer, step)
        beam.step()
        held.append(bool(beam._cache))
    assert held == [n in (3, 7, 11, 15) for n in range(1, STEPS + 1)]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adafactor])
def test_other_optimizers_are_told_apart_and_trained_all_the_same(adapted, kind: Any) -> None:
    model = adapted().train()
    optimizer = optimizer_of(model, kind)
    beam = BeamScheduler(model, optimizer, STEPS, every=EVERY, fixed=1)
    with pytest.warns(UserWarning, match=f"{kind.__name__} keeps no exp_avg") as caught:
        follow(model, optimizer, beam)
    assert sum("exp_avg" in str(w.message) for w in caught) == 1
    assert [event.step for event in beam.events] == [4, 8, 12, 16]


def test_accelerate_and_ddp_wrappers_are_seen_through(adapted) -> None:
    class Wrapper:
        """As accelerate's: the optimizer inside, its state handed through."""

        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.state = optimizer, {}

    model = adapted()
    optimizer = optimizer_of(model)
    wrapped: Any = Wrapper(optimizer)
    holder = torch.nn.Module()
    holder.module = model
    beam = BeamScheduler(holder, wrapped, STEPS)
    assert beam.optimizer is optimizer
    assert "model.layers.0.self_attn.q_proj" in beam.layers


def test_bad_input(adapted, tmp_path) -> None:
    from labkit.testbeds.models import tiny

    model = adapted()
    optimizer = optimizer_of(model)
    for settings, message in [
        ({"every": 5}, "every=5 must be an even number"),
        ({"p0": 0.0}, "p0=0.0 must lie within"),
        ({"optimizer_state": "moved"}, '"copy", "keep" or "zero"'),
        ({"source": "old"}, '"cached" or "current"'),
        ({"cap": 0.0}, "cap=0.0 must lie within"),
        ({"fixed": 5}, "fixed=5 must lie between 1 and the smallest rank"),
        ({"adapter": "x"}, "no BeamLoRA layers of adapter 'x'"),
    ]:
        with pytest.raises(ValueError, match=message):
            BeamScheduler(model, optimizer, STEPS, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="total_steps=0 must be the positive"):
        BeamScheduler(model, optimizer, 0)
    with pytest.raises(ValueError, match="no BeamLoRA layers"):
        BeamScheduler(tiny("llama"), optimizer, STEPS)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer, got int"):
        BeamScheduler(model, 3, STEPS)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no reallocation will ever happen"):
        BeamScheduler(model, optimizer, STEPS, every=14)
    with pytest.raises(ValueError, match=r"has no beam_search.json"):
        BeamScheduler(model, optimizer, STEPS).restore(tmp_path)
    BeamScheduler(model, optimizer, STEPS, every=4).save(tmp_path)
    with pytest.raises(ValueError, match="every=4; this one has every=6"):
        BeamScheduler(model, optimizer, STEPS, every=6).restore(tmp_path)
    late = BeamScheduler(model, optimizer, STEPS, every=4, fixed=1)
    update(model.train(), optimizer, 0)
    with pytest.raises(RuntimeError, match="nothing was remembered before step 4"):
        late.advance(4)
