"""Clocks, peak memory, and the spread of repeated measurements."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensors_in(value: Any) -> list[Tensor]:
    """Tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (tuple, list)) else []


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
class Sample:
    """Seconds of one measurement by each clock."""

    wall: float = 0.0
    cpu: float = 0.0
    device: float | None = None

    def __add__(self, other: Sample) -> Sample:
        both = None if self.device is None or other.device is None else self.device + other.device
        return Sample(self.wall + other.wall, self.cpu + other.cpu, both)

    def by(self, clock: str) -> float:
        return {"wall": self.wall, "cpu": self.cpu, "cuda": self.device}[clock] or 0.0


def clock_of(device: torch.device) -> str:
    if device.type == "cuda":
        return "cuda"
    return "cpu" if torch.get_num_threads() == 1 else "wall"


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[Sample]:
    sample = Sample()
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


def repeat(work: Callable[[], Any], times: int, device: torch.device) -> Sample:
    with timed(device) as sample:
        for _ in range(times):
            work()
    return sample


def median_interval(ratios: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Median of the ratios with a bootstrap 90 % interval."""
    values = np.asarray(ratios, dtype=float)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.quantile(medians, [0.05, 0.95])
    return float(np.median(values)), float(low), float(high)
