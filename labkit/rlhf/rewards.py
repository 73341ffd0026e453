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

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.logprobs import plain
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
        Responses over which a constant error of 20 % would change the coefficient by about 20 %. More than a fifth of the
        responses of an update.

    Raises
    ------
    ValueError
        For a start below 0 (0 with a target: it would stay 0), a target or horizon that is not positive, and in `update`
        for so many responses that the coefficient could become 0 or less.

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
        if target is not None and coef == 0:
            raise ValueError(
                f"a coefficient of 0 cannot follow the target {target}: start above 0, for example at 0.05"
            )
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, responses: int) -> None:
        """Move the coefficient after a rollout with this mean KL."""
        if self.target is not None:
            if 0.2 * responses >= self.horizon:
                raise ValueError(
                    f"{responses} responses in an update with horizon={self.horizon} could make the coefficient 0 or "
                    f"negative: take a horizon above {0.2 * responses:g}"
                )
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
        ``**kwargs``. Lists are its own to change.
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
    # Copies: what a reward does to its lists is nobody else's business.
    given = {
        "prompts": list(prompts),
        "completions": list(completions),
        "completion_ids": [list(ids) for ids in completion_ids],
        **{name: list(values) for name, values in {**more, **(columns or {})}.items()},
    }
    found = reward(**_taken(reward, given))
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


def unique_names(rewards: Sequence[Any]) -> list[str]:
    """Names of rewards for metrics; those that are alike get a number.

    Examples
    --------
    >>> unique_names([len, max, len])
    ['len', 'max', 'len_2']
    """
    names: list[str] = []
    for reward in rewards:
        name, number = name_of(reward), 1
        while (unique := name if number == 1 else f"{name}_{number}") in names:
            number += 1
        names.append(unique)
    return names


def _taken(reward: Reward, given: dict[str, Any]) -> dict[str, Any]:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):
        return given
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {name: value for name, value in given.items() if name in {p.name for p in parameters}}


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

    The score is read where transformers reads it, see `classifier_scores`.

    Raises
    ------
    TypeError, ValueError
        When the model has more than one label, the batch size or `max_length` is below 1, or a text is longer than the
        model's positions.

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
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, or None to cut nothing, got {max_length}")
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
        found = [
            classifier_scores(self.model, rows[start : start + self.batch_size])
            for start in range(0, len(rows), self.batch_size)
        ]
        return torch.cat(found)

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


@torch.no_grad()
def classifier_scores(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Scores of texts by a sequence classifier with one label, where transformers reads them.

    Decoders are read at the last token that is not ``config.pad_token_id``, as in their training. So where texts are
    padded with the token that ends them, that is the token before the end. Without a pad token it is the last one.

    Parameters
    ----------
    model : PreTrainedModel or PeftModel
    rows : sequence of sequence of int
        Token ids of each text.

    Returns
    -------
    Tensor
        ``(B,)`` float32 on the CPU.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> model = tiny("llama", vocab=50, seed=0, head="classification", num_labels=1).eval()
    >>> torch.allclose(classifier_scores(model, [[3, 4], [5]])[1:], classifier_scores(model, [[5]]), atol=1e-5)
    True
    """
    config = plain(model).config
    kept = config.pad_token_id
    fill = kept
    if fill is None:  # transformers asks for one: any that no text has
        used = {token for row in rows for token in row}
        fill = next((token for token in range(config.get_text_config().vocab_size) if token not in used), 0)
    width = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    try:
        config.pad_token_id = fill
        # Padded on the right: the model's own positions are right.
        logits = model(input_ids=ids, attention_mask=mask).logits
    finally:
        config.pad_token_id = kept
    return logits[:, 0].float().cpu()


def as_text(prompt: Any, completion: Any, tokenizer: Any) -> tuple[str, bool]:
    """Prompt and completion as one text, and whether the tokenizer has to add its special tokens (no chat template did)."""
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], int):
        raise TypeError(
            "prompts are lists of ids, which a reward model with a tokenizer of its own cannot read: give the trainer "
            "processing_class=tokenizer, or RewardModel no tokenizer if both share a vocabulary"
        )
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
        if hasattr(one, "judge") and hasattr(one, "causal_lm"):
            raise TypeError(
                f"{type(one).__name__} judges with tools: ToolBank.as_reward_fn(model, tokenizer) makes it a reward"
            )
        if isinstance(one, type):
            raise TypeError(f"{one.__name__} is a class: give an instance of it as the reward")
        if hasattr(one, "config") and hasattr(one, "parameters"):
            found.append(RewardModel(one))
        elif callable(one):
            found.append(one)
        else:
            raise TypeError(f"a reward must be callable or a transformers model, got {type(one).__name__}")
    return found


def as_hooks(hooks: Any) -> list[Any]:
    """Token rewards as a list.

    Raises
    ------
    TypeError
        When it is no sequence, or something in it is not callable or a class.
    """
    if not isinstance(hooks, list | tuple):
        raise TypeError(f"token_rewards must be a list of hooks, got {hooks!r}: [hook] for one, [] for none")
    for hook in hooks:
        if isinstance(hook, type) or not callable(hook):
            raise TypeError(
                f"a token reward must be a callable, hook(batch) -> (B, T), such as CuriosityReward(); got {hook!r}"
            )
    return list(hooks)


def as_weights(weights: Sequence[float] | None, rewards: int) -> list[float]:
    """One weight a reward, 1 by default.

    Raises
    ------
    ValueError
        For another number of weights than rewards, or one that is not finite.

    Examples
    --------
    >>> as_weights(None, 2)
    [1.0, 1.0]
    """
    if weights is None:
        return [1.0] * rewards
    if len(weights) != rewards:
        raise ValueError(f"reward_weights has {len(weights)} numbers for {rewards} rewards: give one each")
    numbers = [float(weight) for weight in weights]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"reward_weights must be finite, got {numbers}")
    return numbers
