"""Policy and value model as one module, which is what a training step, its wrappers and a checkpoint need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from labkit.rlhf.config import PPOConfig
from labkit.rlhf.logprobs import CHUNK, TokenStats, anatomy, model_inputs, stats_of_states
from labkit.rlhf.rollout import RolloutBatch
from labkit.rlhf.values import ValueModel, value_head, write_head


class ActorCritic(nn.Module):
    """Policy and value model.

    Parameters
    ----------
    policy : transformers.PreTrainedModel or peft.PeftModel
    value : ValueModel, torch.nn.Linear or "shared"
        A linear layer is one on the policy's own last hidden states; ``"shared"`` is a new one.
    temperature : float
        Of the log-probabilities.
    entropy_grad : bool
        Whether the entropy is part of the loss.
    dropout : bool
        Whether ``train()`` turns dropout on.

    Raises
    ------
    ValueError
        For a shared value head on a policy that does not show its hidden states, or a policy that checkpoints its
        activations and would drop out against `dropout`.
    """

    def __init__(
        self,
        policy: Any,
        value: Any,
        *,
        temperature: float = 1.0,
        entropy_grad: bool = False,
        dropout: bool = False,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        self.parts = anatomy(policy)
        self.policy = policy
        value = value_head(policy.config) if isinstance(value, str) else value
        self.shared = isinstance(value, nn.Linear)
        if self.shared and isinstance(self.parts.head, nn.Identity):
            raise ValueError(
                f"value_model='shared' needs the last hidden states of {type(policy).__name__}, which it does not "
                f"show apart from its logits: give a ValueModel"
            )
        # transformers checkpoints activations in training mode alone
        self.checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in policy.modules())
        active = [
            name for name, part in policy.named_modules() if isinstance(part, nn.Dropout) and part.p > 0
        ]
        active += [name for name, value in policy.config.to_dict().items() if "dropout" in name and value]
        if self.checkpointing and active and not dropout:
            raise ValueError(
                f"the policy checkpoints its activations, which needs training mode, and would drop out in {active[0]}: "
                f"set that to 0, or dropout=True in PPOConfig"
            )
        device = next(policy.parameters()).device
        self.value: nn.Module = value.to(device) if self.shared else value
        self.temperature, self.entropy_grad, self.dropout, self.chunk = (
            temperature,
            entropy_grad,
            dropout,
            chunk,
        )

    def train(self, mode: bool = True) -> ActorCritic:
        """Enter training mode; modules stay in evaluation mode unless dropout or checkpointing of activations is wanted."""
        super().train(mode and (self.dropout or self.checkpointing))
        return self

    def groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Trained parameters of policy and value model."""
        own = {id(p): p for p in self.policy.parameters() if p.requires_grad}
        other = [p for p in self.value.parameters() if p.requires_grad and id(p) not in own]
        return list(own.values()), other

    def optimizer(
        self,
        config: PPOConfig,
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    ) -> torch.optim.Optimizer:
        """AdamW, or what `make` makes, on the two groups with their learning rates.

        Raises
        ------
        ValueError
            When the policy has nothing to train, or AdamW would have to train float16 weights.
        """
        policy, value = self.groups()
        if not policy:
            raise ValueError("the policy has no trainable parameter: every requires_grad is False")
        groups: list[dict[str, Any]] = [{"params": policy, "lr": config.learning_rate}]
        if value:
            groups.append({"params": value, "lr": config.value_learning_rate or config.learning_rate})
        if make is not None:
            return make(groups)
        if any(weight.dtype == torch.float16 for weight in (*policy, *value)):
            raise ValueError(
                "trained weights are float16, in which AdamW's eps of 1e-8 is 0 and its steps are nan: load policy and "
                "value model with dtype=torch.bfloat16 or torch.float32, or pass an optimizer of your own"
            )
        return torch.optim.AdamW(groups, betas=config.betas, weight_decay=config.weight_decay)

    def forward(self, batch: RolloutBatch, entropy_grad: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the response tokens, entropies and values before them, each ``(B, T)``."""
        ids, attend = whole_rows(batch)
        prompt = batch.prompt_ids.shape[1]
        states = self.parts.body(**model_inputs(self.policy, ids, attend))
        stats: TokenStats = stats_of_states(
            self.parts,
            states,
            prompt,
            batch.tokens,
            batch.mask,
            self.temperature,
            self.chunk,
            self.entropy_grad if entropy_grad is None else entropy_grad,
        )
        if self.shared:
            values = self.value(states.to(self.value.weight.dtype))[..., 0].float()  # type: ignore[arg-type]
        else:
            values = self.value(ids, attend)
        return stats.logprobs, stats.entropy, values[:, prompt - 1 : -1].masked_fill(~batch.mask, 0)

    def save_value(self, folder: Any) -> None:
        """Write the value model's part."""
        if isinstance(self.value, ValueModel):
            self.value.save_pretrained(folder)
        elif isinstance(self.value, nn.Linear):
            write_head(self.value, folder)


def whole_rows(batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """Prompt and response in one, ``(B, P + T)``: ids and attention mask."""
    return (
        torch.cat([batch.prompt_ids, batch.tokens], 1),
        torch.cat([batch.prompt_mask, batch.mask], 1),
    )
