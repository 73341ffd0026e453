"""Which weights have rows that MIGU can mask, and whose output says how large each row's outputs are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class RowLayer:
    """A weight with one row per output.

    Attributes
    ----------
    name : str
        Of the module.
    module : torch.nn.Module
        Holds ``weight``.
    source : torch.nn.Module
        Its output is measured: the module itself, or for B of a LoRA the layer that it belongs to.
    dim : int
        Dimension of the weight that counts outputs.
    """

    name: str
    module: nn.Module
    source: nn.Module
    dim: int

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]

    @property
    def size(self) -> int:
        """Number of outputs."""
        return int(self.weight.shape[self.dim])


def _is_under(name: str, skipped: str) -> bool:
    """Whether `skipped` is a run of whole components of the dotted name."""
    return f".{skipped}." in f".{name}."


def row_layers(model: nn.Module, skip: Sequence[str] = (), combined: bool = True) -> list[RowLayer]:
    """Find the linear layers of a model, in the order of its modules.

    Parameters
    ----------
    model : torch.nn.Module
    skip : sequence of str
        Names, or parts of names between dots, of layers to leave out.
    combined : bool
        Whether B of a LoRA is measured at the output of its whole layer.

    Raises
    ------
    ValueError
        When the model has no linear layer or a name of `skip` fits none.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [layer.name for layer in row_layers(model, skip=("2",))]
    ['0']
    """
    if isinstance(skip, str):
        raise TypeError(f'skip must be a sequence of names, got the string {skip!r}; write ("{skip}",)')
    found = []
    owners = {}
    for name, module in model.named_modules():
        if combined and isinstance(getattr(module, "lora_B", None), nn.ModuleDict):
            owners.update({id(b): module for b in module.lora_B.values()})  # type: ignore[operator, union-attr]
        if isinstance(module, nn.Linear):
            found.append(RowLayer(name, module, owners.get(id(module), module), 0))
        elif isinstance(module, Conv1D):
            found.append(RowLayer(name, module, module, 1))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer (torch.nn.Linear, or Conv1D of transformers), so MIGU has "
            "nothing to mask"
        )
    for wanted in skip:
        if not any(_is_under(layer.name, wanted) for layer in found):
            parts = sorted({part for layer in found for part in layer.name.split(".") if not part.isdigit()})
            close = difflib.get_close_matches(wanted, parts, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(
                f"skip: no linear layer is called {wanted!r}; {hint}There are {', '.join(parts)}"
            )
    return [layer for layer in found if not any(_is_under(layer.name, wanted) for wanted in skip)]
