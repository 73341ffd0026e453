"""Whole jobs against one another, phase by phase."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labkit.lab.bench.measure import Sample, clock_of, median_interval, peak_memory, timed
from labkit.lab.bench.records import append, columns, environment, megabytes


class Stopwatch:
    """Handed to the jobs of :func:`race`: ``with watch("prefill"): ...`` times a phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.phases: dict[str, Sample] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with timed(self._device) as sample:
            yield
        self.phases[phase] = self.phases[phase] + sample if phase in self.phases else sample


@dataclass
class Race:
    """What :func:`race` found: by phase and provider, seconds and the ratio to the baseline (below 1 is faster)."""

    name: str
    baseline: str
    setting: dict[str, Any]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]

    def ratio(self, phase: str, provider: str) -> float:
        """Median over the rounds of a provider's time / the baseline's."""
        for row in self.rows:
            if (row["phase"], row["provider"]) == (phase, provider):
                return float(row["time_ratio"])
        known = sorted({(row["phase"], row["provider"]) for row in self.rows})
        raise ValueError(f"no phase {phase!r} of provider {provider!r}; there are {known}")

    def records(self) -> list[dict[str, Any]]:
        """One record a phase and provider, each with the machine, ready for :func:`append`."""
        common = {"kind": "race", "race": self.name, "baseline": self.baseline, "setting": self.setting}
        return [{**common, **row, "environment": self.environment} for row in self.rows]

    def __str__(self) -> str:
        table = [["provider", "phase", "ms", f"time / {self.baseline}", "90% interval", "peak MB"]]
        table += [
            [
                row["provider"],
                row["phase"],
                f"{row['seconds'] * 1e3:.2f}",
                f"{row['time_ratio']:.3f}",
                f"{row['low']:.3f}-{row['high']:.3f}",
                megabytes(row["memory"]),
            ]
            for row in self.rows
        ]
        return f"{self.name}\n{columns(table)}"


def race(
    jobs: Mapping[str, Callable[[Stopwatch], Any]],
    baseline: str,
    *,
    rounds: int = 5,
    name: str = "",
    setting: Mapping[str, Any] | None = None,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    device: str | torch.device = "cpu",
    memory: bool = False,
    path: str | Path | None = None,
) -> Race:
    """Time several whole jobs against one of them, phase by phase.

    Every round runs all jobs forwards and then backwards (A B C C B A). Only what stands inside
    ``with watch(phase):`` is timed.

    Parameters
    ----------
    jobs : mapping of str to callable
        Provider to a function of a :class:`Stopwatch`; each must time the same phases.
    baseline : str
        The provider that ratios are taken to.
    rounds : int, default 5
        Rounds, after one of warming.
    name, setting
        What is run, for the records.
    check : callable, optional
        Sees what each job returned in the warming round, and raises AssertionError if the race would be unfair.
    device : str or torch.device, default "cpu"
        Where the jobs run; decides the clock.
    memory : bool, default False
        Whether to measure each job's peak memory (whole job, not by phase), in a run of its own.
    path : path, optional
        File of JSON lines to which the records are added.

    Examples
    --------
    >>> def job(n):
    ...     def run(watch):
    ...         x = torch.randn(n)
    ...         with watch("sort"):
    ...             return x.sort().values
    ...     return run
    >>> found = race({"long": job(200_000), "short": job(1000)}, "long", rounds=3)
    >>> found.ratio("sort", "short") < 1
    True
    """
    if baseline not in jobs:
        raise ValueError(f"baseline {baseline!r} is none of the jobs {sorted(jobs)}")
    if rounds < 3:
        raise ValueError(f"an interval needs at least 3 rounds; got {rounds}")
    device = torch.device(device)
    clock = clock_of(device)
    results: dict[str, Any] = {}
    peaks: dict[str, int | None] = dict.fromkeys(jobs)
    phases: list[str] = []
    for provider, job in jobs.items():
        if memory:
            kept: list[Any] = []

            def work(job: Callable[[Stopwatch], Any] = job, kept: list[Any] = kept) -> None:
                kept.append(job(Stopwatch(device)))

            peaks[provider] = peak_memory(work, device)
            results[provider] = kept.pop()
        else:
            results[provider] = job(Stopwatch(device))
    if check is not None:
        check(results)
    del results

    samples: dict[str, list[Stopwatch]] = {provider: [] for provider in jobs}
    for _ in range(rounds):
        for provider in (*jobs, *reversed(tuple(jobs))):
            watch = Stopwatch(device)
            jobs[provider](watch)
            phases = phases or list(watch.phases)
            if list(watch.phases) != phases:
                raise ValueError(f"{provider!r} timed the phases {list(watch.phases)}, another job {phases}")
            samples[provider].append(watch)

    def by_round(provider: str, phase: str, by: str) -> list[float]:
        # within a round the two runs of a provider stand at mirrored places: taken together, drift cancels
        single = [watch.phases[phase].by(by) for watch in samples[provider]]
        return [(a + b) / 2 for a, b in zip(single[::2], single[1::2], strict=True)]

    rows = []
    for phase in phases:
        for provider in jobs:
            ours, theirs = by_round(provider, phase, clock), by_round(baseline, phase, clock)
            ratio, low, high = median_interval([a / max(b, 1e-12) for a, b in zip(ours, theirs, strict=True)])
            rows.append(
                {
                    "phase": phase,
                    "provider": provider,
                    "time_ratio": ratio,
                    "low": low,
                    "high": high,
                    "rounds": rounds,
                    "clock": clock,
                    "seconds": float(np.median(ours)),
                    "wall_seconds": float(np.median(by_round(provider, phase, "wall"))),
                    "cpu_seconds": float(np.median(by_round(provider, phase, "cpu"))),
                    "memory": peaks[provider],
                }
            )
    found = Race(name, baseline, dict(setting or {}), rows, environment())
    if path is not None:
        append(path, found.records())
    return found
