"""Comparing implementations honestly: correctness first, rounds interleaved, spread and losing shapes shown.

:func:`compare` sets a candidate beside a baseline over several shapes, :func:`race` times whole jobs (such as the
prefill and decoding of a model with and without a press). Both time A B B A within each round, so that a drift of
the machine falls on both sides alike, and judge by the median of the rounds' ratios.

The clock is the device's own (CUDA events) on a GPU, the CPU time of the process where torch runs on one thread,
since that does not count what other jobs take from a shared machine, and the wall otherwise. CPU and wall time are
both kept.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.lab.session import environment as _run_environment

__all__ = [
    "Comparison",
    "Point",
    "Race",
    "Stopwatch",
    "append",
    "compare",
    "environment",
    "growth_exponent",
    "peak_memory",
    "race",
    "read",
]

MODES = ("forward", "full")
# atol and rtol of the gate, by the coarsest dtype among the inputs
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


# ---------------------------------------------------------------------------------------------- measuring


def _tensors(value: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Send file descriptor 2 nowhere: the profiler's C++ part announces its start and stop there."""
    try:
        saved = os.dup(2)
    except OSError:  # no such descriptor, nothing to silence
        yield
        return
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_memory(work: Callable[[], Any], device: str | torch.device = "cpu") -> int:
    """Bytes that torch allocates at the worst moment of ``work()``, above what it held before.

    Exact, to the allocation: on CUDA from the allocator's own counter, on the CPU by replaying the allocations and
    releases that torch's profiler logs, temporaries inside operators included. Memory that does not pass through
    torch's allocator (NumPy, the workspace of a BLAS) is not seen.

    Examples
    --------
    >>> x = torch.zeros(1000)
    >>> peak_memory(lambda: (x + x) * x)  # the sum is still held when the product is made
    8000
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _quiet_stderr():
        recorder.__enter__()
    try:
        work()
    finally:
        with _quiet_stderr():
            recorder.__exit__(None, None, None)
    assert recorder.profiler is not None
    results = recorder.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"] if results else []
    events.sort(key=lambda event: event.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()  # type: ignore[attr-defined]
        peak = max(peak, held)
    return peak


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope b of the least-squares fit of ``log(value) = a + b log(size)``: 1 is linear, 2 is quadratic.

    Examples
    --------
    >>> round(growth_exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    if len(sizes) != len(values) or len(sizes) < 2:
        raise ValueError(
            f"needs as many values as sizes, and two at least; got {len(sizes)} and {len(values)}"
        )
    if min(*sizes, *values) <= 0:
        raise ValueError("sizes and values must be positive")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@dataclass
class _Sample:
    """Seconds of one measurement by each clock."""

    wall: float = 0.0
    cpu: float = 0.0
    device: float | None = None

    def __add__(self, other: _Sample) -> _Sample:
        both = None if self.device is None or other.device is None else self.device + other.device
        return _Sample(self.wall + other.wall, self.cpu + other.cpu, both)

    def by(self, clock: str) -> float:
        return {"wall": self.wall, "cpu": self.cpu, "cuda": self.device}[clock] or 0.0


def _clock(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda"
    return "cpu" if torch.get_num_threads() == 1 else "wall"


@contextlib.contextmanager
def _timed(device: torch.device) -> Iterator[_Sample]:
    sample = _Sample()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
    wall, cpu = time.perf_counter(), time.process_time()
    yield sample
    if device.type == "cuda":
        end.record()
        torch.cuda.synchronize(device)
        sample.device = begin.elapsed_time(end) / 1e3
    sample.wall, sample.cpu = time.perf_counter() - wall, time.process_time() - cpu


def _repeat(work: Callable[[], Any], times: int, device: torch.device) -> _Sample:
    with _timed(device) as sample:
        for _ in range(times):
            work()
    return sample


def _interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median of the ratios with a bootstrap 90 % interval."""
    values = np.asarray(ratios, dtype=float)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.quantile(medians, [0.05, 0.95])
    return float(np.median(values)), float(low), float(high)


# ---------------------------------------------------------------------------------------------- records


