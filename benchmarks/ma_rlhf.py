"""Where the time of a PPO iteration goes, and what macro actions add to it.

    python benchmarks/ma_rlhf.py            # some minutes on one core; adds to benchmarks/results/ma_rlhf.jsonl
    python benchmarks/ma_rlhf.py --quick    # half a minute; prints, and writes only with --out

1. Iterations (rollout and update) of token PPO and of each kind of macro action on one small Llama, in the same rounds, as
   a ratio to token PPO. Responses have a fixed length, so that all do the same work.
2. Shares of generation, measuring (log-probabilities and values), credit (token rewards, segments, advantages) and update.
3. Credit alone at T = 512 and B = 64: the segmenter and macro GAE beside token GAE.

On the CPU torch gets one thread, and times are CPU time. Nothing measured here says anything about a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labkit.lab import bench
from labkit.rlhf import (
    FixedNgram,
    PerplexityRise,
    PPOConfig,
    PPOTrainer,
    RandomNgram,
    ValueModel,
    WholeResponse,
    gae,
    macro_gae,
)

RESULTS = Path(__file__).resolve().parent / "results" / "ma_rlhf.jsonl"
TOKEN = "token PPO"
RULES: dict[str, dict[str, Any]] = {
    TOKEN: {},
    "groups of 5": {"segmenter": FixedNgram(5)},
    "groups of 5, joint ratio": {"segmenter": FixedNgram(5), "ratio": "joint"},
    "random groups": {"segmenter": RandomNgram()},
    "perplexity": {"segmenter": PerplexityRise()},
    "whole response": {"segmenter": WholeResponse()},
}
PHASES = ("generate", "measure", "reward", "hooks", "credit")


def small_llama() -> LlamaForCausalLM:
    """Four layers of width 128; the same weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def share_of_sevens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that costs next to nothing."""
    return [ids.count(7) / len(ids) for ids in completion_ids]


class Fitted:
    """A trainer of one kind, and the CPU seconds of the parts of its iterations."""

    def __init__(
        self,
        device: str,
        length: int,
        reward: Any = share_of_sevens,
        hooks: Sequence[Any] = (),
        **changes: Any,
    ) -> None:
        config = PPOConfig(
            iterations=10_000, batch_size=16, max_new_tokens=length, eos_token_id=None, learning_rate=1e-6
        )
        self.trainer = PPOTrainer(
            small_llama().to(device),
            reward,
            replace(config, **changes),
            [{"input_ids": list(range(3, 3 + length))} for length in range(4, 12)],
            value_model=ValueModel.from_backbone(small_llama().to(device)),
            token_rewards=hooks,
        )
        if device == "cpu":
            self.trainer.collector.clock = time.process_time
        self.course = iter(self.trainer)
        self.parts: list[dict[str, float]] = []

    def job(self, watch: bench.Stopwatch) -> float:
        """One iteration."""
        began = self.trainer.collector._now()
        with watch("iteration"):
            record = next(self.course)
        total = self.trainer.collector._now() - began
        self.parts.append(self.trainer.collector.seconds | {"all": total})
        return float(record["val/response_length"])

    def shares(self) -> dict[str, float]:
        """Median share of each part; the update is what the rollout leaves."""
        found = {
            phase: statistics.median(part.get(phase, 0.0) / part["all"] for part in self.parts[1:])
            for phase in PHASES
        }
        return found | {"update and bookkeeping": 1 - sum(found.values())}


def print_shares(fitted: dict[str, Fitted]) -> None:
    """A table of the parts of an iteration."""
    columns = [*PHASES, "update and bookkeeping"]
    print(f"{'share of the iteration':28}" + "".join(f"{name.split()[0]:>12}" for name in columns))
    for name, one in fitted.items():
        shares = one.shares()
        print(f"{name:28}" + "".join(f"{shares[column]:12.2%}" for column in columns))
    print()


def split_records(fitted: dict[str, Fitted], setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The same for the results."""
    return [
        {
            "kind": "split",
            "op": "PPO iteration",
            "provider": name,
            "setting": setting,
            "shares": {key: round(value, 5) for key, value in one.shares().items()},
            "environment": bench.environment(),
        }
        for name, one in fitted.items()
    ]


def credit(device: str, rule: Callable[..., torch.Tensor] | None) -> Callable[[bench.Stopwatch], float]:
    """Segments and advantages of 64 responses of 512 tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (64, 512), generator=generator).to(device)
    rewards, values = (torch.randn(64, 512, generator=generator).to(device) for _ in range(2))
    mask = torch.ones_like(tokens, dtype=torch.bool)

    def run(watch: bench.Stopwatch) -> float:
        with watch("credit"):
            for _ in range(5):
                if rule is None:
                    advantages, _ = gae(rewards, values, mask)
                else:
                    advantages, _ = macro_gae(rewards, values, rule(tokens, mask, values, None), mask)
        return float(advantages[:, -1].sum())

    return run


def main() -> None:
    options = bench.options(__doc__, RESULTS, rounds=7)
    length = 32 if options.quick else 128
    names = [TOKEN, "groups of 5", "perplexity"] if options.quick else list(RULES)
    fitted = {name: Fitted(options.device, length, **RULES[name]) for name in names}
    setting = {"model": "llama 4x128, value model alike", "batch": 16, "response": length, "dtype": "float32"}

    def check(found: Any) -> None:
        assert all(value == length for value in found.values()), found

    race = bench.race(
        {name: fitted[name].job for name in names},
        TOKEN,
        rounds=options.rounds,
        name="PPO iteration",
        setting=setting,
        check=check,
        device=options.device,
    )
    print(race, end="\n\n")
    records: list[dict[str, Any]] = race.records()
    print_shares(fitted)
    records += split_records(fitted, setting)
    rules = {name: RULES[name].get("segmenter") for name in names if "ratio" not in RULES[name]}
    race = bench.race(
        {name: credit(options.device, rule) for name, rule in rules.items()},
        TOKEN,
        rounds=options.rounds,
        name="credit",
        setting={"batch": 64, "response": 512, "calls": 5},
        device=options.device,
    )
    print(race)
    records += race.records()
    if options.out is not None:
        bench.append(options.out, records)


if __name__ == "__main__":
    main()
