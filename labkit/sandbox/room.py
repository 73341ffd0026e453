"""The room: run a program that nobody has read, and say what held it in.

Four ways of holding a program in, strongest first. `Sandbox` takes the first that works here and names it:

``bubblewrap``
    The program ``bwrap`` builds the room: namespaces of its own for files, processes, network, identities.
``namespaces``
    The same by our own calls, as root or through a user namespace.
``uid``
    For root where no namespace may be made (as in many containers): an identity that nobody else has, Landlock
    for files, and a filter of system calls for the network.
``landlock``
    For anybody else there: Landlock and the filter under the user's own identity.

In the last two a program can still see that a file exists, and its size and times (Landlock does not cover ``stat``);
it reads and changes none. In ``landlock`` it can also not change modes or times of its own files, so that some
compilers fail. What is none of these four is not opened, except with ``allow_weak=True``, as kind ``weak``: limits
on what is used and nothing else, for code that you trust.

In all kinds: every call that makes a socket is refused, so are tracing, new namespaces, and setting clocks; nothing
that the host process has open or in its environment is passed on; limits cannot be raised; and when the program
ends, everything that it started is killed.

System folders (``/usr`` and the language's own) can be read in every kind: programs need them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.sandbox.kinds import choose
from labkit.sandbox.languages import Language
from labkit.sandbox.limits import Limits
from labkit.sandbox.opening import Kind, SandboxResult, open_room


class Sandbox:
    """Rooms of one kind, each opened for one program and gone with it.

    Parameters
    ----------
    kind : str, optional
        One of `KINDS`. By default the strongest that works on this machine.
    limits : Limits, optional
        What a program may use, where `run` does not say otherwise.
    readable : sequence of str or Path
        Further files and folders of the host that programs may read.
    allow_weak : bool
        Where no kind works: run programs with limits on what they use and nothing else (kind ``weak``).

    Raises
    ------
    SandboxUnavailable
        If the kind, or with None every kind, does not work here.

    Examples
    --------
    >>> box = Sandbox()
    >>> box.run("print(6 * 7)").stdout
    '42\\n'
    >>> box.run("import socket; socket.create_connection(('localhost', 80))").status
    'error'
    """

    def __init__(
        self,
        kind: Kind | None = None,
        *,
        limits: Limits | None = None,
        readable: Sequence[str | Path] = (),
        allow_weak: bool = False,
    ) -> None:
        if limits is not None and not isinstance(limits, Limits):
            raise TypeError(f"limits must be a Limits, got {type(limits).__name__}")
        if isinstance(readable, str | Path):
            raise TypeError("readable must be a list of paths, got a single one")
        self.limits = limits or Limits()
        self.readable = [os.path.realpath(path) for path in readable]
        for path in self.readable:
            if not os.path.exists(path):
                raise ValueError(f"readable: {path} does not exist")
        self.kind: Kind = choose(kind, allow_weak)

    def run(
        self,
        code: str,
        language: str | Language = "python",
        *,
        stdin: str | bytes = "",
        files: Mapping[str, str | bytes] | None = None,
        args: Sequence[str] = (),
        limits: Limits | None = None,
        env: Mapping[str, str] | None = None,
    ) -> SandboxResult:
        """Run a program in a room of its own.

        Parameters
        ----------
        code : str
            The program.
        language : str or Language
            A name of `LANGUAGES`, or a row of your own.
        stdin : str or bytes
            What it reads; by default nothing.
        files : mapping of str to str or bytes, optional
            Further files in its working folder: relative path to content.
        args : sequence of str
            Further words of its command line.
        limits : Limits, optional
            What it may use.
        env : mapping of str to str, optional
            Further environment variables.

        Returns
        -------
        SandboxResult

        Raises
        ------
        SandboxUnavailable
            If the language is not installed, or no room could be opened.
        ValueError, TypeError
            For an unknown language, a file outside the working folder, or arguments of another type.
        """
        return open_room(
            self.kind,
            limits or self.limits,
            code,
            language,
            readable=self.readable,
            stdin=stdin,
            files=files,
            args=args,
            env=env,
        )
