"""The facts world, its models and their recipe."""

from __future__ import annotations

import itertools

import pytest
import torch

from labkit.testbeds import facts, shipped
from labkit.testbeds.facts import FactsWorld, facts_model

KINDS = [("llama", 1), ("llama", 2), ("gpt_neox", 2)]


def test_every_entity_has_every_relation_once_and_an_object() -> None:
    world = FactsWorld(0)
    assert world.facts.shape == (400, 3)
    pairs = {(int(e), int(r)) for e, r, _ in world.facts}
    assert pairs == set(itertools.product(facts.ENTITIES, facts.RELATIONS))
    assert set(world.objects.tolist()) <= set(facts.OBJECTS)
    assert len(world.objects.unique()) == 30
    assert not torch.equal(world.objects, FactsWorld(1).objects)


def test_templates_state_the_same_facts_and_do_not_change_the_table() -> None:
    one, two = FactsWorld(5), FactsWorld(5, templates=2)
    assert torch.equal(one.facts, two.facts)
    first, second = two.prompts(0), two.prompts(1)
    assert torch.equal(first[:, two.subject_position(0)], second[:, two.subject_position(1)])
    assert torch.equal(first[:, 2] + 4, second[:, 0])
    assert first[0].tolist() == [1, 30, 20, 2]
    assert second[-1].tolist() == [27, 3, 129, 4]
    assert two.text(second[-1]) == "relation3' task3 entity99 task4"


def test_a_batch_has_its_loss_on_the_object_alone() -> None:
    world = FactsWorld(0, templates=2)
    rows = torch.tensor([3, 399])
    batch = world.batch(rows, template=1)
    assert torch.equal(batch["input_ids"], torch.cat([world.prompts(1), world.objects[:, None]], 1)[rows])
    assert (batch["labels"][:, :-1] == -100).all()
    assert torch.equal(batch["labels"][:, -1], world.objects[rows])


def test_a_pass_of_batches_holds_every_statement_once() -> None:
    world = FactsWorld(0, entities=7, relations=3, templates=2)
    drawn = torch.cat([b["input_ids"] for b in itertools.islice(world.batches(6, seed=1), 7)])
    assert len(drawn) == 42
    assert len(drawn.unique(dim=0)) == 42
    again = torch.cat([b["input_ids"] for b in itertools.islice(world.batches(6, seed=1), 7)])
    assert torch.equal(drawn, again)
    assert next(world.batches(100))["labels"].shape == (100, 5)


@pytest.mark.parametrize("seed", facts.SHIPPED_SEEDS)
@pytest.mark.parametrize(("family", "templates"), KINDS)
def test_shipped_models_recall_every_fact(family: str, templates: int, seed: int) -> None:
    model = facts_model(seed, family=family, templates=templates)
    recipe = shipped.recipe(f"facts-{family}-{templates}-{seed}")
    assert recipe["seed"] == seed
    assert recipe["accuracy"] == 1.0
    assert model.num_parameters() == recipe["parameters"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    world = FactsWorld(seed, templates=templates)
    for template in range(templates):
        assert world.recalled(model, template).all()
    assert (
        FactsWorld(seed + 1).recalled(model).float().mean() < 0.15
    )  # another world's facts: chance is 1 of 30


def test_other_models_are_trained_once(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(seed, **settings):
        calls.append((seed, settings["family"], settings["templates"]))
        return facts.untrained(seed, settings["family"]), None

    monkeypatch.setattr(facts, "train_facts", stand_in)
    first, second = facts_model(7, family="gpt_neox"), facts_model(7, family="gpt_neox")
    assert calls == [(7, "gpt_neox", 1)]
    assert torch.equal(first.get_output_embeddings().weight, second.get_output_embeddings().weight)
    facts_model(0, retrain=True)
    assert calls[1:] == [(0, "llama", 1)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FactsWorld(0, entities=101), r"entities must be a whole number in 1..100, got 101"),
        (lambda: FactsWorld(0, templates=3), r"1..2, got 3"),
        (lambda: FactsWorld(0, objects=True), r"1..30, got True"),
        (lambda: FactsWorld(0).prompts(1), r"template must lie in 0..0, got 1.*templates=2"),
        (lambda: facts_model(0, templates=0), r"1..2, got 0"),
        (lambda: facts_model(0, family="lama"), r"did you mean 'llama'"),
    ],
)
def test_bad_worlds_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.slow
def test_recipe_reaches_its_metric_on_an_unshipped_seed() -> None:
    model, log = facts.train_facts(3)
    assert log.notes["recalled"] == [1.0]
    assert FactsWorld(3).recalled(model).all()
