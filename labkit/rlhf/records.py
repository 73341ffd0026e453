"""The record of an iteration: what its rollout, its updates and its guests measured, under one roof."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from labkit.rlhf.rewards import unique_names


class IterationRecord:
    """Gathers the numbers of one iteration at a time.

    Parameters
    ----------
    guests : iterable
        Rewards and hooks; those with ``metrics()`` are asked at the end of an iteration.

    Attributes
    ----------
    rollout : dict
        What the rollout measured; set by whoever collects it.

    Examples
    --------
    >>> record = IterationRecord([])
    >>> record.rollout = {"objective/scores": 0.5}
    >>> for norm, loss in ((1.0, 3.0), (3.0, 1.0)):
    ...     record.norm("policy", norm)
    ...     record.add({"step": 2, "loss": loss, "lr": 0.1, "val/ratio": 1.0})
    >>> record.close(iteration=1, episode=8)
    {'step': 2, 'iteration': 1, 'episode': 8, 'lr': 0.1, 'loss': 2.0, 'objective/scores': 0.5, 'val/ratio': 1.0,
     'policy/grad_norm': 2.0}
    """

    def __init__(self, guests: Iterable[Any]) -> None:
        self.guests = list(guests)
        self._names = unique_names(self.guests)
        self.rollout: dict[str, float] = {}
        self._updates: list[Mapping[str, Any]] = []
        self._norms: dict[str, list[float]] = {}

    def norm(self, part: str, value: float) -> None:
        """Note the gradient norm of ``policy`` or ``value`` in an update."""
        self._norms.setdefault(f"{part}/grad_norm", []).append(value)

    def add(self, update: Mapping[str, Any]) -> None:
        """Note what an update measured: step, loss, lr, and numbers whose names have a slash."""
        self._updates.append(update)

    def close(self, iteration: int, episode: int) -> dict[str, Any]:
        """The iteration's record, means over its updates where there are several; then starts anew."""
        last = self._updates[-1]
        whole: dict[str, Any] = {
            "step": last["step"],
            "iteration": iteration,
            "episode": episode,
            "lr": last["lr"],
            "loss": _mean([one["loss"] for one in self._updates]),
            **self.rollout,
        }
        names = [name for name in last if "/" in name]
        whole |= {name: _mean([one[name] for one in self._updates]) for name in names}
        whole |= {name: _mean(norms) for name, norms in self._norms.items()}
        for own, guest in zip(self._names, self.guests, strict=True):
            if hasattr(guest, "metrics"):
                whole |= {
                    name if "/" in name else f"{own}/{name}": float(value)
                    for name, value in guest.metrics().items()
                }
        self._updates, self._norms = [], {}
        return whole


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
