"""The four tasks in the standard library's source."""

from __future__ import annotations

import pytest
import torch

from labkit.testbeds import shipped, stdlib_tasks
from labkit.testbeds.stdlib_tasks import GROUPS, StdlibTasks
from labkit.testbeds.training import IGNORED


@pytest.fixture(scope="module")
def world() -> StdlibTasks:
    return StdlibTasks(0)


def test_examples_are_window_separator_task_and_label(world: StdlibTasks) -> None:
    names = stdlib_tasks.vocabulary()
    assert len(set(names)) == stdlib_tasks.VOCAB
    for task in world.tasks:
        assert task.classes == tuple(GROUPS[task.name])
        assert [names[i] for i in task.label_ids] == [f"<{task.name}:{label}>" for label in task.classes]
        for inputs, targets, each in (
            (task.inputs, task.targets, 300),
            (task.test_inputs, task.test_targets, 60),
        ):
            assert inputs.shape == (5 * each, 34)
            assert {names[i] for i in inputs[:, -1]} == {f"<task:{task.name}>"}
            assert (inputs[:, -2] == stdlib_tasks.SEP).all()
            assert [int((targets == label).sum()) for label in task.label_ids] == [each] * 5


def test_windows_are_passages_of_their_own_part_of_the_class(world: StdlibTasks) -> None:
    for task in world.tasks:
        for label, label_id in zip(task.classes, task.label_ids, strict=True):
            stream = stdlib_tasks._streams()[task.name, label]
            cut = int(0.8 * len(stream))
            for part, inputs, targets in (
                (stream[:cut], task.inputs, task.targets),
                (stream[cut:], task.test_inputs, task.test_targets),
            ):
                known = {tuple(row) for row in part.unfold(0, 32, 1).tolist()}
                assert all(tuple(row) in known for row in inputs[targets == label_id, :32].tolist())


def test_batches_repeat_by_seed_and_pass_over_all_examples(world: StdlibTasks) -> None:
    task = world.tasks[2]
    one, other, third = task.batches(5), task.batches(5), task.batches(6)
    first = next(one)
    assert torch.equal(first["input_ids"], next(other)["input_ids"])
    assert not torch.equal(first["input_ids"], next(third)["input_ids"])
    assert torch.equal(first["labels"][:, -1], first["input_ids"][:, -1])
    assert (first["labels"][:, :-1] == IGNORED).all()
    rows = torch.cat([first["input_ids"], *(next(one)["input_ids"] for _ in range(46))])[:1500]
    wanted = torch.cat([task.inputs, task.targets[:, None]], 1)
    assert sorted(rows.tolist()) == sorted(wanted.tolist())


def test_loss_of_a_batch_is_that_of_the_label_word_alone(world: StdlibTasks) -> None:
    model = world.base_model()
    batch = world.tasks[0].batch(torch.arange(6))
    logits = model(input_ids=batch["input_ids"]).logits[:, -2]
    wanted = torch.nn.functional.cross_entropy(logits, world.tasks[0].targets[:6])
    assert float(stdlib_tasks.label_loss(model, batch).detach()) == pytest.approx(float(wanted.detach()))
    assert float(model(**batch).loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)


class Oracle(torch.nn.Module):
    """Answers with a fixed token, or with one the test gives it."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.answers, self.seen = answers, 0

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        rows = self.answers[self.seen : self.seen + len(input_ids)]
        self.seen += len(input_ids)
        logits = torch.zeros(len(input_ids), 1, stdlib_tasks.VOCAB)
        logits[:, 0, 2000] = 2.0  # a word that is no label
        logits[torch.arange(len(rows)), 0, rows] = 1.0
        return type("Output", (), {"logits": logits})()


def test_evaluation_scores_label_words_or_the_whole_vocabulary(world: StdlibTasks) -> None:
    task = world.tasks[1]
    answers = task.test_targets.clone()
    answers[:30] = task.label_ids[4]  # the first class's, so all 30 are wrong
    assert task.evaluate(Oracle(answers)) == pytest.approx(0.9)
    assert task.evaluate(Oracle(answers), open_vocabulary=True) == 0.0
    model = world.base_model()
    task.evaluate(model)
    assert model.training


def test_seeds_differ_in_windows_and_order() -> None:
    worlds = [StdlibTasks(seed) for seed in range(3)]
    assert len({tuple(task.name for task in world.tasks) for world in worlds}) == 3
    assert not torch.equal(worlds[0].training_windows(), worlds[1].training_windows())
    again = StdlibTasks(1)
    assert torch.equal(worlds[1].training_windows(), again.training_windows())


@pytest.mark.parametrize("seed", stdlib_tasks.SHIPPED_SEEDS)
def test_shipped_models_predict_as_their_recipe_says(seed: int) -> None:
    loss, accuracy = stdlib_tasks.next_token_scores((made := StdlibTasks(seed)).base_model(), made)
    recipe = shipped.recipe(f"stdlib-tasks-{seed}")
    # Sources differ between Python versions, and so do the windows.
    assert loss == pytest.approx(recipe["loss"], abs=0.25)
    assert accuracy == pytest.approx(recipe["accuracy"], abs=0.03)


@pytest.mark.slow
def test_recipe_reaches_its_metric_again(own_cache, world: StdlibTasks) -> None:
    model, log = stdlib_tasks.train_base_model(world)
    recipe = shipped.recipe("stdlib-tasks-0")
    assert log.steps == recipe["steps"]
    loss, accuracy = stdlib_tasks.next_token_scores(model, world)
    assert loss == pytest.approx(recipe["loss"], abs=0.25)
    assert accuracy == pytest.approx(recipe["accuracy"], abs=0.03)


def test_other_seeds_are_trained_once(own_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def stand_in(world, **settings):
        calls.append(world.seed)
        return stdlib_tasks.untrained(3), None

    monkeypatch.setattr(stdlib_tasks, "train_base_model", stand_in)
    world = StdlibTasks(7, train=2, test=1)
    first, second = world.base_model(), world.base_model()
    assert calls == [7]
    assert first is not second
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert torch.equal(first.lm_head.weight, stdlib_tasks.untrained(3).lm_head.weight)


def test_probes_are_text_of_the_task_alone(world: StdlibTasks) -> None:
    task = world.tasks[3]
    one, other = (world.probe(task, 16, seed)["input_ids"] for seed in (0, 1))
    assert one.shape == (16, 32)
    known = {tuple(row) for row in task.inputs[:, :32].tolist()}
    assert all(tuple(row) in known for row in one.tolist())
    assert not torch.equal(one, other)


def test_larger_models_are_no_shipped_ones(own_cache) -> None:
    world = StdlibTasks(0, train=4, test=1, width=32, layers=1, pretraining=2)
    model = world.base_model()
    assert model.config.hidden_size == 32
    assert model.config.num_hidden_layers == 1


def test_counts_are_checked() -> None:
    for name in ("train", "test", "batch_size", "steps"):
        with pytest.raises(ValueError, match=f"{name} must be a positive whole number, got 0"):
            StdlibTasks(0, **{name: 0})


def test_python_without_sources_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stdlib_tasks._words.cache_clear()
    monkeypatch.setattr(stdlib_tasks, "_files", lambda module: [])
    with pytest.raises(FileNotFoundError, match="email hold 0 tokens.*install a complete one"):
        stdlib_tasks._words()
