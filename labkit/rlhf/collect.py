"""From prompts to credited responses: the first half of a PPO iteration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from labkit.rlhf.actor_critic import ActorCritic
from labkit.rlhf.advantages import gae, macro_gae, whiten
from labkit.rlhf.config import PPOConfig
from labkit.rlhf.logprobs import plain, sequence_stats
from labkit.rlhf.positions import check_length
from labkit.rlhf.prompts import Prompts, end_tokens, pad_token, vocabulary
from labkit.rlhf.reference import Reference
from labkit.rlhf.rewards import AdaptiveKL, call_reward, kl_penalty, name_of, token_rewards, unique_names
from labkit.rlhf.rollout import RolloutBatch, generate_responses, left_pad, uniforms
from labkit.rlhf.segments import count_segments, token_segments
from labkit.training.processes import OneProcess


class Collector:
    """Makes rollouts: responses, their facts under policy and reference, scores, rewards and credit.

    Parameters
    ----------
    model : ActorCritic
    reference : Reference or None
    rewards : sequence of callable
    weights : sequence of float
    hooks : sequence of callable
    prompts : Prompts
    config : PPOConfig
    controller : AdaptiveKL
    processes : OneProcess
    """

    def __init__(
        self,
        model: ActorCritic,
        reference: Reference | None,
        rewards: Sequence[Any],
        weights: Sequence[float],
        hooks: Sequence[Any],
        prompts: Prompts,
        config: PPOConfig,
        controller: AdaptiveKL,
        processes: OneProcess,
    ) -> None:
        self.model, self.reference = model, reference
        self.rewards, self.weights, self.hooks = rewards, weights, hooks
        self.prompts, self.config, self.controller, self.processes = prompts, config, controller, processes
        self.needs_hidden = any(getattr(hook, "needs_ref_hidden", False) for hook in hooks)
        if self.needs_hidden and reference is not None and isinstance(reference.parts.head, nn.Identity):
            raise ValueError(
                f"a token reward asks for the reference's hidden states, which "
                f"{type(plain(reference.model)).__name__} does not show apart from its logits: take a decoder with a "
                f"plain head as ref_model"
            )
        self.ends = end_tokens(config, prompts.tokenizer, model.policy)
        self.pad = pad_token(config, prompts.tokenizer, self.ends, model.policy)
        self.names = unique_names(rewards)
        self.rows = vocabulary(model.policy)
        self.readers = [("policy", model.policy)]
        self.readers += [] if reference is None else [("reference", reference.model)]
        self.readers += [("value model", model.value.backbone)] if hasattr(model.value, "backbone") else []
        for what, reader in self.readers:
            if vocabulary(reader) < self.rows:
                raise ValueError(
                    f"the {what} has {vocabulary(reader)} tokens and the policy {self.rows}: it must know all of them"
                )
        self.metrics: dict[str, float] = {}
        self.clock: Callable[[], float] = time.perf_counter
        self.seconds: dict[str, float] = {}

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = self._now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self._now() - began

    def _now(self) -> float:
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)
        return self.clock()

    @torch.no_grad()
    def __call__(self, iteration: int) -> RolloutBatch:
        """The rollout of an iteration; `metrics` then describe it."""
        config, processes = self.config, self.processes
        share = config.batch_size // processes.world
        first = processes.rank * share
        size = min(config.generation_batch or share, share)
        training = self.model.policy.training
        self.seconds = {}
        self.model.eval()
        try:
            parts = [
                self._respond(iteration, start, min(start + size, first + share))
                for start in range(first, first + share, size)
            ]
        finally:
            self.model.train(training)
        batch = RolloutBatch.concatenate(parts, self.pad)
        batch.reduce = processes.total
        with self._timed("reward"):
            separate = self._score(batch)
        self._drop(batch)
        with self._timed("hooks"):
            extra = [self._extra(hook, batch) for hook in self.hooks]
        with self._timed("credit"):
            kl = self._credit(batch, extra)
        self._measure(batch, kl, separate)
        if config.whiten_advantages:
            batch.advantages = whiten(batch.advantages, batch.mask, reduce=batch.reduce)
        self.metrics |= {f"time/{phase}": round(seconds, 4) for phase, seconds in self.seconds.items()}
        return batch

    def _respond(self, iteration: int, first: int, last: int) -> RolloutBatch:
        """Generate and measure some rows."""
        config, device = self.config, self.processes.device
        ids, prompts, columns = self.prompts.rows(iteration, first, last)
        prompt_ids, prompt_mask = left_pad(ids, self.pad, device)
        low, high = int(prompt_ids.min()), int(prompt_ids.max())
        if low < 0 or high >= self.rows:
            raise ValueError(
                f"a prompt has the id {high if low >= 0 else low} and the policy {self.rows} tokens: take its own tokenizer"
            )
        for what, reader in self.readers:
            check_length(
                prompt_ids.shape[1] + config.max_new_tokens,
                plain(reader),
                f"a prompt of {prompt_ids.shape[1]} and max_new_tokens={config.max_new_tokens}, together a text",
                f"shorten one of them (the {what} reads it)",
            )
        rows = list(range(first, last))
        with self._timed("generate"):
            response = generate_responses(
                self.model.policy,
                prompt_ids,
                prompt_mask,
                uniforms(rows, config.max_new_tokens, config.seed, iteration),
                temperature=config.temperature,
                top_k=config.top_k,
                top_p=config.top_p,
                eos_token_ids=self.ends,
                pad_token_id=self.pad,
                options=config.generation,
            )
        batch = RolloutBatch(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            tokens=response.tokens,
            mask=response.mask,
            ranks=response.ranks,
            eos=response.eos,
            rows=torch.tensor(rows, device=device),
            prompts=prompts,
            completions=self._texts(response.tokens, response.mask),
            columns=columns,
            iteration=iteration,
        )
        with self._timed("measure"), self._precision():
            batch.logprobs, batch.entropy, batch.values = self.model(batch, entropy_grad=False)
            if self.reference is not None:
                with self.reference.off():
                    found = sequence_stats(
                        self.reference.model,
                        prompt_ids,
                        prompt_mask,
                        batch.tokens,
                        batch.mask,
                        self.model.temperature,
                        parts=self.reference.parts,
                        chunk=self.model.chunk,
                        return_hidden=self.needs_hidden,
                    )
                batch.ref_logprobs, batch.ref_hidden = found.logprobs, found.hidden
        return batch

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast as in updates, so that old and new log-probabilities agree."""
        accelerator = getattr(self.processes, "accelerator", None)
        context: AbstractContextManager[Any] = (
            accelerator.autocast() if accelerator is not None else nullcontext()
        )
        return context

    def _texts(self, tokens: Tensor, mask: Tensor) -> list[Any]:
        lists = [row[real].tolist() for row, real in zip(tokens, mask, strict=True)]
        tokenizer = self.prompts.tokenizer
        return lists if tokenizer is None else tokenizer.batch_decode(lists, skip_special_tokens=True)

    def _score(self, batch: RolloutBatch) -> list[tuple[str, Tensor]]:
        """Put the weighted sum of all rewards into the batch; returns each."""
        answers = [
            [{"role": "assistant", "content": text}]
            if isinstance(prompt, list) and isinstance(text, str)
            else text
            for prompt, text in zip(batch.prompts, batch.completions, strict=True)
        ]
        completion_ids = [row[real].tolist() for row, real in zip(batch.tokens, batch.mask, strict=True)]
        prompt_ids = [
            row[real].tolist() for row, real in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
        ]
        found = [
            (
                name,
                call_reward(
                    reward, batch.prompts, answers, completion_ids, batch.columns, prompt_ids=prompt_ids
                ).to(self.processes.device),
            )
            for name, reward in zip(self.names, self.rewards, strict=True)
        ]
        batch.scores = torch.stack(
            [weight * scores for weight, (_, scores) in zip(self.weights, found, strict=True)]
        ).sum(0)
        return found

    def _drop(self, batch: RolloutBatch) -> None:
        short = batch.lengths < self.config.min_response
        if short.any():
            batch.mask = batch.mask & ~short[:, None]

    def _credit(self, batch: RolloutBatch, extra: list[Tensor]) -> Tensor:
        """Rewards, segments, advantages; returns the KL estimates."""
        config, mask = self.config, batch.mask
        kl = torch.zeros_like(batch.logprobs)
        if batch.ref_logprobs is not None:
            kl = torch.where(mask, kl_penalty(batch.logprobs, batch.ref_logprobs, config.kl_estimator), 0)
        paid = batch.scores
        if config.missing_eos_penalty is not None:
            paid = paid - config.missing_eos_penalty * (~batch.eos).to(paid.dtype)
        rewards = token_rewards(
            paid, kl, mask, kl_coef=self.controller.coef, score_clip=config.score_clip, extra=extra
        )
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=batch.reduce)
        batch.rewards = rewards
        if config.segmenter is None:
            batch.segments = token_segments(mask)
            batch.advantages, batch.returns = gae(rewards, batch.values, mask, config.gamma, config.lam)
        else:
            batch.segments = config.segmenter(
                batch.tokens, mask, ref_logprobs=batch.ref_logprobs, tokenizer=self.prompts.tokenizer
            )
            batch.advantages, batch.returns = macro_gae(
                rewards,
                batch.values,
                batch.segments,
                mask,
                gamma=config.gamma,
                lam=config.lam,
                value_pooling=config.value_pooling,
                macro_reward=config.macro_reward,
                allow_empty=bool(getattr(config.segmenter, "phantom", False)),
            )
        return kl

    def _extra(self, hook: Any, batch: RolloutBatch) -> Tensor:
        """A hook's token rewards, checked, 0 on padding."""
        found = hook(batch)
        if not isinstance(found, Tensor) or found.shape != batch.mask.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the token reward {name_of(hook)} must return a tensor {tuple(batch.mask.shape)}, got {shape}"
            )
        found = torch.where(batch.mask, found.detach(), 0)
        if not torch.isfinite(found).all():
            row, place = (int(i) for i in (~torch.isfinite(found)).nonzero()[0])
            raise ValueError(f"the token reward {name_of(hook)} is not finite in row {row} at token {place}")
        return found

    def _measure(self, batch: RolloutBatch, kl: Tensor, separate: list[tuple[str, Tensor]]) -> None:
        """Means over the global rollout."""
        mask, scores = batch.mask, batch.scores
        kept = mask.any(1)
        penalty = -self.controller.coef * kl.sum(1)
        columns: dict[str, tuple[Tensor, Tensor]] = {
            "objective/entropy": (-(batch.logprobs * mask).sum(1), kept),
            "objective/scores": (scores, torch.ones_like(kept)),
            "val/response_length": (batch.lengths, kept),
            "val/macro_actions": (count_segments(batch.segments), kept),
            "val/values": (batch.values, mask),
            "val/returns": (batch.returns, mask),
            "val/returns_squared": (batch.returns.square(), mask),
            "val/errors_squared": ((batch.returns - batch.values).square(), mask),
        }
        if batch.ref_logprobs is not None:
            k1 = torch.where(mask, batch.logprobs - batch.ref_logprobs, 0).sum(1)
            columns |= {
                "objective/kl": (k1, kept),
                "objective/non_score_reward": (penalty, kept),
            }
        if len(separate) > 1:
            columns |= {f"reward/{name}": (values, torch.ones_like(kept)) for name, values in separate}
        exact = torch.float32 if self.processes.device.type == "mps" else torch.float64
        sums = [
            torch.stack([torch.where(k, x, 0).sum().to(exact), k.sum().to(exact)])
            for x, k in columns.values()
        ]
        counts = torch.stack([batch.eos.sum().to(exact), (~kept).sum().to(exact)])
        totals = self.processes.total(torch.cat([*sums, counts])).tolist()
        means = {name: totals[2 * i] / max(1.0, totals[2 * i + 1]) for i, name in enumerate(columns)}
        variance = means.pop("val/returns_squared") - means["val/returns"] ** 2
        error = means.pop("val/errors_squared")
        means["val/explained_variance"] = 1 - error / variance if variance > 1e-12 else math.nan
        means["objective/rlhf_reward"] = means["objective/scores"] + means.get(
            "objective/non_score_reward", 0.0
        )
        means["objective/kl_coef"] = self.controller.coef
        means["val/num_eos_tokens"], means["val/dropped"] = totals[-2:]
        self.metrics = means
