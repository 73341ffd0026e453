"""The benchmark's prompts, its metric, and a short sequence on its real texts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.testbeds import cl_benchmark, data
from labkit.testbeds.cl_benchmark import PromptTask, exact_match, load, normalised
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import train_bpe


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    (tmp_path / "migu").mkdir()
    labels = {
        "dbpedia": ["Company", "Mean of Transportation"],
        "boolq": ["True", "False"],
        "copa": ["A", "B"],
    }
    (tmp_path / "migu" / "labels.json").write_text(json.dumps(labels))
    rows = [{"label": "Company", "sentence": f"Title: Firm {i}\nText: It sells {i}.\n"} for i in range(5)]
    for part in ("train", "test"):
        (tmp_path / "migu" / f"dbpedia_{part}.json").write_text(json.dumps(rows))
    return tmp_path


def test_prompt_has_kind_name_options_and_an_open_answer(folder: Path) -> None:
    task = load("dbpedia")
    prompt, answer = task.train[3]
    lines = prompt.split("\n")
    assert lines[:2] == ["Task:TC", "Dataset:dbpedia"]
    assert lines[3] == "Option: Company, Mean of Transportation "
    assert lines[4:] == ["Title: Firm 3", "Text: It sells 3.", "Answer:"]
    assert answer == "Company"
    with pytest.raises(ValueError, match="did you mean 'dbpedia'"):
        load("dbpedla")


@pytest.mark.parametrize(
    ("answer", "label", "right"),
    [
        ("mean of transportation.", "Mean of Transportation", True),
        ("  Mean   of\ttransportation", "Mean of Transportation", True),
        ("Mean-of transportation", "Mean of Transportation", False),
        ("Mean", "Mean of Transportation", False),
        ("", "A", False),
    ],
)
def test_metric_is_exact_after_normalisation(answer: str, label: str, right: bool) -> None:
    assert exact_match([answer], [label]) == 100 * right
    assert (normalised(answer) == normalised(label)) == right


def test_metric_refuses_lists_that_do_not_match() -> None:
    for answers, labels in ((["a"], []), ([], [])):
        with pytest.raises(ValueError, match="as many answers as labels"):
            exact_match(answers, labels)


def tokenizer(texts: list[str]) -> Any:
    return train_bpe("\n".join(texts), 400, special_tokens=["<pad>", "<eos>"])


def test_batches_pad_and_keep_the_question(folder: Path) -> None:
    task = load("dbpedia")
    words = tokenizer([prompt for prompt, _ in task.train])
    made = PromptTask(task, words, source=24, target=4, batch_size=3)
    batch = next(made.batches(0))
    assert batch["input_ids"].shape == (3, 24)
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        text = words.decode(ids[mask.bool()])
        assert text.startswith("Task:TC")
        assert text.removesuffix("<eos>").endswith("Answer:")
    assert torch.equal(next(made.batches(0))["input_ids"], batch["input_ids"])
    assert (batch["labels"] != words.pad_token_id).all()


def test_score_is_that_of_what_the_model_writes(folder: Path) -> None:
    task = load("dbpedia")
    words = tokenizer([prompt for prompt, _ in task.train])
    made = PromptTask(task, words)

    class Writes(torch.nn.Module):
        def __init__(self, answer: str) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(()))
            self.answer = words(answer)["input_ids"]

        def generate(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            return torch.tensor([self.answer] * len(input_ids))

    assert made.evaluate(Writes("company.")) == 1.0
    assert made.evaluate(Writes("Artist")) == 0.0


def test_world_of_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    words = tokenizer([prompt for prompt, _ in load("dbpedia").train])
    model = tiny("t5", width=16, layers=1, heads=2, vocab=len(words), seed=0)
    for part in (model, words):
        part.save_pretrained(tmp_path / "checkpoint")
    world = cl_benchmark.PromptWorld(str(tmp_path / "checkpoint"), 0, ("dbpedia",), source=24, batch_size=2)
    assert [task.name for task in world.tasks] == ["dbpedia"]
    batch = world.probe(world.tasks[0], rows=4)
    assert batch["input_ids"].shape == (4, 24)
    copies = [world.base_model() for _ in range(2)]
    assert torch.equal(copies[0].shared.weight, model.shared.weight)
    assert copies[0] is not copies[1]
    assert float(world.loss(copies[0], batch).detach()) == pytest.approx(
        float(copies[1](**batch).loss.detach())
    )


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif("LABKIT_DATA" not in os.environ, reason="LABKIT_DATA is not set")
def test_real_texts_are_learned_in_sequence_with_masks() -> None:
    from labkit.finetuning import MIGU, Task, sequential_finetune

    tasks = [load(name) for name in ("dbpedia", "boolq", "copa")]
    assert [(len(t.train), len(t.test), len(t.labels)) for t in tasks] == [
        (2200, 700, 14),
        (1600, 400, 2),
        (400, 100, 2),
    ]
    assert all(label in t.labels for t in tasks for _, label in t.train + t.test)
    words = train_bpe("\n".join(prompt for t in tasks for prompt, _ in t.train[:800]), 1200)
    words.add_special_tokens({"eos_token": "<eos>", "pad_token": "<pad>"})
    model = tiny(
        "t5",
        width=64,
        layers=1,
        vocab=len(words),
        pad_token_id=words.pad_token_id,
        decoder_start_token_id=words.pad_token_id,
        seed=0,
    )
    made = [PromptTask(t, words, source=112, target=10, batch_size=16, test=100) for t in tasks]
    migu = MIGU(skip=("lm_head",))
    scores = sequential_finetune(
        model,
        [
            Task(t.name, t.batches, t.evaluate, steps=steps)
            for t, steps in zip(made, (250, 10, 10), strict=True)
        ],
        migu,
        lr=3e-3,
        evaluate_all=False,
    )
    # chance, with the form of an answer known, is 1/14
    assert scores.scores[0, 0] > 0.2
    assert scores.stages == 3
    assert all(0.25 < float(mask.float().mean()) < 0.45 for mask in migu.masks().values())
