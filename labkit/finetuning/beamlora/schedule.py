"""When values are remembered and ranks reallocated, for any training loop."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

from labkit.finetuning.beamlora.config import BeamLoraConfig, check_schedule
from labkit.finetuning.beamlora.layer import BeamLinear
from labkit.finetuning.beamlora.rule import beam_threshold, expand, prune_counts, pruned_and_top
from labkit.lab.cache import write_atomic

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
FILE = "beam_search"


@dataclass(frozen=True)
class BeamEvent:
    """What one reallocation did.

    Attributes
    ----------
    step : int
        Finished steps n.
    p : float
        Share of the scores that survived.
    scores : dict of str to list of float
        s of every module before the event.
    pruned, sources : dict of str to list of int
        Slots that were given away, and for each the rank that was copied; only modules that lost any.
    """

    step: int
    p: float
    scores: dict[str, list[float]]
    pruned: dict[str, list[int]]
    sources: dict[str, list[int]]

    @property
    def count(self) -> int:
        """Ranks pruned in all."""
        return sum(map(len, self.pruned.values()))


class BeamScheduler:
    """Reallocates the ranks of a BeamLoRA adapter; call `step` after each ``optimizer.step()``.

    Parameters
    ----------
    model : torch.nn.Module
        Holds `BeamLinear` layers; may be wrapped by DDP or ``torch.compile``.
    optimizer : torch.optim.Optimizer
        Trains them; accelerate's wrapper is fine.
    total_steps : int
        S, optimizer steps of the whole run.
    every, end, p0, scope
        As `BeamLoraConfig`, whose values hold where they are left out here.
    seed : int
        Of the permutations. Equal in all processes.
    adapter : str
    optimizer_state : {"copy", "keep", "zero"}
        Adam's moments of a slot that is given away: those remembered of the copied rank, as they are (the authors'
        released code), or 0. The gate's become 0 in any case.
    cap : float, optional
        Largest share of a module's ranks that an event may prune; None for no limit (the released code).
    source : {"cached", "current"}
        Copy remembered values, or current ones (ablation).
    fixed : int, optional
        Prune this many ranks of every module at every event up to `end`, in place of the threshold (ablation).
    reallocate : bool
        False learns the scores and leaves the ranks alone (ablation).

    Attributes
    ----------
    finished : int
        Optimizer steps seen.
    events : list of BeamEvent

    Raises
    ------
    ValueError
        Without BeamLoRA layers for `adapter`, or for settings outside their range.
    NotImplementedError
        For sharded parameters (FSDP).

    Warns
    -----
    UserWarning
        When no event can happen (``every`` above half of the run), or when the optimizer has no Adam moments.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from labkit.testbeds.models import tiny
    >>> config = BeamLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    >>> model = get_peft_model(tiny("llama", seed=0), config)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    >>> beam = BeamScheduler(model, optimizer, total_steps=24, every=4, p0=0.7)
    >>> tokens = torch.arange(64).view(2, 32)
    >>> for _ in range(24):
    ...     model(input_ids=tokens, labels=tokens).loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    ...     event = beam.step()
    >>> [event.step for event in beam.events]
    [4, 8, 12, 16]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        *,
        every: int | None = None,
        end: int | None = None,
        p0: float | None = None,
        scope: str | None = None,
        seed: int = 0,
        adapter: str = "default",
        optimizer_state: Literal["copy", "keep", "zero"] = "copy",
        cap: float | None = 0.5,
        source: Literal["cached", "current"] = "cached",
        fixed: int | None = None,
        reallocate: bool = True,
    ) -> None:
        self.layers = dict(beam_layers(model, adapter))
        if not self.layers:
            raise ValueError(
                f"the model has no BeamLoRA layers of adapter {adapter!r}: make it with "
                f"get_peft_model(model, BeamLoraConfig(...))"
            )
        if total_steps is None or total_steps < 1:
            raise ValueError(
                f"total_steps={total_steps} must be the positive number of optimizer steps of the run"
            )
        config = _config(model, adapter)
        every = every if every is not None else config.beam_every
        end = end if end is not None else config.beam_end
        self.every = max(2, 2 * round(total_steps / 24)) if every is None else every
        self.end = max(1, round(2 * total_steps / 3)) if end is None else end
        self.p0 = config.beam_p0 if p0 is None else p0
        self.scope: Any = scope or config.scope
        check_schedule(self.p0, self.every, self.end, self.scope)
        if optimizer_state not in ("copy", "keep", "zero"):
            raise ValueError(f'optimizer_state={optimizer_state!r} must be "copy", "keep" or "zero"')
        if source not in ("cached", "current"):
            raise ValueError(f'source={source!r} must be "cached" or "current"')
        if cap is not None and not 0 < cap <= 1:
            raise ValueError(f"cap={cap} must lie within (0, 1], or be None for no limit")
        if fixed is not None and not 0 < fixed <= min(layer.r[adapter] for layer in self.layers.values()):
            raise ValueError(f"fixed={fixed} must lie between 1 and the smallest rank of the adapter")
        if reallocate and self.every > total_steps / 2:
            warnings.warn(
                f"every={self.every} is more than half of {total_steps} steps: no reallocation will ever happen",
                stacklevel=2,
            )
        self.total_steps, self.seed, self.adapter = total_steps, seed, adapter
        self.optimizer_state, self.cap, self.source = optimizer_state, cap, source
        self.fixed, self.reallocate = fixed, reallocate
        self.optimizer = _unwrapped(optimizer)
        self.finished = 0
        self.events: list[BeamEvent] = []
        self._cache: dict[str, torch.Tensor] = {}
        self._warned = False
        for layer in self.layers.values():
            for weight in self._weights(layer).values():
                if hasattr(weight, "device_mesh") or not hasattr(weight, "shape") or weight.numel() == 0:
                    raise NotImplementedError(
                        "BeamLoRA needs whole parameters in each process: train with DDP, not with sharded weights"
                    )

    # ------------------------------------------------------------------------------------------------ the steps

    def step(self) -> BeamEvent | None:
        """Count a finished optimizer step; remember or reallocate where one is due."""
        self.remember(self.finished)
        return self.advance(self.finished + 1)

    def remember(self, step: int) -> bool:
        """Take the copies if they are due in the step that began with `step` finished ones, after its update."""
        due = step > 0 and step % self.every == self.every // 2
        if not (due and self.reallocate and self.source == "cached"):
            return False
        event = (step // self.every + 1) * self.every
        if event > self.end or self.total_steps - event < self.every:
            return False  # nobody will ask for them
        self._check_optimizer()
        self._cache = dict(self._current())
        return True

    @torch.no_grad()
    def advance(self, finished: int) -> BeamEvent | None:
        """Take note that `finished` steps are done, and reallocate if that is due."""
        self.finished = finished
        due = finished > 0 and finished % self.every == 0 and self.total_steps - finished >= self.every
        if not due or not self.reallocate:
            return None
        p = beam_threshold(finished - 1, self.p0, self.end)
        if p >= 1:
            return None
        scores = {name: layer.scores(self.adapter).cpu() for name, layer in self.layers.items()}
        counts = [self.fixed] * len(scores)
        if self.fixed is None:
            counts = prune_counts(list(scores.values()), p, self.scope, self.cap)  # type: ignore[assignment]
        self._check_optimizer()
        pruned, sources = {}, {}
        for index, (name, count) in enumerate(zip(scores, counts, strict=True)):
            if count:
                lost, top = pruned_and_top(scores[name], count)
                top = top[torch.randperm(count, generator=self._generator(finished, index))]
                self._give(name, lost, top)
                pruned[name], sources[name] = lost.tolist(), top.tolist()
        event = BeamEvent(finished, p, {name: s.tolist() for name, s in scores.items()}, pruned, sources)
        self.events.append(event)
        self._cache = {}
        return event

    def _generator(self, step: int, index: int) -> torch.Generator:
        words = np.random.SeedSequence((self.seed, step, index)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)

    def _give(self, name: str, pruned: torch.Tensor, top: torch.Tensor) -> None:
        layer = self.layers[name]
        a, b, gate = self._weights(layer).values()
        values = dict(self._current(name)) if self.source == "current" else self._cache
        if f"{name}::A" not in values:
            raise RuntimeError(
                f"nothing was remembered before step {self.finished}, so that no rank can be copied: restore the "
                f"scheduler of the interrupted run with restore(folder), or start it with the training"
            )
        old_a, old_b = values[f"{name}::A"].to(a.device), values[f"{name}::B"].to(b.device)
        for weight, new in zip((a, b, gate), expand(a, b, gate, old_a, old_b, pruned, top), strict=True):
            weight.copy_(new)
        pruned, top = pruned.to(a.device), top.to(a.device)
        for moment in self._moments(gate):
            self.optimizer.state[gate][moment].zero_()
        for key, weight in (("A", a), ("B", b)):
            for moment in self._moments(weight):
                held = self.optimizer.state[weight][moment]
                # ranks are rows of A and columns of B: with B transposed both are indexed alike, in place
                slots = held if key == "A" else held.t()
                if self.optimizer_state == "zero":
                    slots[pruned] = 0
                elif self.optimizer_state == "copy":
                    old = values.get(f"{name}::{key}.{moment}")
                    if old is not None:
                        slots[pruned] = (old if key == "A" else old.t()).to(held.device)[top]

    # ------------------------------------------------------------------------------------ what there is to copy

    def _weights(self, layer: Any) -> dict[str, torch.Tensor]:
        return {
            "A": layer.lora_A[self.adapter].weight,
            "B": layer.lora_B[self.adapter].weight,
            "gate": layer.lora_gate[self.adapter],
        }

    def _moments(self, weight: torch.Tensor) -> list[str]:
        state = self.optimizer.state.get(weight, {})
        return [name for name in MOMENTS if name in state and state[name].shape == weight.shape]

    def _check_optimizer(self) -> None:
        found = any(self._moments(w) for layer in self.layers.values() for w in self._weights(layer).values())
        if not found and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self.optimizer).__name__} keeps no exp_avg and exp_avg_sq of the adapter's shapes, so the "
                f"optimizer's state of reallocated ranks is left as it is; BeamLoRA is meant for Adam",
                stacklevel=4,
            )

    def _current(self, only: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Copies of A, B and their moments, by name."""
        for name, layer in self.layers.items():
            if only not in (None, name):
                continue
            weights = self._weights(layer)
            for key in ("A", "B"):
                yield f"{name}::{key}", weights[key].detach().clone()
                if self.optimizer_state == "copy":
                    for moment in self._moments(weights[key]):
                        held = self.optimizer.state[weights[key]][moment]
                        yield f"{name}::{key}.{moment}", held.detach().clone()

    # ------------------------------------------------------------------------------------------------ checkpoints

    @property
    def needs_cache(self) -> bool:
        """Whether the next event copies values that were remembered before now."""
        due = (self.finished // self.every + 1) * self.every
        possible = self.total_steps - due >= self.every and due <= self.end
        inside = self.finished % self.every > self.every // 2
        return self.reallocate and self.source == "cached" and inside and possible

    def save(self, folder: str | Path) -> None:
        """Write what was remembered and the events so far: two files in `folder`, safetensors and JSON."""
        folder = Path(folder)
        tensors = {name: value.contiguous().cpu() for name, value in self._cache.items()}
        write_atomic(folder / f"{FILE}.safetensors", safetensors.torch.save(tensors))
        facts = {"finished": self.finished, "every": self.every, "events": [asdict(e) for e in self.events]}
        write_atomic(folder / f"{FILE}.json", json.dumps(facts))

    def restore(self, folder: str | Path) -> None:
        """Go on from what `save` wrote.

        Raises
        ------
        ValueError
            If `folder` has no such files, or those of another schedule or model.
        """
        folder = Path(folder)
        if not (folder / f"{FILE}.json").is_file():
            raise ValueError(f"{folder} has no {FILE}.json: give a folder that BeamScheduler.save wrote")
        facts = json.loads((folder / f"{FILE}.json").read_text())
        tensors = safetensors.torch.load_file(folder / f"{FILE}.safetensors")
        odd = {name.split("::")[0] for name in tensors} - set(self.layers)
        if facts["every"] != self.every or odd:
            raise ValueError(
                f"{folder} is of a run with every={facts['every']}{f' and modules {sorted(odd)[:3]}' if odd else ''}; "
                f"this one has every={self.every}: resume with the same settings and model"
            )
        self.finished = facts["finished"]
        self.events = [BeamEvent(**event) for event in facts["events"]]
        devices: Mapping[str, Any] = {n: self._weights(layer)["A"].device for n, layer in self.layers.items()}
        self._cache = {name: value.to(devices[name.split("::")[0]]) for name, value in tensors.items()}


def beam_layers(model: nn.Module, adapter: str = "default") -> Iterator[tuple[str, Any]]:
    """BeamLoRA layers of an adapter with their names in the model that was adapted."""
    for name, module in model.named_modules():
        if isinstance(module, BeamLinear) and adapter in getattr(module, "lora_gate", {}):
            yield plain_name(name), module


def plain_name(name: str) -> str:
    """A module's name without what wrappers put in front of it."""
    parts = name.split(".")
    while parts and parts[0] in ("module", "_orig_mod", "base_model"):
        parts = parts[2:] if parts[:2] == ["base_model", "model"] else parts[1:]
    return ".".join(parts)


def _config(model: nn.Module, adapter: str) -> BeamLoraConfig:
    for module in model.modules():
        config = getattr(module, "peft_config", {}).get(adapter) if hasattr(module, "peft_config") else None
        if isinstance(config, BeamLoraConfig):
            return config
    return BeamLoraConfig()


def _unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate wraps
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "state"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer
