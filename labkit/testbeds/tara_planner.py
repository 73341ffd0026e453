"""A small language model that learns to call the calendar, from traces made by rule in the words of the released data.

Questions are those of the released training file with other dates and numbers; what the tool says is computed. The
model learns the traces by next-token loss, and is tried on the released test questions, whose wordings it has mostly
met and whose dates it has not. What counts is whether every call, action and input, is the stored one to the letter.
"""

from __future__ import annotations

import datetime
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from labkit.rlhf.themis import (
    Calendar,
    ThemisCollator,
    ThemisLoss,
    ThemisRewardModel,
    ToolBank,
    TraceFormat,
    load_tara,
    parse_actions,
    run_traces,
)
from labkit.rlhf.themis.replaying import ANSWERS
from labkit.testbeds import data
from labkit.testbeds.tara import Pair
from labkit.testbeds.tara_rewards import BradleyTerry
from labkit.testbeds.tool_questions import DAYS, word_tokenizer
from labkit.testbeds.training import train_steps

__all__ = ["SEEDS", "STEPS", "anew", "measure", "planner", "train", "tried"]

SEEDS = (0, 1, 2)
STEPS = 800
#: Texts a step: a better and a worse answer to each of 16 questions.
BATCH = 32
#: What the released training questions span.
FIRST, LAST, FARTHEST = datetime.date(2000, 1, 1), datetime.date(2022, 12, 31), 364
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_FACT = re.compile(r"\d{4}-\d\d-\d\d|\d+")
_BANK = ToolBank([Calendar()])


