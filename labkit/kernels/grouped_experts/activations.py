"""The activations that the experts know: value and derivative, both written into given buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An elementwise activation.

    Attributes
    ----------
    value : callable
        ``value(x)``, differentiable.
    into : callable
        ``into(x, out)`` writes the value.
    backward_into : callable
        ``backward_into(gradient, x, out)`` writes the gradient with respect to x; ``out`` may be ``gradient``.
    """

    value: Callable[[Tensor], Tensor]
    into: Callable[[Tensor, Tensor], Any]
    backward_into: Callable[[Tensor, Tensor, Tensor], Any]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: torch.nn.functional.gelu(x, approximate=approximate),
        lambda x, out: _aten.gelu.out(x, approximate=approximate, out=out),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
    )


ACTIVATIONS = {
    "silu": Activation(
        torch.nn.functional.silu,
        lambda x, out: _aten.silu.out(x, out=out),
        lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    ),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(
        torch.relu,
        lambda x, out: _aten.relu.out(x, out=out),
        lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    ),
}
