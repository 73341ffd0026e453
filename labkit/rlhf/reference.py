"""The policy that the KL penalty is measured from."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from labkit.rlhf.config import PPOConfig
from labkit.rlhf.logprobs import anatomy, check_causal, plain


class Reference:
    """The frozen policy that the KL penalty is measured from.

    Parameters
    ----------
    policy : transformers.PreTrainedModel or peft.PeftModel
    model : transformers.PreTrainedModel, optional
        By default the policy with its adapters off, or a copy of it.

    Raises
    ------
    ValueError
        When the reference is the policy itself, or a peft policy trains what switching its adapters off does not undo.
    """

    def __init__(self, policy: Any, model: Any = None) -> None:
        if model is policy:
            raise ValueError(
                "ref_model is the policy itself, so the KL penalty would always be 0: leave ref_model out for a "
                "frozen copy (or for the policy with its adapters off)"
            )
        self.adapters = model is None and hasattr(policy, "disable_adapter")
        moving = _beside_adapters(policy) if self.adapters else []
        if moving:
            raise ValueError(
                f"the policy trains {', '.join(moving[:3])}{', ...' if len(moving) > 3 else ''} beside its adapters, which "
                "stay as they are when the adapters are off, so the reference would move along: pass ref_model= (a copy "
                "of the base model), or freeze them (peft's bias='none')"
            )
        if model is None:
            model = policy if self.adapters else copy.deepcopy(policy)
        check_causal(model, "ref_model")
        self.model = model
        if not self.adapters:
            model.eval().requires_grad_(False)
            mine, theirs = (plain(m).config.get_text_config().vocab_size for m in (policy, model))
            if mine != theirs:
                raise ValueError(
                    f"ref_model has {theirs} tokens and the policy {mine}: they must share a vocabulary"
                )
        self.parts = anatomy(model)

    def off(self) -> AbstractContextManager[Any]:
        """Context in which the model is the reference."""
        context: AbstractContextManager[Any] = (
            self.model.disable_adapter() if self.adapters else nullcontext()
        )
        return context


def _beside_adapters(policy: Any) -> list[str]:
    """Names of a peft policy's trained parameters that are there with its adapters off."""
    own = (getattr(policy.base_model, "prefix", ""), "modules_to_save", "prompt_encoder", "trainable_tokens")
    return [
        name
        for name, parameter in policy.named_parameters()
        if parameter.requires_grad and not any(part and part in name for part in own)
    ]


def needed(config: PPOConfig, hooks: Iterable[Any]) -> bool:
    """Whether a run asks for a reference: for a KL penalty or its target, for its segmenter, or for a token reward.

    Examples
    --------
    >>> needed(PPOConfig(iterations=1, batch_size=1, kl_coef=0.0), [])
    False
    """
    return (
        config.kl_coef > 0
        or config.kl_target is not None
        or bool(getattr(config.segmenter, "needs_reference", False))
        or any(
            getattr(hook, "needs_ref_hidden", False) or getattr(hook, "needs_reference", False)
            for hook in hooks
        )
    )
