"""The intrinsic curiosity module: what comes after a token, predicted from features that it learns itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


class CuriosityConfig(PreTrainedConfig):
    """Sizes of a `CuriosityModule`.

    Parameters
    ----------
    hidden_size : int
        D, of the reference's hidden states and of the policy's token embeddings.
    intermediate_size : int
        Hidden units of the forward model; the policy's own MLP size in the paper.

    Raises
    ------
    ValueError
        When a size is not a whole number from 1.

    Examples
    --------
    >>> CuriosityModule(CuriosityConfig(hidden_size=8, intermediate_size=16)).dynamics[0].in_features
    16
    """

    model_type = "labkit_curiosity"

    def __init__(self, hidden_size: int = 64, intermediate_size: int = 256, **kwargs: Any) -> None:
        for name, value in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        super().__init__(**kwargs)


class CuriosityModule(PreTrainedModel):
    r"""Encoder :math:`\phi` and forward model f, whose error is the curiosity.

    .. math:: e_t = \lVert f(\phi(s_t), a_t) - \phi(s_{t+1}) \rVert_2

    :math:`\phi` has three linear layers (D, 2D, 2D, D) and f three (2D, I, I, D), with ReLU between. There is no inverse
    model, and the target :math:`\phi(s_{t+1})` is trained too, as in the authors' code: features may shrink, which
    would be the trivial way to predict them. ``curiosity/feature_norm`` of `CuriosityReward` shows it.

    Parameters
    ----------
    config : CuriosityConfig

    Examples
    --------
    >>> icm = CuriosityModule(CuriosityConfig(8, 16))
    >>> icm(torch.randn(2, 6, 8), torch.randn(2, 5, 8)).shape      # six states, the five tokens between them
    torch.Size([2, 5])
    """

    config_class = CuriosityConfig
    base_model_prefix = "curiosity"
    main_input_name = "states"

    def __init__(self, config: CuriosityConfig) -> None:
        super().__init__(config)
        width, inner = config.hidden_size, config.intermediate_size
        self.encoder = _mlp(width, 2 * width, width)
        self.dynamics = _mlp(2 * width, inner, width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Keep torch's own initialisation, which the authors use."""

    @classmethod
    def from_model(cls, model: PreTrainedModel, seed: int = 0) -> CuriosityModule:
        """Make a module of the size that fits a model.

        Parameters
        ----------
        model : PreTrainedModel
            The policy; its ``config.hidden_size`` and ``config.intermediate_size`` (4 D without one) are taken.
        seed : int
            Of the initial weights; torch's global generator is left as it is.

        Returns
        -------
        CuriosityModule

        Raises
        ------
        ValueError
            When the configuration gives no hidden size.
        """
        return cls.from_config(model.config, seed)

    @classmethod
    def from_config(cls, config: Any, seed: int = 0) -> CuriosityModule:
        """As `from_model`, from the model's configuration."""
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        width = getattr(text, "hidden_size", None)
        if width is None:
            raise ValueError(
                f"{type(config).__name__} names no hidden_size: build CuriosityModule(CuriosityConfig(D, I))"
            )
        inner = getattr(text, "intermediate_size", None) or 4 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(CuriosityConfig(width, inner))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """Prediction error of each step.

        Parameters
        ----------
        states : Tensor
            ``(B, T + 1, D)``, the state before each token and the one after the last.
        actions : Tensor
            ``(B, T, D)``, embeddings of the tokens.

        Returns
        -------
        Tensor
            ``(B, T)`` float32, at least 0.

        Raises
        ------
        ValueError
            When the shapes do not fit each other or the module.
        """
        return self.compare(states, actions)[0]

    def compare(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction errors, as `forward` has them, and the features ``(B, T + 1, D)`` that they come from."""
        width = self.config.hidden_size
        if states.shape[-1] != width or actions.shape[-1] != width:
            raise ValueError(
                f"this module is of width {width}; the reference's hidden states have {states.shape[-1]} and the "
                f"policy's token embeddings {actions.shape[-1]}: all three must agree"
            )
        if states.shape[:-1] != (actions.shape[0], actions.shape[1] + 1):
            raise ValueError(
                f"states must be (B, T + 1, D) for actions (B, T, D); got {tuple(states.shape)}, {tuple(actions.shape)}"
            )
        features = self.encoder(states.to(self.dtype))  # (B, T + 1, D)
        predicted = self.dynamics(torch.cat([features[:, :-1], actions.to(self.dtype)], -1))  # (B, T, D)
        return (predicted - features[:, 1:]).float().norm(dim=-1), features


def _mlp(start: int, inner: int, end: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(start, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, end)
    )
