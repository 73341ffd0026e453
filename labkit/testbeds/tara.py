"""Pairs of the released tool-augmented reward data, which labkit does not ship, with tools that run.

Observations are made anew, by the tool, on the answer at hand; stored observations, thoughts and rationales are never
read. Stored verdicts on worse training answers of the calculator were made with another answer, and rationales tell the
label. Rewards that learn from the pairs are in :mod:`labkit.testbeds.tara_rewards`, a small model that learns to call in
:mod:`labkit.testbeds.tara_planner`.

``python -m labkit.testbeds.tara`` measures everything, in about nine minutes on one core, and writes
``recordings/themis.json``. The files are found by :func:`labkit.testbeds.data.find` under the name ``themis``.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
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
    replay,
)
from labkit.testbeds import data

__all__ = [
    "TASKS",
    "Pair",
    "bank",
    "measure",
    "observe",
    "read",
    "shuffled",
    "swapped",
    "with_final",
]

#: Tasks that come with training pairs and a tool that runs here.
TASKS = ("calendar", "calculator", "weather", "code", "multi_tools")
ANSWERS = ("pos_answer", "neg_answer")
_FINAL = re.compile(r"####.*", re.DOTALL)
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
    found = _FINAL.search(other)
    body = _FINAL.sub("", answer).rstrip()
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
        sides = [
            observe(task, {**row, "neg_answer": worse}, which, tools)
            for which in ("pos_answer", "neg_answer")
        ]
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


def _facts(pairs: Sequence[Pair]) -> dict[str, float]:
    ends = [[_FINAL.findall(answer) for answer in pair.answers] for pair in pairs]
    same_end = {"same final number": round(float(np.mean([a == b for a, b in ends])), 3)}
    return {
        "pairs": len(pairs),
        "longer better answer": round(
            float(np.mean([len(p.answers[0]) > len(p.answers[1]) for p in pairs])), 3
        ),
        "same observation": round(float(np.mean([p.observations[0] == p.observations[1] for p in pairs])), 3),
        **(same_end if pairs[0].task == "calculator" else {}),
    }


def _stored(own: Sequence[Pair], given: Sequence[Pair]) -> dict[str, int]:
    """Stored observations on the calculator's training answers that come back, by the number that answers end in."""
    rows = load_tara(data.find("themis"), "calculator_train")
    stored = [parse_actions(row[which]["actions"])[0].observation for row in rows for which in ANSWERS]
    count = lambda pairs: sum(  # noqa: E731
        made.strip() == kept.strip()
        for made, kept in zip([told for pair in pairs for told in pair.observations], stored, strict=True)
    )
    return {"answers": len(stored), "own number": count(own), "given number": count(given)}


def _lines(table: Sequence[Mapping[Any, Any]]) -> list[dict[str, Any]]:
    """Rows of a table with whole numbers, and None where there is none."""
    return [
        {
            str(name): value
            if isinstance(value, str)
            else None
            if value is None or value != value
            else int(value)
            for name, value in line.items()
        }
        for line in table
    ]


def _seconds() -> float:
    """CPU seconds of this process and the programs that it ran."""
    return sum(os.times()[:4])


def measure(done: Callable[[dict[str, Any]], Any] = lambda found: None) -> dict[str, Any]:
    """Everything that is recorded.

    Parameters
    ----------
    done : callable
        Called with what there is so far after each part.

    Returns
    -------
    dict
        ``replay``: rows of :func:`labkit.rlhf.themis.replay`. ``facts``: of each task's training and test pairs.
        ``judged``, and ``judged, given`` with ``given`` training pairs of the calculator: see
        :func:`labkit.testbeds.tara_rewards.judged`. ``planner``: see :func:`labkit.testbeds.tara_planner.measure`.
        ``seconds``: CPU seconds of each part.

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    from labkit.testbeds import tara_planner, tara_rewards

    folder = data.find("themis")
    out: dict[str, Any] = {"seconds": {}}

    def part(name: str, values: Mapping[str, Any], since: float) -> float:
        out.update(values)
        out["seconds"][name] = round(_seconds() - since, 1)
        done(out)
        return _seconds()

    now = _seconds()
    now = part("replay", {"replay": _lines(replay(folder).to_dict("records"))}, now)
    tools = bank()
    train, test = ({task: read(task, name, tools) for task in TASKS} for name in ("train", "test"))
    given = read("calculator", "train", tools, given=True)
    facts: dict[str, Any] = {
        task: {"train": _facts(train[task]), "test": _facts(test[task])} for task in TASKS
    }
    facts["calculator"] |= {"train, given": _facts(given), "stored": _stored(train["calculator"], given)}
    now = part("tools", {"facts": facts}, now)
    now = part("judged", {"judged": tara_rewards.judged(train, test)}, now)
    now = part(
        "judged, given", {"judged, given": tara_rewards.judged(train | {"calculator": given}, test)}, now
    )
    part("planner", {"planner": tara_planner.measure(train["calendar"])}, now)
    return out


def main() -> None:
    """Measure and record."""
    import sklearn
    import torch

    from labkit.lab.bench import environment
    from labkit.testbeds import recorded

    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    where = environment() | {
        "scikit-learn": sklearn.__version__,
        "data": "TARA, commit 1601b5f6 of ernie-research/Tool-Augmented-Reward-Model",
    }

    def keep(found: dict[str, Any]) -> None:
        recorded.write("themis", found, where)
        print(*found, flush=True)

    measure(keep)


if __name__ == "__main__":
    main()
