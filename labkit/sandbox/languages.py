"""How the programs of a language are compiled and run: a table, to which a user adds rows.

A command is a tuple of words in which ``{source}`` stands for the file with the program and ``{stem}`` for its name
without the ending. The first word is looked up on the host when a room is opened.
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from labkit.sandbox.limits import Limits

PYTHON = "python"
_COMPILING = Limits(seconds=30, memory_mb=1024, processes=64, open_files=256)


@dataclass(frozen=True)
class Language:
    """How the programs of one language are run.

    Parameters
    ----------
    name : str
        What it is called.
    source : str
        Name of the file that the program is written to.
    run : tuple of str
        The command; ``{source}``, ``{stem}`` and ``{memory_mb}`` are filled in.
    compile : tuple of str
        A command that comes first; empty without one.
    env : mapping of str to str
        Environment variables beside ``PATH``, ``HOME``, ``TMPDIR`` and ``LANG``, which every room sets.
    readable : tuple of str
        Paths outside ``/usr`` that the language needs to read, where they are there, with ``*`` for any part of a
        name; the folder of its own executable is added by itself.
    threads : int
        Processes and threads that the language itself needs.
    memory_mb : int
        Memory that it needs itself, beside the program's.
    out_of_memory : tuple of str
        What it prints when it gets no more memory, so that the result can say so.
    compile_limits : Limits
        Limits of the compilation.

    Examples
    --------
    >>> lua = Language("lua", "main.lua", ("lua5.4", "{source}"))
    >>> lua.command(lua.run)
    ['lua5.4', 'main.lua']
    """

    name: str
    source: str
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    readable: tuple[str, ...] = ()
    threads: int = 0
    memory_mb: int = 0
    out_of_memory: tuple[str, ...] = ()
    compile_limits: Limits = _COMPILING

    def __post_init__(self) -> None:
        if not self.name or not self.source:
            raise ValueError("a language needs a name and the name of a source file")
        if os.path.basename(self.source) != self.source or self.source in (".", ".."):
            raise ValueError(f"source must be a plain file name such as 'main.py', got {self.source!r}")
        for what in ("run", "compile"):
            words = getattr(self, what)
            if isinstance(words, str) or not all(isinstance(word, str) for word in words):
                raise TypeError(f"{what} must be a tuple of words, got {words!r}")
        if not self.run:
            raise ValueError(f"{self.name}: run must be a command, got an empty one")

    def command(self, words: tuple[str, ...], memory_mb: int = 0) -> list[str]:
        """`words` with the places filled in."""
        places = {
            "{source}": self.source,
            "{stem}": os.path.splitext(self.source)[0],
            "{memory_mb}": str(memory_mb),
        }
        out = []
        for word in words:
            for place, value in places.items():
                word = word.replace(place, value)
            out.append(word)
        return out


def interpreters() -> list[str]:
    """Pythons that could run a program, best first: this one without its virtual environment, then the system's."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found = [os.path.join(sys.base_prefix, "bin", version), "/usr/bin/python3", shutil.which("python3")]
    return [os.path.realpath(path) for path in found if path and os.path.isfile(path)]


def locate(word: str) -> list[str]:
    """Executables on this machine that a command's first word may mean, best first; empty when there is none."""
    if word == PYTHON:
        return interpreters()
    found = shutil.which(word)
    return [os.path.realpath(found)] if found else []


def home_of(executable: str) -> str:
    """The folder of an executable's installation, to be readable in the room."""
    folder = os.path.dirname(executable)
    return os.path.dirname(folder) if os.path.basename(folder) in ("bin", "sbin") else folder


_PLAIN_JAVA = (
    "-Xshare:auto",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Xmx{memory_mb}m",
    "-XX:-UsePerfData",
)

_TABLE = (
    Language(PYTHON, "main.py", (PYTHON, "-I", "-S", "-B", "{source}"), out_of_memory=("MemoryError",)),
    Language(
        "javascript",
        "main.js",
        ("node", "--max-old-space-size={memory_mb}", "{source}"),
        threads=16,
        memory_mb=192,
        out_of_memory=("heap out of memory", "Array buffer allocation failed"),
    ),
    Language("perl", "main.pl", ("perl", "{source}"), out_of_memory=("Out of memory",)),
    Language("shell", "main.sh", ("sh", "{source}"), threads=4),
    Language(
        "java",
        "Main.java",
        ("java", *_PLAIN_JAVA, "{source}"),
        readable=("/etc/java-*",),
        threads=40,
        memory_mb=768,
        out_of_memory=("java.lang.OutOfMemoryError",),
    ),
    Language(
        "c",
        "main.c",
        ("./{stem}",),
        compile=("gcc", "-O1", "-o", "{stem}", "{source}", "-lm"),
    ),
    Language(
        "cpp",
        "main.cpp",
        ("./{stem}",),
        compile=("g++", "-O1", "-o", "{stem}", "{source}"),
        out_of_memory=("std::bad_alloc",),
    ),
)
LANGUAGES: Mapping[str, Language] = MappingProxyType({language.name: language for language in _TABLE})


def get_language(language: str | Language) -> Language:
    """The row of a language by name; a `Language` is returned as it is.

    Raises
    ------
    ValueError
        If no language has that name.

    Examples
    --------
    >>> get_language("python").source
    'main.py'
    """
    if isinstance(language, Language):
        return language
    if not isinstance(language, str):
        raise TypeError(f"language must be a name or a Language, got {type(language).__name__}")
    if language not in LANGUAGES:
        near = difflib.get_close_matches(language, LANGUAGES, 1)
        hint = f"; did you mean {near[0]!r}? Known are" if near else "; known are"
        known = ", ".join(LANGUAGES)
        raise ValueError(
            f"no language {language!r}{hint} {known}; pass a Language(name, source, run) for another"
        )
    return LANGUAGES[language]
