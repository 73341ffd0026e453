"""Macro actions in trl's GRPO: our subclass, and segments and losses in a dozen lines of a user's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from labkit.rlhf import FixedNgram, MacroGRPOTrainer, PerplexityRise, WholeResponse, policy_loss
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import byte_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")


class MacroGRPO(trl.GRPOTrainer):
    segmenter = FixedNgram(3)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        attend = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        tokens, mask = inputs["completion_ids"], inputs["completion_mask"].bool()
        new = self._get_per_token_logps_and_entropies(model, ids, attend, tokens.shape[1])[0]
        old = inputs.get("old_per_token_logps")
        segments = self.segmenter(tokens, mask)
        advantages = inputs["advantages"][:, None].expand_as(new)
        old = new.detach() if old is None else old
        self.groups.append(int(segments.max()) + 1)
        return policy_loss(new, old, advantages, mask, ratio="joint", segments=segments)


def grpo(tmp_path: Path, kind: Any = trl.GRPOTrainer, options: Any = None, **more: Any) -> Any:
    tokenizer = byte_tokenizer()
    model = tiny("llama", width=32, heads=2, layers=1, vocab=len(tokenizer), seed=0)
    model.save_pretrained(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")  # trl loads its reference from there
    args = trl.GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=8, max_steps=2,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, learning_rate=1e-2, num_iterations=2,
        **(options or {}),
    )  # fmt: skip
    return kind(
        model=model,
        reward_funcs=lambda completions, **_: [
            float(text.count("e")) + 0.1 * i for i, text in enumerate(completions)
        ],
        args=args,
        train_dataset=datasets.Dataset.from_list([{"prompt": "ab"}, {"prompt": "c"}]),
        processing_class=tokenizer,
        **more,
    )


def given(model: Any) -> dict[str, Any]:
    """A batch as trl makes it: answers of 6 and 4 tokens, old and reference log-probabilities near the present ones."""
    torch.manual_seed(1)
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    ids = torch.randint(20, 90, (2, 9))
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[:, 2:-1].gather(-1, ids[:, 3:, None])[..., 0]
    return {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones(2, 3, dtype=torch.long),
        "completion_ids": ids[:, 3:],
        "completion_mask": mask.long(),
        "advantages": torch.tensor([1.0, -0.5]),
        "old_per_token_logps": logprobs + 0.3 * torch.randn(2, 6),
        "ref_per_token_logps": logprobs + 0.3 * torch.randn(2, 6),
        "num_items_in_batch": mask.sum(),
    }


def loss_and_slope(trainer: Any, inputs: dict[str, Any]) -> tuple[float, torch.Tensor]:
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer._compute_loss(trainer.model, inputs)
    return float(loss.detach()), torch.autograd.grad(loss, trainer.model.lm_head.weight)[0]


@pytest.mark.parametrize("options", [{"loss_type": "grpo"}, {"loss_type": "dapo", "beta": 0.1}])
def test_groups_of_one_are_grpo_and_one_group_is_gspo(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = WholeResponse(last_alone=False)
    for segmenter, level in ((FixedNgram(1), "token"), (whole, "sequence")):
        ours = grpo(tmp_path, MacroGRPOTrainer, options, segmenter=segmenter)
        theirs = grpo(tmp_path, options=options | {"importance_sampling_level": level})
        inputs = given(ours.model)
        loss, slope = loss_and_slope(ours, inputs)
        expected, wanted = loss_and_slope(theirs, inputs)
        assert loss == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(slope, wanted, atol=1e-6, rtol=1e-4)
        between = grpo(tmp_path, MacroGRPOTrainer, options, segmenter=FixedNgram(3))
        assert not torch.allclose(loss_and_slope(between, inputs)[1], wanted, atol=1e-5)


def test_the_ratio_of_a_group_is_its_tokens_geometric_mean(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, MacroGRPOTrainer, segmenter=FixedNgram(2, last_alone=False))
    inputs = given(trainer.model) | {"tool_mask": torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]])}
    kept = inputs["old_per_token_logps"].clone()
    new = torch.arange(12.0).reshape(2, 6).square() / 50
    left = new - trainer._old(new, inputs)
    ratio = new - kept
    for row, groups in ((0, [(0, 1), (2,), (4, 5)]), (1, [(0, 1), (2, 3)])):
        for group in groups:
            torch.testing.assert_close(
                left[row, list(group)], ratio[row, list(group)].mean().expand(len(group))
            )
    loss_and_slope(trainer, inputs)
    assert torch.equal(inputs["old_per_token_logps"], kept)  # trl passes over the same batch again


def test_it_trains_by_macro_actions(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, MacroGRPOTrainer, {"beta": 0.05}, segmenter=PerplexityRise())
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    assert not torch.equal(trainer.model.lm_head.weight, before)
    assert "kl" in trainer.state.log_history[0]


def test_settings_without_room_for_groups_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"segmenter must be a callable such as FixedNgram\(5\), got 5"):
        grpo(tmp_path, MacroGRPOTrainer, segmenter=5)
    with pytest.raises(ValueError, match=r"FixedNgram\(.*n=3\) skips an id .*: leave phantom=False"):
        grpo(tmp_path, MacroGRPOTrainer, segmenter=FixedNgram(3, phantom=True))
    options = {"importance_sampling_level": "sequence"}
    with pytest.raises(ValueError, match="importance_sampling_level='sequence' leaves no ratios to groups"):
        grpo(tmp_path, MacroGRPOTrainer, options, segmenter=FixedNgram(3))
    with pytest.raises(ValueError, match="PerplexityRise reads the reference's log-probabilities"):
        grpo(tmp_path, MacroGRPOTrainer, segmenter=PerplexityRise())


def test_a_grpo_user_has_macro_actions(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, MacroGRPO)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.groups = []
    trainer.train()
    assert trainer.groups == [4, 4]  # three, three, one, and the last token
    assert any(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
