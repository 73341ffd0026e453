"""The whole check, as `make test` and CI run it: ``python -m labkit.lab.check [STEP ...]``.

Steps run one after the other in processes of their own, all of them even when one fails. What was skipped is named
at the end with its reason, and the last line counts what passed and failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from labkit.lab import doctor, project

_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "MPLBACKEND": "agg",
    "PLOTLY_RENDERER": "plotly_mimetype",
    "LABKIT_BATCH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Step:
    """One part of the check.

    Parameters
    ----------
    name, mend : str
        Name on the command line; what to run when it fails.
    arguments : tuple of str
        Arguments of this Python.
    environment : dict
        Beyond the common one.
    needs : tuple of str
        Paths without which there is nothing to do yet.
    """

    name: str
    arguments: tuple[str, ...]
    mend: str
    environment: dict[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def is_pytest(self) -> bool:
        """Whether the step writes a JUnit report."""
        return self.arguments[:2] == ("-m", "pytest")


@dataclass
class Outcome:
    """What became of a step."""

    step: Step
    passed: int = 0
    failed: int = 0
    seconds: float = 0.0
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def steps(jobs: int = 2) -> list[Step]:
    """All steps, quick ones first."""
    workers = ("-n", str(jobs))
    return [
        Step("lint", ("-m", "ruff", "check", "."), "ruff check --fix ."),
        Step("format", ("-m", "ruff", "format", "--check", "."), "ruff format ."),
        Step("types", ("-m", "mypy"), "read what mypy says; it checks labkit/"),
        Step(
            "hygiene",
            (*_PYTEST, "tests/notebooks/test_hygiene.py"),
            "each finding names its command, mostly `labkit refresh SLUG`",
        ),
        Step(
            "unit",
            (
                *_PYTEST,
                "tests",
                "labkit",
                "--doctest-modules",
                "--ignore=tests/notebooks",
                "--ignore=tests/kernels/triton",
                "-m",
                "not browser and not gpu",
                "--durations=10",
                *workers,
            ),
            "pytest tests/... of the failing file",
        ),
        Step(
            "triton",
            (*_PYTEST, "tests/kernels/triton"),
            "TRITON_INTERPRET=1 pytest tests/kernels/triton",
            {"TRITON_INTERPRET": "1"},
            ("tests/kernels/triton",),
        ),
        Step(
            "gpu",
            (*_PYTEST, "tests", "-m", "gpu"),
            "pytest tests -m gpu",
        ),
        Step(
            "smoke",
            (*_PYTEST, "tests/notebooks", "--ignore=tests/notebooks/test_hygiene.py", "-m", "not browser"),
            "labkit run SLUG --size smoke --seed 1",
        ),
        Step(
            "nbval",
            (
                *_PYTEST,
                "notebooks",
                "--nbval-lax",
                "-p",
                "no:python",
                "--dist",
                "loadscope",
                "--nbval-kernel-name",
                "python3",
                "--nbval-cell-timeout",
                "240",
                "--nbval-kernel-startup-timeout",
                "180",
                "--nbval-sanitize-with",
                "notebooks/sanitize.cfg",
                *workers,
            ),
            "labkit refresh SLUG, and look at what changed before committing it",
        ),
        Step(
            "browser",
            (*_PYTEST, "tests", "-m", "browser", "-rs"),
            "labkit doctor",
        ),
    ]


def run(step: Step, folder: Path) -> Outcome:
    """Carry out one step in the repository, its output passed through."""
    top = project.root()
    outcome = Outcome(step)
    lacking = [path for path in step.needs if not (top / path).exists()]
    if lacking:
        outcome.skipped.append((step.name, f"{', '.join(lacking)} does not exist"))
        return outcome
    print(f"\n== {step.name}: {' '.join(step.arguments[1:])}", flush=True)
    report = folder / f"{step.name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, *step.arguments]
    if step.is_pytest:
        command.append(f"--junitxml={report}")
    environment = {**os.environ, **_ENVIRONMENT, **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(top), os.environ.get("PYTHONPATH")]))
    started = time.monotonic()
    code = subprocess.run(command, cwd=top, env=environment, stdin=subprocess.DEVNULL, check=False).returncode
    outcome.seconds = time.monotonic() - started
    if step.is_pytest:
        read_report(report, code, outcome)
    elif code == 0:
        outcome.passed = 1
    else:
        outcome.failed = 1
        outcome.failures.append(step.name)
    return outcome


def read_report(report: Path, code: int, outcome: Outcome) -> None:
    """Fill an outcome from pytest's JUnit report and exit code."""
    name = outcome.step.name
    if code == 5:  # no tests were collected
        reason = "no test is there for it"
        if name == "browser" and os.environ.get("LABKIT_REQUIRE_BROWSER") == "1":
            outcome.failed, outcome.failures = 1, ["browser: required, but there is no browser test"]
        else:
            outcome.skipped.append((name, reason))
        return
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        cases = []
    for case in cases:
        label = f"{case.get('classname', '')}::{case.get('name', '')}".lstrip(":")
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            outcome.failed += 1
            outcome.failures.append(label)
        elif skipped is not None:
            outcome.skipped.append((label, skipped.get("message") or "no reason given"))
        else:
            outcome.passed += 1
    if code != 0 and not outcome.failed:
        outcome.failed = 1
        outcome.failures.append(f"{name}: pytest ended with code {code}")
    required = name == "browser" and os.environ.get("LABKIT_REQUIRE_BROWSER") == "1"
    if required and outcome.skipped:
        outcome.failed += len(outcome.skipped)
        outcome.failures += [f"{label}: required, but skipped: {reason}" for label, reason in outcome.skipped]
        outcome.skipped = []


