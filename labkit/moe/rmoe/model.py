"""Mixtral with a recurrent router, as a class of its own: ``from_pretrained``, ``save_pretrained``, ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralConfig
from transformers import initialization as init
from transformers.models.mixtral.modeling_mixtral import (
    MixtralAttention,
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
    MixtralPreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from labkit.moe.adapters import moe_blocks
from labkit.moe.rmoe.attach import RecurrentRouting
from labkit.moe.rmoe.settings import RecurrentSettings
from labkit.moe.rmoe.shared import RecurrentGate


class RecurrentMoeConfig(MixtralConfig):
    """Settings of Mixtral, and of its recurrent router.

    Parameters
    ----------
    recurrent_router : dict, optional
        Of :class:`RecurrentSettings`; missing entries have the paper's values (a GRU of width 128).
    **settings
        Those of ``transformers.MixtralConfig``.

    Raises
    ------
    ValueError, TypeError
        For settings that :class:`RecurrentSettings` refuses, or more experts a token than there are.

    Examples
    --------
    >>> RecurrentMoeConfig(recurrent_router={"cell": "lstm"}).recurrent_router["state_size"]
    128
    """

    model_type = "recurrent_mixtral"

    recurrent_router: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.recurrent_router = RecurrentSettings.named(**(self.recurrent_router or {})).to_dict()
        if not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok must lie in 1..{self.num_local_experts} (num_local_experts); "
                f"got {self.num_experts_per_tok}"
            )
        super().__post_init__(**kwargs)


class RecurrentMixtralPreTrainedModel(MixtralPreTrainedModel):
    """Base of the two models."""

    config: RecurrentMoeConfig
    config_class = RecurrentMoeConfig
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(RecurrentGate, index=0),
        "hidden_states": MixtralDecoderLayer,
        "attentions": MixtralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.RNNCellBase):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, RecurrentGate) and module.log_temperature is not None:
            settings = RecurrentSettings.named(**(self.config.recurrent_router or {}))
            init.constant_(module.log_temperature, torch.tensor(settings.temperature).log().item())


class RecurrentMixtralModel(RecurrentMixtralPreTrainedModel, MixtralModel):
    """The decoder without a head."""

    def __init__(self, config: RecurrentMoeConfig) -> None:
        super().__init__(config)
        settings = RecurrentSettings.named(**(config.recurrent_router or {}))
        RecurrentRouting(self, moe_blocks(self), settings).shared.records_logits = True
        self.post_init()


class RecurrentMixtralForCausalLM(RecurrentMixtralPreTrainedModel, MixtralForCausalLM):
    """Mixtral with a recurrent router and a language-model head.

    ``output_router_logits=True`` gives raw logits, and with labels adds transformers' balancing loss.

    Examples
    --------
    >>> import torch
    >>> config = RecurrentMoeConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
    ...     num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, recurrent_router={"state_size": 8})
    >>> model = RecurrentMixtralForCausalLM(config).eval()
    >>> [name for name, _ in model.named_parameters() if "recurrent_router" in name][0]
    'model.recurrent_router.cell.weight_ih'
    >>> model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, min_new_tokens=3, do_sample=False).shape
    torch.Size([1, 5])
    """

    def __init__(self, config: RecurrentMoeConfig) -> None:
        # Not MixtralForCausalLM's own: it would make a decoder of the usual kind first.
        MixtralPreTrainedModel.__init__(self, config)
        self.model = RecurrentMixtralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self.num_experts = config.num_local_experts
        self.num_experts_per_tok = config.num_experts_per_tok
        self.post_init()

    @classmethod
    def from_mixtral(
        cls, model: MixtralForCausalLM, state_size: int = 128, **settings: Any
    ) -> RecurrentMixtralForCausalLM:
        """Copy a Mixtral, all but its routers.

        Parameters
        ----------
        model : MixtralForCausalLM
            Left as it is.
        state_size, **settings
            Of :class:`RecurrentSettings`.

        Returns
        -------
        RecurrentMixtralForCausalLM
            In the device, dtype and mode of `model`, its routers untrained.

        Raises
        ------
        TypeError
            If `model` is no MixtralForCausalLM.

        Examples
        --------
        >>> from labkit.testbeds.models import tiny
        >>> new = RecurrentMixtralForCausalLM.from_mixtral(tiny("mixtral", width=16, heads=2), 4)
        >>> new.config.recurrent_router["state_size"]
        4
        """
        if not isinstance(model, MixtralForCausalLM):
            raise TypeError(
                f"from_mixtral copies a MixtralForCausalLM; got {type(model).__name__} (for other classes use "
                "attach_recurrent_router)"
            )
        checked = RecurrentSettings.named(state_size=state_size, **settings)
        fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
        new = cls(RecurrentMoeConfig(**{**fields, "recurrent_router": checked.to_dict()}))
        state = {name: value for name, value in model.state_dict().items() if ".gate." not in name}
        missing, unexpected = new.load_state_dict(state, strict=False)
        wrong = [name for name in missing if ".gate." not in name and "recurrent_router" not in name]
        if wrong or unexpected:
            raise ValueError(f"these weights do not fit: {', '.join([*wrong, *unexpected])}")
        new.train(model.training)
        return nn.Module.to(new, device=model.device, dtype=model.dtype)  # type: ignore[return-value]


def register() -> None:
    """Let transformers' ``Auto`` classes load models with recurrent routers, in this process.

    Nothing is registered by importing. Calling it again does no harm.

    Examples
    --------
    >>> register()
    >>> type(AutoConfig.for_model("recurrent_mixtral")).__name__
    'RecurrentMoeConfig'
    """
    AutoConfig.register("recurrent_mixtral", RecurrentMoeConfig, exist_ok=True)
    AutoModel.register(RecurrentMoeConfig, RecurrentMixtralModel, exist_ok=True)
    AutoModelForCausalLM.register(RecurrentMoeConfig, RecurrentMixtralForCausalLM, exist_ok=True)
