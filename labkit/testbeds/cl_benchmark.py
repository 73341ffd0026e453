"""Text classification tasks in the format of the continual-learning benchmark that O-LoRA and MIGU train on.

The rows come from the folder ``migu`` of ``LABKIT_DATA`` (`labkit.testbeds.data`): DBpedia (14 classes), BoolQ and
COPA. A model reads one prompt with the task's kind, the data set's name, an instruction and the list of answers, and
writes the answer's text::

    Task:TC
    Dataset:dbpedia
    What is the topic of the following paragraph? Choose one from the option.
    Option: Company, Educational Institution, ...
    Title: ...
    Answer:

The score is the share of exact matches in per cent, after lower-casing, without ASCII punctuation and with white
space collapsed. The data set's name and its options are in the prompt, so the label space is known at test time.

The frame of the prompt is the authors'. The wording of an instruction is ours.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from labkit.testbeds.data import find
from labkit.testbeds.models import nearest

KINDS = {"dbpedia": "TC", "boolq": "BoolQA", "copa": "COPA"}
_INSTRUCTIONS = {
    "dbpedia": "What is the topic of the following paragraph? Choose one from the option.",
    "boolq": "According to the following passage, is the question true or false? Choose one from the option.",
    "copa": "Which choice follows from the premise? Choose one from the option.",
}


@dataclass(frozen=True)
class TextTask:
    """Rows of one data set.

    Attributes
    ----------
    name : str
    labels : tuple of str
        Answers in the official order.
    train, test : list of (str, str)
        Prompt and answer.
    """

    name: str
    labels: tuple[str, ...]
    train: list[tuple[str, str]]
    test: list[tuple[str, str]]


def prompt(name: str, sentence: str, labels: tuple[str, ...]) -> str:
    """Write a row as the model reads it.

    Examples
    --------
    >>> print(prompt("copa", "Premise ...", ("A", "B")))
    Task:COPA
    Dataset:copa
    Which choice follows from the premise? Choose one from the option.
    Option: A, B
    Premise ...
    Answer:
    """
    nearest(name, KINDS, "data set")
    # a space behind the last option, as the official prompts have it
    options = f"Option: {', '.join(labels)} \n"
    head = f"Task:{KINDS[name]}\nDataset:{name}\n{_INSTRUCTIONS[name]}\n"
    return f"{head}{options}{sentence.rstrip()}\nAnswer:"


def load(name: str) -> TextTask:
    """Read a data set of ``LABKIT_DATA/migu``.

    Parameters
    ----------
    name : {"dbpedia", "boolq", "copa"}

    Raises
    ------
    ValueError
        For another name.
    FileNotFoundError
        When the data are not there; the message says how to get them.
    """
    nearest(name, KINDS, "data set")
    known: dict[str, Any] = json.loads(find("migu/labels.json").read_text(encoding="utf-8"))
    labels = tuple(known[name])
    parts = []
    for part in ("train", "test"):
        rows = json.loads(find(f"migu/{name}_{part}.json").read_text(encoding="utf-8"))
        parts.append([(prompt(name, row["sentence"], labels), row["label"]) for row in rows])
    return TextTask(name, labels, *parts)


def normalised(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces.

    Examples
    --------
    >>> normalised(" Means Of  transportation. ")
    'means of transportation'
    """
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def exact_match(answers: list[str], labels: list[str]) -> float:
    """Share of answers that are their label, in per cent.

    Raises
    ------
    ValueError
        When there are none, or not as many of both.

    Examples
    --------
    >>> exact_match(["true.", "False"], ["True", "True"])
    50.0
    """
    if len(answers) != len(labels) or not labels:
        raise ValueError(f"as many answers as labels are needed, got {len(answers)} and {len(labels)}")
    hits = sum(normalised(a) == normalised(b) for a, b in zip(answers, labels, strict=True))
    return 100 * hits / len(labels)