def anew(row: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """A row of the released calendar data with other dates and numbers, and with what the calendar then says.

    Parameters
    ----------
    row : dict
        With ``question``, ``pos_answer`` and ``neg_answer``.
    rng : random.Random

    Returns
    -------
    dict
        Of the same form; the wrong value is drawn among those that the tool could have said.
    """
    (step,) = parse_actions(row["pos_answer"]["actions"])
    facts = list(dict.fromkeys(_FACT.findall(f"{row['question']}\n{step.action_input}")))
    days = (LAST - FIRST).days
    other = {}
    for fact in facts:
        if _DATE.fullmatch(fact):
            other[fact] = f"{FIRST + datetime.timedelta(days=rng.randrange(days + 1))}"
        else:
            other[fact] = str(rng.randrange(1, FARTHEST))
    change = lambda text: _FACT.sub(lambda found: other.get(found.group(), found.group()), text)  # noqa: E731
    given = change(step.action_input)
    right = wrong = _BANK.call(step.action, given)
    while wrong == right:
        if step.action.endswith("week_day"):
            wrong = rng.choice(DAYS)
        elif step.action.endswith("difference"):
            wrong = str(rng.randrange(1, days))
        else:
            wrong = f"{FIRST + datetime.timedelta(days=rng.randrange(days + 1))}"
    wording = change(row["pos_answer"]["answer"].rsplit(" ", 1)[0])
    call = {
        "Thought": change(step.thought),
        "Action": step.action,
        "Action Input": given,
        "Observation": right,
    }
    sides = {
        which: {"answer": f"{wording} {said}", "actions": call}
        for which, said in zip(ANSWERS, (right, wrong), strict=True)
    }
    return {"question": change(row["question"]), **sides}


def planner(rows: Sequence[Mapping[str, Any]], seed: int) -> tuple[ThemisRewardModel, ThemisCollator]:
    """An untrained model of two layers, and the collator that makes its batches; it knows the words of `rows`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    form, texts = TraceFormat(), [" ".join(["", *DAYS]), "".join(f"\n{digit}" for digit in range(10))]
    for row in rows:
        for which in ANSWERS:
            texts.append(form.prompt(row["question"], row[which]["answer"]))
            texts.append(form.trace(parse_actions(row[which]["actions"])))
    tokenizer = word_tokenizer(texts)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # No ranking and no rationale: the planner alone is trained here.
    model = ThemisRewardModel.from_causal_lm(
        LlamaForCausalLM(config), tokenizer, loss=ThemisLoss(rm_weight=0)
    )
    return model, ThemisCollator(tokenizer, imitate=False)


def train(
    rows: Sequence[Mapping[str, Any]], seed: int, steps: int = STEPS
) -> tuple[ThemisRewardModel, ThemisCollator, list[float]]:
    """Train a planner on questions like those of `rows`; also the loss of each step."""
    model, collator = planner(rows, seed)
    rng = random.Random(seed)

    def batches() -> Iterator[Mapping[str, torch.Tensor]]:
        while True:
            yield collator([anew(rng.choice(rows), rng) for _ in range(BATCH // 2)])

    model.train()
    losses = [
        step.loss
        for step in train_steps(
            model,  # type: ignore[arg-type]
            batches(),
            steps,
            lr=3e-3,
            warmup=0.1,
            loss=lambda model, batch: model(**batch).loss,
        )
    ]
    return model.eval(), collator, losses


def tried(
    model: ThemisRewardModel, collator: ThemisCollator, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The calls that a planner makes to judge each answer, beside those that are stored.

    Returns
    -------
    list of dict
        For each row, better answer before worse: ``right`` (every call to the letter, and no other), ``action`` (every
        action), ``calls`` (action and input of each), ``observation`` (what its calls brought, one a line).
    """
    examples = [(row["question"], row[which]["answer"]) for row in rows for which in ANSWERS]
    stored = [parse_actions(row[which]["actions"]) for row in rows for which in ANSWERS]
    traces = run_traces(
        model, collator.tokenizer, _BANK, examples, rationale=False, max_new_tokens=80, batch_size=64
    )
    out = []
    for trace, steps in zip(traces, stored, strict=True):
        calls = [(step.action, step.action_input) for step in trace.steps if step.action]
        wanted = [(step.action, step.action_input) for step in steps]
        out.append(
            {
                "right": calls == wanted,
                "action": [name for name, _ in calls] == [name for name, _ in wanted],
                "calls": calls,
                "observation": "\n".join(step.observation for step in trace.steps if step.action),
            }
        )
    return out


def measure(judge_on: Sequence[Pair], seeds: Sequence[int] = SEEDS, steps: int = STEPS) -> dict[str, Any]:
    """Train planners and try them on the released test questions.

    Parameters
    ----------
    judge_on : sequence of Pair
        Training pairs of the `BradleyTerry` rewards that judge with what the planner's calls bring, and without.
    seeds : sequence of int
    steps : int

    Returns
    -------
    dict
        By seed, in lists: ``exact`` and ``action``, shares of the traces (one for each answer) with all calls to the
        letter and all actions right; ``accuracy`` of the reward that reads the planner's observations; ``loss`` every
        50 steps; ``seconds`` of CPU. And ``text``, the accuracy of the reward without tools.

    Raises
    ------
    FileNotFoundError
        Without the data.
    """
    folder = data.find("themis")
    rows, test = load_tara(folder, "calendar_train"), load_tara(folder, "calendar_test")
    with_tool, without = BradleyTerry(True).fit(judge_on), BradleyTerry(False).fit(judge_on)
    out: dict[str, Any] = {"seeds": list(seeds), "steps": steps, "questions": len(test)}
    kept: dict[str, list[Any]] = {
        name: [] for name in ("exact", "action", "accuracy", "loss", "seconds", "wrong")
    }
    for seed in seeds:
        start = time.process_time()
        model, collator, losses = train(rows, seed, steps)
        found = tried(model, collator, test)
        pairs = [
            Pair(
                "calendar",
                row["question"],
                (row["pos_answer"]["answer"], row["neg_answer"]["answer"]),
                (found[2 * n]["observation"], found[2 * n + 1]["observation"]),
            )
            for n, row in enumerate(test)
        ]
        wrong = [
            {"question": test[n // 2]["question"], "calls": row["calls"]}
            for n, row in enumerate(found)
            if not row["right"]
        ]
        values = {
            "exact": round(sum(row["right"] for row in found) / len(found), 4),
            "action": round(sum(row["action"] for row in found) / len(found), 4),
            "accuracy": round(with_tool.accuracy(pairs), 4),
            "loss": [round(loss, 4) for loss in losses[49::50]],
            "seconds": round(time.process_time() - start, 1),
            "wrong": wrong[:5],
        }
        for name, value in values.items():
            kept[name].append(value)
    parameters = sum(weight.numel() for weight in model.causal_lm.parameters())
    return {**out, **kept, "text": round(without.accuracy(pairs), 4), "parameters": parameters}
