r"""Rewards of responses and of tokens.

A reward is called as trl's GRPO calls one, ``f(prompts, completions, completion_ids=..., **columns) -> list of float``;
a transformers sequence classifier becomes one in `RewardModel`. Tokens get

.. math:: r_t = -\beta \, k_t + \sum_h h_t + [t\ \text{last}]\; \mathrm{clip}(s, \pm c)

with a KL estimate k of the log-ratio :math:`\ell = \log\pi(y_t) - \log\pi_{ref}(y_t)`, hooks h, and the score s:

======== ================================ ==========================================
``"k1"`` :math:`\ell`                     unbiased, signed; what PPO for RLHF uses
``"k2"`` :math:`\ell^2/2`                 biased, low variance
``"k3"`` :math:`e^{-\ell} - 1 + \ell`     unbiased, never negative
======== ================================ ==========================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from labkit.rlhf.arguments import taken
from labkit.rlhf.positions import check_length

Reward = Callable[..., Any]


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(policy || reference) of each sampled token, in nats.

    Parameters
    ----------
    logprobs, ref_logprobs : Tensor
        Of the sampled tokens, any common shape.
    estimator : {"k1", "k2", "k3"}

    Raises
    ------
    ValueError
        For an unknown estimator.

    Examples
    --------
    >>> kl_penalty(torch.tensor([-1.0]), torch.tensor([-3.0])).tolist()
    [2.0]
    """
    ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return ratio
    if estimator == "k2":
        return ratio.square() / 2
    if estimator == "k3":
        return torch.expm1(-ratio) + ratio
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")


class AdaptiveKL:
    r"""Coefficient of the KL penalty that follows a target (Ziegler et al. 2019).

    :math:`\beta \leftarrow \beta \, (1 + \mathrm{clip}(KL/target - 1, \pm 0.2) \; n / horizon)` after n responses.

    Parameters
    ----------
    coef : float
        Start.
    target : float, optional
        KL of a response, nats. None keeps the coefficient.
    horizon : float
        Responses over which a constant error of 20 % would change the coefficient by about 20 %.

    Examples
    --------
    >>> controller = AdaptiveKL(0.1, target=6.0, horizon=100)
    >>> controller.update(kl=12.0, responses=50)
    >>> round(controller.coef, 6)
    0.11
    """

    def __init__(self, coef: float, target: float | None = None, horizon: float = 10_000) -> None:
        if coef < 0 or (target is not None and not target > 0) or not horizon > 0:
            raise ValueError(
                f"coef must be 0 or more, target and horizon positive; got {coef}, {target}, {horizon}"
            )
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, responses: int) -> None:
        """Move the coefficient after a rollout with this mean KL."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error * responses / self.horizon

    def state_dict(self) -> dict[str, float]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Put the coefficient back."""
        self.coef = float(state["coef"])


def last_token(mask: Tensor) -> Tensor:
    """``(B, T)`` bool: the last real token of each row."""
    mask = mask.bool()
    after = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return mask & ~after


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    score_clip: float | None = None,
    extra: Sequence[Tensor] = (),
) -> Tensor:
    """Rewards of tokens from scores of responses.

    Parameters
    ----------
    scores : Tensor
        ``(B,)``.
    kl : Tensor
        ``(B, T)``, see `kl_penalty`.
    mask : Tensor
        ``(B, T)``, true on real tokens.
    kl_coef : float
        beta.
    score_clip : float, optional
    extra : sequence of Tensor
        ``(B, T)`` more rewards.

    Returns
    -------
    Tensor
        ``(B, T)``, 0 on padding.

    Examples
    --------
    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([9.0]), torch.ones(1, 3), mask, kl_coef=0.5, score_clip=2.5).tolist()
    [[-0.5, 2.0, 0.0]]
    """
    rewards = -kl_coef * kl
    for more in extra:
        rewards = rewards + more
    bounded = scores if score_clip is None else scores.clamp(-score_clip, score_clip)
    rewards = rewards + last_token(mask) * bounded[:, None]
    return torch.where(mask.bool(), rewards, 0)


def call_reward(
    reward: Reward,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]] | None = None,
    **more: Any,
) -> Tensor:
    """Call a reward function and check what it returns.

    Parameters
    ----------
    reward : callable
        ``f(prompts, completions, completion_ids=..., **columns)``; what it does not name is passed only if it takes
        ``**kwargs``.
    prompts, completions : sequence
        Text, or lists of ids.
    completion_ids : sequence of sequence of int
    columns : mapping, optional
        The data set's other columns.
    more
        Further arguments of the same kind, such as `prompt_ids`.

    Returns
    -------
    Tensor
        ``(B,)`` float32 on the CPU. None of a function ("does not apply") is 0.

    Raises
    ------
    ValueError
        For a wrong number of rewards, or one that is not finite, with its index.

    Examples
    --------
    >>> call_reward(lambda prompts, completions, **_: [len(c) for c in completions], ["a"], ["bcd"], [[1]]).tolist()
    [3.0]
    """
    given = {"completion_ids": completion_ids, **more, **(columns or {})}
    found = reward(prompts=prompts, completions=completions, **taken(reward, given))
    name = name_of(reward)
    if isinstance(found, Tensor):
        found = found.detach().float().cpu().reshape(-1).tolist() if found.ndim <= 1 else found.tolist()
    try:
        numbers = [0.0 if value is None else float(value) for value in found]
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must return a list of numbers, one a completion; got {str(found)[:80]!r}"
        ) from None
    if len(numbers) != len(completions):
        raise ValueError(f"{name} returned {len(numbers)} rewards for {len(completions)} completions")
    for index, value in enumerate(numbers):
        if not math.isfinite(value):
            raise ValueError(
                f"{name} returned {value} for completion {index}: rewards must be finite numbers"
            )
    return torch.tensor(numbers, dtype=torch.float32)


