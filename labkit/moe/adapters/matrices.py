"""The weights of experts and of linear routers, read from modules under any of the names in use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class ExpertMatrices:
    """The weights of one expert; neuron j is row j of ``up`` and of ``act`` and column j of ``down``.

    Attributes
    ----------
    up : Tensor
        ``(f, D)``.
    act : Tensor or None
        ``(f, D)``; None where the expert has two matrices, act(up x) then goes to ``down``.
    down : Tensor
        ``(D, f)``.
    """

    up: Tensor
    act: Tensor | None
    down: Tensor

    def named(self) -> dict[str, Tensor]:
        """The matrices there are, by name.

        Examples
        --------
        >>> import torch
        >>> sorted(ExpertMatrices(torch.zeros(4, 8), None, torch.zeros(8, 4)).named())
        ['down', 'up']
        """
        found = {"up": self.up, "act": self.act, "down": self.down}
        return {name: matrix for name, matrix in found.items() if matrix is not None}


def readable(matrix: Tensor, what: str) -> Tensor:
    """Return the weight detached, or say why its numbers cannot be read.

    Raises
    ------
    ValueError
        For quantised weights and for weights on the meta device.
    """
    if matrix.is_meta:
        raise ValueError(
            f"{what} is on the meta device, its numbers are not loaded. Load the model without offloading, or analyse "
            "the folder with from_checkpoint"
        )
    if matrix.dtype not in FLOATS:
        raise ValueError(
            f"{what} is stored as {matrix.dtype}, quantised. Load the model in float32, bfloat16 or float16, or call "
            "model.dequantize() first"
        )
    return matrix.detach()


MLP_NAMES = (
    ("up_proj", "gate_proj", "down_proj"),
    ("w3", "w1", "w2"),
    ("wi", None, "wo"),
    ("fc1", None, "fc2"),
)


def mlp_matrices(module: nn.Module, what: str) -> ExpertMatrices:
    """The matrices of a feed-forward module, by the names that models give them."""
    for up, act, down in MLP_NAMES:
        if hasattr(module, up) and hasattr(module, down):

            def weight(name: str) -> Tensor:
                return readable(getattr(module, name).weight, f"{what}.{name}")

            return ExpertMatrices(weight(up), None if act is None else weight(act), weight(down))
    raise ValueError(
        f"{what}: {type(module).__name__} has none of the matrices "
        + ", ".join("/".join(name for name in names if name) for names in MLP_NAMES)
    )


def linear_of(router: nn.Module, experts: int) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear router, looked for under the names in use."""
    for holder in (router, *(getattr(router, name, None) for name in ("classifier", "layer"))):
        weight = getattr(holder, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == experts:
            bias = getattr(holder, "bias", None)
            return weight, bias if isinstance(bias, Tensor) else None
    return None


def unwrapped(experts: Any) -> Any:
    """Take off the wrappers that peft puts around a module, of which ``base_layer`` is the inside."""
    while isinstance(experts, nn.Module) and isinstance(getattr(experts, "base_layer", None), nn.Module):
        experts = experts.base_layer
    return experts
