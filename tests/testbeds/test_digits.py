"""Digit tasks: exact answers, labels that train the answer alone, and the models that ship with them."""

from __future__ import annotations

import itertools

import pytest
import torch

from labkit.testbeds import digits, shipped
from labkit.testbeds.digits import KINDS, DigitTask, answer_loss, digits_model, token_accuracy
from labkit.testbeds.models import tiny


def by_hand(kind: str, d: list[int]) -> list[int]:
    return {
        "reverse": d[::-1],
        "sort": sorted(d),
        "add": [(x + 3) % 10 for x in d],
        "running_sum": [x % 10 for x in itertools.accumulate(d)],
        "rotate": [*d[1:], d[0]],
        "max_minus": [max(d) - x for x in d],
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 4, 7])
def test_answers_are_exact_and_only_they_carry_loss(kind: str, length: int) -> None:
    task = DigitTask(kind, length)
    batch = task.batch(50, torch.Generator().manual_seed(0))
    assert batch["input_ids"].shape == batch["labels"].shape == (50, task.tokens)
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        given = [i - 10 for i in ids[2 : 2 + length]]
        assert ids[:2] == [1, 3 + KINDS.index(kind)]
        assert ids[2 + length] == 2
        assert [i - 10 for i in ids[3 + length :]] == by_hand(kind, given)
        assert labels == [-100] * (3 + length) + ids[3 + length :]


def test_batches_are_those_of_their_seed_and_examples_stand_apart() -> None:
    task = DigitTask("sort")
    first, again = next(task.batches(8, 0)), next(task.batches(8, 0))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], next(task.batches(8, 1))["input_ids"])
    assert torch.equal(task.examples(8)["labels"], task.examples(8)["labels"])
    assert not torch.equal(task.examples(8)["input_ids"], first["input_ids"])


def test_rows_are_a_data_set() -> None:
    rows = DigitTask("add").rows(5, seed=3)
    assert len(rows) == 5
    assert rows[0]["input_ids"].shape == (11,)
    batch = DigitTask("add").batch(5, torch.Generator().manual_seed(3))
    assert torch.equal(torch.stack([row["labels"] for row in rows]), batch["labels"])


@pytest.mark.parametrize("seed", digits.SHIPPED_SEEDS)
def test_shipped_models_do_what_their_recipe_says(seed: int) -> None:
    recipe, model = shipped.recipe(f"digits-{seed}"), digits_model(seed)
    for kind in digits.PRETRAINED:
        got = token_accuracy(model, DigitTask(kind).examples(512, seed))
        assert abs(got - recipe["accuracy"][kind]) < 0.01
        assert got > 0.98
    for kind in ("sort", "max_minus"):
        assert token_accuracy(model, DigitTask(kind).examples(512, seed)) < 0.5


def test_a_model_trained_anew_meets_the_metric(own_cache) -> None:
    model = digits_model(0, ["rotate"], retrain=True)
    assert token_accuracy(model, DigitTask("rotate").examples(256)) > 0.98
    again = digits_model(0, ["rotate"])
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert len(list(own_cache.rglob("*.safetensors"))) == 1


def test_accuracy_counts_the_answers_alone_and_keeps_the_mode() -> None:
    model = tiny("llama", width=16, layers=1, heads=2, vocab=digits.VOCAB, seed=0).train()
    batch = DigitTask("add").examples(32)
    logits = model.eval()(input_ids=batch["input_ids"]).logits[:, 6:10].argmax(-1)
    model.train()
    right = (logits == batch["input_ids"][:, 7:]).float().mean()
    assert token_accuracy(model, batch) == pytest.approx(float(right))
    assert model.training
    assert answer_loss(model, batch).requires_grad


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="did you mean 'reverse'"):
        DigitTask("revers")
    with pytest.raises(ValueError, match="positive whole number of digits, got 0"):
        DigitTask("sort", 0)
    with pytest.raises(ValueError, match="one or more different ones"):
        digits_model(0, ["sort", "sort"])
    with pytest.raises(ValueError, match="one or more different ones"):
        digits_model(0, [])


def test_adapting_teaches_a_new_task() -> None:
    model, task = digits_model(0), DigitTask("rotate")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = token_accuracy(model, task.examples())
    steps = list(digits.adapt(model, task, optimizer, 60, lr=3e-3, seed=1))
    assert [step.number for step in steps] == list(range(60))
    assert steps[1].lr == max(step.lr for step in steps)
    assert not model.training
    assert token_accuracy(model, task.examples()) > before + 0.3
    batch = task.examples(64)
    assert digits.held_out_loss(model, batch) == pytest.approx(
        float(answer_loss(model, batch).detach()), rel=1e-4
    )
