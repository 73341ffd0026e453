"""What curiosity, a calibrated reward and a tool's reward add to a PPO iteration, alone and with macro actions.

    python benchmarks/cd_rlhf.py            # some minutes on one core; adds to benchmarks/results/cd_rlhf.jsonl
    python benchmarks/cd_rlhf.py --quick    # half a minute; prints, and writes only with --out

1. Iterations (rollout and update) of token PPO and of each variant on one small Llama, in the same rounds, as a ratio to
   token PPO. Responses have a fixed length, so that all do the same work. The calibration's window is full from the start,
   so that each of its fits costs what it costs late in a run.
2. Shares of generation, measuring (log-probabilities and values), reward, hooks (what curiosity pays), credit (token
   rewards, segments, advantages) and update, and of the curiosity module's own learning within the update.

On the CPU torch gets one thread, and times are CPU time. Nothing measured here says anything about a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ma_rlhf import TOKEN, Fitted, print_shares, share_of_sevens, split_records

from labkit.lab import bench
from labkit.rlhf import (
    Calculator,
    CalibratedRewardModel,
    CuriosityReward,
    FixedNgram,
    GateBonus,
    RunningLowess,
    ToolBank,
)

RESULTS = Path(__file__).resolve().parent / "results" / "cd_rlhf.jsonl"


def letters(completions: Sequence[Sequence[int]]) -> list[int]:
    """Length in characters, as if token t were a word of 1 to 12 letters."""
    return [sum(1 + token % 12 for token in ids) for ids in completions]


def calibrated(length: int) -> CalibratedRewardModel:
    """The plain reward under a running calibration whose window is full."""
    rng = np.random.default_rng(0)
    running = RunningLowess(window=4096)
    lengths = rng.normal(6.5 * length, 3.5 * length**0.5, 4096)
    running.update(np.maximum(lengths, 0), rng.normal(size=4096))
    return CalibratedRewardModel(share_of_sevens, running, letters)


def calculator() -> Callable[..., list[float]]:
    """The calculator's verdict on a worked answer that the first six tokens spell out."""
    verdict = ToolBank([Calculator()]).as_reward_fn(action="calculator")

    def checked(prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        worked = [
            f"<<{a}+{b}={c}>>{c}, <<{c}*{d}={e}>>{e} #### {f}"
            for a, b, c, d, e, f in (ids[:6] for ids in completion_ids)
        ]
        return verdict([""] * len(worked), worked)

    return checked


def variants(device: str, length: int) -> dict[str, Fitted]:
    """Trainers by name."""
    return {
        TOKEN: Fitted(device, length),
        "curiosity": Fitted(device, length, hooks=[CuriosityReward()]),
        "constant bonus": Fitted(device, length, hooks=[GateBonus()]),
        "running calibration": Fitted(device, length, calibrated(length)),
        "calculator": Fitted(device, length, [share_of_sevens, calculator()]),
        "all, groups of 5": Fitted(
            device, length, [calibrated(length), calculator()], [CuriosityReward()], segmenter=FixedNgram(5)
        ),
    }


class Timed:
    """Seconds that a hook's learning takes."""

    def __init__(self, fitted: Fitted, hook: Any) -> None:
        self.seconds: list[float] = []
        learn, now = hook.update, fitted.trainer.collector._now

        def timed(batch: Any) -> None:
            began = now()
            learn(batch)
            self.seconds.append(now() - began)

        hook.update = timed


def main() -> None:
    options = bench.options(__doc__, RESULTS, rounds=7)
    length = 32 if options.quick else 128
    fitted = variants(options.device, length)
    learning = {
        name: Timed(one, hook)
        for name, one in fitted.items()
        for hook in one.trainer.token_rewards
        if hasattr(hook, "update")
    }
    setting = {"model": "llama 4x128, value model alike", "batch": 16, "response": length, "dtype": "float32"}

    def check(found: Any) -> None:
        assert all(value == length for value in found.values()), found

    race = bench.race(
        {name: one.job for name, one in fitted.items()},
        TOKEN,
        rounds=options.rounds,
        name="PPO iteration",
        setting=setting,
        check=check,
        device=options.device,
    )
    print(race, end="\n\n")
    print_shares(fitted)
    records: list[dict[str, Any]] = race.records() + split_records(fitted, setting)
    for name, timed in learning.items():
        share = statistics.median(
            seconds / part["all"] for seconds, part in zip(timed.seconds, fitted[name].parts, strict=True)
        )
        print(f"{name}: the curiosity module's own learning is {share:.1%} of the iteration")
        records.append(
            {
                "kind": "split",
                "op": "curiosity's learning",
                "provider": name,
                "setting": setting,
                "shares": {"learning": round(share, 5)},
                "environment": bench.environment(),
            }
        )
    if options.out is not None:
        bench.append(options.out, records)


if __name__ == "__main__":
    main()
