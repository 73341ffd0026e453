"""Pairs of the released tool-augmented reward data, which labkit does not ship, with tools that run.

Observations are made anew, by the tool, on the answer at hand; stored observations, thoughts and rationales are never
read. Stored verdicts on worse training answers of the calculator were made with another answer, and rationales tell the
label. Rewards that learn from the pairs are in :mod:`labkit.testbeds.tara_rewards`, a small model that learns to call in
:mod:`labkit.testbeds.tara_planner`; :mod:`labkit.testbeds.tara_record` measures everything.

The files are found by :func:`labkit.testbeds.data.find` under the name ``themis``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from labkit.rlhf.themis import (
    Calculator,
    Calendar,
    CodeRunner,
    ToolBank,
    WeatherCache,
    load_tara,
    parse_actions,
)
from labkit.rlhf.themis.replaying import ANSWERS
from labkit.testbeds import data

__all__ = [
    "TASKS",
    "Pair",
    "bank",
    "observe",
    "read",
    "shuffled",
    "swapped",
    "with_final",
]

#: Tasks that come with training pairs and a tool that runs here.
TASKS = ("calendar", "calculator", "weather", "code", "multi_tools")
FINAL = re.compile(r"####.*", re.DOTALL)
_VALUE = re.compile(r"\['(.*?)'\]|(?<!\d)(-?\d+\.\d+(?:\([A-Za-z]+\))?)")


@dataclass(frozen=True)
class Pair:
    """A question, a better and a worse answer, and what the tool said about each."""

    task: str
    question: str
    answers: tuple[str, str]
    observations: tuple[str, str]


def bank() -> ToolBank:
    """The tools of `TASKS`; the calculator reads as the release's does.

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    weather = WeatherCache(data.find("themis/weather_history.json.gz"))
    return ToolBank([Calendar(), Calculator(strict=True), weather, CodeRunner()])


def observe(task: str, row: Mapping[str, Any], which: str, tools: ToolBank) -> str:
    """What the tools say when the calls of one answer are made now; the observations of several calls, one a line.

    The calculator is given the answer itself: some stored inputs hold other sums than the answer they belong to.
    """
    answer = row[which]["answer"]
    state = {"question": row["question"], "answer": answer, "test_list": row.get("test_list")}
    steps = parse_actions(row[which]["actions"])
    return "\n".join(
        tools.call(step.action, answer if task == "calculator" else step.action_input, state)
        for step in steps
    )


def with_final(answer: str, other: str) -> str:
    """A worked answer that ends in the number that another ends in.

    Examples
    --------
    >>> with_final("2 + 2 = <<2+2=5>>5\\n#### 5", "It is 4.\\n#### 4")
    '2 + 2 = <<2+2=5>>5\\n#### 4'
    """
    found = FINAL.search(other)
    body = FINAL.sub("", answer).rstrip()
    return answer if found is None else f"{body}\n{found.group().strip()}"


def read(task: str, part: str, tools: ToolBank, given: bool = False) -> list[Pair]:
    """The pairs of a task's ``train`` or ``test``, with observations made now.

    Parameters
    ----------
    task, part : str
    tools : ToolBank
    given : bool
        Let a worse answer of the calculator's end in the better one's number, as all of the test file do (and few of
        the training file, though its stored observations were made so). The calculator then compares with the number
        that is right: it has been told.

    Raises
    ------
    FileNotFoundError
        Without the data.
    ValueError
        For an unknown task.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    out = []
    for row in load_tara(data.find("themis"), f"{task}_{part}"):
        better, worse = row["pos_answer"], row["neg_answer"]
        if given and task == "calculator":
            worse = {**worse, "answer": with_final(worse["answer"], better["answer"])}
        sides = [observe(task, {**row, "neg_answer": worse}, which, tools) for which in ANSWERS]
        out.append(Pair(task, row["question"], (better["answer"], worse["answer"]), (sides[0], sides[1])))
    return out


def shuffled(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """The pairs with their observations dealt out anew, over pairs and over better and worse."""
    every = [told for pair in pairs for told in pair.observations]
    order = np.random.default_rng(seed).permutation(len(every))
    dealt = [every[place] for place in order]
    return [
        Pair(pair.task, pair.question, pair.answers, (dealt[2 * n], dealt[2 * n + 1]))
        for n, pair in enumerate(pairs)
    ]


def swapped(pair: Pair) -> Pair:
    """The pair with observations that contradict the better answer and support the worse.

    Calendar: the tool says what the worse answer says. Weather: what the worse answer says stands in the place of the
    value that was asked for. Calculator and code: each answer gets the verdict on the other.

    Examples
    --------
    >>> pair = Pair("calendar", "Which day is 2023-03-04?", ("Saturday", "Sunday"), ("Saturday", "Saturday"))
    >>> swapped(pair).observations
    ('Sunday', 'Sunday')
    """
    if pair.task in ("calculator", "code"):
        told = (pair.observations[1], pair.observations[0])
    elif pair.task == "calendar":
        told = (pair.answers[1].split()[-1],) * 2
    else:
        asked = re.match(r"What is the (.*?) (?:like )?in ", pair.question)
        found = _VALUE.search(pair.answers[1])
        if asked is None or found is None:
            raise ValueError(f"no value can be read from {pair.question!r} and {pair.answers[1]!r}")
        value, name = found.group(1) or found.group(2), re.escape(asked.group(1))
        first, second = (
            re.sub(rf"({name}: )[^;,]*", lambda match: match.group(1) + value, text, count=1)
            for text in pair.observations
        )
        told = (first, second)
    return Pair(pair.task, pair.question, pair.answers, told)
