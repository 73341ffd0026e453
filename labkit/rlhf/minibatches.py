"""The updates of an iteration: which rows of the rollout each of them sees.

A rollout's rows stay in the process that made them. An update's rows are dealt so that they do not depend on the number
of processes: the rollout is cut into blocks of as many consecutive rows as there are minibatches, and each pass gives
each minibatch one row of every block, drawn anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.config import PPOConfig
from labkit.rlhf.losses import policy_terms, value_terms
from labkit.rlhf.rollout import RolloutBatch
from labkit.rlhf.segments import count_segments
from labkit.training.data import GlobalBatches, mixed_seed
from labkit.training.processes import OneProcess


@dataclass
class Minibatch:
    """Rows of an update, and how many tokens and macro actions the whole update has."""

    batch: RolloutBatch
    tokens: float
    actions: float


class Updates(GlobalBatches):
    """Minibatches of the present rollout, and a new rollout when its updates are done."""

    def __init__(
        self,
        config: PPOConfig,
        collect: Callable[[int], RolloutBatch],
        gather: Callable[[Tensor], Tensor],
        processes: OneProcess,
        prompts: Mapping[str, Any],
    ) -> None:
        super().__init__(config.batch_size // config.minibatches, config.seed)
        self.config, self.collect, self.gather = config, collect, gather
        self.processes, self.prompts = processes, prompts
        self.iteration = -1
        self.batch_of_iteration: RolloutBatch | None = None
        self.seconds = self.ended = 0.0
        self.tokens = self.actions = torch.zeros(0)

    def describe(self) -> dict[str, Any]:
        """What a resumed run must share."""
        config = self.config
        names = (
            "minibatches",
            "epochs",
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "match_temperature",
            # Optimizer and controller come back with these, so that others asked for would not be taken.
            "learning_rate",
            "value_learning_rate",
            "weight_decay",
            "warmup",
            "schedule",
            "kl_coef",
            "kl_target",
            "kl_horizon",
        )
        own = {name: getattr(config, name) for name in names} | {"betas": list(config.betas)}
        return super().describe() | own | {"prompts": dict(self.prompts)}

    def rows(self, step: int, first: int, last: int) -> Minibatch:
        """Rows of blocks ``first`` to ``last - 1``, which this process has."""
        iteration, update = divmod(step, self.config.updates)
        if iteration != self.iteration:
            began = time.perf_counter()
            self.batch_of_iteration = self.collect(iteration)
            self.iteration = iteration
            self.ended = time.perf_counter()
            self.seconds = self.ended - began
            segments = self.batch_of_iteration.segments
            self.tokens = self.gather(self.batch_of_iteration.lengths).cpu()
            self.actions = self.gather(count_segments(segments)).cpu()
        assert self.batch_of_iteration is not None
        epoch, number = divmod(update, self.config.minibatches)
        chosen = self._dealt(iteration, epoch, number)  # (B / minibatches,)
        start = self.processes.rank * (self.config.batch_size // self.processes.world)
        own = chosen[first:last] - start
        count = max(1.0, float(self.tokens[chosen].sum())), max(1.0, float(self.actions[chosen].sum()))
        return Minibatch(self.batch_of_iteration.select(own), *count)

    def _dealt(self, iteration: int, epoch: int, number: int) -> Tensor:
        """Global rows of a minibatch: one of each block of consecutive rows."""
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, iteration, epoch, 1))
        hands = torch.rand(self.batch, self.config.minibatches, generator=generator).argsort(1)
        return torch.arange(self.batch) * self.config.minibatches + hands[:, number]


def micro_batch_loss(
    model: Any, part: Minibatch, config: PPOConfig, cuts: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a micro-batch, scaled so that the mean over all `cuts` micro-batches is that of the update.

    Parameters
    ----------
    model : callable
        `ActorCritic`, perhaps wrapped.
    part : Minibatch
    config : PPOConfig
    cuts : int
        Micro-batches of the update, over all processes.
    """
    batch, mask = part.batch, part.batch.mask
    logprobs, entropy, values = model(batch)
    policy = policy_terms(
        logprobs,
        batch.logprobs,
        batch.advantages,
        mask,
        config.clip,
        ratio=config.ratio,
        segments=batch.segments,
    )
    value = value_terms(values, batch.values, batch.returns, mask, config.value_clip)
    tokens = cuts / part.tokens
    actions = cuts / part.actions if config.ratio == "joint" else tokens
    policy_loss, value_loss = policy.loss.sum() * actions, value.loss.sum() * tokens
    mean_entropy = (entropy * mask).sum() * tokens
    loss = policy_loss + config.value_coef * value_loss
    if config.entropy_coef:
        loss = loss - config.entropy_coef * mean_entropy
    drift = torch.where(mask, logprobs.detach() - batch.logprobs, 0)
    return loss, {
        "loss/policy_avg": policy_loss,
        "loss/value_avg": value_loss,
        "policy/approxkl_avg": 0.5 * drift.square().sum() * tokens,
        "policy/clipfrac_avg": policy.clipped.sum() * actions,
        "policy/entropy_avg": mean_entropy,
        "val/clipfrac_avg": value.clipped.sum() * tokens,
        "val/ratio": (policy.ratio * policy.kept).sum() * actions,
    }
