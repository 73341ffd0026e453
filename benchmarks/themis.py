"""What judging with tools costs: many traces at a time against one by one, the tools' own time, and the plain score.

    python benchmarks/themis.py            # about two minutes on one core; adds to results/themis.jsonl
    python benchmarks/themis.py --quick    # seconds; prints, and writes only with --out

1. Traces: 32 answers judged in batches of 16 and of 1, and scored without a trace, by an untrained model that is made to
   write 24 tokens a round. Batches must give the rewards of one by one before they are timed.
2. Reading on: the same answers with a context of 100 and of 1000 tokens, judged with two calls and a rationale (three
   rounds, dictated to an untrained model), with keys and values kept between rounds and without. Rewards must agree.
3. Tools: calls a second of each.

On the CPU torch gets one thread, and ratios are of CPU time. Nothing measured here says anything about a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from labkit.lab import bench
from labkit.rlhf import (
    BM25Search,
    Calculator,
    Calendar,
    CodeRunner,
    ThemisRewardModel,
    Tool,
    ToolBank,
    WeatherCache,
    run_traces,
)
from labkit.rlhf.themis.traces import Example, TraceFormat
from labkit.testbeds import tool_questions
from labkit.testbeds.corpus import stdlib_text
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import byte_tokenizer

RESULTS = Path(__file__).resolve().parent / "results" / "themis.jsonl"


def race_traces(rounds: int, width: int) -> bench.Race:
    """Judge answers in batches and one by one."""
    tokenizer = byte_tokenizer()
    base = tiny(
        "llama", width=width, layers=2, heads=4, vocab=len(tokenizer), seed=0, max_position_embeddings=1024
    )
    model = ThemisRewardModel.from_causal_lm(base, tokenizer)
    rows = tool_questions.rows("calendar", 16, seed=0)
    examples = [
        Example(row["question"], row[which]["answer"])
        for row in rows
        for which in ("pos_answer", "neg_answer")
    ]
    form = TraceFormat()

    def judge(batch_size: int) -> Callable[[bench.Stopwatch], list[float]]:
        def run(watch: bench.Stopwatch) -> list[float]:
            with watch("judge"):
                options = {"batch_size": batch_size, "max_new_tokens": 24, "min_new_tokens": 24}
                traces = run_traces(model, tokenizer, ToolBank([Calendar()]), examples, **options)  # type: ignore[arg-type]
            return [trace.reward or 0.0 for trace in traces]

        return run

    @torch.no_grad()
    def score(watch: bench.Stopwatch) -> list[float]:
        texts = [form.plain(example.question, example.answer) + tokenizer.eos_token for example in examples]
        with watch("judge"):
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            return model(batch["input_ids"], batch["attention_mask"]).rewards.tolist()

    def check(found: Mapping[str, list[float]]) -> None:
        one, many = torch.tensor(found["one by one"]), torch.tensor(found["batches of 16"])
        if not torch.allclose(one, many, atol=1e-4):
            raise ValueError(f"rewards differ by up to {float((one - many).abs().max()):.2g}")

    return bench.race(
        {"one by one": judge(1), "batches of 16": judge(16), "no trace": score},
        "one by one",
        rounds=rounds,
        name=f"32 answers judged, D={width}",
        setting={"width": width, "answers": 32},
        check=check,
    )


SCRIPT = (
    " Thought: I need the weekday.\nAction: Calendar.week_day\nAction Input: 2015-03-24\n<start_observation>",
    "<start_tool> Thought: Again.\nAction: Calendar.week_day\nAction Input: 2015-03-25\n<start_observation>",
    "<start_work> Work: The tool says Tuesday.",
)


class _Dictate(LogitsProcessor):
    def __init__(self, tokens: list[int], width: int) -> None:
        self.tokens, self.width = tokens, width

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        out = torch.full_like(scores, -torch.inf)
        out[:, self.tokens[input_ids.shape[1] - self.width]] = 0
        return out


class Dictated(ThemisRewardModel):
    """Writes `SCRIPT`, one piece a round, at the cost of a model that writes it by itself."""

    tokenizer: Any
    round = 0

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The next piece."""
        said = self.tokenizer(SCRIPT[self.round % len(SCRIPT)])["input_ids"] + [self.tokenizer.eos_token_id]
        hand = LogitsProcessorList([_Dictate(said, kwargs["input_ids"].shape[1])])
        self.round += 1
        return super().generate(*args, logits_processor=hand, **kwargs)


