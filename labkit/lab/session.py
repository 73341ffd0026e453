"""The first line of every notebook: ``run = lab.start("nacl", size=size, seed=seed)``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

from labkit import __version__, papers
from labkit.lab import cache, claims
from labkit.lab.progress import progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def start(slug: str, size: str = "laptop", seed: int = 0, device: str = "auto", **knobs: Any) -> Run:
    """Begin a run of a paper's notebook.

    Checks every parameter against the registry, seeds Python, NumPy and torch, takes one torch thread, picks the
    device, sets up the figures and prints one line that says what runs where.

    Parameters
    ----------
    slug : str
        Paper, such as ``"nacl"``.
    size : {"smoke", "laptop", "gpu", "paper"}
        How much is run.
    seed : int
        First seed; :meth:`Run.seeds` counts up from it.
    device : {"auto", "cpu", "cuda", "cuda:N", "mps"}
        ``"auto"`` takes a CUDA device if there is one.
    **knobs
        The paper's own parameters.

    Returns
    -------
    Run

    Raises
    ------
    ValueError, TypeError
        For an unknown paper, name or choice, a wrong type, or a size that needs a GPU where there is none.

    Examples
    --------
    >>> run = start("nacl", size="smoke", seed=7)           # doctest: +ELLIPSIS
    nacl · smoke · seed 7 · cpu · ...
    >>> run.seeds(3)
    [7, 8, 9]
    >>> start("nacl", size="lptop")
    Traceback (most recent call last):
    ...
    ValueError: size='lptop' is not allowed; one of 'smoke', 'laptop', 'gpu', 'paper'
    """
    paper = papers.load(slug)
    parameters = paper.check({"size": size, "seed": seed, "device": device, **knobs})
    import numpy
    import torch
    import transformers

    chosen = _device(parameters["device"], parameters["size"])
    # One thread per kernel: with two kernels on two cores, more threads wait for one another and move digits.
    torch.set_num_threads(1)
    random.seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries that a notebook calls may draw from it
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if importlib.util.find_spec("plotly"):
        from labkit.lab import figures

        figures.setup()
    run = Run(paper, parameters, chosen)
    print(
        f"{slug} · {size} · seed {seed} · {chosen} · labkit {__version__} · torch {torch.__version__} · "
        f"transformers {transformers.__version__} · Python {platform.python_version()}"
    )
    return run


def _device(name: str, size: str) -> torch.device:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        if size in ("gpu", "paper"):
            raise ValueError(
                f"size={size!r} is meant for a CUDA device and none was found; "
                "use size='laptop', or device='cpu' to run it here all the same"
            )
        return torch.device("cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: torch sees no CUDA device; use 'auto' or 'cpu'")
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device='mps': torch sees no Apple GPU; use 'auto' or 'cpu'")
    return torch.device(name)


class Run:
    """A run in progress: its parameters, its claims, and where its record is written.

    Attributes
    ----------
    paper : labkit.papers.Paper
    size, seed : str, int
    device : torch.device
    knobs : dict
        The paper's own parameters, completed with their defaults.
    directory : Path
        Folder of ``verdicts.json``: ``LABKIT_RUN_DIR`` if set, else a fresh folder in the cache.
    """

    def __init__(self, paper: papers.Paper, parameters: Mapping[str, Any], device: torch.device) -> None:
        self.paper = paper
        self.parameters = dict(parameters)
        self.size: str = parameters["size"]
        self.seed: int = parameters["seed"]
        self.device = device
        self.knobs = {name: parameters[name] for name in paper.knobs}
        named = os.environ.get("LABKIT_RUN_DIR")
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.directory = (
            Path(named)
            if named
            else cache.root() / "runs" / paper.slug / f"{stamp}-{self.size}-{os.getpid()}"
        )
        self._started = time.perf_counter()
        self._verdicts: dict[str, claims.Verdict] = {}
        self._metrics: dict[str, Any] = {}

    def __repr__(self) -> str:
        shown = {name: value for name, value in self.parameters.items() if name != "device"}
        return f"{self.paper.slug}: " + ", ".join(f"{name}={value!r}" for name, value in shown.items())

    def sizes(self, **settings: Mapping[str, Any]) -> SimpleNamespace:
        """The settings of this run's size; the one place where a notebook says what differs between sizes.

        Parameters
        ----------
        **settings : mapping per size
            ``smoke=dict(...), laptop=dict(...), ...``, all with the same names.

        Raises
        ------
        ValueError
            If this size is missing, a size is unknown, or the names differ between sizes.

        Examples
        --------
        >>> run = start("nacl", size="smoke")           # doctest: +ELLIPSIS
        nacl · smoke...
        >>> run.sizes(smoke=dict(seeds=1), laptop=dict(seeds=3)).seeds
        1
        """
        for name in settings:
            if name not in papers.SIZES:
                raise ValueError(f"size {name!r} is unknown; {papers.nearest(name, papers.SIZES)}")
        if self.size not in settings:
            raise ValueError(f"no settings for size={self.size!r}; this notebook has {', '.join(settings)}")
        wanted = set(settings[self.size])
        for name, values in settings.items():
            if set(values) != wanted:
                odd = ", ".join(sorted(set(values) ^ wanted))
                raise ValueError(
                    f"sizes {self.size!r} and {name!r} differ in {odd}; every size sets the same names"
                )
        return SimpleNamespace(**settings[self.size])

    def seeds(self, count: int) -> list[int]:
        """`count` consecutive seeds, from the run's seed on."""
        if count < 1:
            raise ValueError(f"{count} seeds: at least one is needed")
        return list(range(self.seed, self.seed + count))

    def progress(self, iterable: Iterable[T], desc: str = "", total: int | None = None) -> Iterator[T]:
        """Iterate with a progress bar, silent in a batch."""
        return progress(iterable, desc, total)

    def record(self, **values: Any) -> None:
        """Keep further results (numbers, strings, lists) in the run's record, beside the claims.

        Raises
        ------
        TypeError
            If a value is not JSON-serialisable.
        """
        for name, value in values.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"record({name}=...): {error}; use numbers, strings, lists and mappings"
                ) from None
        self._metrics.update(values)

    def claim(self, claim_id: str, values: Sequence[float] | None = None) -> claims.Verdict:
        """Decide a registered claim from one value per seed.

        Parameters
        ----------
        claim_id : str
            As registered in the paper's TOML file.
        values : sequence of float, optional
            One value per seed; may be left out only at a size where the claim is untestable.

        Raises
        ------
        ValueError
            If the claim is not registered, or its values are missing or not finite.
        """
        verdict = claims.judge(self.paper.claim(claim_id), self.size, values)
        self._verdicts[claim_id] = verdict
        return verdict

    def verdicts(self) -> claims.Verdicts:
        """All verdicts of the run, in the registered order; writes ``verdicts.json`` into :attr:`directory`.

        Raises
        ------
        RuntimeError
            If a registered claim has not been decided.
        """
        missing = [claim.id for claim in self.paper.claims if claim.id not in self._verdicts]
        if missing:
            raise RuntimeError(
                f"{len(missing)} registered claims have no value: {', '.join(missing)}. "
                "Call run.claim(id, values) for each; a claim can't be left out."
            )
        rows = tuple(self._verdicts[claim.id] for claim in self.paper.claims)
        changed = {
            name: (self.knobs[name], knob.default)
            for name, knob in self.paper.knobs.items()
            if self.knobs[name] not in (knob.default, *knob.registered)
        }
        result = claims.Verdicts(self.paper.slug, self.size, rows, changed)
        record = {
            "schema": 1,
            "slug": self.paper.slug,
            "size": self.size,
            "seed": self.seed,
            "device": str(self.device),
            "parameters": self.parameters,
            "changed": {name: value for name, (value, _) in changed.items()},
            "claims": result.to_records(),
            "metrics": self._metrics,
            "environment": environment(),
            "seconds": round(time.perf_counter() - self._started, 2),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        cache.write_atomic(self.directory / "verdicts.json", json.dumps(record, indent=1, ensure_ascii=False))
        return result


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a run. Loads torch only if it is loaded already."""
    found: dict[str, Any] = {
        "labkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }
    for package in ("torch", "transformers", "numpy", "tokenizers", "plotly"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None:
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes); 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        import psutil

        return float(getattr(psutil.Process().memory_info(), "peak_wset", 0)) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
