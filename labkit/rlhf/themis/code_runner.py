"""The tool that runs an answer's code against tests, in a room of its own."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from labkit.rlhf.themis.bank import Tool, ToolUnavailable
from labkit.sandbox import Limits, Sandbox, SandboxUnavailable

# Runs in the room. One process a test, so that none meets what another left; a test has passed when its process has
# come to the end of the program, so leaving early does not pass. Descriptors are closed before any of the answer's
# code runs: it holds only its own line to the parent.
_DRIVER = """
import ctypes, json, os, select, signal, sys, time
job = json.loads(sys.stdin.read())
ctypes.CDLL(None).prctl(4, 0)
out = os.dup(1)
nothing = os.open("/dev/null", os.O_RDWR)
for place in (0, 1, 2):
    os.dup2(nothing, place)
def compiles(block):
    try:
        return bool(compile(block, "<string>", "exec"))
    except Exception:
        return False
blocks = job["blocks"]
if len(blocks) > 1:
    blocks = [block for block in blocks if compiles(block)] or blocks
code = "\\n".join(blocks)
verdicts = []
for test in job["tests"]:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(out); os.close(reads)
        me, said = os.getpid(), "passed"
        try:
            exec(code + "\\n" + test, {})
        except BaseException as error:
            said = "failed " + (str(error) or "")[:300]
        if os.getpid() == me:
            os.write(writes, said.encode(errors="replace"))
        os._exit(0)
    os.close(writes)
    said, end = b"", time.monotonic() + job["timeout"]
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([reads], [], [], left)[0]:
            said = b"failed timed out"
            break
        piece = os.read(reads, 4096)
        if not piece:
            break
        said += piece
    try:
        os.killpg(child, signal.SIGKILL)
    except OSError:
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reads)
    verdicts.append(said.decode(errors="replace") or "failed ended early")
    os.write(out, (json.dumps(verdicts[-1]) + "\\n").encode())
"""

# The label is the first word behind the fence; a fence that is not closed runs to the end.
_FENCE = re.compile(r"```[^\S\n]*+([^\s`]*+)[^\n`]*+\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = re.compile(r"py(?:thon)?[\d.]*+", re.IGNORECASE)


def code_blocks(text: str) -> list[str]:
    """Blocks of Python in a text: those fenced as Python, else those fenced without a name, else the text itself.

    Examples
    --------
    >>> code_blocks("First:\\n```python3\\nimport math\\n```\\nthen\\n```Py\\nx = math.pi")
    ['import math\\n', 'x = math.pi']
    >>> code_blocks("x = 1")
    ['x = 1']
    """
    found = [(match.group(1), match.group(2)) for match in _FENCE.finditer(text)]
    named = [code for label, code in found if _PYTHON.fullmatch(label)]
    return named or [code for label, code in found if not label] or [text]


@dataclass(frozen=True)
class TestReport:
    """Outcome of each test: passed or not, and why not."""

    __test__ = False  # not a test class, whatever its name makes test runners think

    passed: tuple[bool, ...]
    reasons: tuple[str, ...]
    isolation: str

    @property
    def pass_rate(self) -> float:
        """Share of tests passed."""
        return sum(self.passed) / len(self.passed)


class CodeRunner(Tool):
    """Run an answer's Python against its tests; the observation says how many passed and why others did not.

    The code comes from the state's ``answer`` when the input is ``Same as the answer``, as in the release, else from
    the input; the tests are the state's ``test_list``. Fenced blocks are taken out of their fences and joined: those
    named Python, else those without a name; of several, those that can be compiled (an example's output cannot).

    Parameters
    ----------
    timeout : float
        Seconds a test may take.
    memory_mb : int
        Memory of the room.
    sandbox : Sandbox, optional
        Where to run; by default the strongest kind that works here, made at the first call.

    Raises
    ------
    ToolUnavailable
        At a call, where no room can be opened.

    Notes
    -----
    A test that only defines a function, as those of HumanEval in the release do, passes with any answer that runs: it
    is run as it is. A program can look at its own process and so could say that it passed; what is judged must not be
    trained against this tool alone.

    Examples
    --------
    >>> runner = CodeRunner()
    >>> state = {"answer": "def twice(x): return x + x", "test_list": ["assert twice(2) == 4", "assert twice('') == 'a'"]}
    >>> runner("Same as the answer", state)
    'The pass rate is 0.5. 1 test cases passed, and 1 test cases failed.'
    """

    name = "code_run"
    description = "Runs the answer's code against its test cases."
    needs = ("test_list",)

    def __init__(self, timeout: float = 3.0, memory_mb: int = 1024, sandbox: Sandbox | None = None) -> None:
        if not timeout > 0:
            raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
        Limits(memory_mb=memory_mb)
        self.timeout, self.memory_mb = timeout, memory_mb
        self._given = sandbox

    @functools.cached_property
    def sandbox(self) -> Sandbox:
        """Where the code runs."""
        try:
            return self._given or Sandbox()
        except SandboxUnavailable as error:
            raise ToolUnavailable(str(error)) from None

    @property
    def available(self) -> bool:
        """Whether a room can be opened here."""
        try:
            return self.sandbox is not None
        except ToolUnavailable:
            return False

    def run(self, code: str, tests: Sequence[str]) -> TestReport:
        """Run code against tests.

        Raises
        ------
        ValueError
            Without a test.
        """
        if isinstance(tests, str) or not tests:
            raise ValueError(f"tests must be a list of at least one statement, got {tests!r}")
        job = {"blocks": code_blocks(code), "tests": list(tests), "timeout": self.timeout}
        seconds = self.timeout * len(tests) + 5
        limits = Limits(seconds=seconds, memory_mb=self.memory_mb, processes=8, output_kb=256, disk_mb=8)
        result = self.sandbox.run(_DRIVER, stdin=json.dumps(job), limits=limits)
        said = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('"')]
        # A room that was closed early has fewer verdicts than there are tests.
        why = result.reason or result.status
        said += [f"failed {why}"] * (len(tests) - len(said))
        passed = tuple(text == "passed" for text in said)
        return TestReport(
            passed, tuple(text.removeprefix("failed").strip() for text in said), result.isolation
        )

    def __call__(self, text: str, state: Mapping[str, Any]) -> str:
        same = text.strip().strip("\"'.").lower() == "same as the answer" or not text.strip()
        code = state.get("answer", "") if same else text
        report = self.run(code, state["test_list"])
        rate, right = report.pass_rate, sum(report.passed)
        if right == len(report.passed):
            return f"The pass rate is {rate}. All test cases passed."
        wrong = [
            reason for reason, good in zip(report.reasons, report.passed, strict=True) if not good and reason
        ]
        reasons = "; ".join(dict.fromkeys(wrong))
        failed = f" Failed reason: {reasons}" if reasons else ""
        if right == 0:
            return f"The pass rate is {rate}. All test cases failed.{failed}"
        left = len(report.passed) - right
        return f"The pass rate is {rate}. {right} test cases passed, and {left} test cases failed.{failed}"

    def score(self, observation: str) -> float:
        """The pass rate."""
        found = re.match(r"The pass rate is ([\d.]+?)\. ", observation)
        return float(found.group(1)) if found else 0.0
