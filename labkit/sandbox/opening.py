"""Opening one room of a kind that is known to work, or is being tried: what the warden is told, and what became of it."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from labkit.sandbox.jail import inside
from labkit.sandbox.languages import PYTHON, Language, get_language, home_of, locate
from labkit.sandbox.limits import Limits

Kind = Literal["bubblewrap", "namespaces", "uid", "landlock", "weak"]
Status = Literal["ok", "error", "timeout", "memory", "output", "killed"]

_START = "import sys; sys.path.insert(0, sys.argv[1]); from jail import warden; warden.main()"
_HERE = str(Path(__file__).resolve().parent)
_GRACE = 10.0  # for opening and closing a room on a busy machine, beyond the program's own time
_OVERHEAD = 48 << 20  # the keeper's interpreter


@dataclass(frozen=True)
class SandboxResult:
    """What became of a program.

    Attributes
    ----------
    status : str
        ``ok`` (it ended with 0), ``error`` (with another code, or by a signal of its own), ``timeout`` (time on the
        clock or of the processor), ``memory``, ``output`` (it printed too much), or ``killed`` (ended by the room for
        another reason, which `reason` gives).
    stdout, stderr : str
        What it printed, up to the limit; bytes that are not UTF-8 are replaced.
    returncode : int or None
        Its exit code; ``-n`` when signal n ended it, None when the room did.
    seconds : float
        Time on the clock from opening the room to its end.
    isolation : str
        What held it in: a `Sandbox.kind`.
    phase : str
        ``run`` or ``compile``: which command ended last.
    reason : str
        A few words where the room ended it.
    peak_memory_mb : float
        The most memory that was seen in use; 0 for a program too short to be looked at.

    Examples
    --------
    >>> from labkit.sandbox import Sandbox
    >>> result = Sandbox().run("print('so far'); 1 / 0")
    >>> result.status, result.stdout, result.stderr.splitlines()[-1]
    ('error', 'so far\\n', 'ZeroDivisionError: division by zero')
    """

    status: Status
    stdout: str
    stderr: str
    returncode: int | None
    seconds: float
    isolation: Kind
    phase: str = "run"
    reason: str = ""
    peak_memory_mb: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether the program ended with 0."""
        return self.status == "ok"


class SandboxUnavailable(RuntimeError):
    """No room can be opened here, or the program's language is not installed; the message says why."""


