"""PPO for causal language models of transformers.

One iteration: sample a rollout (`collect`), then update policy and value model on its minibatches. Reward, segments,
token rewards, value model and reference are all given from outside; the parts that do the arithmetic are plain functions
(`gae`, `macro_gae`, `policy_loss`, ...). The training step, checkpoints, several processes and mixed precision are
those of `labkit.training`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from labkit.rlhf.actor_critic import ActorCritic
from labkit.rlhf.collect import Collector
from labkit.rlhf.config import PPOConfig
from labkit.rlhf.logprobs import check_causal
from labkit.rlhf.minibatches import Minibatch, Updates, micro_batch_loss
from labkit.rlhf.prompts import Prompts
from labkit.rlhf.records import IterationRecord
from labkit.rlhf.reference import Reference, needed
from labkit.rlhf.rewards import AdaptiveKL, as_hooks, as_rewards, as_weights
from labkit.rlhf.rollout import RolloutBatch
from labkit.rlhf.values import chosen_value_model
from labkit.training.loop import TrainingConfig, TrainingLoop
from labkit.training.processes import OneProcess, choose


class _Loop(TrainingLoop):
    """The loop, with one record an iteration instead of one an update."""

    def __init__(self, trainer: PPOTrainer, *parts: Any, **options: Any) -> None:
        self.trainer = trainer
        super().__init__(*parts, **options)

    def _log(self, record: dict[str, Any]) -> None:
        whole = self.trainer._whole(record)
        if whole is not None:
            super()._log(whole)


class PPOTrainer:
    """Train a policy with PPO.

    Iterate over it for a record at a time, or call `train`.

    Parameters
    ----------
    model : transformers.PreTrainedModel or peft.PeftModel
        The policy, a decoder with a language-model head. Only what requires a gradient is trained.
    reward : callable, transformers.PreTrainedModel, or a list of these
        ``f(prompts, completions, completion_ids=..., **columns) -> list of float``, as for trl's GRPO; a sequence
        classifier with one label that shares the policy's vocabulary (else wrap it: ``RewardModel(model,
        tokenizer)``). Several are added. An object may also have ``setup(trainer)``, ``update(batch)`` (once an
        iteration), ``metrics()``, and ``state_dict``/``load_state_dict``, which go into the checkpoints.
    args : PPOConfig
    train_dataset : sequence of mapping, or datasets.Dataset
        Column ``prompt`` (text or chat messages) or ``input_ids``; other columns are handed to the reward.
    processing_class : tokenizer, optional
        Without one, prompts and completions are lists of ids.
    ref_model : transformers.PreTrainedModel, optional
        By default a frozen copy of the policy, or a peft policy with its adapters off. There is none when nothing needs it
        (``kl_coef=0``, no target, no hook or segmenter that asks).
    value_model : ValueModel, "shared" or torch.nn.Linear, optional
        By default a `ValueModel` on a copy of the policy's body. ``"shared"`` is a linear layer on the policy's own
        hidden states, new or, from an earlier run, `load_value_head`.
    reward_weights : sequence of float, optional
        One a reward.
    token_rewards : sequence of callable
        ``hook(batch) -> (B, T)``, added to the rewards of tokens; `batch` is a `RolloutBatch` without rewards yet. It may
        also have ``needs_ref_hidden = True`` or ``needs_reference = True``, ``setup(trainer)``, ``update(batch)`` (after
        each update, with its rows), ``metrics()``, ``state_dict``/``load_state_dict``.
    optimizer : callable, optional
        ``optimizer(groups)`` for the parameter groups of policy and value model; AdamW by default.
    directory : Path or str, optional
        For ``log.jsonl`` and checkpoints. With `resume`, an interrupted run goes on from there, on the CPU to the bit.
    resume : bool
    on_record : callable, optional
        Gets each record.
    processes : labkit.training.OneProcess, optional

    Attributes
    ----------
    history : list of dict
        One record an iteration. Means are over the responses or tokens of the whole rollout (``objective``, ``val``) or
        of its updates (``policy``, ``value``, ``loss``); names as in trl's PPO where it has them:

        ==================================  =========================================================================
        ``objective/kl``                    log(policy / reference) of a response, nats: sum over its tokens
        ``objective/entropy``               minus the log-probability of a response
        ``objective/scores``                reward before clipping and penalties
        ``objective/non_score_reward``      KL penalty of a response
        ``objective/rlhf_reward``           sum of the last two
        ``objective/kl_coef``               beta in this rollout
        ``policy/approxkl_avg``             half the mean square of the log-ratio to the policy that sampled
        ``policy/clipfrac_avg``             share of ratios whose gradient is clipped off
        ``policy/entropy_avg``              entropy of the policy before a token, nats
        ``policy/grad_norm``, ``value/...`` gradient norm before clipping
        ``loss/policy_avg``, ``value_avg``  the two losses
        ``val/clipfrac_avg``                share of values whose gradient is clipped off
        ``val/ratio``                       mean ratio to the policy that sampled; 1 at the first update
        ``val/num_eos_tokens``              responses that ended by themselves
        ``val/response_length``             tokens of a response, the end token included
        ``val/macro_actions``               macro actions of a response; its tokens in token PPO
        ``val/explained_variance``          of the returns by the old values; nan when returns do not vary
        ``val/values``, ``val/returns``     means of the old values and of the returns
        ``val/dropped``                     responses left out for being shorter than `min_response`
        ``reward/NAME``                     each of several rewards
        ``episode``, ``lr``, ``iteration``  responses so far, learning rate of the policy, iterations done
        ``time/rollout``, ``time/update``   seconds of this iteration; of the rollout ``time/generate``, ``time/measure``
                                            (log-probabilities and values), ``time/reward``, ``time/hooks`` and
                                            ``time/credit`` (rewards, segments and advantages of tokens)
        ==================================  =========================================================================
    policy, value_model, reference, config, processes
        As given or made; `reference` is None when there is none.
    iteration : int
        Iterations done.

    Raises
    ------
    TypeError, ValueError
        For models, rewards or data that do not fit, before any work.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> policy = tiny("llama", width=32, heads=2, vocab=8, seed=0)
    >>> def sevens(completion_ids, **_):
    ...     return [ids.count(7) / len(ids) for ids in completion_ids]
    >>> config = PPOConfig(iterations=25, batch_size=32, max_new_tokens=6, eos_token_id=None, learning_rate=5e-3)
    >>> trainer = PPOTrainer(policy, sevens, config, [{"input_ids": [1, 2]}, {"input_ids": [3]}], value_model="shared")
    >>> history = trainer.train()
    >>> history[0]["objective/scores"] < 0.3 < 0.7 < history[-1]["objective/scores"]
    True
    """

    def __init__(
        self,
        model: Any,
        reward: Any,
        args: PPOConfig,
        train_dataset: Any,
        *,
        processing_class: Any = None,
        ref_model: Any = None,
        value_model: Any = None,
        reward_weights: Sequence[float] | None = None,
        token_rewards: Sequence[Any] = (),
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
        directory: Path | str | None = None,
        resume: bool = True,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        processes: OneProcess | None = None,
    ) -> None:
        if not isinstance(args, PPOConfig):
            raise TypeError(f"args must be a PPOConfig, got {type(args).__name__}")
        check_causal(model)
        if ref_model is model:
            Reference(model, ref_model)  # raises
        self.config = config = args
        self.policy = model
        self.rewards = as_rewards(reward)
        self.reward_weights = as_weights(reward_weights, len(self.rewards))
        self.token_rewards = as_hooks(token_rewards)
        self.prompts = Prompts(train_dataset, processing_class, config.batch_size, config.seed)
        wanted = ref_model is not None or needed(config, self.token_rewards)
        self.reference = Reference(model, ref_model) if wanted else None
        self.actor_critic = ActorCritic(
            model,
            chosen_value_model(model, value_model),
            temperature=config.temperature if config.match_temperature else 1.0,
            entropy_grad=config.entropy_coef > 0,
            dropout=config.dropout,
        )
        self.controller = AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        self.processes = processes or choose(
            config.precision,
            None if config.device == "auto" else config.device,
            config.find_unused_parameters,
            self.actor_critic,
        )
        self._check_processes()
        self._place()
        self._groups = self.actor_critic.groups()
        made = self.actor_critic.optimizer(config, optimizer)
        self.collector = Collector(
            self.actor_critic,
            self.reference,
            self.rewards,
            self.reward_weights,
            self.token_rewards,
            self.prompts,
            config,
            self.controller,
            self.processes,
        )
        guests = [*self.rewards, *self.token_rewards]
        self._record = IterationRecord(guests)
        for guest in guests:
            if hasattr(guest, "setup"):
                guest.setup(self)
        named = [(f"reward.{i}", reward) for i, reward in enumerate(self.rewards)]
        named += [(f"token_reward.{i}", hook) for i, hook in enumerate(self.token_rewards)]
        kept = {name: guest for name, guest in named if hasattr(guest, "state_dict")}
        self._data = Updates(
            config, self._rollout, self.gather, self.processes, self.prompts.batches.describe()
        )
        self._loop = _Loop(
            self,
            self.actor_critic,
            self._data,
            self._loss,
            made,
            TrainingConfig(
                steps=config.iterations * config.updates,
                accumulate=config.accumulate,
                clip=None,  # policy and value model are clipped apart, in _clip
                precision=config.precision,
                device=config.device,
                seed=config.seed,
                checkpoint_every=config.checkpoint_every * config.updates,
                keep=config.keep,
            ),
            scheduler=config.factor,
            directory=directory,
            resume=resume,
            state={"controller": self.controller, **kept},
            on_record=on_record,
            processes=self.processes,
            before_step=self._clip,
            after_step=self._after,
        )

    @property
    def history(self) -> list[dict[str, Any]]:
        """One record an iteration."""
        return self._loop.history

    @property
    def iteration(self) -> int:
        """Iterations done."""
        return self._loop.step // self.config.updates

    @property
    def remaining(self) -> int:
        """Iterations still to do."""
        return self.config.iterations - self.iteration

    @property
    def value_model(self) -> nn.Module:
        """The value model, or the linear layer of a shared one."""
        return self.actor_critic.value

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in self._loop:
            if (step.number + 1) % self.config.updates == 0:
                yield self.history[-1]

    def train(
        self, progress: Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]] | None = None
    ) -> list[dict[str, Any]]:
        """Train to the last iteration.

        Parameters
        ----------
        progress : callable, optional
            Wraps the iterable of records; only the main process calls it.

        Returns
        -------
        list of dict
            `history`.
        """
        records: Iterable[dict[str, Any]] = self
        if progress is not None and self.processes.is_main:
            records = progress(self)
        for _ in records:
            pass
        return self.history

    def collect(self, iteration: int) -> RolloutBatch:
        """Sample, score and credit a rollout with the present policy; nothing is updated.

        Parameters
        ----------
        iteration : int
            Decides prompts and random numbers.

        Returns
        -------
        RolloutBatch
            This process's rows.
        """
        return self.collector(iteration)

    def _rollout(self, iteration: int) -> RolloutBatch:
        batch = self.collect(iteration)
        self._record.rollout = dict(self.collector.metrics)
        return batch

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all processes, in the order of the global rollout.

        Parameters
        ----------
        rows : Tensor
            ``(batch_size / processes, ...)``; other axes alike in every process.

        Returns
        -------
        Tensor
            ``(batch_size, ...)``, the same in every process.
        """
        if self.processes.world == 1:
            return rows
        everything = rows.new_zeros(self.processes.world * len(rows), *rows.shape[1:])
        start = self.processes.rank * len(rows)
        everything[start : start + len(rows)] = rows
        return self.processes.total(everything)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the policy (or its adapters), its tokenizer, and the value model under ``value``."""
        if not self.processes.is_main:
            return
        self.policy.save_pretrained(folder)
        if self.prompts.tokenizer is not None:
            self.prompts.tokenizer.save_pretrained(folder)
        self.actor_critic.save_value(Path(folder) / "value")

    def save(self) -> Path:
        """Write a checkpoint to resume from; between iterations, in all processes.

        Raises
        ------
        ValueError
            Without a directory, or amid an iteration.
        """
        if self._loop.step % self.config.updates:
            raise ValueError(
                f"update {self._loop.step} is amid an iteration of {self.config.updates}, whose rollout a checkpoint does "
                f"not hold: save between iterations"
            )
        return self._loop.save()

    def close(self) -> None:
        """Leave the process group; the last line of a script that runs in several processes."""
        self._loop.close()

    def _check_processes(self) -> None:
        config, world = self.config, self.processes.world
        if self.processes.sharded:
            raise ValueError(
                "PPO can't sample from a sharded (FSDP) policy here: use data parallelism, with LoRA where memory is short"
            )
        cut = world * config.minibatches * config.accumulate
        if config.batch_size % cut:
            raise ValueError(
                f"batch_size={config.batch_size} can't be dealt evenly to {world} processes times {config.minibatches} "
                f"minibatches times {config.accumulate} micro-batches: take a multiple of {cut}"
            )

    def _place(self) -> None:
        """Put all models where the batches go, before hooks look there for theirs; one that is spread over devices stays."""
        models: list[nn.Module] = [self.policy, self.actor_critic.value]
        if self.reference is not None and not self.reference.adapters:
            models.append(self.reference.model)
        for one in models:
            if not any(len(getattr(part, "hf_device_map", None) or ()) > 1 for part in one.modules()):
                one.to(self.processes.device)

    def _loss(self, model: Any, part: Minibatch) -> tuple[Tensor, dict[str, Tensor]]:
        return micro_batch_loss(model, part, self.config, self.processes.world * self.config.accumulate)

    def _clip(self, model: nn.Module) -> None:
        """Clip the gradients of policy and value model, each by its own norm."""
        limit = self.config.max_grad_norm
        for name, group in zip(("policy", "value"), self._groups, strict=True):
            if group:
                norm = self.processes.clip(group, float("inf") if limit is None else limit)
                self._record.norm(name, float(norm))

    def _after(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Let hooks learn after an update, and rewards after the last of an iteration."""
        step = self._loop.step
        learners = [hook for hook in self.token_rewards if hasattr(hook, "update")]
        if learners:
            share = self._data.batch // self.processes.world
            first = self.processes.rank * share
            rows = self._data.rows(step, first, first + share).batch
            for hook in learners:
                hook.update(rows)
        if (step + 1) % self.config.updates == 0:
            assert self._data.batch_of_iteration is not None
            for reward in self.rewards:
                if hasattr(reward, "update"):
                    reward.update(self._data.batch_of_iteration)
            self.controller.update(self._record.rollout.get("objective/kl", 0.0), self.config.batch_size)

    def _whole(self, record: dict[str, Any]) -> dict[str, Any] | None:
        """The iteration's record after its last update, else None."""
        self._record.add(record)
        iteration, amid = divmod(record["step"], self.config.updates)
        if amid:
            return None
        return self._record.close(iteration, iteration * self.config.batch_size) | {
            "time/rollout": round(self._data.seconds, 4),
            "time/update": round(time.perf_counter() - self._data.ended, 4),
            "seconds": record["seconds"],
        }