def race_reading(rounds: int, width: int, context: int) -> bench.Race:
    """Judge answers in three rounds, reading on and reading everything again."""
    tokenizer = byte_tokenizer()
    base = tiny(
        "llama", width=width, layers=4, heads=4, vocab=len(tokenizer), seed=0, max_position_embeddings=2048
    )
    model = Dictated.from_causal_lm(base, tokenizer)
    model.tokenizer = tokenizer
    texts = stdlib_text()
    pairs = tool_questions.rows("calendar", 8, seed=0)
    examples = [
        Example(row["question"], row["pos_answer"]["answer"], texts[place * 5000 :][: context - 7 * place])
        for place, row in enumerate(pairs)
    ]

    def judge(reuse: bool) -> Callable[[bench.Stopwatch], list[float]]:
        def run(watch: bench.Stopwatch) -> list[float]:
            with watch("judge"):
                traces = run_traces(
                    model, tokenizer, ToolBank([Calendar()]), examples, batch_size=8, reuse_cache=reuse
                )
            if any(len(trace.steps) != 2 or trace.finished != "work" for trace in traces):
                raise ValueError("a trace did not take its three rounds")
            return [trace.reward or 0.0 for trace in traces]

        return run

    def check(found: Mapping[str, list[float]]) -> None:
        again, on = torch.tensor(found["reading again"]), torch.tensor(found["reading on"])
        if not torch.allclose(again, on, atol=1e-4):
            raise ValueError(f"rewards differ by up to {float((again - on).abs().max()):.2g}")

    return bench.race(
        {"reading again": judge(False), "reading on": judge(True)},
        "reading again",
        rounds=rounds,
        name=f"three rounds, context of {context} tokens, D={width}",
        setting={"width": width, "answers": len(examples), "context": context},
        check=check,
    )


def tools(seconds: float) -> list[dict[str, Any]]:
    """Calls a second of each tool."""
    passages = [piece for piece in stdlib_text()[:2_000_000].split("\n\n") if len(piece) > 80][:5000]
    store = tool_questions.weather_store()
    code = {"answer": "def f(x): return x * x", "test_list": ["assert f(2) == 4", "assert f(3) == 9"]}
    cases: list[tuple[Tool, str, str, dict[str, Any]]] = [
        (Calculator(), "calculator", "<<40*4=160>>160, <<160-60=100>>100", {"answer": "#### 100"}),
        (Calendar(), "Calendar.target_day", "2023-03-04, 64", {}),
        (WeatherCache(store), "history_weather", next(iter(store)), {}),
        (BM25Search(passages), "wiki_search", "how to open a file and read its lines", {}),
        (CodeRunner(), "code_run", "Same as the answer", code),
    ]
    rows = []
    for tool, action, given, state in cases:
        bank = ToolBank([tool])
        bank.call(action, given, state)  # opens what is opened once
        calls, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            bank.call(action, given, state)
            calls += 1
        rate = calls / (time.perf_counter() - began)
        if bank.counts["failed"]:
            raise ValueError(f"{action} failed")
        setting = {"passages": len(passages)} if action == "wiki_search" else {}
        rows.append(
            {
                "kind": "throughput",
                "op": action,
                "setting": setting,
                "per_second": rate,
                "environment": bench.environment(),
            }
        )
        print(f"{action:20} {rate:10.0f} calls a second")
    return rows


def main() -> None:
    options = bench.options(__doc__, RESULTS, rounds=3, devices=False)
    race = race_traces(options.rounds, 64 if options.quick else 128)
    print(race, end="\n\n")
    records = race.records()
    for context in (100, 1000):
        race = race_reading(options.rounds, 32 if options.quick else 128, context)
        print(race, end="\n\n")
        records += race.records()
    records += tools(0.3 if options.quick else 1.0)
    if options.out is not None:
        print(f"added {len(records)} records to {bench.append(options.out, records)}")


if __name__ == "__main__":
    main()