def name_of(reward: Any) -> str:
    """Name of a reward, for messages and metrics."""
    return str(getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__))


class RewardModel:
    """A transformers sequence classifier with one label, as a reward function.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        With one logit a sequence. It is put into evaluation mode and not trained.
    processing_class : tokenizer, optional
        Of the reward model. Without one the policy's own ids are scored, for models that share its vocabulary.
    batch_size : int
        Responses at a time.
    max_length : int, optional
        Longer texts lose their beginning. Without it a text that the model has no positions for is an error.

    Raises
    ------
    TypeError, ValueError
        When the model has more than one label, the batch size is below 1, or a text is longer than the model's
        positions.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", vocab=50, seed=0, head="classification", num_labels=1)
    >>> reward = RewardModel(model)
    >>> reward([[3, 4]], [[5, 6]], completion_ids=[[5, 6]], prompt_ids=[[3, 4]]).shape
    torch.Size([1])
    """

    def __init__(
        self, model: Any, processing_class: Any = None, *, batch_size: int = 16, max_length: int | None = None
    ) -> None:
        labels = getattr(getattr(model, "config", None), "num_labels", None)
        if labels is None:
            raise TypeError(f"a reward model must be a transformers model, got {type(model).__name__}")
        if labels != 1:
            raise ValueError(
                f"the reward model {type(model).__name__} has {labels} labels, one is needed: load it with "
                f"AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model, self.processing_class = model.eval(), processing_class
        self.batch_size, self.max_length = batch_size, max_length
        self.name = type(model).__name__

    def setup(self, trainer: Any) -> None:
        """Move the model to where the trainer is."""
        self.model.to(trainer.processes.device)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]] | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **_: Any,
    ) -> Tensor:
        """Score responses.

        Parameters
        ----------
        prompts, completions : sequence
            Text, when there is a tokenizer.
        completion_ids, prompt_ids : sequence of sequence of int
            Ids, when there is none.

        Returns
        -------
        Tensor
            ``(B,)`` float32.
        """
        rows = self._rows(prompts, completions, completion_ids, prompt_ids)
        device = next(self.model.parameters()).device
        found = []
        for start in range(0, len(rows), self.batch_size):
            part = rows[start : start + self.batch_size]
            width = max(map(len, part))
            pad = self.model.config.pad_token_id or 0
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in part], device=device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part], device=device)
            found.append(self._logits(ids, mask))
        return torch.cat(found).float().cpu()

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Scores ``(B,)`` at the last real token; transformers looks for the pad token's id, which a text may end with."""
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
        }  # padded on the right: the model's own positions are right
        layer = getattr(self.model, "score", None)
        if not isinstance(layer, nn.Linear) or not hasattr(self.model, "base_model"):
            found: Tensor = self.model(**inputs).logits[:, 0]
            return found
        states = self.model.base_model(**inputs).last_hidden_state
        last = states[torch.arange(len(ids), device=ids.device), mask.sum(1) - 1]
        return layer(last)[:, 0]

    def _rows(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None,
        prompt_ids: Sequence[Sequence[int]] | None,
    ) -> list[list[int]]:
        if self.processing_class is None:
            if completion_ids is None or prompt_ids is None:
                raise ValueError(
                    "the reward model has no tokenizer, so it needs prompt_ids and completion_ids: pass "
                    "processing_class=tokenizer to score text"
                )
            rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        else:
            rows = []
            for prompt, completion in zip(prompts, completions, strict=True):
                text, special = as_text(prompt, completion, self.processing_class)
                rows.append(list(self.processing_class(text, add_special_tokens=special)["input_ids"]))
        if self.max_length is not None:
            rows = [row[-self.max_length :] for row in rows]
        check_length(
            max(map(len, rows), default=0),
            self.model,
            "a prompt with its answer",
            "max_length= cuts beginnings off",
        )
        return rows


def as_text(prompt: Any, completion: Any, tokenizer: Any) -> tuple[str, bool]:
    """Prompt and completion as one text, and whether the tokenizer has to add its special tokens (no chat template did)."""
    if isinstance(prompt, str):
        return prompt + str(completion), True
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return str(tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)), False


def as_rewards(reward: Any) -> list[Any]:
    """One reward or several, as functions.

    Raises
    ------
    TypeError
        When something is neither callable nor a transformers model.
    """
    several = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    if not several:
        raise ValueError("reward is empty: give a function, a reward model, or a list of them")
    found = []
    for one in several:
        if hasattr(one, "config") and hasattr(one, "parameters"):
            found.append(RewardModel(one))
        elif callable(one):
            found.append(one)
        else:
            raise TypeError(f"a reward must be callable or a transformers model, got {type(one).__name__}")
    return found


def as_weights(weights: Sequence[float] | None, rewards: int) -> list[float]:
    """One weight a reward, 1 by default.

    Raises
    ------
    ValueError
        For another number of weights than rewards.

    Examples
    --------
    >>> as_weights(None, 2)
    [1.0, 1.0]
    """
    if weights is None:
        return [1.0] * rewards
    if len(weights) != rewards:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {rewards} rewards: give one each")
    return [float(weight) for weight in weights]