def summary(outcomes: Sequence[Outcome]) -> str:
    """The closing text: a line a step, what was skipped and why, what failed and what mends it, and the count."""
    lines = ["", "== summary"]
    for item in outcomes:
        state = "FAILED" if item.failed else "ok" if item.passed else "skipped"
        lines.append(
            f"{item.step.name:<8} {state:<8} {item.passed:>5} passed {item.failed:>4} failed "
            f"{len(item.skipped):>4} skipped {item.seconds:>7.1f} s"
        )
    skipped = [(name, reason) for item in outcomes for name, reason in item.skipped]
    if skipped:
        lines += ["", f"skipped ({len(skipped)}):"]
        reasons: dict[str, list[str]] = {}
        for name, reason in skipped:
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"  {', '.join(names[:4])}{more}: {reason}")
    for item in outcomes:
        if item.failed:
            lines += ["", f"failed in {item.step.name}; when this fails: {item.step.mend}"]
            lines += [f"  {label}" for label in item.failures[:20]]
    passed, failed = (sum(getattr(item, name) for item in outcomes) for name in ("passed", "failed"))
    seconds = sum(item.seconds for item in outcomes)
    counts = [f"{failed} failed"] if failed else []
    counts += [f"{passed} passed", *([f"{len(skipped)} skipped"] if skipped else [])]
    lines += ["", f"===== {', '.join(counts)} in {seconds:.2f}s ====="]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the named steps, or all; 0 if nothing failed."""
    known = {step.name: step for step in steps()}
    parser = argparse.ArgumentParser(
        prog="python -m labkit.lab.check", description="The whole check, or parts."
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(known))
    parser.add_argument("--jobs", type=int, default=2, help="processes for unit tests and nbval [2]")
    parser.add_argument("--skip", action="append", default=[], help="a step to leave out")
    options = parser.parse_args(arguments)
    for name in (*options.steps, *options.skip):
        if name not in known:
            from labkit.papers import nearest

            parser.error(f"there is no step {name!r}; {nearest(name, known)}")
    folder = project.root() / "build" / "check"
    folder.mkdir(parents=True, exist_ok=True)
    if doctor.chromium() is None:
        print("no Chromium was found: browser tests will be skipped")
    chosen = [
        step
        for step in steps(options.jobs)
        if (not options.steps or step.name in options.steps) and step.name not in options.skip
    ]
    outcomes = [run(step, folder) for step in chosen]
    print(summary(outcomes), flush=True)
    return 1 if any(item.failed for item in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
