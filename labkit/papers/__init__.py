"""The registry: what each paper is, what can be turned in its notebook, and the claims made before measuring.

One TOML file a paper, ``labkit/papers/<slug>.toml``. A claim's threshold is fixed there, per size, before the
notebook runs; a size at which a claim can't be tested says why instead.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any, Literal

Size = Literal["smoke", "laptop", "gpu", "paper"]
SIZES: tuple[str, ...] = ("smoke", "laptop", "gpu", "paper")
_KINDS = {"paper": "", "control": " (our control)", "identity": " (an identity)"}
_TYPES: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}


def nearest(name: object, known: Iterable[str]) -> str:
    """End of an error message: the most similar known name if there is one, then all of them.

    Examples
    --------
    >>> nearest("nacll", ["nacl", "dha"])
    "did you mean 'nacl'? known: dha, nacl"
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


@dataclass(frozen=True)
class Knob:
    """A parameter of a notebook beyond size, seed and device.

    Parameters
    ----------
    name, type, default, help
        ``type`` is one of int, float, str, bool.
    choices : tuple, optional
        The only values allowed.
    minimum, maximum : float, optional
        Inclusive bounds of a number.
    registered : tuple, optional
        Values beside the default for which the thresholds were registered too, such as the real data in place of a
        stand-in. Any other value makes a run exploratory.
    """

    name: str
    type: str
    default: Any
    help: str = ""
    choices: tuple[Any, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    registered: tuple[Any, ...] = ()

    def check(self, value: Any) -> Any:
        """Return `value` in the knob's type.

        Raises
        ------
        TypeError
            If the value has another type. An int is accepted where a float is wanted.
        ValueError
            If it is not among the choices or outside the bounds.
        """
        wanted = _TYPES[self.type]
        if wanted is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise TypeError(
                f"{self.name}={value!r} is a {type(value).__name__}; a {self.type} is wanted, {self.allowed()}"
            )
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{self.name}={value!r} is not allowed; {self.allowed()}")
        if isinstance(value, int | float):
            low = -math.inf if self.minimum is None else self.minimum
            high = math.inf if self.maximum is None else self.maximum
            if not (math.isfinite(value) and low <= value <= high):
                raise ValueError(f"{self.name}={value!r} is out of range; {self.allowed()}")
        return value

    def allowed(self) -> str:
        """What may be given, in words."""
        if self.choices is not None:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        low = "" if self.minimum is None else f" from {self.minimum:g}"
        high = "" if self.maximum is None else f" up to {self.maximum:g}"
        return f"any {self.type}{low}{high}, such as {self.default!r}"


@dataclass(frozen=True)
class SizeNote:
    """What a size costs: seconds and resident megabytes on the machine named in `what`."""

    name: str
    seconds: float
    memory_mb: float
    what: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence that a run can support or fail to support.

    Parameters
    ----------
    id, text, metric, unit
        ``text`` is the claim as a plain sentence; ``metric`` says which number per seed decides it.
    direction : {">=", "<="}
        Side of the threshold on which the claim holds.
    threshold : mapping of size to float
        Fixed before the run.
    untestable : mapping of size to reason
        Sizes that can't decide the claim, and why.
    paper_figure, setting
        What the paper reports, and on which models and data.
    min_seeds : int
        Fewer values than this decide nothing.
    kind : {"paper", "control", "identity"}
        Whether the paper says so, or the claim is a control of ours, or an equality that holds by construction.
    without_data : str
        Why a run may have no values at a size with a threshold: they are of data that is not shipped. Given values
        are judged.
    """

    id: str
    text: str
    metric: str
    direction: str
    threshold: Mapping[str, float]
    untestable: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    paper_figure: str = ""
    setting: str = ""
    min_seeds: int = 3
    kind: str = "paper"
    without_data: str = ""

    @property
    def sentence(self) -> str:
        """The claim, with a note if it is not the paper's."""
        return self.text + _KINDS[self.kind]

    def passes(self, value: float, size: str) -> bool:
        """Whether `value` lies on the claimed side of the threshold of `size`."""
        return value >= self.threshold[size] if self.direction == ">=" else value <= self.threshold[size]


@dataclass(frozen=True)
class Paper:
    """One paper of the collection, as its TOML file describes it."""

    slug: str
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str
    family: str
    idea: str
    drag: str
    knobs: Mapping[str, Knob]
    sizes: Mapping[str, SizeNote]
    claims: tuple[Claim, ...]

    @property
    def notebook(self) -> str:
        """Path of the notebook from the root of the repository."""
        return f"notebooks/{self.family}/{self.slug}.ipynb"

    @property
    def module(self) -> str:
        """Import name of the method's module."""
        return f"labkit.{self.family}.{self.slug}"

    @property
    def url(self) -> str:
        """Where to read the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    def claim(self, claim_id: str) -> Claim:
        """The registered claim of that id; ValueError with the nearest id otherwise."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        raise ValueError(
            f"claim {claim_id!r} is not registered for {self.slug!r}; "
            f"{nearest(claim_id, (claim.id for claim in self.claims))}. "
            f"Register it in labkit/papers/{self.slug}.toml before measuring it."
        )

    def parameter(self, name: str) -> Knob:
        """The parameter of that name: a knob, or one that all papers have; ValueError with the nearest otherwise."""
        known = {**_COMMON, **self.knobs}
        if name not in known:
            raise ValueError(f"{self.slug} has no parameter {name!r}; {nearest(name, known)}")
        return known[name]

    def check(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Complete and validate the parameters of a run: size, seed, device and the paper's knobs.

        Parameters
        ----------
        parameters : mapping
            Any subset; what is missing takes its default.

        Returns
        -------
        dict
            All parameters, in the order size, seed, device, knobs.

        Raises
        ------
        ValueError
            For an unknown name, or a value that is not allowed.
        TypeError
            For a value of the wrong type.
        """
        for name in parameters:
            self.parameter(name)
        known = {**_COMMON, **self.knobs}
        checked = {name: knob.check(parameters.get(name, knob.default)) for name, knob in known.items()}
        if checked["size"] not in self.sizes:
            raise ValueError(f"size={checked['size']!r}: {self.slug} has the sizes {', '.join(self.sizes)}")
        device = checked["device"]
        if device not in ("auto", "cpu", "cuda", "mps") and not device.startswith("cuda:"):
            raise ValueError(
                f"device={device!r} is not allowed; one of 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'"
            )
        return checked


_COMMON: dict[str, Knob] = {
    "size": Knob("size", "str", "laptop", "how much is run", choices=SIZES),
    "seed": Knob("seed", "int", 0, "first seed of the run", minimum=0, maximum=2**31 - 1),
    "device": Knob("device", "str", "auto", "auto takes a GPU if there is one"),
}


@cache
def slugs() -> tuple[str, ...]:
    """Slugs of all registered papers, sorted."""
    files = resources.files(__name__).iterdir()
    return tuple(sorted(item.name.removesuffix(".toml") for item in files if item.name.endswith(".toml")))


@cache
def load(slug: str) -> Paper:
    """Read a paper's entry.

    Raises
    ------
    ValueError
        If there is no such paper (the nearest slug is named), or its file is not well formed.

    Examples
    --------
    >>> load("nacl").family
    'kv'
    """
    if slug not in slugs():
        raise ValueError(f"paper {slug!r} is not in the collection; {nearest(slug, slugs())}")
    text = (resources.files(__name__) / f"{slug}.toml").read_text(encoding="utf-8")
    try:
        return parse(slug, tomllib.loads(text))
    except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"labkit/papers/{slug}.toml is not well formed: {error!r}") from error


def parse(slug: str, data: Mapping[str, Any]) -> Paper:
    """Build a :class:`Paper` from the content of its TOML file, checking that the claims are complete.

    Raises
    ------
    ValueError
        If a size or a claim's kind is unknown, or a claim has neither a threshold nor a reason for one of the paper's sizes.
    """
    sizes = {name: SizeNote(name, **note) for name, note in data["sizes"].items()}
    for name in sizes:
        if name not in SIZES:
            raise ValueError(f"{slug}: size {name!r} is unknown; {nearest(name, SIZES)}")
    knobs = {}
    for name, entry in data.get("knobs", {}).items():
        lists = {key: tuple(entry[key]) for key in ("choices", "registered") if key in entry}
        knobs[name] = Knob(name, **{**entry, **lists})
        for value in (knobs[name].default, *knobs[name].registered):
            knobs[name].check(value)
    claims = tuple(Claim(**entry) for entry in data["claims"])
    for claim in claims:
        if claim.direction not in (">=", "<="):
            raise ValueError(
                f"{slug}: claim {claim.id!r} has direction {claim.direction!r}; use '>=' or '<='"
            )
        if claim.kind not in _KINDS:
            raise ValueError(
                f"{slug}: claim {claim.id!r} has kind {claim.kind!r}; {nearest(claim.kind, _KINDS)}"
            )
        for name in sizes:
            if (name in claim.threshold) == (name in claim.untestable):
                raise ValueError(
                    f"{slug}: claim {claim.id!r} needs either a threshold or a reason under 'untestable' "
                    f"for size {name!r}"
                )
    known = ("title", "authors", "venue", "year", "arxiv", "family", "idea", "drag")
    return Paper(slug=slug, knobs=knobs, sizes=sizes, claims=claims, **{name: data[name] for name in known})
