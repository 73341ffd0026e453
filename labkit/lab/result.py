"""The record of one run, ``run.json``, and how it is read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class RunResult:
    """What became of one run; the content of its ``run.json``.

    Parameters
    ----------
    slug : str
        The paper, or the stem of the notebook where it is not registered.
    key : str
        Name of the run within its paper, such as ``"laptop-seed0"``.
    directory : Path
        Folder of the run.
    status : {"ok", "failed", "timeout", "memory", "died"}
        A claim that is not reproduced is no failure: the status says whether the notebook ran to its end. With
        ``"timeout"`` and ``"memory"`` it was stopped at a limit, with ``"died"`` it was killed by something else.
    parameters : dict
        All of them, defaults filled in.
    seconds, peak_memory_mb : float
        Wall time with the start of the kernel; resident memory of the kernel and what it started.
    cells : dict
        ``{"done": int, "total": int}``.
    error : dict or None
        Cell, name, message and last lines of the traceback.
    fingerprint : str
        Hash of all that the run depends on.
    verdicts : dict or None
        Content of ``verdicts.json``, if the notebook wrote one.
    attempts : int
        How often the run was begun: more than once if its kernel never answered, or was killed and tried again.
    limits : dict
        ``{"timeout": seconds, "memory_mb": megabytes}`` that the run was given, None for no limit.
    host : str
        Name of the machine that it ran on.
    reused : bool
        Whether an earlier run was taken instead of running. Not stored.
    """

    slug: str
    key: str
    directory: Path
    status: str
    parameters: dict[str, Any]
    seconds: float
    peak_memory_mb: float
    cells: dict[str, int]
    error: dict[str, Any] | None
    fingerprint: str
    verdicts: dict[str, Any] | None = None
    attempts: int = 1
    started: str = ""
    finished: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    limits: dict[str, float | None] = field(default_factory=dict)
    host: str = ""
    reused: bool = False

    @property
    def ok(self) -> bool:
        """Whether the notebook ran to its end."""
        return self.status == "ok"

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.directory / f"{self.slug}.ipynb"

    @property
    def counts(self) -> dict[str, int]:
        """How many claims got each verdict."""
        found: dict[str, int] = {}
        for claim in (self.verdicts or {}).get("claims", []):
            found[claim["verdict"]] = found.get(claim["verdict"], 0) + 1
        return found

    def summary(self) -> str:
        """The verdicts in a few words, or what went wrong.

        Examples
        --------
        >>> from pathlib import Path
        >>> claims = [{"verdict": "reproduced"}] * 5 + [{"verdict": "not reproduced"}]
        >>> result = RunResult("nacl", "laptop-seed0", Path(), "ok", {}, 1.0, 1.0, {}, None, "", {"claims": claims})
        >>> result.summary()
        '5 reproduced, 1 not'
        """
        if not self.ok:
            error = self.error or {}
            where = f" in cell {error['cell']}" if error.get("cell") is not None else ""
            what = f": {error['name']}" if error.get("name") and self.status == "failed" else ""
            return f"{self.status}{where}{what}"
        words = {"reproduced": "reproduced", "not reproduced": "not", "untestable here": "untestable"}
        parts = [f"{self.counts[name]} {word}" for name, word in words.items() if name in self.counts]
        return ", ".join(parts) or "no claims"

    def record(self) -> dict[str, Any]:
        """The content of ``run.json``."""
        values = asdict(self)
        for name in ("directory", "verdicts", "reused"):
            del values[name]
        return {"schema": SCHEMA, **values}


def load(directory: Path) -> RunResult | None:
    """Read a run's folder; None if there is no complete record in it."""
    try:
        record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
        if record.pop("schema") != SCHEMA:
            return None
        verdicts = directory / "verdicts.json"
        content = json.loads(verdicts.read_text(encoding="utf-8")) if verdicts.exists() else None
        return RunResult(directory=directory, verdicts=content, **record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_all(out: Path) -> list[RunResult]:
    """All recorded runs under a folder, by paper and key."""
    found = (load(path.parent) for path in sorted(out.glob("*/*/run.json")))
    return [run for run in found if run is not None]
