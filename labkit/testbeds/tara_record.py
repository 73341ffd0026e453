"""Everything that is recorded of the released tool-augmented reward data.

``python -m labkit.testbeds.tara_record`` measures it, in about nine minutes on one core, and writes
``recordings/themis.json``; `judged` alone, what tools are worth to a linear reward, takes two and a half.
The data is found by :func:`labkit.testbeds.data.find` under the name ``themis``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from labkit.lab.bench import environment
from labkit.rlhf.themis import load_tara, parse_actions, replay
from labkit.rlhf.themis.replaying import ANSWERS
from labkit.testbeds import data, recorded, tara_planner, tara_rewards
from labkit.testbeds.tara import FINAL, TASKS, Pair, bank, read

#: What the calculator's replies begin with, by what they say of an answer's sums and of the number at its end.
_REPLIES = {
    "nothing wrong": "Both the calculation and the answer are correct",
    "right sums, another end": "The calculation process is correct, but",
    "wrong sums": "The calculation process is incorrect, but",
    "wrong sums, another end": "Both the calculation and the answer are incorrect",
    "no number": "No valid answer",
}


def _replies(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """How many better and how many worse answers get each of the calculator's replies."""
    return {
        name: [sum(pair.observations[which].startswith(said) for pair in pairs) for which in (0, 1)]
        for name, said in _REPLIES.items()
    }


def _facts(pairs: Sequence[Pair]) -> dict[str, Any]:
    ends = [[FINAL.findall(answer) for answer in pair.answers] for pair in pairs]
    sums = {
        "same final number": round(float(np.mean([a == b for a, b in ends])), 3),
        "replies": _replies(pairs),
    }
    return {
        "pairs": len(pairs),
        "longer better answer": round(
            float(np.mean([len(p.answers[0]) > len(p.answers[1]) for p in pairs])), 3
        ),
        "same observation": round(float(np.mean([p.observations[0] == p.observations[1] for p in pairs])), 3),
        **(sums if pairs[0].task == "calculator" else {}),
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


def judged(trainings: Sequence[str] = ("single",)) -> dict[str, Any]:
    """What tools are worth to a linear reward on the released pairs, measured now: 2.5 minutes, mostly of code.

    See :func:`labkit.testbeds.tara_rewards.judged`.

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    tools = bank()
    train, test = ({task: read(task, name, tools) for task in TASKS} for name in ("train", "test"))
    return tara_rewards.judged(train, test, trainings)


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
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    where = environment() | {
        "scikit-learn": importlib.metadata.version("scikit-learn"),
        "data": "TARA, commit 1601b5f6 of ernie-research/Tool-Augmented-Reward-Model",
    }

    def keep(found: dict[str, Any]) -> None:
        recorded.write("themis", found, where)
        print(*found, flush=True)

    measure(keep)


if __name__ == "__main__":
    main()
