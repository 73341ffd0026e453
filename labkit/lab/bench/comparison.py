"""Two callables over several shapes: correctness first, then the ratio of their times and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from labkit.lab.bench.measure import Sample, clock_of, median_interval, peak_memory, repeat, tensors_in
from labkit.lab.bench.records import append, columns, environment, megabytes

MODES = ("forward", "full")
# atol and rtol of the gate, by the coarsest dtype among the inputs
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (2e-2, 2e-2),
}


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
                    *(megabytes(p.memory.get(n)) for n in names),
                    "-" if p.gb_per_second is None else f"{p.gb_per_second:.1f}",
                    f"{p.error:.1e}",
                    "no faster" if p.loses else "",
                ]
            )
        text = f"{self.op}: {self.candidate} against {self.baseline}\n{columns(rows)}"
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
                return tensors_in(function(*arguments))

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
        outputs = tensors_in(function(*own))
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
        tensors = tensors_in(arguments)
        device = tensors[0].device if tensors else torch.device("cpu")
        dtypes = [t.dtype for t in tensors if t.is_floating_point()]
        dtype = min(dtypes, key=lambda d: -torch.finfo(d).eps) if dtypes else torch.float32
        for mode in modes:
            point = Point(shape, mode, str(dtype).removeprefix("torch."), str(device), clock_of(device))
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
        once = min(repeat(call, 1, device).by(point.clock) for _ in range(2))
        times.append(max(1, min(10_000, math.ceil(min_seconds / max(once, 1e-7)))))
    samples: tuple[list[Sample], list[Sample]] = ([], [])
    for _ in range(rounds):
        a = repeat(calls[0], times[0], device)
        b = repeat(calls[1], times[1], device) + repeat(calls[1], times[1], device)
        samples[0].append(a + repeat(calls[0], times[0], device))
        samples[1].append(b)
    scale = [2.0 * n for n in times]
    ratios = [
        (a.by(point.clock) / scale[0]) / max(b.by(point.clock) / scale[1], 1e-12)
        for a, b in zip(*samples, strict=True)
    ]
    point.speedup, point.low, point.high = median_interval(ratios)
    point.rounds = rounds
    for name, side, calls_made in zip(names, samples, scale, strict=True):
        point.seconds[name] = float(np.median([s.by(point.clock) for s in side])) / calls_made
        point.wall_seconds[name] = float(np.median([s.wall for s in side])) / calls_made
        point.cpu_seconds[name] = float(np.median([s.cpu for s in side])) / calls_made