def environment() -> dict[str, Any]:
    """Describe the machine and the versions that a timing was taken with, and the commit where there is one."""
    found = _run_environment()
    for package in ("triton", "kvpress", "peft", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if hasattr(os, "getloadavg"):
        found["load"] = [round(x, 2) for x in os.getloadavg()]
    found["commit"] = _commit()
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


@functools.cache
def _commit() -> str | None:
    """Commit of this checkout, with ``+`` where tracked files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = functools.partial(subprocess.run, cwd=here, capture_output=True, text=True, timeout=10)
        sha = run(["git", "rev-parse", "--short=12", "HEAD"])
        if sha.returncode:
            return None
        status = run(["git", "status", "--porcelain", "--untracked-files=no"])
    except (OSError, subprocess.SubprocessError):
        return None
    return sha.stdout.strip() + ("+" if status.stdout.strip() else "")


def append(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """Add records to a file of JSON lines in one write, so that two processes do not mix their lines."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        data = lines.encode()
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)
    return path


def read(path: str | Path) -> list[dict[str, Any]]:
    """Records of a file of JSON lines, oldest first."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    texts = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([texts[0], "-" * len(texts[0]), *texts[1:]])


def _mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


# ---------------------------------------------------------------------------------------------- two callables


@dataclass
class Point:
    """One shape in one mode.

    Attributes
    ----------
    shape, mode, dtype, device
        What was run.
    speedup, low, high : float or None
        Median over the rounds of baseline time / candidate time, and its 90 % interval: above 1 the candidate is
        faster. None where the gate was red.
    seconds, wall_seconds, cpu_seconds : dict
        Median seconds of a call by provider, by the clock that was used, the wall and the CPU.
    memory : dict
        Peak bytes above the inputs, by provider.
    error : float
        Largest absolute difference from the baseline over outputs (and gradients in mode full).
    bytes_moved, gb_per_second
        Traffic that the operation declares, and that traffic over the candidate's time.
    failure : str or None
        Why the gate was red.
    """

    shape: str
    mode: str
    dtype: str
    device: str
    clock: str = "wall"
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    wall_seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    bytes_moved: int | None = None
    gb_per_second: float | None = None
    failure: str | None = None

    @property
    def loses(self) -> bool:
        """Whether the candidate is not faster beyond the spread, or wrong."""
        return self.low is None or self.low <= 1.0


@dataclass
class Comparison:
    """What :func:`compare` found. ``print`` it for the table."""

    op: str
    baseline: str
    candidate: str
    points: list[Point]
    environment: dict[str, Any]

    @property
    def losing(self) -> list[Point]:
        """Points at which the candidate is wrong, or not faster beyond the spread."""
        return [point for point in self.points if point.loses]

    @property
    def failures(self) -> list[Point]:
        """Points at which the correctness gate was red."""
        return [point for point in self.points if point.failure]

    def records(self) -> list[dict[str, Any]]:
        """One record a point, each with the machine, ready for :func:`append`."""
        common = {"kind": "comparison", "op": self.op, "baseline": self.baseline, "candidate": self.candidate}
        return [{**common, **vars(point), "environment": self.environment} for point in self.points]

    def table(self, limit: int | None = None) -> str:
        """Text table; with ``limit``, that many of the winning points and every losing one."""
        winners = sorted((p for p in self.points if not p.loses), key=lambda p: -(p.speedup or 0.0))
        shown = {id(p) for p in (winners if limit is None else winners[:limit])} | {
            id(p) for p in self.losing
        }
        names = (self.baseline, self.candidate)
        head = ["shape", "mode", "dtype", *(f"{n} ms" for n in names), "speedup", "90% interval"]
        rows = [[*head, *(f"{n} MB" for n in names), "GB/s", "error", ""]]
        for p in self.points:
            if id(p) not in shown:
                continue
            if p.failure:
                rows.append([p.shape, p.mode, p.dtype, *["-"] * 7, f"{p.error or math.nan:.1e}", "WRONG"])
                continue
            rows.append(
                [
                    p.shape,
                    p.mode,
                    p.dtype,
                    *(f"{p.seconds[n] * 1e3:.3f}" for n in names),
                    f"{p.speedup:.2f}x",
                    f"{p.low:.2f}-{p.high:.2f}",
                    *(_mb(p.memory.get(n)) for n in names),
                    "-" if p.gb_per_second is None else f"{p.gb_per_second:.1f}",
                    f"{p.error:.1e}",
                    "no faster" if p.loses else "",
                ]
            )
        text = f"{self.op}: {self.candidate} against {self.baseline}\n{_columns(rows)}"
        hidden = len(self.points) - len(shown)
        if hidden:
            text += f"\n({hidden} more, all faster)"
        for p in self.failures:
            text += f"\nWRONG at {p.shape}, {p.mode}: {p.failure}"
        return text

    def __str__(self) -> str:
        return self.table()


def _prepare(function: Callable[..., Any], arguments: Sequence[Any], mode: str) -> Callable[[], list[Tensor]]:
    """Close over the arguments: a call gives the outputs, and in mode full the gradients behind them."""
    if mode == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return _tensors(function(*arguments))

        return forward

    # leaves of this provider alone, so that neither sees the other's gradients
    own = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    leaves = [a for a in own if isinstance(a, Tensor) and a.requires_grad]
    if not leaves:
        raise ValueError("mode 'full' needs a floating-point tensor among the inputs")
    directions: list[Tensor] = []

    def full() -> list[Tensor]:
        outputs = _tensors(function(*own))
        roots = [o for o in outputs if o.requires_grad]
        if not directions:
            generator = torch.Generator().manual_seed(0)
            directions.extend(torch.randn(o.shape, generator=generator).to(o) for o in roots)
        gradients = torch.autograd.grad(roots, leaves, directions, allow_unused=True)
        return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]

    return full


def _gate(
    expected: list[Tensor], actual: list[Tensor], check: Any, dtype: torch.dtype
) -> tuple[float, str | None]:
    """Largest error, and the reason for a red gate."""
    if len(expected) != len(actual) or any(
        a.shape != b.shape for a, b in zip(expected, actual, strict=False)
    ):
        shapes = [[tuple(t.shape) for t in side] for side in (expected, actual)]
        return math.inf, f"outputs and gradients differ in shape: {shapes[0]} and {shapes[1]}"
    pairs = list(zip(expected, actual, strict=True))
    error = max(
        (float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel() and not a.is_complex()),
        default=0.0,
    )
    try:
        if callable(check):
            check(expected, actual)
        else:
            atol, rtol = TOLERANCE.get(dtype, (0.0, 0.0)) if check is None else (check["atol"], check["rtol"])
            for a, b in pairs:
                torch.testing.assert_close(b, a, atol=atol, rtol=rtol, check_dtype=False, equal_nan=True)
    except AssertionError as wrong:
        return error, " ".join(str(wrong).split()) or "the check refused it"
    return error, None


def compare(
    baseline: Callable[..., Any],
    candidate: Callable[..., Any],
    inputs: Mapping[str, Sequence[Any] | Callable[[], Sequence[Any]]],
    modes: Sequence[str] = ("forward",),
    *,
    check: Mapping[str, float] | Callable[[list[Tensor], list[Tensor]], None] | None = None,
    rounds: int = 9,
    min_seconds: float = 0.01,
    op: str = "",
    names: tuple[str, str] = ("baseline", "candidate"),
    traffic: Callable[..., int] | None = None,
    memory: bool = True,
    path: str | Path | None = None,
) -> Comparison:
    """Time a candidate against a baseline, after it was found to compute the same.

    Parameters
    ----------
    baseline, candidate : callable
        Called with the tensors of an input; may return tensors in nested tuples, lists and mappings.
    inputs : mapping
        Name of a shape to its positional arguments, or to a function that makes them (each is then made only
        when its turn comes, and dropped afterwards).
    modes : sequence of {"forward", "full"}
        ``"forward"`` runs under ``no_grad``; ``"full"`` is forward and backward to every floating-point input.
    check : mapping or callable, optional
        ``{"atol": ..., "rtol": ...}``, or a function of the baseline's and the candidate's outputs (followed by
        the gradients in mode full) that raises AssertionError. By default a tolerance by dtype, ``TOLERANCE``.
    rounds : int, default 9
        Rounds A B B A.
    min_seconds : float, default 0.01
        Each measurement repeats the call until it lasts about so long.
    op : str
        Name of the operation, for the records.
    names : tuple of str
        Names of the two providers.
    traffic : callable, optional
        Bytes that the operation must move, from the same arguments; gives the achieved GB/s.
    memory : bool, default True
        Whether to measure peak memory, in a call of its own.
    path : path, optional
        File of JSON lines to which the records are added.

    Returns
    -------
    Comparison
        A point for each shape and mode. A point whose gate is red has no timing.

    Raises
    ------
    ValueError
        For no inputs, an unknown mode, fewer than three rounds, or providers of one name.

    Examples
    --------
    >>> x = torch.randn(64, 64)
    >>> found = compare(lambda a: a + a, lambda a: 2 * a, {"64x64": (x,)}, rounds=3, min_seconds=1e-4)
    >>> found.points[0].error, found.failures
    (0.0, [])
    """
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise ValueError(f"modes must be of {MODES}; got {tuple(modes)}")
    if not inputs:
        raise ValueError("inputs is empty: give at least one named shape")
    if rounds < 3:
        raise ValueError(f"an interval needs at least 3 rounds; got {rounds}")
    if names[0] == names[1]:
        raise ValueError(f"the providers need two names; got {names}")

    points = []
    for shape, made in inputs.items():
        arguments = tuple(made() if callable(made) else made)
        tensors = _tensors(arguments)
        device = tensors[0].device if tensors else torch.device("cpu")
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        dtype = min(dtypes, key=lambda d: -torch.finfo(d).eps) if dtypes else torch.float32
        for mode in modes:
            point = Point(shape, mode, str(dtype).removeprefix("torch."), str(device), _clock(device))
            points.append(point)
            calls = [_prepare(function, arguments, mode) for function in (baseline, candidate)]
            point.error, point.failure = _gate(calls[0](), calls[1](), check, dtype)
            if not point.failure:
                _measure(point, calls, names, rounds, min_seconds, device, memory)
                if traffic is not None:
                    point.bytes_moved = int(traffic(*arguments))
                    point.gb_per_second = point.bytes_moved / point.seconds[names[1]] / 1e9
            elif not math.isfinite(point.error):
                point.error = None  # JSON has no infinity
    found = Comparison(op or names[1], *names, points, environment())
    if path is not None:
        append(path, found.records())
    return found


def _measure(
    point: Point,
    calls: Sequence[Callable[[], Any]],
    names: tuple[str, str],
    rounds: int,
    min_seconds: float,
    device: torch.device,
    memory: bool,
) -> None:
    if memory:
        for name, call in zip(names, calls, strict=True):
            point.memory[name] = peak_memory(call, device)
    times = []
    for call in calls:
        once = min(_repeat(call, 1, device).by(point.clock) for _ in range(2))
        times.append(max(1, min(10_000, math.ceil(min_seconds / max(once, 1e-7)))))
    samples: tuple[list[_Sample], list[_Sample]] = ([], [])
    for _ in range(rounds):
        a = _repeat(calls[0], times[0], device)
        b = _repeat(calls[1], times[1], device) + _repeat(calls[1], times[1], device)
        samples[0].append(a + _repeat(calls[0], times[0], device))
        samples[1].append(b)
    scale = [2.0 * n for n in times]
    ratios = [
        (a.by(point.clock) / scale[0]) / max(b.by(point.clock) / scale[1], 1e-12)
        for a, b in zip(*samples, strict=True)
    ]
    point.speedup, point.low, point.high = _interval(ratios)
    point.rounds = rounds
    for name, side, calls_made in zip(names, samples, scale, strict=True):
        point.seconds[name] = float(np.median([s.by(point.clock) for s in side])) / calls_made
        point.wall_seconds[name] = float(np.median([s.wall for s in side])) / calls_made
        point.cpu_seconds[name] = float(np.median([s.cpu for s in side])) / calls_made


# ---------------------------------------------------------------------------------------------- whole jobs


class Stopwatch:
    """Handed to the jobs of :func:`race`: ``with watch("prefill"): ...`` times a phase."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.phases: dict[str, _Sample] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with _timed(self._device) as sample:
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
                _mb(row["memory"]),
            ]
            for row in self.rows
        ]
        return f"{self.name}\n{_columns(table)}"


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
    clock = _clock(device)
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
            ratio, low, high = _interval([a / max(b, 1e-12) for a, b in zip(ours, theirs, strict=True)])
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
