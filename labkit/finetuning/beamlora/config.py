"""The configuration of a BeamLoRA adapter, as peft takes it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from torch import nn

from labkit.finetuning.beamlora.layer import BeamLinear, refuse


@dataclass
class BeamLoraConfig(LoraConfig):
    """LoRA with a learned score per rank; everything that `peft.LoraConfig` takes, and the fields below.

    The adapter trains as any other of peft. Give the trainer a `BeamSearchCallback`, or the loop a `BeamScheduler`,
    and the ranks are reallocated; without one the scores are learned and nothing more.

    Parameters
    ----------
    beam_p0 : float
        Share of the scores that survives the first event, within (0, 1].
    beam_every : int, optional
        T, steps from one event to the next: even. By default the even number nearest to a twelfth of the run.
    beam_end : int, optional
        T_end, steps after which nothing is pruned; by default two thirds of the run.
    beam_temperature : float
        tau of the softmax over the gates. The authors take 0.05, and 0.03 for learning rates below 1e-4.
    scope : {"global", "module"}
        Whether all modules share one budget.

    Raises
    ------
    ValueError
        For values outside these ranges, ``r=1`` (there is nothing to reallocate) or `target_parameters`.
    NotImplementedError
        For ``use_dora=True``.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from labkit.testbeds.models import tiny
    >>> config = BeamLoraConfig(r=4, lora_alpha=8, target_modules="all-linear", beam_every=20)
    >>> model = get_peft_model(tiny("llama", seed=0), config)
    >>> sum(p.numel() for name, p in model.named_parameters() if "lora_gate" in name)  # 14 modules of 4 ranks
    56
    """

    beam_p0: float = field(
        default=0.95, metadata={"help": "share of the scores that survives the first event"}
    )
    beam_every: int | None = field(default=None, metadata={"help": "steps between two events, even"})
    beam_end: int | None = field(default=None, metadata={"help": "steps after which nothing is pruned"})
    beam_temperature: float = field(default=0.05, metadata={"help": "temperature of the gates' softmax"})
    scope: str = field(default="global", metadata={"help": '"global" or "module": what shares a budget'})

    def __post_init__(self) -> None:
        if self.use_dora:
            raise NotImplementedError(
                "use_dora=True: the gate of BeamLoRA and the magnitude of DoRA do not combine; set use_dora=False"
            )
        if getattr(self, "target_parameters", None):
            raise ValueError(
                f"target_parameters={self.target_parameters!r}: BeamLoRA adapts torch.nn.Linear modules alone; "
                f"name them in target_modules"
            )
        for where, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            if rank == 1:
                raise ValueError(
                    f"{where}=1 leaves nothing to reallocate: take 2 or more, or plain LoraConfig"
                )
        check_schedule(self.beam_p0, self.beam_every, self.beam_end, self.scope)
        if not self.beam_temperature > 0:
            raise ValueError(f"beam_temperature={self.beam_temperature} must be positive, for example 0.05")
        super().__post_init__()
        # peft tries the types in this order: everything that is no Linear is refused, not silently made plain LoRA
        makers: dict[Any, Any] = {nn.Linear: BeamLinear, nn.Module: refuse}
        self._register_custom_module(makers)

    @classmethod
    def from_peft_type(cls, **values: Any) -> BeamLoraConfig:
        """Make the configuration from a saved one; peft itself would return a `LoraConfig` without the beam's fields."""
        known = {item.name for item in fields(cls) if item.init} - {"peft_type"}
        return cls(**{name: value for name, value in values.items() if name in known})


def check_schedule(p0: float, every: int | None, end: int | None, scope: str) -> None:
    """Raise a ValueError for settings of the schedule that cannot be meant."""
    if not 0 < p0 <= 1:
        raise ValueError(f"p0={p0} must lie within (0, 1]: it is the share of the scores that survives")
    if every is not None and (not isinstance(every, int) or every < 2 or every % 2):
        raise ValueError(
            f"every={every!r} must be an even number of at least 2 steps: half-way between two events the values "
            f"are remembered that the next one copies"
        )
    if end is not None and (not isinstance(end, int) or end < 1):
        raise ValueError(f"end={end!r} must be a positive whole number of steps")
    if scope not in ("global", "module"):
        raise ValueError(f'scope={scope!r} must be "global" or "module"')