def open_room(
    kind: Kind,
    limits: Limits,
    code: str,
    language: str | Language = PYTHON,
    *,
    readable: Sequence[str] = (),
    stdin: str | bytes = "",
    files: Mapping[str, str | bytes] | None = None,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> SandboxResult:
    """Run a program in a room of a kind, see `Sandbox.run`. Whether the kind holds anything in is not asked here."""
    row = get_language(language)
    if not isinstance(code, str):
        raise TypeError(f"code must be text, got {type(code).__name__}")
    if not isinstance(limits, Limits):
        raise TypeError(f"limits must be a Limits, got {type(limits).__name__}")
    if not isinstance(stdin, str | bytes):
        raise TypeError(f"stdin must be text or bytes, got {type(stdin).__name__}")
    words, variables = _words(args), _variables(env or {})
    blobs = {row.source: code.encode("utf-8", "surrogatepass"), **_files(files or {}, row)}
    if stdin:
        blobs[""] = stdin.encode() if isinstance(stdin, str) else stdin
    spec = _spec(kind, readable, row, limits, words, variables)
    report, printed = _keep_watch(spec, blobs, limits, row)
    return _judge(report, printed, row, kind)


def _spec(
    kind: Kind, shown: Sequence[str], row: Language, limits: Limits, args: list[str], env: dict[str, str]
) -> dict[str, Any]:
    """All that a warden needs to know, as plain data."""
    run_limits = limits.record(row.threads, row.memory_mb)
    commands: list[tuple[str, tuple[str, ...], list[str], dict[str, Any]]] = []
    if row.compile:
        compiling = row.compile_limits.record(row.threads, row.memory_mb)
        commands.append(("compile", row.compile, [], compiling))
    commands.append(("run", row.run, args, run_limits))
    readable = [*shown, *(path for pattern in row.readable for path in glob.glob(pattern))]
    phases: list[dict[str, Any]] = []
    for name, words, more, phase_limits in commands:
        argv = row.command(words, limits.memory_mb)
        executable = argv[0]
        if "/" not in executable:
            executable = _executable(kind, row, words[0])
            # Python finds itself by this name, and so do programs that are many in one.
            argv[0] = executable if words[0] == PYTHON else shutil.which(words[0]) or executable
            home = home_of(executable)
            if home not in ("/", "/usr", "/usr/local"):
                readable.append(home)
        environment = {
            "PATH": os.path.dirname(executable) + ":/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            **row.env,
            **env,
        }
        phases.append(
            {
                "name": name,
                "executable": executable,
                "argv": argv + more,
                "env": environment,
                "limits": phase_limits,
            }
        )
    # One file system serves both commands: as large as the larger asks for.
    space = {key: max(phase["limits"][key] for phase in phases) for key in ("disk", "inodes")}
    return {
        "kind": kind,
        "bwrap": shutil.which("bwrap"),
        "phases": phases,
        "limits": {**run_limits, **space},
        "readable": list(dict.fromkeys(readable)),
        "runtime": [home_of(os.path.realpath(sys.executable))],
        "overhead": _OVERHEAD,
    }


def _executable(kind: Kind, row: Language, word: str) -> str:
    found = locate(word)
    if not found:
        raise SandboxUnavailable(
            f"{row.name} is not installed here: there is no {word!r} on the path. Install it, or pass a "
            f"Language whose commands are there"
        )
    if kind != "uid":
        return found[0]
    from labkit.sandbox.jail.warden import reachable

    for path in found:
        if reachable(path):
            return path
    raise SandboxUnavailable(
        f"{row.name}: {found[0]} lies in a folder that only its owner may enter, so that the identity of a room "
        "of kind 'uid' cannot reach it. Install it under /usr, or use a kind with namespaces"
    )


def _words(args: Sequence[str]) -> list[str]:
    if isinstance(args, str | bytes) or not isinstance(args, Sequence):
        raise TypeError(f"args must be a list of words, such as ['--fast', '3'], got {args!r:.60}")
    for word in args:
        if not isinstance(word, str):
            raise TypeError(f"args must be words, got {word!r:.60}; write {str(word)!r:.60}")
        if "\0" in word:
            raise ValueError(f"args: {word!r:.60} holds a zero byte, which no command line can")
    return list(args)


def _variables(env: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(env, Mapping):
        raise TypeError(f"env must map names to text, such as {{'SEED': '3'}}, got {env!r:.60}")
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(
                f"env must map names to text, got {name!r:.60}: {value!r:.60}; write {str(value)!r:.60}"
            )
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(
                f"env: {name!r:.60} must be a name without '=', and neither may hold a zero byte"
            )
    return dict(env)


def _files(files: Mapping[str, str | bytes], row: Language) -> dict[str, bytes]:
    if not isinstance(files, Mapping):
        raise TypeError(f"files must map relative paths to text or bytes, got {files!r:.60}")
    out = {}
    for name, content in files.items():
        if not isinstance(name, str):
            raise TypeError(f"files: {name!r:.60} must be a relative path as text, such as 'data.txt'")
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\0" in name or str(path) == ".":
            raise ValueError(
                f"files: {name!r} must be a relative path inside the working folder, such as 'data.txt'"
            )
        if str(path) == row.source:
            raise ValueError(f"files: {name!r} is the program's own file; pass it as code")
        if not isinstance(content, str | bytes):
            raise TypeError(f"files: {name!r} must be text or bytes, got {type(content).__name__}")
        out[str(path)] = content.encode() if isinstance(content, str) else content
    return out


def _keep_watch(
    spec: dict[str, Any], blobs: dict[str, bytes], limits: Limits, row: Language
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Start a warden, hand it the room's settings, wait for its report."""
    patience = limits.seconds + _GRACE + (row.compile_limits.seconds if row.compile else 0)
    data = inside.pack(spec, blobs)
    warden = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _START, _HERE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": os.environ.get("TMPDIR", "/tmp")},
    )
    assert warden.stdin is not None
    assert warden.stdout is not None
    assert warden.stderr is not None
    # Its input stays open: a closed one ends the room, also when this process dies.
    timer = threading.Timer(patience, warden.stdin.close)
    timer.daemon = True
    timer.start()
    try:
        try:
            warden.stdin.write(len(data).to_bytes(8, "big") + data)
            warden.stdin.flush()
        except BrokenPipeError:
            pass  # it has failed already, and says why below
        out = warden.stdout.read()
        complaint = warden.stderr.read().decode(errors="replace")
    finally:
        timer.cancel()
        with contextlib.suppress(BrokenPipeError):
            warden.stdin.close()
        warden.wait()
        warden.stdout.close()
        warden.stderr.close()
    if len(out) < 8:
        raise SandboxUnavailable(f"the room's warden failed: {complaint.strip()[-500:] or 'no message'}")
    report, printed = inside.unpack(out)
    if complaint and not report["failed"] and not report["ends"]:
        report["failed"] = complaint.strip()[-500:]
    return report, printed


def _judge(report: dict[str, Any], printed: dict[str, bytes], row: Language, kind: Kind) -> SandboxResult:
    verdict, reason, ends = report["verdict"], report["reason"], report["ends"]
    stdout, stderr = (printed[name].decode(errors="replace") for name in ("stdout", "stderr"))
    phase, wait = (ends[-1][0], ends[-1][1]) if ends else ("run", None)
    code = None if wait is None else os.waitstatus_to_exitcode(wait)
    if report["failed"] or (verdict is None and wait is None):
        raise SandboxUnavailable(
            f"no room of kind {kind!r} could be opened: {report['failed'] or stderr.strip()[-500:] or 'no message'}"
        )
    status: Status
    if verdict is not None:
        status, code = verdict, None
    elif code == 0:
        status = "ok"
    elif code in (-24, 128 + 24):
        status, reason, code = "timeout", "processor time", None
    elif code == -25:
        status, reason, code = "killed", "a file larger than the disk", None
    elif any(sign in stderr[-2000:] for sign in row.out_of_memory):
        status, reason = "memory", "the language got no more memory"
    else:
        status = "error"
    peak = report["peak_memory"] / 2**20
    return SandboxResult(status, stdout, stderr, code, report["seconds"], kind, phase, reason, peak)
