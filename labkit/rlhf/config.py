"""Settings of PPO for language models, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from labkit.rlhf.rewards import AdaptiveKL
from labkit.rlhf.segments import ALIASES

KLEstimator = Literal["k1", "k2", "k3"]
Pooling = Literal["equal", "unit", "position", "mean", "last", "harmonic"]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "kl_estimator": ("k1", "k2", "k3"),
    "value_pooling": ("equal", "unit", "position"),
    "macro_reward": ("sum", "mean"),
    "ratio": ("token", "joint"),
    "schedule": ("constant", "linear"),
    "precision": (None, "no", "bf16"),
    "device": ("auto", "cpu"),
}
_AT_LEAST = {
    **dict.fromkeys(
        ("iterations", "batch_size", "minibatches", "epochs", "accumulate", "max_new_tokens", "keep"), 1
    ),
    **dict.fromkeys(("min_response", "top_k", "warmup", "checkpoint_every"), 0),
}
_OPTIONAL = {
    "value_clip",
    "score_clip",
    "max_grad_norm",
    "kl_target",
    "value_learning_rate",
    "missing_eos_penalty",
}
_FLAGS = ("match_temperature", "whiten_advantages", "whiten_rewards", "dropout", "find_unused_parameters")
#: Arguments of ``generate`` that the trainer sets, or that end or multiply responses behind its back.
_TAKEN = {
    "assistant_model",
    "attention_mask",
    "do_sample",
    "eos_token_id",
    "generation_config",
    "input_ids",
    "inputs",
    "inputs_embeds",
    "logits_processor",
    "max_length",
    "max_new_tokens",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "prompt_lookup_num_tokens",
    "return_dict_in_generate",
    "stop_strings",
    "stopping_criteria",
    "temperature",
    "top_k",
    "top_p",
}
_WITHIN: dict[str, tuple[float, float, str]] = {
    "gamma": (0, 1, "in [0, 1]"),
    "lam": (0, 1, "in [0, 1]"),
    "top_p": (1e-9, 1, "in (0, 1]; 1 keeps every token"),
    "clip": (1e-9, math.inf, "positive, for example 0.2"),
    "value_clip": (1e-9, math.inf, "positive, or None for no clipping"),
    "score_clip": (1e-9, math.inf, "positive, or None for no clipping"),
    "max_grad_norm": (1e-9, math.inf, "positive, or None for no clipping"),
    "kl_target": (1e-9, math.inf, "positive (nats a response), or None for a fixed coefficient"),
    "kl_horizon": (1e-9, math.inf, "positive (responses)"),
    "temperature": (1e-9, math.inf, "positive"),
    "learning_rate": (1e-30, math.inf, "positive"),
    "value_learning_rate": (1e-30, math.inf, "positive, or None for learning_rate"),
    "kl_coef": (0, math.inf, "0 or more"),
    "value_coef": (0, math.inf, "0 or more"),
    "entropy_coef": (0, math.inf, "0 or more"),
    "weight_decay": (0, math.inf, "0 or more"),
    "missing_eos_penalty": (0, math.inf, "0 or more, or None"),
}


@dataclass(frozen=True)
class PPOConfig:
    """Settings of a `PPOTrainer`.

    An *iteration* is one rollout of `batch_size` responses and ``epochs * minibatches`` updates on it.

    Parameters
    ----------
    iterations : int
        Rollouts in all, those before a resume included.
    batch_size : int
        Responses of a rollout, over all processes.
    minibatches, epochs : int
        Updates per pass over a rollout, and passes. Each pass deals the rollout into minibatches anew.
    accumulate : int
        Micro-batches of each process in an update.
    generation_batch : int, optional
        Responses that a process generates and scores at a time; all of its own by default. Changes memory and
        speed, not the outcome.
    max_new_tokens : int
        Longest response T.
    temperature, top_k, top_p : float, int, float
        Of sampling. ``top_k=0`` and ``top_p=1`` keep all tokens.
    match_temperature : bool
        Take log-probabilities of ``logits / temperature``, the distribution that was sampled from (before top-k and
        top-p). False takes them at temperature 1, as DeepSpeed-Chat does; the ratio is then off-policy from the start.
    generation : mapping
        More arguments for ``generate``, such as ``suppress_tokens``. Log-probabilities know nothing of them. The model's
        own ``generation_config`` is not asked.
    eos_token_id : int, sequence of int, "auto" or None
        What ends a response. ``"auto"`` asks the tokenizer, then the model. None: every response has T tokens.
    pad_token_id : int, optional
        What fills rows up; any token will do, since it is masked everywhere.
    min_response : int
        Responses with fewer tokens, the end token included, are left out of the updates and counted in
        ``val/dropped``. The official MA-RLHF code has 2.
    gamma, lam : float
        Discount and GAE's lambda, per action (per macro action where there is a `segmenter`).
    clip, value_clip : float, float or None
        How far the ratio may leave 1, and a value its old value, before the gradient stops.
    value_coef, entropy_coef : float
        Factors of value loss and of the mean token entropy.
    whiten_advantages, whiten_rewards : bool
        Shift and scale advantages (only scale rewards) by their statistics over the whole rollout.
    score_clip : float, optional
        Scores are clipped to plus or minus this.
    missing_eos_penalty : float, optional
        Taken off the score of a response that was cut at `max_new_tokens`.
    kl_coef : float
        beta of the per-token penalty; the start of it when adaptive.
    kl_estimator : {"k1", "k2", "k3"}
        Of the KL divergence from the reference, see `kl_penalty`.
    kl_target, kl_horizon : float
        With a target (nats a response) beta follows it, see `AdaptiveKL`.
    segmenter : callable, optional
        Groups tokens into macro actions, such as `FixedNgram`. None is token PPO.
    value_pooling : {"equal", "unit", "position"}
        How the values of a macro action's tokens make its value, see `macro_gae`; ``"mean"``, ``"last"`` and ``"harmonic"``
        are other names of them.
    macro_reward : {"sum", "mean"}
        Reward of a macro action: the sum over its tokens (the paper), or the average with the same weights as the
        value (the official code, which shrinks the KL penalty with the length of the group).
    ratio : {"token", "joint"}
        Whether the clipped ratio is each token's, or the product over a macro action (also ``"macro"``).
    learning_rate, value_learning_rate : float
        Of the policy and of the value model.
    betas, weight_decay
        Of AdamW.
    max_grad_norm : float, optional
        Largest gradient norm, of policy and value model each.
    warmup : int
        Updates of linear warm-up.
    schedule : {"constant", "linear"}
        What follows; linear ends at 0.
    dropout : bool
        Whether dropout acts in updates. False, as in other PPO code, makes the ratio of an unchanged policy 1.
    seed : int
        Of prompts, sampling and minibatches. What is drawn does not depend on the number of processes.
    device, precision
        See `labkit.training.TrainingConfig`.
    checkpoint_every, keep : int
        In iterations, and how many stay. With a directory the last is always kept.
    find_unused_parameters : bool
        For DDP when some trained parameters may get no gradient.

    Raises
    ------
    ValueError
        When a value is out of range, or `batch_size` can't be dealt into `minibatches`.
    TypeError
        When a value has another type, such as a `segmenter` that is not callable.

    Examples
    --------
    >>> PPOConfig(iterations=10, batch_size=32, minibatches=4).updates
    4
    >>> PPOConfig(iterations=10, batch_size=32, lam=1.5)
    Traceback (most recent call last):
        ...
    ValueError: lam must be in [0, 1], got 1.5
    """

    iterations: int
    batch_size: int
    minibatches: int = 1
    epochs: int = 1
    accumulate: int = 1
    generation_batch: int | None = None
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    match_temperature: bool = True
    generation: Mapping[str, Any] = field(default_factory=dict)
    eos_token_id: int | Sequence[int] | Literal["auto"] | None = "auto"
    pad_token_id: int | None = None
    min_response: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.0
    whiten_advantages: bool = False
    whiten_rewards: bool = False
    score_clip: float | None = None
    missing_eos_penalty: float | None = None
    kl_coef: float = 0.05
    kl_estimator: KLEstimator = "k1"
    kl_target: float | None = None
    kl_horizon: float = 10_000
    segmenter: Callable[..., Any] | None = None
    value_pooling: Pooling = "equal"
    macro_reward: Literal["sum", "mean"] = "sum"
    ratio: Literal["token", "joint", "macro"] = "token"
    learning_rate: float = 1e-5
    value_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    warmup: int = 0
    schedule: Literal["constant", "linear"] = "constant"
    dropout: bool = False
    seed: int = 0
    device: str = "auto"
    precision: Literal["no", "bf16"] | None = None
    checkpoint_every: int = 0
    keep: int = 2
    find_unused_parameters: bool = False

    def __post_init__(self) -> None:
        for name, others in (("value_pooling", ALIASES), ("ratio", {"macro": "joint"})):
            object.__setattr__(self, name, others.get(str(getattr(self, name)), getattr(self, name)))
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, (low, high, words) in _WITHIN.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, {words}; got {value!r}")
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name} must be {words}, got {value}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number of at least 0, got {self.seed!r}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                also = {"value_pooling": (*ALIASES,), "ratio": ("macro",)}.get(name, ())
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, (*allowed, *also)))}, got {getattr(self, name)!r}"
                )
        if self.generation_batch is not None and self.generation_batch < 1:
            raise ValueError(f"generation_batch must be at least 1, or None, got {self.generation_batch}")
        if self.batch_size % (self.minibatches * self.accumulate):
            raise ValueError(
                f"batch_size={self.batch_size} can't be dealt evenly into {self.minibatches} minibatches times "
                f"{self.accumulate} micro-batches: take a multiple of {self.minibatches * self.accumulate}"
            )
        if self.min_response > self.max_new_tokens:
            raise ValueError(
                f"min_response={self.min_response} is more than max_new_tokens={self.max_new_tokens}: every response would "
                "be left out"
            )
        AdaptiveKL(self.kl_coef, self.kl_target, self.kl_horizon).update(0.0, self.batch_size)  # raises
        if isinstance(self.segmenter, type):
            raise TypeError(
                f"segmenter is the class {self.segmenter.__name__}: give an instance, such as FixedNgram(5)"
            )
        if self.segmenter is not None and not callable(self.segmenter):
            raise TypeError(
                f"segmenter must be a callable such as FixedNgram(5), or None for token PPO; got {self.segmenter!r}"
            )
        if self.segmenter is None and self.ratio == "joint":
            raise ValueError(
                "ratio='joint' is the ratio of a macro action: give a segmenter, or ratio='token'"
            )
        clash = sorted(_TAKEN & set(self.generation))
        if clash:
            raise ValueError(
                f"generation has {clash}, which the trainer sets or cannot have: use PPOConfig's own fields (temperature, "
                f"top_k, top_p, max_new_tokens, eos_token_id, pad_token_id)"
            )

    @property
    def updates(self) -> int:
        """Updates of one iteration."""
        return self.epochs * self.minibatches

    def factor(self, update: int) -> float:
        """Factor of the learning rate at an update.

        Examples
        --------
        >>> config = PPOConfig(iterations=10, batch_size=4, warmup=2, schedule="linear")
        >>> [config.factor(update) for update in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
        """
        if update < self.warmup:
            return (update + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        last = self.iterations * self.updates
        return max(0.0, (last - update) / max(1, last - self.warmup))
