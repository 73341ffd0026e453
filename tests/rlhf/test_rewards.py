"""Rewards of responses and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from labkit.rlhf import (
    AdaptiveKL,
    CalibratedRewardModel,
    LinearCalibrator,
    RewardModel,
    call_reward,
    kl_penalty,
)
from labkit.rlhf.rewards import last_token, token_rewards
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import byte_tokenizer


def test_estimators_of_the_divergence() -> None:
    """k1 and k3 are unbiased for KL(p || q) under samples of p, k2 is near it when p is near q."""
    p = torch.tensor([0.5, 0.3, 0.2]).log()
    q = torch.tensor([0.4, 0.35, 0.25]).log()
    true = float((p.exp() * (p - q)).sum())
    means = {k: float((p.exp() * kl_penalty(p, q, k)).sum()) for k in ("k1", "k2", "k3")}
    assert means["k1"] == pytest.approx(true, rel=1e-4)
    assert means["k3"] == pytest.approx(true, rel=1e-4)
    assert means["k2"] == pytest.approx(true, rel=0.1)
    assert (kl_penalty(p, q, "k3") >= 0).all()
    assert kl_penalty(p, q, "k1").min() < 0
    with pytest.raises(ValueError, match="estimator must be 'k1', 'k2' or 'k3', got 'abs'"):
        kl_penalty(p, q, "abs")


def test_the_score_is_on_the_last_real_token() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert last_token(mask).tolist() == [[False, False, True], [True, False, False], [False] * 3]
    kl = torch.full((3, 3), 2.0)
    extra = torch.ones(3, 3)
    found = token_rewards(
        torch.tensor([5.0, -5.0, 1.0]), kl, mask, kl_coef=0.1, score_clip=2.5, extra=[extra, extra]
    )
    expected = torch.tensor([[1.8, 1.8, 4.3], [-0.7, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(found, expected)
    assert token_rewards(torch.tensor([5.0, 0, 0]), kl, mask)[0, 2] == pytest.approx(4.9)


def test_the_controller_is_ziegler_s() -> None:
    controller = AdaptiveKL(0.2, target=6.0, horizon=10_000)
    controller.update(7.0, 64)  # error 1/6
    assert controller.coef == pytest.approx(0.2 * (1 + (1 / 6) * 64 / 10_000))
    controller.update(0.0, 64)  # clipped to -0.2
    assert controller.coef == pytest.approx(0.2 * (1 + (1 / 6) * 64 / 10_000) * (1 - 0.2 * 64 / 10_000))
    again = AdaptiveKL(1.0, target=6.0)
    again.load_state_dict(controller.state_dict())
    assert again.coef == controller.coef
    fixed = AdaptiveKL(0.3)
    fixed.update(100.0, 10**6)
    assert fixed.coef == 0.3
    with pytest.raises(ValueError, match="coef must be 0 or more"):
        AdaptiveKL(-1.0)


def test_functions_get_what_they_name() -> None:
    seen: dict[str, Any] = {}

    def narrow(completions: list[str], label: list[int], prompts: list[str]) -> list[float]:
        seen.update(completions=completions, label=label, prompts=prompts)
        return [1.0, 2.0]

    columns = {"label": [5, 6], "other": [7, 8]}
    assert call_reward(narrow, ["a", "b"], ["c", "d"], [[1], [2]], columns).tolist() == [1.0, 2.0]
    assert seen == {"completions": ["c", "d"], "label": [5, 6], "prompts": ["a", "b"]}

    def wide(prompts: list[str], completions: list[str], **rest: Any) -> torch.Tensor:
        seen.clear()
        seen.update(rest)
        return torch.tensor([3.0, 4.0])

    assert call_reward(wide, ["a", "b"], ["c", "d"], [[1], [2]], columns, prompt_ids=[[0], [0]]).tolist() == [
        3,
        4,
    ]
    assert sorted(seen) == ["completion_ids", "label", "other", "prompt_ids"]
    assert call_reward(lambda completions, **_: [None, 2], ["a", "b"], ["c", "d"], [[1], [2]]).tolist() == [
        0,
        2,
    ]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ([1.0], "mine returned 1 rewards for 2 completions"),
        ([1.0, math.inf], "mine returned inf for completion 1: rewards must be finite"),
        (torch.tensor([math.nan, 0.0]), "mine returned nan for completion 0"),
        (None, "mine must return a list of numbers"),
        ("ab", "mine must return a list of numbers, one a completion; got 'ab'"),
        (torch.zeros(2, 2), "mine must return a list of numbers"),
    ],
)
def test_wrong_answers_are_named(answer: Any, match: str) -> None:
    def mine(prompts: list[str], completions: list[str]) -> Any:
        return answer

    with pytest.raises(ValueError, match=match):
        call_reward(mine, ["a", "b"], ["c", "d"], [[1], [2]])


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral"])
def test_a_reward_model_scores_the_last_real_token(name: str) -> None:
    model = tiny(
        name, width=32, heads=2, vocab=50, seed=0, head="classification", num_labels=1, pad_token_id=7
    ).eval()
    prompts, answers = [[3, 4, 5], [6]], [[8, 9], [10, 11, 12, 13]]
    found = RewardModel(model, batch_size=2)([], [], completion_ids=answers, prompt_ids=prompts)
    for row in range(2):
        own = model(torch.tensor([prompts[row] + answers[row]])).logits[0, 0]
        assert float(found[row]) == pytest.approx(own.item(), abs=1e-5)
    # Where an answer ends in what pads, classifiers of transformers are trained, and read, at the token before.
    ends = RewardModel(model)([], [], completion_ids=[[8, 7], [8, 9]], prompt_ids=[[3], [4]])
    own = model(torch.tensor([[3, 8, 7]])).logits[0, 0]
    assert float(ends[0]) == pytest.approx(own.item(), abs=1e-5)
    wrapped = CalibratedRewardModel(
        model, LinearCalibrator(alpha=0.0), lambda answers: [len(answer) for answer in answers]
    ).fit([[3]] * 12, [[8] * n + [7] for n in range(1, 13)])
    calibrated = wrapped([[3], [4]], [[8, 7], [8, 9]])
    assert calibrated == pytest.approx(ends.tolist(), abs=1e-5)


def test_a_reward_model_without_a_pad_token() -> None:
    model = tiny("llama", width=32, heads=2, vocab=50, seed=0, head="classification", num_labels=1).eval()
    model.config.pad_token_id = None
    asked = {"completion_ids": [[0, 1, 2], [0]], "prompt_ids": [[3], [4]]}
    found = RewardModel(model)([], [], **asked)
    assert model.config.pad_token_id is None
    for row, ids in enumerate(([3, 0, 1, 2], [4, 0])):
        assert float(found[row]) == pytest.approx(model(torch.tensor([ids])).logits[0, 0].item(), abs=1e-5)


@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_a_reward_model_with_adapters(task: str | None) -> None:
    model = tiny(
        "llama", width=32, heads=2, vocab=50, seed=0, head="classification", num_labels=1, pad_token_id=7
    ).eval()
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type=task)
    adapted = get_peft_model(model, lora).eval()
    asked = {"completion_ids": [[8, 7], [8, 9, 10]], "prompt_ids": [[3], [4]]}
    found = RewardModel(adapted)([], [], **asked)
    merged = RewardModel(adapted.merge_and_unload())([], [], **asked)
    torch.testing.assert_close(found, merged, atol=1e-5, rtol=0)


def test_a_reward_model_reads_text_with_its_own_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    model = tiny(
        "roberta", width=32, heads=2, vocab=len(tokenizer), seed=0, head="classification", num_labels=1
    ).eval()
    reward = RewardModel(model, tokenizer, batch_size=1, max_length=6)
    found = reward(["ab", "long prompt "], ["cd", "ef"])
    for row, text in enumerate(("abcd", "mpt ef")):
        own = model(torch.tensor([tokenizer(text)["input_ids"][-6:]])).logits[0, 0]
        assert float(found[row]) == pytest.approx(own.item(), abs=1e-5)
    with pytest.raises(ValueError, match="has no tokenizer, so it needs prompt_ids and completion_ids"):
        RewardModel(model)(["a"], ["b"])
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        RewardModel(model, batch_size=0)
    with pytest.raises(TypeError, match="must be a transformers model, got function"):
        RewardModel(byte_tokenizer)  # type: ignore[arg-type]
