"""The recall task, its recipe and the weights that ship with it."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds import retrieval, shipped
from labkit.testbeds.retrieval import RetrievalTask, accuracy, copy_batch, load


def draw(task: RetrievalTask, n: int = 8, seed: int = 0, questions: int = 1) -> retrieval.RetrievalBatch:
    return task.batch(n, torch.Generator().manual_seed(seed), questions=questions)


@pytest.mark.parametrize("question_first", [False, True])
@pytest.mark.parametrize(("pairs", "filler"), [(16, 64), (1, 0), (32, 5), (3, 100)])
def test_needles_hold_the_asked_key_and_its_answer(pairs: int, filler: int, question_first: bool) -> None:
    task = RetrievalTask(pairs, filler, question_first)
    batch = draw(task, questions=min(3, pairs))
    key = batch.context.gather(1, batch.needles[..., 0])
    value = batch.context.gather(1, batch.needles[..., 1])
    assert torch.equal(key, batch.questions[..., 1])
    assert torch.equal(value, batch.answers)
    assert torch.equal(batch.needles[..., 1], batch.needles[..., 0] + 1)
    assert batch.tokens.shape == (8, task.prompt_length)
    assert batch.tokens[0, batch.question_start] == retrieval.QUESTION
    assert (batch.context[:, 0] == retrieval.BOS).all()


def test_context_holds_each_key_and_value_once_and_filler_elsewhere() -> None:
    batch = draw(RetrievalTask(16, 64))
    spots = batch.pairs.flatten(1)
    assert all(len(set(row.tolist())) == 32 for row in spots)
    for row in batch.context.gather(1, spots):
        assert len(set(row.tolist())) == 32
    rest = torch.ones_like(batch.context, dtype=torch.bool).scatter_(1, spots, False)
    rest[:, 0] = False
    filler = batch.context[rest]
    assert filler.min() >= retrieval.VOCAB - retrieval.FILLERS
    assert filler.max() < retrieval.VOCAB
    assert rest.sum() == 8 * 64


def test_question_first_puts_the_question_behind_bos() -> None:
    batch = draw(RetrievalTask(question_first=True))
    assert torch.equal(batch.context[:, 1:3], batch.questions[:, 0])
    assert batch.question_start == 99


def test_needles_fall_everywhere() -> None:
    places = draw(RetrievalTask(), n=4000).needle[:, 0].float()
    assert abs(places.mean() - 48) < 2
    assert places.min() <= 2
    assert places.max() >= 94


def test_chance_comes_from_the_generator_alone() -> None:
    first = draw(RetrievalTask(), seed=3)
    torch.manual_seed(99)
    again = draw(RetrievalTask(), seed=3)
    other = draw(RetrievalTask(), seed=4)
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_training_batch_targets_the_value_at_every_asked_key() -> None:
    tokens, targets = RetrievalTask().training_batch(4, torch.Generator().manual_seed(0), questions=8)
    asked = targets != -100
    assert asked.sum() == 32
    row, column = asked.nonzero(as_tuple=True)
    assert torch.equal(tokens[row, column + 1], targets[row, column])
    assert (tokens[row, column - 1] == retrieval.QUESTION).all()


def test_copy_batch_can_be_answered_from_its_first_half() -> None:
    tokens, targets = copy_batch(4, torch.Generator().manual_seed(1))
    length = tokens.shape[1] // 2
    row, column = (targets != -100).nonzero(as_tuple=True)
    assert len(row) == 4 * (length - 1)
    assert torch.equal(targets[row, column], tokens[row, column - length + 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RetrievalTask(33), "1..32"),
        (lambda: RetrievalTask(0), "1..32"),
        (lambda: RetrievalTask(4, -1), "negative"),
        (lambda: draw(RetrievalTask(4), questions=5), "1..4"),
        (lambda: draw(RetrievalTask(4), n=0), "at least 1"),
    ],
)
def test_bad_tasks_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("seed", retrieval.SHIPPED_SEEDS)
def test_shipped_models_answer_fresh_prompts(seed: int) -> None:
    model = load(seed)
    recipe = shipped.recipe(f"retrieval-{seed}")
    assert recipe["seed"] == seed
    assert model.num_parameters() == recipe["parameters"] == 101_184
    reached = accuracy(model, prompts=512, seed=777)
    assert reached >= 0.95
    assert reached == pytest.approx(recipe["accuracy"], abs=0.03)
    assert accuracy(model, RetrievalTask(question_first=True), prompts=256) >= 0.95
    assert accuracy(model, RetrievalTask(8, 24), prompts=256) >= 0.95


def test_context_and_question_may_come_in_two_calls() -> None:
    model = load(1)
    assert accuracy(model, prompts=256, split_question=True) == accuracy(model, prompts=256)


def test_load_gives_a_fresh_model_each_time() -> None:
    first = load(0)
    with torch.no_grad():
        first.model.embed_tokens.weight.zero_()
    assert load(0).model.embed_tokens.weight.abs().sum() > 0
    tied = load(0)
    assert tied.lm_head.weight.data_ptr() == tied.model.embed_tokens.weight.data_ptr()


def test_other_seeds_are_trained_once(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(seed, **settings):
        calls.append(seed)
        return retrieval.retrieval_model(seed, kv_heads=settings["kv_heads"]), None

    monkeypatch.setattr(retrieval, "train_retrieval", stand_in)
    first, second = load(7, kv_heads=2), load(7, kv_heads=2)
    assert calls == [7]
    assert torch.equal(first.model.embed_tokens.weight, second.model.embed_tokens.weight)
    assert first.config.num_key_value_heads == 2
    load(7, kv_heads=2, retrain=True)
    assert calls == [7, 7]


def test_curriculum_that_does_not_arrive_says_where_it_is() -> None:
    with pytest.raises(RuntimeError, match="stage 0 of 3 after 3 steps"):
        retrieval.train_retrieval(0, max_steps=3, batch=4)


@pytest.mark.slow
def test_recipe_reaches_its_metric_on_an_unshipped_seed() -> None:
    model, log = retrieval.train_retrieval(3)
    assert len(log.notes["stages"]) == 4
    assert log.steps < 2200
    assert accuracy(model, prompts=1024) >= 0.95
