"""Curiosity for trainers that know rewards of whole answers only, such as trl's GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.cd_rlhf.rewards import CuriosityReward
from labkit.rlhf.logprobs import anatomy, sequence_stats
from labkit.rlhf.positions import check_length


class CuriosityRewardFunction:
    """The intrinsic rewards of an answer's tokens, summed: for ``reward_funcs`` of trl's ``GRPOTrainer``.

    A loss against PPO's per-token rewards: which token was worth exploring is lost in the sum, and GRPO's normalisation
    within a group rescales it. Each call also trains the module by one step.

    Parameters
    ----------
    curiosity : CuriosityReward
    policy : PreTrainedModel
        The model that is trained; ranks for the gate are taken from it.
    ref_model : PreTrainedModel
        Decoder-only, frozen. The policy before its training.
    processing_class : tokenizer
        Of both models.
    per_token : bool
        Mean over an answer's tokens instead of the sum, which grows with the length.

    Raises
    ------
    ValueError
        When the reference is the policy or an encoder-decoder; at a call, for an empty prompt, or a prompt whose answer
        passes the positions of either model.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> policy, ref = tiny("llama", width=16, heads=2, layers=1), tiny("llama", width=16, heads=2, layers=1)
    >>> reward = CuriosityRewardFunction(CuriosityReward(eta=0.1), policy, ref)
    >>> paid = reward(["", ""], ["", ""], prompt_ids=[[1, 2], [3]], completion_ids=[[4, 5, 6], [7]])
    >>> len(paid)
    2
    """

    __name__ = "curiosity"

    def __init__(
        self,
        curiosity: CuriosityReward,
        policy: Any,
        ref_model: Any,
        processing_class: Any = None,
        *,
        per_token: bool = False,
    ) -> None:
        if ref_model is policy:
            raise ValueError("ref_model is the policy: give a frozen copy of it, made before the training")
        if getattr(ref_model.config, "is_encoder_decoder", False):
            raise ValueError(
                f"curiosity needs a decoder-only reference; {type(ref_model).__name__} is an encoder-decoder"
            )
        self.curiosity, self.policy, self.ref_model = curiosity, policy, ref_model
        self.processing_class, self.per_token = processing_class, per_token
        self._parts = anatomy(ref_model), anatomy(policy)
        curiosity.attach(policy)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        completion_ids: Sequence[Sequence[int]],
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Rewards of a batch, after which the module takes its step."""
        if prompt_ids is None:
            if self.processing_class is None:
                raise ValueError("give processing_class, so that prompts can be tokenised, or prompt_ids")
            prompt_ids = [self._encode(prompt) for prompt in prompts]
        longest = max((len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=False)), default=0)
        for model in (self.policy, self.ref_model):
            check_length(
                longest,
                model,
                "a prompt with its answer",
                "shorten the prompts, or lower max_completion_length in GRPOConfig",
            )
        device = self.policy.get_input_embeddings().weight.device
        before, seen, tokens, mask = (t.to(device) for t in _padded(prompt_ids, completion_ids))
        with torch.no_grad():
            known = sequence_stats(
                self.ref_model, before, seen, tokens, mask, parts=self._parts[0], return_hidden=True
            )
            states = known.hidden
            ranks = sequence_stats(self.policy, before, seen, tokens, mask, parts=self._parts[1]).ranks
            paid = self.curiosity.intrinsic(self.curiosity.error(states, tokens), mask, ranks)
        self.curiosity.step(states, tokens, mask)
        total = paid.sum(1)
        if self.per_token:
            total = total / mask.sum(1).clamp(min=1)
        return (self.curiosity.eta * total).tolist()

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            found: list[int] = self.processing_class(prompt)["input_ids"]
        else:
            found = self.processing_class.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        return found


def _padded(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and their mask ``(B, P)`` padded left, answers and theirs ``(B, T)`` padded right."""
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions")
    before, after = max(map(len, prompts), default=0), max(map(len, completions), default=0)
    if before == 0 or any(len(p) == 0 for p in prompts):
        raise ValueError("curiosity needs at least one token before an answer: a prompt is empty")
    ids = torch.zeros(len(prompts), before + after, dtype=torch.long)
    seen = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, completions, strict=True)):
        ids[row, before - len(prompt) : before] = torch.tensor(list(prompt), dtype=torch.long)
        ids[row, before : before + len(answer)] = torch.tensor(list(answer), dtype=torch.long)
        seen[row, before - len(prompt) : before + len(answer)] = True
    return ids[:, :before], seen[:, :before], ids[:, before:], seen[:, before:]