@dataclass(frozen=True)
class PromptTask:
    """A `TextTask` for a model that reads a prompt and writes the answer (T5 and other encoder-decoders).

    Attributes
    ----------
    name : str
    text : TextTask
    tokenizer : transformers.PreTrainedTokenizerBase
        Needs a padding and an end token.
    source, target : int
        Most tokens of prompt and answer; the authors' are 512 and 50.
    batch_size, steps : int
        Rows and updates.
    test : int
        Test rows that are used.
    """

    text: TextTask
    tokenizer: PreTrainedTokenizerBase
    source: int = 512
    target: int = 50
    batch_size: int = 8
    steps: int = 125
    test: int = 100

    @property
    def name(self) -> str:
        return self.text.name

    def _tokens(self, texts: Sequence[str], longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and mask. A long prompt loses the end of its text, never its last line, ``Answer:``."""
        end = int(self.tokenizer.eos_token_id)  # type: ignore[arg-type]
        rows = []
        for text in texts:
            head, line, last = text.rpartition("\nAnswer:")
            tail = self.tokenizer(line + last, add_special_tokens=False)["input_ids"] if line else []
            ids = self.tokenizer(head if line else text, add_special_tokens=False)["input_ids"]
            rows.append([*ids[: longest - 1 - len(tail)], *tail, end])
        width = max(map(len, rows))
        pad = int(self.tokenizer.pad_token_id)  # type: ignore[arg-type]
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return ids, mask

    def batches(self, seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
        """Yield endless batches; every pass over the training rows is shuffled anew."""
        generator = torch.Generator().manual_seed(seed)
        order: list[int] = []
        while True:
            while len(order) < self.batch_size:
                order += torch.randperm(len(self.text.train), generator=generator).tolist()
            rows = [self.text.train[i] for i in order[: self.batch_size]]
            del order[: self.batch_size]
            ids, mask = self._tokens([prompt for prompt, _ in rows], self.source)
            answers, real = self._tokens([answer for _, answer in rows], self.target)
            yield {
                "input_ids": ids,
                "attention_mask": mask,
                "labels": answers.masked_fill(real == 0, -100),
            }

    @torch.no_grad()
    def evaluate(self, model: Any) -> float:
        """Share of test prompts that the model answers exactly, greedily, in [0, 1]."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        rows = self.text.test[: self.test]
        answers: list[str] = []
        for first in range(0, len(rows), 50):
            ids, mask = self._tokens([prompt for prompt, _ in rows[first : first + 50]], self.source)
            written = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self.target,
                do_sample=False,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            answers += self.tokenizer.batch_decode(written, skip_special_tokens=True)
        model.train(was_training)
        return exact_match(answers, [label for _, label in rows]) / 100


class PromptWorld:
    """A sequence of `PromptTask` and a checkpoint that learns it.

    Parameters
    ----------
    checkpoint : str
        Folder or hub id of an encoder-decoder with its tokenizer.
    seed : int
        Of the order of the tasks.
    tasks : sequence of str
        Names for `load`.
    **settings
        Of `PromptTask`.

    Raises
    ------
    OSError
        When the checkpoint is neither a folder nor to be had from the hub.
    """

    def __init__(
        self,
        checkpoint: str,
        seed: int = 0,
        tasks: Sequence[str] = ("dbpedia", "boolq", "copa"),
        **settings: Any,
    ) -> None:
        from transformers import AutoTokenizer

        self.checkpoint, self.seed = checkpoint, seed
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        order = list(tasks)
        random.Random(seed).shuffle(order)
        self.tasks = [PromptTask(load(name), self.tokenizer, **settings) for name in order]

    def base_model(self, *, device: torch.device | str = "cpu") -> Any:
        """A fresh copy of the checkpoint, in training mode."""
        from transformers import AutoModelForSeq2SeqLM

        model: Any = AutoModelForSeq2SeqLM.from_pretrained(self.checkpoint)
        return model.to(device).train()

    @staticmethod
    def loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's own."""
        found: torch.Tensor = model(**batch).loss
        return found

    def probe(self, task: PromptTask, rows: int = 128, seed: int = 0) -> dict[str, torch.Tensor]:
        """Draw training rows of a task."""
        return next(replace(task, batch_size=rows).batches(seed))
