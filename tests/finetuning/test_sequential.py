"""Sequences of tasks: the score matrix, resuming to the bit, replay, GEM, and the protocol of a method."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from labkit.finetuning import (
    GEM,
    Method,
    Replay,
    ScoreMatrix,
    Task,
    combine,
    gem_projection,
    sequential_finetune,
)
from labkit.finetuning.sequential import Course, StreamBatches, target_count
from labkit.finetuning.sequential.data import joined
from labkit.testbeds.models import tiny
from labkit.training import DatasetBatches

from . import sequence

R = ((0.9, 0.1, 0.2), (0.6, 0.8, 0.3), (0.7, 0.5, 0.6))


@pytest.fixture(scope="module")
def whole() -> tuple[ScoreMatrix, torch.nn.Module]:
    return sequence.main(None)


class TestScoreMatrix:
    def test_summaries_by_hand(self) -> None:
        matrix = ScoreMatrix("abc", R)
        assert matrix.op() == pytest.approx((0.7 + 0.5 + 0.6) / 3)
        assert matrix.bwt() == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
        assert matrix.bwt(divide_by="tasks") == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 3)
        assert matrix.forgetting() == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)
        assert matrix.learned() == pytest.approx((0.9 + 0.8 + 0.6) / 3)
        assert repr(matrix) == "ScoreMatrix(3 tasks, OP 0.600, BWT -0.250)"

    def test_forgetting_is_from_the_best_score_since_it_was_learned(self) -> None:
        matrix = ScoreMatrix("abc", [[0.5, 0.99, 0], [0.8, 0.4, 0], [0.6, 0.3, 0.1]])
        assert matrix.forgetting() == pytest.approx(((0.8 - 0.6) + (0.4 - 0.3)) / 2)

    def test_json_there_and_back_with_what_was_not_measured(self, tmp_path: Path) -> None:
        matrix = ScoreMatrix(["x", "y"], [[0.25, math.nan], [0.125, 0.5]])
        path = matrix.save(tmp_path / "m.json")
        assert json.loads(path.read_text())["scores"][0] == [0.25, None]
        assert ScoreMatrix.load(path) == matrix
        (tmp_path / "no.json").write_text("[1]")
        with pytest.raises(ValueError, match=r"no\.json holds no score matrix"):
            ScoreMatrix.load(tmp_path / "no.json")

    def test_table_and_plot(self) -> None:
        matrix = ScoreMatrix("abc", R)
        frame = matrix.to_frame()
        assert frame.loc["after b", "a"] == 0.6
        figure = matrix.plot()
        assert np.allclose(figure.data[0].z, R)
        assert [list(row) for row in figure.data[0].text][1] == ["0.60", "0.80", "0.30"]
        assert ScoreMatrix("ab", [[0.5, math.nan]]).plot().data[0].z[0][1] is None

    def test_misuse(self) -> None:
        with pytest.raises(ValueError, match="different names"):
            ScoreMatrix(["a", "a"])
        with pytest.raises(ValueError, match="a row has one score for each of the 2 tasks"):
            ScoreMatrix("ab", [[1.0]])
        with pytest.raises(ValueError, match="all 1 stages have their row"):
            ScoreMatrix("a", [[1.0], [1.0]])
        with pytest.raises(ValueError, match="needs all 3 stages, and 1 are done"):
            ScoreMatrix("abc", R[:1]).op()
        with pytest.raises(ValueError, match="at least 2 tasks"):
            ScoreMatrix("a", [[1.0]]).bwt()
        with pytest.raises(ValueError, match="divide_by"):
            ScoreMatrix("abc", R).bwt("all")  # type: ignore[arg-type]


class TestSequence:
    def test_is_the_loop_by_hand(self) -> None:
        tasks, model = [sequence.shifts(1), sequence.shifts(3)], sequence.model(dropout=0.0)
        by_hand, rows = sequence.model(dropout=0.0).train(), []
        scores = sequential_finetune(model, tasks, steps=15, lr=5e-3, warmup=4, clip=0.5)
        for task in tasks:
            optimizer = torch.optim.AdamW(by_hand.parameters(), lr=5e-3, weight_decay=0.0)
            for step, batch in enumerate(itertools.islice(task.batches(0), 15)):
                optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 4)
                optimizer.zero_grad()
                by_hand(**batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
                optimizer.step()
            by_hand.eval()
            with torch.no_grad():
                rows.append([t.evaluate(by_hand) for t in tasks])
            by_hand.train()
        assert scores == ScoreMatrix(["by 1", "by 3"], rows)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))

    @pytest.mark.parametrize("die_at", [7, 10, 25])
    def test_resumes_to_the_bit(self, tmp_path: Path, die_at: int, whole: tuple) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        words = [sys.executable, "-m", "tests.finetuning.sequence", str(tmp_path), "--die-at", str(die_at)]
        done = subprocess.run(
            words, env=environment, capture_output=True, check=False, text=True, timeout=200
        )
        assert done.returncode == -9, done.stderr[-2000:]
        scores, model = sequence.main(tmp_path)
        assert scores == whole[0]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole[1].parameters(), strict=True))
        assert sorted(p.name for p in tmp_path.glob("stage-*")) == ["stage-02"]
        again, other = sequence.main(tmp_path)  # a finished run is read, not run
        assert again == scores
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))

    def test_a_directory_of_another_run_is_refused(self, tmp_path: Path) -> None:
        tasks = [sequence.shifts(1)]
        sequential_finetune(sequence.model(), tasks, steps=2, directory=tmp_path)
        with pytest.raises(ValueError, match="other steps .*give the same, or another directory"):
            sequential_finetune(sequence.model(), tasks, steps=3, directory=tmp_path)

    def test_tasks_to_come_can_be_left_out_and_stages_watched(self) -> None:
        seen = []
        tasks = [sequence.shifts(1), sequence.shifts(3)]
        scores = sequential_finetune(
            sequence.model(), tasks, steps=1, evaluate_all=False, on_stage=lambda m: seen.append(m.stages)
        )
        assert math.isnan(scores.scores[0, 1])
        assert not np.isnan(scores.scores[1]).any()
        assert seen == [1, 2]

    def test_data_sets_and_t5(self) -> None:
        model = tiny("t5", width=16, layers=1, heads=2, vocab=16, seed=0)
        rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(3) + i} for i in range(8)]
        before = model(**DatasetBatches(rows, 8).rows(0, 0, 8)).loss.item()
        task = Task(
            "copy", rows, lambda m: -m(**DatasetBatches(rows, 8).rows(0, 0, 8)).loss.item(), steps=20, batch=4
        )
        scores = sequential_finetune(model, [task], lr=1e-2)
        assert -scores.op() < 0.5 * before

    def test_weight_counts_labels_as_the_loss_does(self) -> None:
        labels = torch.tensor([[5, 1, -100, 2], [5, -100, -100, 3]])
        assert target_count(sequence.model())({"labels": labels}) == 3
        assert target_count(tiny("t5", layers=1))({"labels": labels}) == 5
        assert target_count(tiny("roberta", layers=1, head="classification"))({"labels": labels[:, 0]}) == 2

    def test_misuse(self) -> None:
        task, model = sequence.shifts(1), sequence.model()
        with pytest.raises(ValueError, match="no number of steps for by 1"):
            sequential_finetune(model, [task])
        with pytest.raises(TypeError, match="some of the hooks begin, stage"):
            sequential_finetune(model, [task], object(), steps=1)
        with pytest.raises(TypeError, match="make an instance"):
            combine(GEM)
        with pytest.raises(ValueError, match="one or more different names"):
            sequential_finetune(model, [], steps=1)
        with pytest.raises(TypeError, match="evaluate must be callable"):
            Task("x", [1], None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="function of a seed"):
            Task("x", 3, len)
        with pytest.raises(ValueError, match="steps must be at least 1"):
            Task("x", [1], len, steps=0)
        with pytest.raises(ValueError, match="warmup"):
            sequential_finetune(model, [task], steps=1, warmup=-1)
        short = Task("short", lambda seed: iter([{"input_ids": torch.ones(2, 2)}]), len)
        with pytest.raises(ValueError, match="'short' end after 1 steps"):
            short.data(0).rows(1, 0, 2)
        with pytest.raises(TypeError, match="must be a dict of tensors"):
            Task("x", lambda seed: iter([torch.ones(2)]), len).data(0)

        def all_of_it(parameters: list) -> torch.optim.Optimizer:
            return torch.optim.AdamW(model.parameters())

        model.model.norm.weight.requires_grad_(False)
        with pytest.raises(ValueError, match="the optimizer holds frozen parameters"):
            sequential_finetune(model, [task], steps=1, optimizer=all_of_it)
        model.requires_grad_(False)
        with pytest.raises(ValueError, match="no trainable parameter"):
            sequential_finetune(model, [task], steps=1)


class TestProtocol:
    def test_hooks_in_order(self) -> None:
        calls: list[str] = []

        class Notes:
            def __init__(self, name: str) -> None:
                self.name = name

            def begin(self, course: Course) -> None:
                calls.append(f"{self.name} begin {len(course.tasks)}")

            @contextmanager
            def stage(self, model, index, task):
                calls.append(f"{self.name} in {index} {task.name}")
                yield
                calls.append(f"{self.name} out {index}")

            def before_step(self, model) -> None:
                norm = model.model.norm.weight
                calls.append(f"{self.name} before {norm.grad is not None}")

            def after_step(self, model, optimizer) -> None:
                calls.append(f"{self.name} after {len(optimizer.state) > 0}")

        sequential_finetune(sequence.model(), [sequence.shifts(1)], combine(Notes("a"), Notes("b")), steps=1)
        assert calls == [
            *("a begin 1", "b begin 1", "a in 0 by 1", "b in 0 by 1", "a before True", "b before True"),
            *("a after True", "b after True", "b out 0", "a out 0"),
        ]

    def test_the_stage_comes_before_the_optimizer(self) -> None:
        seen = []

        class Freeze(Method):
            @contextmanager
            def stage(self, model, index, task):
                model.model.embed_tokens.weight.requires_grad_(False)
                yield
                model.requires_grad_(True)

        def optimizer(parameters):
            seen.append(sum(p.numel() for p in parameters))
            return torch.optim.SGD(parameters, lr=0.1)

        model = sequence.model()
        sequential_finetune(model, [sequence.shifts(1)], Freeze(), steps=1, optimizer=optimizer)
        assert seen == [model.num_parameters() - 16 * 16]

    def test_accumulated_gradients_are_whole_when_the_hook_sees_them(self) -> None:
        def gradients(accumulate: int) -> torch.Tensor:
            kept = []

            class Keep(Method):
                def before_step(self, model) -> None:
                    kept.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())

            model = tiny("llama", width=16, layers=2, heads=2, vocab=16, seed=0)
            sequential_finetune(
                model, [sequence.shifts(1)], Keep(), steps=1, accumulate=accumulate, clip=0.01
            )
            return kept[0]

        torch.testing.assert_close(gradients(1), gradients(4))


class TestReplay:
    def course(self, fraction: float) -> tuple[Replay, list[StreamBatches]]:
        tasks = [sequence.shifts(by, rows=8) for by in (1, 3, 5)]
        data = [task.data(0) for task in tasks]
        replay = Replay(fraction)
        replay.begin(Course(torch.nn.Linear(1, 1), tasks, data, [10, 10, 10], lambda m, b: m, 0))
        return replay, data

    def test_own_rows_stay_and_stored_ones_come_once(self) -> None:
        replay, data = self.course(0.25)
        assert replay.data(0, data[0]) is data[0]
        mixed = replay.data(2, data[2])
        assert mixed.batch == 8 + round(0.25 * 2 * 8)
        seen = []
        for step in range(10):
            rows = mixed.rows(step, 0, mixed.batch)["input_ids"]
            assert torch.equal(rows[:8], data[2].rows(step, 0, 8)["input_ids"])
            seen += rows[8:].tolist()
        stored = [
            row for j in (0, 1) for s in (0, 1, 2) for row in data[j].rows(s, 0, 8)["input_ids"].tolist()
        ]
        stored = stored[:20] + stored[24:44]
        assert sorted(seen) == sorted(stored)

    def test_keeps_an_old_task(self) -> None:
        tasks = [sequence.shifts(1), sequence.shifts(3)]
        train = lambda **s: sequential_finetune(sequence.model(), tasks, steps=60, lr=1e-2, **s)  # noqa: E731
        assert train(replay=0.5).bwt() > train().bwt() + 0.2

    def test_batches_of_other_lengths_are_padded(self) -> None:
        long, short = torch.ones(2, 5).long(), torch.ones(1, 3).long()
        both = joined([{"input_ids": long, "labels": long}, {"input_ids": short, "labels": short}])
        assert both["input_ids"][2].tolist() == [1, 1, 1, 0, 0]
        assert both["labels"][2].tolist() == [1, 1, 1, -100, -100]
        assert both["attention_mask"].sum(1).tolist() == [5, 5, 3]
        with pytest.raises(ValueError, match="same fields"):
            joined([{"input_ids": long}, {"labels": long}])

    @pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
    def test_fraction(self, fraction: float) -> None:
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            Replay(fraction)


class TestGEM:
    def test_projection_meets_the_optimality_conditions(self) -> None:
        generator = torch.Generator().manual_seed(0)
        binding = 0
        for trial in range(30):
            G = torch.randn(4, 6, generator=generator, dtype=torch.float64)
            g = torch.randn(6, generator=generator, dtype=torch.float64)
            if trial % 3 == 0:
                G[3] = G[2]  # dependent memories
            x = gem_projection(g, G)
            assert (G @ x > -1e-7).all()
            # x - g is a non-negative combination of the memories that bind
            residual = x - g
            active = (G @ x).abs() < 1e-6
            if active.any():
                binding += 1
                fit = torch.linalg.lstsq(G[active].T, residual).solution
                assert torch.allclose(G[active].T @ fit, residual, atol=1e-6)
            else:
                assert x is g
            # no feasible point is nearer
            for _ in range(50):
                other = x + 0.1 * torch.randn(6, generator=generator, dtype=torch.float64)
                if (G @ other >= 0).all():
                    assert (other - g).norm() >= residual.norm() - 1e-9
        assert binding > 15

    def test_margin_pushes_uphill(self) -> None:
        g, G = torch.tensor([1.0, -1.0]), torch.tensor([[0.0, 2.0]])
        assert gem_projection(g, G, margin=0.5).tolist() == [1.0, 1.0]

    def test_steps_do_not_climb_the_old_loss(self) -> None:
        tasks, gem, products = [sequence.shifts(1), sequence.shifts(3)], GEM(16), []

        class Watch(Method):
            def begin(self, course: Course) -> None:
                self.course = course

            def before_step(self, model) -> None:
                if not gem._memories:
                    return
                trained = list(model.parameters())
                loss = self.course.loss(model.eval(), gem._memories[0])
                old = torch.autograd.grad(loss, trained)
                model.train()
                products.append(float(sum((a * p.grad).sum() for a, p in zip(old, trained, strict=True))))

        sequential_finetune(sequence.model(), tasks, combine(gem, Watch()), steps=25, lr=5e-3)
        assert len(products) == 25
        assert min(products) > -1e-5
        assert 0 < gem.projected <= 25
        assert sum(abs(p) < 1e-5 for p in products) >= gem.projected

    def test_keeps_an_old_task(self) -> None:
        tasks = [sequence.shifts(1), sequence.shifts(3)]
        train = lambda **s: sequential_finetune(sequence.model(), tasks, steps=60, lr=1e-2, **s)  # noqa: E731
        assert train(gem=16).bwt() > train().bwt() + 0.1

    def test_frozen_parameters_stay_out_of_it(self) -> None:
        class Freeze(Method):
            @contextmanager
            def stage(self, model, index, task):
                model.model.layers[0].requires_grad_(False)
                yield
                model.requires_grad_(True)

        model = sequence.model()
        before = {n: p.clone() for n, p in model.named_parameters()}
        tasks = [sequence.shifts(1), sequence.shifts(3)]
        sequential_finetune(model, tasks, combine(Freeze(), GEM(8)), steps=5)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == ("layers.0." in name), name

    def test_misuse(self) -> None:
        with pytest.raises(ValueError, match="memory must be at least 1"):
            GEM(0)
        with pytest.raises(ValueError, match="margin"):
            GEM(margin=-1)
