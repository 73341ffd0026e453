"""The ways of holding a program in, and which of them work here: each is tried before it is used."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile

from labkit.sandbox.jail import kernel, seccomp
from labkit.sandbox.limits import Limits
from labkit.sandbox.opening import Kind, SandboxUnavailable, open_room

KINDS: tuple[Kind, ...] = ("bubblewrap", "namespaces", "uid", "landlock")
_SHOWN = 200  # characters of what a failed probe said


def _missing(kind: Kind) -> str | None:
    """Why a kind cannot work, as far as can be told without trying."""
    if sys.platform != "linux":
        return "it needs Linux"
    if not seccomp.supported():
        return f"there is no filter of system calls for {os.uname().machine}"
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    if kind in ("uid", "landlock") and kernel.landlock_version() < 1:
        return "the kernel has no Landlock"
    if kind == "uid" and os.geteuid() != 0:
        return "it needs root"
    if kind == "landlock" and os.geteuid() == 0:
        return "it would run programs as root; kind 'uid' does the same with an identity of its own"
    return None


# What every kind must show before it is used: it runs a program, which can make no socket, read no file of the
# user's, and see no process but its own.
_PROBE = """
import os, socket
bad = []
try:
    socket.socket(); bad.append("made a socket")
except OSError:
    pass
for path in %r:
    try:
        open(path, "rb").close(); bad.append("read " + path)
    except OSError:
        pass
try:
    os.kill(%d, 0); bad.append("signalled a process outside")
except OSError:
    pass
print("held" if not bad else "; ".join(bad))
"""


@functools.cache
def why_not(kind: Kind) -> str | None:
    """Why a kind does not work on this machine; None when it does."""
    missing = _missing(kind)
    if missing:
        return missing
    # A file of our own: where the package itself lies, a room may show it with the interpreter.
    with tempfile.TemporaryDirectory(prefix="labkit-probe-") as folder:
        os.chmod(folder, 0o755)
        canary = os.path.join(folder, "canary")
        with open(canary, "w") as file:
            file.write("canary")
        try:
            outside = [canary, f"/proc/{os.getpid()}/environ", "/etc/shadow", "/etc/hostname"]
            result = open_room(kind, Limits(seconds=20), _PROBE % (outside, os.getpid()))
        except SandboxUnavailable as error:
            return str(error)
    said = (result.stdout.strip() or result.stderr.strip())[-_SHOWN:]
    return None if said == "held" else f"a program got out: {said}"


def available_kinds() -> dict[str, str]:
    """Each kind with ``""`` where it works here, else the reason why it doesn't.

    Examples
    --------
    >>> list(available_kinds())
    ['bubblewrap', 'namespaces', 'uid', 'landlock']
    """
    return {kind: why_not(kind) or "" for kind in KINDS}


def choose(kind: Kind | None, allow_weak: bool) -> Kind:
    """The kind asked for, or the strongest that works here.

    Raises
    ------
    ValueError
        For an unknown kind.
    SandboxUnavailable
        If it, or every kind, does not work.
    """
    if kind == "weak":
        if not allow_weak:
            raise ValueError("kind 'weak' holds nothing in: pass allow_weak=True to say that you mean it")
        return "weak"
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        reason = why_not(kind)
        if reason:
            raise SandboxUnavailable(f"a room of kind {kind!r} cannot be opened here: {reason}")
        return kind
    for candidate in KINDS:
        if why_not(candidate) is None:
            return candidate
    if allow_weak:
        return "weak"
    reasons = "; ".join(f"{name}: {why}" for name, why in available_kinds().items())
    raise SandboxUnavailable(
        f"no room can be opened here ({reasons}). Install bubblewrap, or pass allow_weak=True to run code that you "
        "trust with limits on what it uses and nothing else"
    )
