"""Llama with decoupled heads: a ``PreTrainedModel`` like any other, with a smaller cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from labkit.kv.dha.attention import HeadLayout


class DHALlamaConfig(LlamaConfig):
    """Settings of Llama, and which key and value head every query head uses.

    Parameters
    ----------
    key_map, value_map : list of list of int
        For every layer, the key head κ(i) and the value head ν(i) of each query head i; heads are numbered from 0
        without gaps. By default every query head has its own.
    **settings
        Those of ``transformers.LlamaConfig``. ``num_key_value_heads`` is set to the most heads of any layer.

    Raises
    ------
    ValueError
        For maps that do not fit the layers and heads, or skip a head.

    Examples
    --------
    >>> from labkit.kv import DHALlamaConfig
    >>> config = DHALlamaConfig(num_hidden_layers=1, num_attention_heads=4, hidden_size=32,
    ...     key_map=[[0, 0, 1, 1]], value_map=[[0, 0, 0, 0]])
    >>> config.key_heads, config.value_heads
    ([2], [1])
    """

    model_type = "dha_llama"
    base_model_tp_plan = None  # type: ignore[assignment]  # groups do not split evenly over devices

    key_map: list[list[int]] | None = None
    value_map: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        identity = list(range(self.num_attention_heads))
        for name in ("key_map", "value_map"):
            maps = getattr(self, name)
            maps = [identity] * self.num_hidden_layers if maps is None else maps
            setattr(self, name, [[int(h) for h in layer] for layer in maps])
            self._check_map(name, getattr(self, name))
        self.num_key_value_heads = max(*self.key_heads, *self.value_heads)
        super().__post_init__(**kwargs)

    def _check_map(self, name: str, maps: list[list[int]]) -> None:
        if len(maps) != self.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(maps)} layers, num_hidden_layers is {self.num_hidden_layers}; give one list for each"
            )
        for layer, heads in enumerate(maps):
            if len(heads) != self.num_attention_heads:
                raise ValueError(
                    f"{name} of layer {layer} has {len(heads)} entries; it needs one for each of the "
                    f"{self.num_attention_heads} query heads (num_attention_heads)"
                )
            if sorted(set(heads)) != list(range(max(heads) + 1)):
                raise ValueError(
                    f"{name} of layer {layer} must use the heads 0..{max(heads)} without gaps; got {sorted(set(heads))}"
                )

    @property
    def key_heads(self) -> list[int]:
        """Key heads of each layer, G_K."""
        return [max(heads) + 1 for heads in self.key_map or []]

    @property
    def value_heads(self) -> list[int]:
        """Value heads of each layer, G_V."""
        return [max(heads) + 1 for heads in self.value_map or []]

    def cache_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        """Bytes that one token takes in the cache: sum over layers of (G_K + G_V) d numbers."""
        width = self.head_dim or self.hidden_size // self.num_attention_heads
        return (sum(self.key_heads) + sum(self.value_heads)) * width * bytes_per_number


class DHALlamaAttention(LlamaAttention):
    """Llama's attention with G_K key heads and G_V value heads; see :class:`labkit.kv.dha.attention.HeadLayout`."""

    def __init__(self, config: DHALlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.layout = HeadLayout(config.key_map[layer_idx], config.value_map[layer_idx])  # type: ignore[index]
        self.num_key_value_groups = self.layout.repeats
        for name, heads in (("k_proj", self.layout.key_heads), ("v_proj", self.layout.value_heads)):
            linear = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.attention_bias)
            setattr(self, name, linear)

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments and results are those of ``LlamaAttention``."""
        if position_embeddings is None:
            raise ValueError("position_embeddings (cos, sin) are needed; call the model, not the layer")
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(hidden_states).view(shape).transpose(1, 2)  # (B, G_K, T, d)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)  # (B, G_V, T, d)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            if k.shape[1] != v.shape[1] and getattr(past_key_values, "is_compileable", False):
                raise ValueError(
                    f"layer {self.layer_idx} has {k.shape[1]} key and {v.shape[1]} value heads, and a static cache "
                    "holds equally many: use a DynamicCache (the default of generate)"
                )
            k, v = past_key_values.update(k, v, self.layer_idx)

        implementation = self.config._attn_implementation
        one_token = q.shape[2] == 1 and implementation == "sdpa" and not self.layout.stock
        flat_mask = attention_mask is None or attention_mask.shape[1] == 1
        if one_token and flat_mask and not (self.training and self.attention_dropout):
            out: Tensor = self.layout.decode(q, k, v, attention_mask, self.scaling)
            weights = None
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
            k, v = self.layout.expand(k, v)
            out, weights = attend(
                self, q, k, v, attention_mask,
                dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
            )  # fmt: skip
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class DHALlamaPreTrainedModel(LlamaPreTrainedModel):
    """Base of the two models."""

    config: DHALlamaConfig
    config_class = DHALlamaConfig
    _can_record_outputs = {"hidden_states": LlamaDecoderLayer, "attentions": DHALlamaAttention}  # noqa: RUF012


class DHALlamaModel(DHALlamaPreTrainedModel, LlamaModel):
    """The decoder without a head."""

    def __init__(self, config: DHALlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = DHALlamaAttention(config, index)
        self.post_init()


class DHALlamaForCausalLM(DHALlamaPreTrainedModel, LlamaForCausalLM):
    """Llama with decoupled heads and a language-model head.

    ``save_pretrained``, ``from_pretrained`` and ``generate`` are those of transformers. The cache of layer l holds
    keys ``(B, G_K, S, d)`` and values ``(B, G_V, S, d)``.

    Examples
    --------
    >>> import torch
    >>> from labkit.kv import DHALlamaConfig, DHALlamaForCausalLM
    >>> config = DHALlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
    ...     num_attention_heads=4, key_map=[[0, 0, 1, 1]], value_map=[[0, 0, 0, 0]])
    >>> cache = DHALlamaForCausalLM(config)(torch.arange(10)[None]).past_key_values
    >>> tuple(cache.layers[0].keys.shape), tuple(cache.layers[0].values.shape)
    ((1, 2, 10, 8), (1, 1, 10, 8))
    """

    def __init__(self, config: DHALlamaConfig) -> None:
        # Not LlamaForCausalLM's own: it would make a decoder of the usual kind first.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DHALlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Let transformers' ``Auto`` classes load models with decoupled heads, in this process.

    Nothing is registered by importing. Calling it again does no harm.

    Examples
    --------
    >>> register()
    >>> type(AutoConfig.for_model("dha_llama")).__name__
    'DHALlamaConfig'
    """
    AutoConfig.register("dha_llama", DHALlamaConfig, exist_ok=True)
    AutoModel.register(DHALlamaConfig, DHALlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(DHALlamaConfig, DHALlamaForCausalLM, exist_ok=True)
