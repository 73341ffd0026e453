"""Where weights come from: a model in memory, one layer and one matrix at a time.

:class:`WeightSource` is what the analyses read; :class:`ModelSource` is a loaded model behind it, and
:class:`labkit.moe.look_into_moes.checkpoint.Checkpoint` a folder that is never loaded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, Protocol

from torch import Tensor, nn

from labkit.moe.adapters import BlockAdapter, ExpertMatrices, moe_blocks
from labkit.moe.adapters.blocks import place_of
from labkit.moe.adapters.matrices import MLP_NAMES, mlp_matrices, readable

Matrix = Literal["up", "act", "down"]
MATRICES: tuple[Matrix, ...] = ("up", "act", "down")


class WeightSource(Protocol):
    """Weights of the MoE layers of one model."""

    @property
    def name(self) -> str:
        """What the model is called."""

    @property
    def layers(self) -> list[int]:
        """MoE layers, ascending."""

    def num_experts(self, layer: int) -> int:
        """Routed experts E of a layer."""

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """Matrices that an expert of the layer has."""

    def stored(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """One matrix of all routed experts, in its own shape and float type."""

    def shared(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """The same matrix of the shared experts."""

    def dense(self, layer: int, matrix: Matrix) -> Tensor:
        """The same matrix of a dense model's feed-forward layer."""

    @property
    def dense_layers(self) -> list[int]:
        """Layers that have a dense feed-forward layer."""

    def router(self, layer: int) -> Tensor | None:
        """Weight (E, D) of a linear router; None for another kind of router."""


def neurons(matrix: Matrix, weight: Tensor) -> Tensor:
    """A matrix as its neurons, ``(f, D)``: rows of W_up and W_act, columns of W_down.

    Examples
    --------
    >>> import torch
    >>> tuple(neurons("down", torch.zeros(8, 3)).shape)
    (3, 8)
    """
    return weight.T if matrix == "down" else weight


def _of(matrices: ExpertMatrices, matrix: Matrix) -> Tensor:
    return matrices.named()[matrix]


class ModelSource:
    """The weights of a model in memory, of any form that `labkit.moe.iter_moe_blocks` knows.

    Parameters
    ----------
    model : nn.Module
        A mixture of experts; as a dense reference, any model with feed-forward layers of known names.
    mixture : bool, default True
        Whether MoE blocks are expected.

    Raises
    ------
    ValueError
        If there is nothing to look at.
    """

    def __init__(self, model: nn.Module, *, mixture: bool = True) -> None:
        self.model = model
        self.blocks: dict[int, BlockAdapter] = (
            {block.layer: block for block in moe_blocks(model)} if mixture else {}
        )
        self._dense: dict[int, nn.Module] = {}
        for name, module in model.named_modules():
            if re.search(r"(^|\.)(experts|shared_experts?)(\.|$)", name):
                continue
            if any(isinstance(getattr(module, n[0], None), nn.Linear) for n in MLP_NAMES) and any(
                isinstance(getattr(module, n[2], None), nn.Linear) for n in MLP_NAMES
            ):
                layer, _ = place_of(model, name, len(self._dense))
                self._dense.setdefault(layer, module)
        if not mixture and not self._dense:
            raise ValueError(
                f"{type(model).__name__} has no dense feed-forward layer of known names (gate_proj/up_proj/down_proj, "
                "w1/w2/w3, wi/wo, fc1/fc2) to compare with"
            )

    @property
    def name(self) -> str:
        """The name or path that the model was loaded from, else its class."""
        config = getattr(self.model, "config", None)
        return str(getattr(config, "_name_or_path", "") or type(self.model).__name__)

    @property
    def layers(self) -> list[int]:
        """MoE layers, ascending."""
        return sorted(self.blocks)

    @property
    def dense_layers(self) -> list[int]:
        """Layers with a dense feed-forward layer, ascending."""
        return sorted(self._dense)

    def num_experts(self, layer: int) -> int:
        """Routed experts E of a layer."""
        return self.blocks[layer].num_experts

    def matrices(self, layer: int) -> tuple[Matrix, ...]:
        """Matrices that an expert of the layer has."""
        named = self.blocks[layer].matrices(0).named()
        return tuple(m for m in MATRICES if m in named)

    def stored(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """One matrix of all routed experts."""
        block = self.blocks[layer]
        return [_of(block.matrices(e), matrix) for e in range(block.num_experts)]

    def shared(self, layer: int, matrix: Matrix) -> list[Tensor]:
        """The same matrix of the shared experts."""
        return [_of(found, matrix) for found in self.blocks[layer].shared_matrices()]

    def dense(self, layer: int, matrix: Matrix) -> Tensor:
        """The same matrix of the dense feed-forward layer."""
        return _of(mlp_matrices(self._dense[layer], f"dense layer {layer}"), matrix)

    def router(self, layer: int) -> Tensor | None:
        """Weight of a linear router."""
        block = self.blocks[layer]
        linear = block.router_linear()
        return None if linear is None else readable(linear[0], f"{block.name}, router")


def check_layers(layers: Sequence[int] | None, known: Sequence[int], what: str = "MoE layer") -> list[int]:
    """The layers asked for, or all; raises ``ValueError`` for one that is not there."""
    if layers is None:
        return list(known)
    odd = [layer for layer in layers if layer not in known]
    if odd or not layers:
        raise ValueError(f"{odd or list(layers)} is no {what}; there are {list(known)}")
    return list(layers)
