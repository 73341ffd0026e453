"""A value model: any transformers backbone with one number at each position."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from labkit.lab.cache import write_atomic
from labkit.rlhf.logprobs import model_inputs, plain

HEAD = "value_head.safetensors"


class ValueModel(nn.Module):
    """Backbone and a linear layer to a value; the value at a position is that of the text up to and with it.

    Parameters
    ----------
    backbone : transformers.PreTrainedModel
        A base model, such as ``AutoModel.from_pretrained(...)``: something with a ``last_hidden_state``.
    head : torch.nn.Linear, optional
        ``(D, 1)``. By default it starts at zero, so that nothing is predicted before something is learned.

    Raises
    ------
    TypeError
        When the backbone is not a base model of transformers.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = ValueModel.from_backbone(tiny("llama", vocab=50, seed=0))
    >>> model(torch.tensor([[3, 4, 5]])).shape
    torch.Size([1, 3])
    """

    def __init__(self, backbone: Any, head: nn.Linear | None = None) -> None:
        super().__init__()
        config = getattr(backbone, "config", None)
        if config is None or not hasattr(backbone, "base_model"):
            raise TypeError(f"the backbone must be a transformers model, got {type(backbone).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise TypeError(
                f"{type(backbone).__name__} is an encoder-decoder; a value model takes decoders alone"
            )
        if backbone.base_model is not backbone:
            raise TypeError(
                f"{type(backbone).__name__} has a head of its own: use ValueModel.from_backbone(model), which takes "
                f"its body"
            )
        self.backbone = backbone
        self.head = head if head is not None else value_head(config)
        if not isinstance(self.head, nn.Linear) or self.head.out_features != 1:
            raise TypeError(f"the head must be a torch.nn.Linear with one output, got {self.head}")

    @classmethod
    def from_backbone(cls, model: Any) -> ValueModel:
        """Take the body of a model with or without a head; weights are shared with it, not copied.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            ``copy.deepcopy`` it first when it is the policy.
        """
        inner = plain(model)
        if not hasattr(inner, "base_model"):
            raise TypeError(f"the model must be a transformers model, got {type(inner).__name__}")
        value = cls(inner.base_model)
        value.head.to(next(inner.parameters()).device)
        return value

    @classmethod
    def from_reward_model(cls, model: Any) -> ValueModel:
        """A copy of a sequence classifier with one label, its score as the value of each position.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            Such as ``AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)``.

        Raises
        ------
        TypeError
            When the model has no linear ``score`` with one output.
        """
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise TypeError(
                f"{type(model).__name__} has no linear layer `score` with one label: load the reward model with "
                f"AutoModelForSequenceClassification and num_labels=1"
            )
        value = cls(copy.deepcopy(model.base_model))
        with torch.no_grad():
            value.head.weight.copy_(score.weight)
            if score.bias is not None:
                value.head.bias.copy_(score.bias)
        return value.to(next(model.parameters()).device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Values of all positions.

        Parameters
        ----------
        input_ids, attention_mask : Tensor
            ``(B, S)``, padded on either side.

        Returns
        -------
        Tensor
            ``(B, S)`` float32.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.backbone(
            **model_inputs(self.backbone, input_ids, mask), use_cache=False
        ).last_hidden_state
        values: Tensor = self.head(states.to(self.head.weight.dtype))[..., 0].float()
        return values

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the backbone as transformers does, and the head beside it."""
        folder = Path(folder)
        self.backbone.save_pretrained(folder)
        write_head(self.head, folder)

    @classmethod
    def from_pretrained(cls, folder: Path | str, **options: Any) -> ValueModel:
        """Read what `save_pretrained` wrote.

        Parameters
        ----------
        folder : Path or str
        options
            Of ``AutoModel.from_pretrained``, such as ``dtype``.

        Raises
        ------
        FileNotFoundError
            When the folder has no value head.
        """
        from transformers import AutoModel

        file = Path(folder) / HEAD
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} has no {HEAD}: it was not written by ValueModel.save_pretrained. Make a new value model "
                f"with ValueModel.from_backbone(AutoModel.from_pretrained({str(folder)!r}))"
            )
        model = cls(AutoModel.from_pretrained(folder, **options))
        model.head.load_state_dict(load_file(file))
        model.head.to(next(model.backbone.parameters()).device)
        return model


def value_head(config: Any) -> nn.Linear:
    """A linear layer from the hidden size to 1, all zero, in float32."""
    size = getattr(config.get_text_config(), "hidden_size", None)
    if size is None:
        raise TypeError(f"{type(config).__name__} does not say its hidden_size")
    head = nn.utils.skip_init(nn.Linear, size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def write_head(head: nn.Linear, folder: Path) -> None:
    """Write a head's weights beside a backbone."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}
    write_atomic(folder / HEAD, save(state))


def load_value_head(folder: Path | str) -> nn.Linear:
    """The linear layer of a shared value model, to go on with: ``PPOTrainer(..., value_model=load_value_head(folder))``.

    Parameters
    ----------
    folder : Path or str
        The folder ``value`` in what ``PPOTrainer.save_pretrained`` wrote.

    Raises
    ------
    FileNotFoundError
        When there is none.

    Examples
    --------
    >>> import tempfile
    >>> from labkit.testbeds.models import tiny
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_head(value_head(tiny("llama", width=32, heads=2).config), folder)
    >>> load_value_head(folder)
    Linear(in_features=32, out_features=1, bias=True)
    """
    file = Path(folder) / HEAD
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {HEAD}: give the folder 'value' that a PPOTrainer wrote")
    state = load_file(file)
    head = nn.utils.skip_init(nn.Linear, state["weight"].shape[1], 1)
    head.load_state_dict(state)
    return head


def chosen_value_model(policy: Any, value: Any) -> Any:
    """What a trainer's `value_model` stands for: a copy of the policy's body by default, a new layer for ``"shared"``."""
    if value is None:
        own = copy.deepcopy(policy)
        if hasattr(own, "unload"):
            own = own.unload()  # the copy of a peft policy, without adapters
        made = ValueModel.from_backbone(own)
        made.requires_grad_(True)
        return made
    if isinstance(value, str):
        if value != "shared":
            raise ValueError(f"value_model must be a ValueModel, 'shared' or None, got {value!r}")
        return value_head(policy.config)
    if isinstance(value, nn.Linear):
        size = policy.config.get_text_config().hidden_size
        if (value.in_features, value.out_features) != (size, 1):
            raise ValueError(
                f"a shared value head must lead from the policy's {size} hidden states to 1, got {value}"
            )
        return value
    if not isinstance(value, ValueModel):
        raise TypeError(
            f"value_model must be a ValueModel, got {type(value).__name__}: use ValueModel.from_backbone(model), or "
            f"ValueModel.from_reward_model(model)"
        )
    mine = {id(p) for p in policy.parameters()}
    if any(id(p) in mine for p in value.parameters()):
        raise ValueError(
            "value_model has the policy's own weights: copy.deepcopy the model first, or pass value_model='shared'"
        )
    _check_causal(value)
    return value


@torch.no_grad()
def _check_causal(value: ValueModel) -> None:
    """Raise when the value of a state depends on tokens after it."""
    training = value.training
    value.eval()
    try:
        ids = torch.tensor([[2, 3], [2, 4]], device=next(value.parameters()).device)
        first = value.backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    finally:
        value.train(training)
    if not torch.allclose(first[0], first[1], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"{type(value.backbone).__name__} looks ahead: the value before a token would know the token. Take a "
            f"decoder as value_model"
        )
