"""The gated linear layer, in peft's own terms: a LoRA layer and a variant of its forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import nn

from labkit.finetuning.beamlora.rule import beam_scores


class Gates(nn.ParameterDict):
    """Gates by adapter, which stay in float32 whatever the model is cast to."""

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Gates:
        def kept(tensor: torch.Tensor) -> torch.Tensor:
            made = fn(tensor)
            return tensor.to(made.device) if made.dtype in (torch.float16, torch.bfloat16) else made

        super()._apply(kept, recurse)
        return self


class BeamVariant(LoraVariant):
    """BeamLoRA as a variant of a LoRA layer: y = W0 x + scaling B (s * A x)."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Add a gate of zeros for the adapter, so that training starts as LoRA."""
        if not hasattr(module, "lora_gate"):
            module.lora_gate = Gates()
            module.beam_temperature = {}
        module.beam_temperature[adapter_name] = float(kwargs["config"].beam_temperature)
        rank, device = module.r[adapter_name], module.lora_A[adapter_name].weight.device
        module.lora_gate[adapter_name] = nn.Parameter(torch.zeros(rank, dtype=torch.float32, device=device))

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> Any:
        """Result of the base layer plus the gated update."""
        up, scaling = module.lora_B[active_adapter], module.scaling[active_adapter]
        scores = module.scores(active_adapter)
        down = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))  # (..., r)
        if module.lora_bias[active_adapter]:
            return result + up(down * scores.to(down.dtype)) * scaling
        # the scaling goes where the r numbers are, not where D_out are
        return result + up(down * (scaling * scores).to(down.dtype))

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update added, as a new tensor."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the update to the weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """The weight without the update."""
        return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class BeamLinear(Linear):
    """A ``torch.nn.Linear`` with a gated LoRA; peft makes it from a `BeamLoraConfig`.

    Attributes
    ----------
    lora_gate : ParameterDict
        g (r,) by adapter, float32.
    beam_temperature : dict
        tau by adapter.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_gate")
    other_param_names = (*LoraLayer.other_param_names, "beam_temperature")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        weight = getattr(base_layer, "weight", None)
        plain = isinstance(weight, torch.Tensor) and weight.is_floating_point()
        if not plain or type(base_layer).__module__.startswith(("bitsandbytes", "torchao", "auto_gptq")):
            refuse(base_layer, adapter_name, config, **kwargs)
        super().__init__(base_layer, adapter_name, config, **kwargs)
        self.fan_in_fan_out = False

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The one variant; peft refuses any that the configuration asks for beside it."""
        return {(): BeamVariant}

    def scores(self, adapter: str = "default") -> torch.Tensor:
        """Importance s of the adapter's ranks, (r,) float32; see `beam_scores`."""
        layer: Any = self  # torch types every attribute of a module as "Tensor or Module"
        return beam_scores(layer.lora_gate[adapter].float(), layer.beam_temperature[adapter])

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Update (alpha / r) B diag(s) A, (D_out, D_in), in the dtype of B."""
        a: Any = self.lora_A[adapter].weight
        b: Any = self.lora_B[adapter].weight
        made: torch.Tensor = (b.float() * self.scores(adapter)) @ a.float() * self.scaling[adapter]
        return made.to(dtype=b.dtype)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        gates = getattr(self, "lora_gate", None)
        if gates is not None and adapter_name in gates and gates[adapter_name].dtype != torch.float32:
            gates[adapter_name] = nn.Parameter(
                gates[adapter_name].detach().float(), requires_grad=gates[adapter_name].requires_grad
            )

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.", "", 1)


def refuse(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> NoReturn:
    """Say that a module cannot carry a gate."""
    kind, where = type(target), kwargs.get("target_name", "a module")
    raise TypeError(
        f"BeamLoRA adapts torch.nn.Linear; {where} is a {kind.__module__}.{kind.__name__}. Name only Linear modules in "
        f'target_modules (or "all-linear"), and load the model without quantization'
    )
