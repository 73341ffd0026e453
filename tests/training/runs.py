"""What the tests of training read from a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def records(folder: Path) -> list[dict[str, Any]]:
    """The log without its times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def tensors(folder: Path, step: int = 12, stem: str = "model") -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint."""
    return load_file(folder / f"step-{step:08d}" / f"{stem}.safetensors")


def same_bits(one: Path, other: Path, step: int = 12) -> None:
    """Log, weights, optimizer state and random generators are equal to the bit."""
    assert [r for r in records(one) if r["step"] > 8] == [r for r in records(other) if r["step"] > 8]
    for stem in ("model", "optimizer"):
        first, second = tensors(one, step, stem), tensors(other, step, stem)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first), stem
    for own in sorted((one / f"step-{step:08d}").glob("*.json")):
        if own.name != "manifest.json":
            assert own.read_text() == (other / own.parent.name / own.name).read_text(), own.name


def gap(one: Path, other: Path) -> tuple[float, float]:
    """Largest relative difference of the losses, and largest difference of the weights."""
    losses = [(a["loss"], b["loss"]) for a, b in zip(records(one), records(other), strict=True)]
    first, second = tensors(one), tensors(other)
    return (
        max(abs(a - b) / b for a, b in losses),
        max(float((first[name] - second[name]).abs().max()) for name in second),
    )
