"""The settings of a recurrent router, checked before anything is built."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from labkit.moe.routers.recurrent import CELLS, HEADS, PASSING, RESIDUALS


@dataclass(frozen=True)
class RecurrentSettings:
    """How the routers of a model remember.

    Parameters
    ----------
    state_size : int, default 128
        p, the width of projectors, cell and heads.
    cell : {"gru", "rnn", "lstm"}, default "gru"
        The cell that all layers share.
    passing : {"full", "none", "detach"}, default "full"
        Whether a layer gets the state of the layer before, nothing, or the state without its gradient.
    logit_residual : float, default 0
        alpha; alpha times the decision of the layer before is added.
    residual_of : {"logits", "scores"}, default "logits"
        What alpha multiplies: logits, or probabilities.
    detach_logits : bool, default False
        Whether that term is without gradient.
    bias : bool, default False
        Whether projectors and heads have biases, as in the paper's small setting.
    shared_projector : bool, default False
        One projector for all layers, which must then have one width.
    head : {"linear", "cosine"}, default "linear"
        "cosine" is XMoE's readout.
    temperature : float, default 0.3
        Of the cosine, where training begins.
    jitter : float, default 0
        In training, what the router reads is multiplied by uniform noise from ``[1 - jitter, 1 + jitter]``.

    Raises
    ------
    ValueError
        For a value that is not allowed.
    TypeError
        For one of another type.

    Examples
    --------
    >>> RecurrentSettings(state_size=0)
    Traceback (most recent call last):
    ...
    ValueError: state_size must be at least 1 (the paper has 128); got 0
    """

    state_size: int = 128
    cell: str = "gru"
    passing: str = "full"
    logit_residual: float = 0.0
    residual_of: str = "logits"
    detach_logits: bool = False
    bias: bool = False
    shared_projector: bool = False
    head: str = "linear"
    temperature: float = 0.3
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.state_size, bool) or not isinstance(self.state_size, int):
            raise TypeError(f"state_size must be a whole number (the paper has 128); got {self.state_size!r}")
        if self.state_size < 1:
            raise ValueError(f"state_size must be at least 1 (the paper has 128); got {self.state_size}")
        for name, allowed in (
            ("cell", tuple(CELLS)),
            ("passing", PASSING),
            ("residual_of", RESIDUALS),
            ("head", HEADS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}"
                )
        for name in ("detach_logits", "bias", "shared_projector"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False; got {getattr(self, name)!r}")
        for name in ("logit_residual", "temperature", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number; got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite; got {value}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive; got {self.temperature}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1); got {self.jitter}")
        if self.residual_of == "scores" and self.logit_residual < 0:
            raise ValueError(
                "logit_residual must not be negative with residual_of='scores', a sum of probabilities; "
                f"got {self.logit_residual}"
            )

    @classmethod
    def named(cls, **settings: Any) -> RecurrentSettings:
        """Make settings, with a readable error for a name that is none."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise TypeError(
                f"{', '.join(unknown)}: no setting of a recurrent router; there are {', '.join(known)}"
            )
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return dataclasses.asdict(self)
