"""The training loop and its measures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from labkit.testbeds.models import tiny
from labkit.testbeds.training import (
    IGNORED,
    bits_per_byte,
    learning_rate,
    lm_loss,
    loss_by_position,
    token_loss,
    train_lm,
    train_steps,
    windows,
)

CYCLE = torch.arange(600) % 12


def small(seed: int = 0) -> torch.nn.Module:
    return tiny("llama", width=16, layers=1, heads=2, vocab=12, seed=seed)


def test_training_learns_a_cycle_and_logs_it() -> None:
    model = small()
    before = lm_loss(model, CYCLE, length=16)
    log = train_lm(model, CYCLE, 80, 8, 16, lr=1e-2, validation=CYCLE, evaluate_every=40)
    assert before == pytest.approx(math.log(12), abs=0.3)
    assert [step for step, _ in log.evaluations] == [40, 80]
    assert log.evaluations[-1][1] < 0.2
    assert lm_loss(model, CYCLE, length=16) == pytest.approx(log.evaluations[-1][1])
    assert log.steps == 80
    assert log.tokens == 80 * 8 * 16
    assert log.cpu_seconds > 0
    assert not model.training


def test_same_seed_same_course_whatever_the_global_generator_says() -> None:
    courses = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        courses.append(train_lm(small(), CYCLE, 5, 4, 8, seed=7).losses)
    assert courses[0] == courses[1]
    assert train_lm(small(), CYCLE, 5, 4, 8, seed=8).losses != courses[0]


def test_progress_sees_every_step() -> None:
    seen = []

    def progress(steps):
        for step in steps:
            seen.append(step.number)
            yield step

    train_lm(small(), CYCLE, 3, 2, 8, progress=progress)
    assert seen == [0, 1, 2]


def test_steps_can_stop_early_and_carry_extras() -> None:
    model = small()
    batches = windows(CYCLE, 4, 8, torch.Generator().manual_seed(0))
    steps = train_steps(model, batches, 100, loss=lambda m, b: (token_loss(m, b), "extra"))
    taken = list(itertools.islice(steps, 4))
    assert [step.number for step in taken] == [0, 1, 2, 3]
    assert taken[0].extra == "extra"
    assert taken[0].lr < taken[3].lr


def test_frozen_parameters_stay() -> None:
    model = small()
    frozen = model.model.embed_tokens.weight
    frozen.requires_grad_(False)
    before, norm = frozen.clone(), model.model.norm.weight.clone()
    train_lm(model, CYCLE, 3, 2, 8)
    assert torch.equal(frozen, before)
    assert not torch.equal(model.model.norm.weight, norm)


def test_ignored_targets_carry_no_loss() -> None:
    model = small()
    tokens = CYCLE[:16].view(1, 16)
    targets = torch.full_like(tokens, IGNORED)
    targets[0, 5] = 3
    logits = model(input_ids=tokens).logits[0, 5]
    expected = torch.nn.functional.cross_entropy(logits[None], torch.tensor([3]))
    assert torch.allclose(token_loss(model, (tokens, targets)), expected)


def test_windows_are_consecutive_and_reach_both_ends() -> None:
    stream = torch.arange(20)
    generator = torch.Generator().manual_seed(0)
    starts = set()
    for tokens, targets in itertools.islice(windows(stream, 8, 16, generator), 20):
        assert torch.equal(targets, tokens + 1)
        assert torch.equal(tokens[:, 1:], tokens[:, :-1] + 1)
        starts |= set(tokens[:, 0].tolist())
    assert starts == {0, 1, 2, 3}


def test_loss_by_position_agrees_with_the_model() -> None:
    model = small()
    curve = loss_by_position(model, CYCLE, length=10, rows=5)
    assert curve.shape == (10,)
    assert curve.mean().item() == pytest.approx(lm_loss(model, CYCLE, length=10, rows=5))
    row = CYCLE[:11]
    logits = model(input_ids=row[None, :-1]).logits[0]
    alone = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    assert torch.allclose(loss_by_position(model, row, length=10), alone, atol=1e-5)


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step, 200, 1.0, 0.1) for step in range(200)]
    assert max(rates) == 1.0 == rates[19] == rates[20]
    assert rates[:20] == sorted(rates[:20])
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(150, 200, 2.0, 30, "constant") == 2.0


def test_bits_per_byte_of_a_uniform_byte_guess_is_eight() -> None:
    assert bits_per_byte(math.log(256), 100, 100) == pytest.approx(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: train_lm(small(), CYCLE, 0), ValueError, "steps must be at least 1"),
        (lambda: train_lm(small(), CYCLE[:8], 1, 2, 8), ValueError, "8 tokens do not hold"),
        (lambda: lm_loss(small(), CYCLE[:8], length=8), ValueError, "8 tokens do not hold"),
        (lambda: train_lm(small(), CYCLE, 1, schedule="cosin"), ValueError, "did you mean 'cosine'"),
        (lambda: train_lm(small().requires_grad_(False), CYCLE, 1), ValueError, "no trainable"),
        (lambda: bits_per_byte(1.0, 0, 5), ValueError, "must be positive"),
    ],
)
def test_bad_calls_are_refused(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(FloatingPointError, match="at step 0"):
        list(train_steps(small(), [None], 1, loss=lambda m, b: m.lm_head.weight.sum() * float("nan")))
