"""PPO as a whole: it learns, and how rows are batched, padded, accumulated or interrupted changes nothing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from labkit.rlhf import (
    CalibratedRewardModel,
    CuriosityReward,
    FixedNgram,
    PerplexityRise,
    PPOConfig,
    PPOTrainer,
    RewardModel,
    RunningLowess,
    ValueModel,
    gae,
    load_value_head,
    macro_gae,
    policy_loss,
    sequence_stats,
    value_loss,
    whiten,
)
from labkit.rlhf.minibatches import Minibatch, micro_batch_loss
from labkit.rlhf.segments import count_segments
from labkit.testbeds.models import tiny
from labkit.testbeds.tokenizers import byte_tokenizer
from labkit.training.processes import OneProcess

from .toy import PROMPTS, Spread, config, full, numbers, policy, share, trainer


def close(left: list[dict[str, float]], right: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == pytest.approx(value, abs=tolerance, rel=1e-3, nan_ok=True), name


def weights(made: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.actor_critic.state_dict().items()}


@pytest.mark.parametrize("value", ["shared", None])
def test_it_learns_and_the_reference_stays(value: Any) -> None:
    made = trainer(settings=config(iterations=30, batch_size=32), value_model=value)
    before = {n: p.clone() for n, p in made.reference.model.named_parameters()}
    history = made.train()
    assert len(history) == made.iteration == 30
    assert history[0]["objective/scores"] < 0.3
    assert history[-1]["objective/scores"] > 0.75
    assert all(torch.equal(before[n], p) for n, p in made.reference.model.named_parameters())
    assert history[-1]["objective/kl"] > 0.5 > abs(history[0]["objective/kl"])


def test_a_rollout_is_what_its_fields_say() -> None:
    made = trainer(settings=config(kl_coef=0.2, score_clip=0.3, gamma=0.9, generation_batch=5))
    torch.nn.init.normal_(made.policy.lm_head.weight, std=0.3)  # so that policy and reference differ
    batch = made.collect(3)
    assert batch.tokens.shape == batch.mask.shape == batch.rewards.shape == batch.advantages.shape
    assert batch.rows.tolist() == list(range(16))
    assert batch.completions == [row[m].tolist() for row, m in zip(batch.tokens, batch.mask, strict=True)]
    assert batch.prompts == [
        row[m].tolist() for row, m in zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ]
    assert batch.scores.tolist() == pytest.approx(share(batch.completions, batch.columns["wanted"]))
    for model, found in ((made.policy, batch.logprobs), (made.reference.model, batch.ref_logprobs)):
        with torch.no_grad():
            own = sequence_stats(model, batch.prompt_ids, batch.prompt_mask, batch.tokens, batch.mask)
        torch.testing.assert_close(found, own.logprobs, atol=1e-5, rtol=1e-5)
    expected = -0.2 * (batch.logprobs - batch.ref_logprobs)
    last = batch.lengths - 1
    expected[torch.arange(16), last] += batch.scores.clamp(-0.3, 0.3)
    torch.testing.assert_close(batch.rewards, expected * batch.mask)
    assert batch.eos.tolist() == [9 in row for row in batch.completions]
    record = made.collector.metrics
    assert record["objective/scores"] == pytest.approx(float(batch.scores.mean()))
    kl = ((batch.logprobs - batch.ref_logprobs) * batch.mask).sum(1)
    assert record["objective/kl"] == pytest.approx(float(kl.mean()), abs=1e-5)
    assert record["objective/non_score_reward"] == pytest.approx(-0.2 * float(kl.mean()), abs=1e-5)
    assert record["objective/entropy"] == pytest.approx(-float(batch.logprobs.sum(1).mean()), abs=1e-4)
    assert record["val/num_eos_tokens"] == int(batch.eos.sum())
    assert record["val/response_length"] == pytest.approx(float(batch.lengths.float().mean()))


def test_the_values_of_a_fixed_policy_are_learned() -> None:
    """A uniform policy, paid for tokens above 4: before token t of 2 the value is those so far and half of the rest."""
    model = policy(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    settings = config(
        iterations=60,
        batch_size=48,
        max_new_tokens=2,
        epochs=2,
        eos_token_id=None,
        learning_rate=1e-12,
        value_learning_rate=3e-3,
        schedule="linear",
        kl_coef=0.0,
        lam=1.0,
        value_clip=None,
    )
    made = trainer(
        model,
        lambda completion_ids, **_: [sum(i > 4 for i in ids) for ids in completion_ids],
        settings,
        value_model=ValueModel.from_backbone(policy(1)),
    )
    history = made.train()
    assert made.reference is None
    assert "objective/kl" not in history[0]
    batch = made.collect(1000)
    high = (batch.tokens > 4).float()
    assert batch.values[:, 0].tolist() == pytest.approx([1.0] * 48, abs=0.3)
    assert float(batch.values[:, 0].mean()) == pytest.approx(1.0, abs=0.15)
    for outcome, value in ((1, 1.5), (0, 0.5)):
        assert float(batch.values[:, 1][high[:, 0] == outcome].mean()) == pytest.approx(value, abs=0.15)
    assert history[-1]["val/explained_variance"] > history[0]["val/explained_variance"] + 0.3
    assert history[-1]["objective/entropy"] == pytest.approx(2 * math.log(10), abs=1e-3)


def test_the_cut_into_batches_changes_nothing() -> None:
    whole = trainer(settings=config(minibatches=2, epochs=2))
    cut = trainer(settings=config(minibatches=2, epochs=2, accumulate=4, generation_batch=3))
    close(numbers(whole.train()), numbers(cut.train()))
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(cut)[name], atol=2e-5, rtol=1e-3, msg=name)


def test_longer_padding_changes_nothing() -> None:
    """A prompt among longer ones gets the numbers that it gets alone."""
    made = trainer()
    batch = made.collect(0)
    assert len(set(batch.prompt_mask.sum(1).tolist())) > 1
    for row in range(4):
        alone = batch.select([row])
        logprobs, _, values = made.actor_critic(alone)
        length = int(batch.lengths[row])
        torch.testing.assert_close(logprobs[0], batch.logprobs[row, :length], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values[0], batch.values[row, :length], atol=1e-5, rtol=1e-5)


def test_macro_actions_of_one_token_are_token_ppo() -> None:
    token = trainer(settings=config(epochs=2, minibatches=2))
    token.train()
    for ratio in ("token", "joint"):
        macro = trainer(settings=config(epochs=2, minibatches=2, segmenter=FixedNgram(1), ratio=ratio))
        macro.train()
        if ratio == "token":
            assert numbers(macro.history) == numbers(token.history)
            assert all(torch.equal(v, weights(macro)[n]) for n, v in weights(token).items())
        else:
            close(numbers(macro.history), numbers(token.history))


def test_macro_actions_train() -> None:
    for segmenter in (FixedNgram(3), PerplexityRise()):
        made = trainer(settings=config(iterations=20, batch_size=32, segmenter=segmenter, kl_coef=0.0))
        assert (made.reference is None) == isinstance(segmenter, FixedNgram)
        history = made.train()
        assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 0.25
        assert history[0]["val/macro_actions"] < history[0]["val/response_length"]


def test_the_authors_empty_groups_reach_the_advantages() -> None:
    settings = config(
        segmenter=FixedNgram(5, phantom=True), macro_reward="mean", eos_token_id=None, iterations=1
    )
    made = trainer(settings=settings)
    batch = made.collect(0)
    assert batch.segments[0].tolist() == [0, 0, 0, 0, 0, 2]  # six tokens: the boundary falls on the last
    own = macro_gae(batch.rewards, batch.values, batch.segments, macro_reward="mean", allow_empty=True)
    assert torch.equal(batch.advantages, own[0])
    straight = macro_gae(
        batch.rewards, batch.values, FixedNgram(5)(batch.tokens, batch.mask), macro_reward="mean"
    )
    torch.testing.assert_close(own[0][:, 5], straight[0][:, 5])
    assert not torch.allclose(own[0][:, 0], straight[0][:, 0])
    joint = trainer(settings=dataclasses.replace(settings, ratio="joint"))
    record = joint.train()[0]
    assert record["val/macro_actions"] == 2
    assert record["val/ratio"] == pytest.approx(1, abs=1e-6)


def test_a_reward_that_learns_is_kept_in_checkpoints(tmp_path: Path) -> None:
    class Centred:
        """Takes the mean of all scores so far off, as a running calibration would."""

        def __init__(self) -> None:
            self.total, self.count, self.trainer = 0.0, 0, None

        def setup(self, trainer: PPOTrainer) -> None:
            self.trainer = trainer

        def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
            self.raw = share(completions, columns["wanted"])
            return [value - self.total / max(1, self.count) for value in self.raw]

        def update(self, batch: Any) -> None:
            assert self.trainer is not None
            everyone = self.trainer.gather(torch.tensor(self.raw))
            self.total, self.count = self.total + float(everyone.sum()), self.count + len(everyone)

        def state_dict(self) -> dict[str, Any]:
            return {"total": self.total, "count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.total, self.count = state["total"], state["count"]

        def metrics(self) -> dict[str, float]:
            return {"mean": self.total / self.count}

    settings = config(minibatches=2, epochs=2, checkpoint_every=1, iterations=3)
    first = trainer(reward=Centred(), settings=settings, directory=tmp_path)
    records = [record for _, record in zip(range(2), first, strict=False)]
    assert [r["Centred/mean"] > 0 for r in records] == [True, True]
    assert first.rewards[0].count == 2 * 16
    again = Centred()
    made = trainer(reward=again, settings=settings, directory=tmp_path)
    assert (again.total, again.count, made.iteration) == (first.rewards[0].total, 32, 2)
    made.train()
    assert again.count == 48
    assert made.remaining == 0


def test_minibatches_deal_every_row_once_a_pass() -> None:
    hook = Spread()
    made = trainer(settings=config(iterations=2, minibatches=4, epochs=3), token_rewards=[hook])
    history = made.train()
    assert len(hook.seen) == 2 * 4 * 3
    passes = [hook.seen[i : i + 4] for i in range(0, len(hook.seen), 4)]
    for one in passes:
        assert sorted(itertools.chain(*one)) == list(range(16))
        for rows in one:  # one of each block of four
            assert sorted(row // 4 for row in rows) == [0, 1, 2, 3]
    assert passes[0] != passes[1]
    assert history[-1]["spread/eta"] == pytest.approx(0.05 * 0.9**24)
    assert history[-1]["other/updates"] == 2 * 3 * 16


def test_the_first_update_has_ratio_one() -> None:
    made = trainer(policy(attention_dropout=0.5))
    record = made.train()[0]
    assert record["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert record["policy/approxkl_avg"] < 1e-10
    assert record["policy/clipfrac_avg"] == 0
    assert (
        trainer(policy(attention_dropout=0.5), settings=config(dropout=True)).train()[0][
            "policy/approxkl_avg"
        ]
        > 1e-7
    )


def test_checkpointed_activations_change_nothing() -> None:
    plain, saving = trainer(), policy()
    saving.gradient_checkpointing_enable()
    made = trainer(saving)
    close(numbers(plain.train()), numbers(made.train()))
    assert made.actor_critic.training
    dropping = policy(attention_dropout=0.5)
    dropping.gradient_checkpointing_enable()
    bad("would drop out in attention_dropout", model=dropping)


def test_half_precision_keeps_the_ratio_at_one() -> None:
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(True)  # accelerate keeps one precision a process
    try:
        made = trainer(settings=config(precision="bf16", iterations=2))
        history = made.train()
    finally:
        state._reset_state(True)
    assert history[0]["val/ratio"] == pytest.approx(1, abs=1e-3)
    assert history[0]["policy/approxkl_avg"] < 1e-5
    assert all(p.dtype == torch.float32 for p in made.actor_critic.parameters())


def test_temperature_is_matched_unless_told_otherwise() -> None:
    found = {
        match: trainer(settings=config(temperature=0.5, match_temperature=match)).collect(0)
        for match in (True, False)
    }
    assert found[True].tokens.tolist() == found[False].tokens.tolist()
    batch = found[True]
    for match, temperature in ((True, 0.5), (False, 1.0)):
        with torch.no_grad():
            own = sequence_stats(
                policy().eval(), batch.prompt_ids, batch.prompt_mask, batch.tokens, batch.mask, temperature
            )
        torch.testing.assert_close(found[match].logprobs, own.logprobs, atol=1e-5, rtol=1e-5)
        # the reference is still the policy, and is asked at the same temperature
        torch.testing.assert_close(found[match].ref_logprobs, own.logprobs, atol=1e-5, rtol=1e-5)


def test_a_cut_response_pays_for_its_missing_end() -> None:
    plain, charged = (
        trainer(settings=config(kl_coef=0.0, missing_eos_penalty=fee)).collect(0) for fee in (None, 0.7)
    )
    assert charged.tokens.tolist() == plain.tokens.tolist()
    assert 0 < int(plain.eos.sum()) < 16
    fees = (plain.rewards - charged.rewards).sum(1)
    assert fees.tolist() == pytest.approx([0.0 if ended else 0.7 for ended in plain.eos])
    torch.testing.assert_close(charged.scores, plain.scores)  # the scores shown are those of the reward


def test_whitening_is_that_of_the_whole_rollout() -> None:
    plain = trainer(settings=config()).collect(0)
    rewards = whiten(plain.rewards, plain.mask, shift_mean=False)
    by_reward = trainer(settings=config(whiten_rewards=True)).collect(0)
    torch.testing.assert_close(by_reward.rewards, rewards)
    torch.testing.assert_close(by_reward.advantages, gae(rewards, plain.values, plain.mask)[0])
    by_advantage = trainer(settings=config(whiten_advantages=True)).collect(0)
    torch.testing.assert_close(by_advantage.advantages, whiten(plain.advantages, plain.mask))
    torch.testing.assert_close(by_advantage.returns, plain.returns)


def test_policy_and_value_model_are_clipped_apart() -> None:
    """One step of plain descent at rate 1 moves each by the limit, whatever the other's gradient."""
    made = trainer(
        settings=config(iterations=1, max_grad_norm=1e-3, learning_rate=1.0),
        value_model=ValueModel.from_backbone(policy(1)),
        optimizer=lambda groups: torch.optim.SGD(groups),
    )
    before = weights(made)
    record = made.train()[0]
    after = weights(made)
    for part in ("policy", "value"):
        names = [n for n in after if n.startswith(f"{part}.") and n != "policy.lm_head.weight"]
        moved = sum(float((after[n] - before[n]).square().sum()) for n in names) ** 0.5
        assert record[f"{part}/grad_norm"] > 1e-2
        assert moved == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("ratio", ["token", "joint"])
def test_an_updates_losses_are_means_over_its_tokens_or_actions(ratio: Any) -> None:
    """The update's loss, made of two micro-batches, is that of the plain functions on all its rows."""
    made = trainer(settings=config(segmenter=FixedNgram(2), ratio=ratio, entropy_coef=0.1, value_coef=0.5))
    batch = made.collect(0)
    batch.advantages = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(made.policy.lm_head.weight, std=0.3)
    with torch.no_grad():
        new, entropy, values = made.actor_critic(batch)
    wanted = policy_loss(
        new, batch.logprobs, batch.advantages, batch.mask, ratio=ratio, segments=batch.segments
    )
    critic = value_loss(values, batch.values, batch.returns, batch.mask, 0.2)
    whole = wanted + 0.5 * critic - 0.1 * entropy[batch.mask].mean()
    counts = float(batch.mask.sum()), float(count_segments(batch.segments).sum())
    halves = [
        micro_batch_loss(made.actor_critic, Minibatch(batch.select(rows), *counts), made.config, 2)
        for rows in (list(range(5)), list(range(5, 16)))
    ]
    assert float(sum(loss.detach() for loss, _ in halves) / 2) == pytest.approx(float(whole), abs=1e-5)
    means = {name: sum(float(found[name].detach()) for _, found in halves) / 2 for name in halves[0][1]}
    assert means["loss/policy_avg"] == pytest.approx(float(wanted), abs=1e-5)
    assert means["loss/value_avg"] == pytest.approx(float(critic), abs=1e-5)
    assert means["policy/entropy_avg"] == pytest.approx(float(entropy[batch.mask].mean()), abs=1e-5)


def test_a_hook_that_pays_nothing_changes_nothing() -> None:
    class Nothing(Spread):
        def __call__(self, batch: Any) -> torch.Tensor:
            torch.rand(100)  # a hook's own random numbers disturb no one
            return torch.zeros_like(batch.logprobs)

    plain, hooked = trainer(), trainer(token_rewards=[Nothing()])
    plain.train()
    hooked.train()
    assert all(torch.equal(v, weights(hooked)[n]) for n, v in weights(plain).items())


def test_a_hooks_reward_reaches_the_policy() -> None:
    class Threes:
        def __call__(self, batch: Any) -> torch.Tensor:
            return (batch.tokens == 3).float()

    made = trainer(
        reward=lambda completions, **_: [0.0] * len(completions),
        settings=config(iterations=15, batch_size=32),
        token_rewards=[Threes()],
    )
    made.train()
    batch = made.collect(99)
    assert ((batch.tokens == 3) & batch.mask).sum() > 0.5 * batch.mask.sum()


def test_a_run_goes_on_to_the_bit(tmp_path: Path) -> None:
    straight = full(tmp_path / "a")
    straight.train()
    broken = full(tmp_path / "b")
    assert next(iter(broken))["iteration"] == 1
    del broken
    again = full(tmp_path / "b")
    assert again.iteration == 1
    assert again.token_rewards[0].updates == 2 * 16
    again.train()
    assert numbers(again.history) == numbers(straight.history)
    assert again.controller.coef == straight.controller.coef != 0.05
    assert all(torch.equal(v, weights(again)[n]) for n, v in weights(straight).items())
    for path in (tmp_path / "a").glob("step-*/*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    with pytest.raises(ValueError, match="temperature 0.9 there, 1.0 here"):
        trainer(settings=config(minibatches=2, epochs=2), value_model=None, directory=tmp_path / "a")


def test_it_saves_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = trainer(value_model=None)
    made.train()
    made.save_pretrained(tmp_path)
    batch = made.collect(0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    value = ValueModel.from_pretrained(tmp_path / "value")
    with torch.no_grad():
        own = sequence_stats(again.eval(), batch.prompt_ids, batch.prompt_mask, batch.tokens, batch.mask)
        rows = torch.cat([batch.prompt_ids, batch.tokens], 1), torch.cat([batch.prompt_mask, batch.mask], 1)
        values = value.eval()(*rows)[:, batch.prompt_ids.shape[1] - 1 : -1]
    torch.testing.assert_close(own.logprobs, batch.logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values * batch.mask, batch.values, atol=1e-5, rtol=1e-5)


def test_a_shared_value_head_goes_on(tmp_path: Path) -> None:
    made = trainer(settings=config(iterations=1))
    made.train()
    made.save_pretrained(tmp_path)
    head = load_value_head(tmp_path / "value")
    again = trainer(made.policy, value_model=head)
    assert torch.equal(again.collect(7).values, made.collect(7).values)
    assert made.collect(7).values.any()
    again.train()
    bad("must lead from the policy's 32 hidden states to 1", value_model=torch.nn.Linear(8, 1))
    with pytest.raises(FileNotFoundError, match="has no value_head"):
        load_value_head(tmp_path)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
def test_adapters_train_against_themselves_switched_off(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = policy()
    start = {n: p.clone() for n, p in base.named_parameters()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))
    made = trainer(model, settings=config(iterations=25, batch_size=32, learning_rate=2e-2), value_model=None)
    assert made.reference.model is model
    assert not any("lora" in n for n, _ in made.value_model.named_parameters())
    assert all(p.requires_grad for p in made.value_model.parameters())  # unlike the base that it copies
    history = made.train()
    assert history[-1]["objective/scores"] > history[0]["objective/scores"] + 0.2
    assert history[-1]["objective/kl"] > 0.1
    for name, value in model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(value, start[name.replace("base_layer.", "")]), name
    batch = made.collect(0)
    with torch.no_grad():
        own = sequence_stats(policy().eval(), batch.prompt_ids, batch.prompt_mask, batch.tokens, batch.mask)
    torch.testing.assert_close(batch.ref_logprobs, own.logprobs, atol=1e-5, rtol=1e-5)
    made.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_text_prompts_a_reward_model_and_a_function() -> None:
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    model = tiny("gpt_neox", width=32, heads=2, vocab=size, seed=0)
    reward_model = tiny(
        "llama", width=32, heads=2, vocab=size, seed=1, head="classification", num_labels=1, pad_token_id=0
    )
    calls = []

    def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append((prompts, completions, columns))
        return [None, *[len(text) / 10 for text in completions[1:]]]

    rows = [{"prompt": "once upon", "label": "a"}, {"prompt": "hi", "label": "b"}]
    made = PPOTrainer(
        model,
        [RewardModel(reward_model, tokenizer), length],
        PPOConfig(iterations=1, batch_size=4, max_new_tokens=5, min_response=2, missing_eos_penalty=1.0),
        rows,
        processing_class=tokenizer,
        reward_weights=[2.0, 0.5],
        value_model=ValueModel.from_reward_model(reward_model),
    )
    batch = made.collect(0)
    prompts, completions, columns = calls[0]
    assert sorted(set(prompts)) == ["hi", "once upon"]
    assert completions == tokenizer.batch_decode(columns["completion_ids"], skip_special_tokens=True)
    assert [columns["label"][i] == "a" for i in range(4)] == [p == "once upon" for p in prompts]
    with torch.no_grad():
        for row in range(4):
            text = tokenizer(prompts[row] + completions[row], return_tensors="pt")["input_ids"]
            score = float(reward_model(text).logits)
            other = 0.5 * len(completions[row]) / 10 if row else 0.0
            assert float(batch.scores[row]) == pytest.approx(2 * score + other, abs=1e-4)
    record = made.train()[0]
    assert record["reward/length"] * 0.5 + record[
        "reward/LlamaForSequenceClassification"
    ] * 2 == pytest.approx(record["objective/scores"], abs=1e-5)
    tokenizer.padding_side = "right"
    again = PPOTrainer(
        tiny("gpt_neox", width=32, heads=2, vocab=size, seed=0),
        length,
        PPOConfig(iterations=1, batch_size=4, max_new_tokens=5),
        rows,
        processing_class=tokenizer,
        value_model="shared",
    )
    assert again.collect(0).tokens.tolist() == batch.tokens.tolist()


def test_chat_prompts_reach_rewards_as_messages() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    chat = [{"prompt": [{"role": "user", "content": "hey"}]}]
    made = PPOTrainer(
        tiny("llama", width=32, heads=2, vocab=len(tokenizer), seed=0),
        reward,
        PPOConfig(iterations=1, batch_size=2, max_new_tokens=3),
        chat,
        processing_class=tokenizer,
        value_model="shared",
    )
    batch = made.collect(0)
    assert tokenizer.decode(batch.prompt_ids[0].tolist()) == "<user>hey<assistant>"
    assert seen[0][0][0] == chat[0]["prompt"]
    assert seen[0][1][0] == [{"role": "assistant", "content": batch.completions[0]}]


def test_all_models_go_where_the_batches_go() -> None:
    """A device that holds no numbers shows the moves: models given on the CPU, and what hooks make in their set-up."""
    hook, scorer = CuriosityReward(), tiny("llama", vocab=10, seed=2, head="classification", num_labels=1)
    scorer.config.pad_token_id = 0
    calibrated = CalibratedRewardModel(scorer, RunningLowess(), "token_length")
    made = trainer(
        reward=[
            RewardModel(tiny("llama", vocab=10, seed=1, head="classification", num_labels=1)),
            calibrated,
        ],
        value_model=ValueModel.from_backbone(policy(1)),
        token_rewards=[hook],
        processes=OneProcess(torch.device("meta")),
    )
    parts = [made.policy, made.value_model, made.reference.model, made.rewards[0].model, scorer, hook.icm]
    assert [{p.device.type for p in part.parameters()} for part in parts] == [{"meta"}] * 6
    held = {id(p) for group in made._loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in made.actor_critic.parameters()}


def test_a_model_spread_over_devices_stays_where_it_is() -> None:
    spread = policy(1)
    spread.model.hf_device_map = {"embed_tokens": 0, "layers": 1}
    made = trainer(value_model=ValueModel.from_backbone(spread), processes=OneProcess(torch.device("meta")))
    assert {p.device.type for p in made.value_model.parameters()} == {"cpu"}
    assert {p.device.type for p in made.policy.parameters()} == {"meta"}


def test_short_responses_are_left_out_and_counted() -> None:
    model = policy()
    ended = trainer(model, settings=config(min_response=3, eos_token_id=list(range(5, 10)), iterations=2))
    batch = ended.collect(0)
    short = torch.tensor([len(ids) < 3 for ids in batch.completions])
    assert short.any()
    assert (~short).any()
    assert not batch.mask[short].any()
    assert batch.mask[~short].any(1).all()
    assert not batch.advantages[short].any()
    assert ended.train()[0]["val/dropped"] == int(short.sum())
    everything = trainer(
        policy(), settings=config(min_response=2, eos_token_id=list(range(10)), iterations=2)
    )
    before = weights(everything)
    assert everything.train()[-1]["val/dropped"] == 16
    assert all(torch.equal(v, before[n]) for n, v in weights(everything).items())


def test_the_coefficient_follows_its_target() -> None:
    with pytest.raises(
        ValueError, match="horizon=3 could make the coefficient 0 or negative: take a horizon above 3.2"
    ):
        config(kl_target=6.0, kl_horizon=3)
    with pytest.raises(ValueError, match="0 cannot follow the target"):
        config(kl_target=6.0, kl_coef=0.0)
    far = trainer(settings=config(kl_target=100.0, kl_horizon=64, iterations=3))
    history = far.train()
    assert [r["objective/kl_coef"] for r in history] == pytest.approx([0.05 * 0.95**i for i in range(3)])


def bad(
    match: str, kind: type[Exception] = ValueError, model: Any = None, reward: Any = share, **options: Any
) -> None:
    with pytest.raises(kind, match=match):
        trainer(model, reward, **options)


def soft_prompts() -> Any:
    """A policy whose hidden states can't be told from its logits."""
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(policy(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_misuse_is_refused_before_any_work() -> None:
    own = policy()
    bad("ref_model is the policy itself", model=own, ref_model=own)
    bad("ref_model has 20 tokens and the policy 10", ref_model=tiny("llama", vocab=20, seed=0))
    bad("value_model has the policy's own weights", model=own, value_model=ValueModel.from_backbone(own))
    bad("value_model must be a ValueModel, 'shared' or None, got 'none'", value_model="none")
    bad("value_model must be a ValueModel, got LlamaForCausalLM", TypeError, value_model=policy())
    bad("encoder-decoder", TypeError, model=tiny("t5", seed=0))
    bad("every requires_grad is False", model=policy().requires_grad_(False))
    bad("trained weights are float16", model=policy().half())
    own_value = ValueModel.from_backbone(policy(1))
    bad(
        "not show apart from its logits",
        model=soft_prompts(),
        value_model=own_value,
        token_rewards=[Spread()],
    )
    bad("a reward must be callable or a transformers model, got int", TypeError, reward=3)
    bad("has 2 labels, one is needed", reward=tiny("llama", head="classification", num_labels=2, seed=0))
    bad("reward_weights has 2 numbers for 1 rewards", reward_weights=[1.0, 2.0])
    with pytest.raises(TypeError, match="args must be a PPOConfig, got dict"):
        PPOTrainer(policy(), share, {}, PROMPTS)  # type: ignore[arg-type]
    for rows, match in (
        ([{"text": "a"}], r"columns \['text'\]: it needs 'prompt'"),
        ([{"prompt": "a"}], "pass processing_class=tokenizer"),
        ([{"input_ids": [1], "completions": "a"}], r"columns \['completions'\], which rewards get"),
        ([], "the data set is empty"),
    ):
        with pytest.raises(ValueError, match=match):
            PPOTrainer(policy(), share, config(), rows, value_model="shared")
    with pytest.raises(TypeError, match="must be mappings"):
        PPOTrainer(policy(), share, config(), ["a"], value_model="shared")
    model = policy()
    model.generation_config.eos_token_id = None
    bad("names an end token", model=model, settings=config(eos_token_id="auto"))


def test_bad_rewards_are_named_with_their_index() -> None:
    for answer, match in (
        ([0.0] * 3, "returned 3 rewards for 16 completions"),
        ([0.0] * 15 + [math.nan], "returned nan for completion 15"),
        (5, "must return a list of numbers"),
    ):
        made = trainer(reward=lambda completions, answer=answer, **_: answer)
        with pytest.raises(ValueError, match=match):
            made.train()
    for hook, match in (
        (lambda batch: torch.zeros(3), r"must return a tensor \(16, 6\), got \(3,\)"),
        (lambda batch: batch.logprobs / 0, "is not finite in row 0 at token 0"),
    ):
        made = trainer(token_rewards=[hook])
        with pytest.raises(ValueError, match=match):
            made.collect(0)
    with pytest.raises(ValueError, match="passes the 8 positions"):
        trainer(policy(max_position_embeddings=8)).collect(0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"minibatches": 3}, "batch_size=16 can't be dealt evenly into 3 minibatches"),
        ({"lam": 1.2}, r"lam must be in \[0, 1\], got 1.2"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_coef": -0.1}, "kl_coef must be 0 or more, got -0.1"),
        ({"kl_coef": math.nan}, "kl_coef must be 0 or more, got nan"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"ratio": "joint"}, "ratio='joint' is the ratio of a macro action"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"generation_batch": 0}, "generation_batch must be at least 1"),
        ({"generation": {"temperature": 2}}, r"generation has \['temperature'\]"),
        ({"generation": {"eos_token_id": 3}}, r"generation has \['eos_token_id'\]"),
        ({"generation": {"num_beams": 2, "input_ids": 1}}, r"generation has \['input_ids', 'num_beams'\]"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_response": 7}, "min_response=7 is more than max_new_tokens=6"),
        ({"seed": None}, "seed must be a whole number"),
        ({"value_pooling": "max"}, "one of 'equal', 'unit', 'position', .*'mean'.*, got 'max'"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        config(**change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gamma": None}, r"gamma must be a number, in \[0, 1\]; got None"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number, positive; got '1e-5'"),
        ({"kl_horizon": None}, "kl_horizon must be a number"),
        ({"dropout": 1}, "dropout must be True or False, got 1"),
        ({"segmenter": FixedNgram}, "segmenter is the class FixedNgram: give an instance"),
    ],
)
def test_settings_of_another_type_are_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        config(**change)


def test_the_models_own_generation_config_does_not_bend_what_is_sampled() -> None:
    """A penalty that log-probabilities know nothing of would make ratio and KL those of another distribution."""
    plain, bent = policy(), policy()
    bent.generation_config.repetition_penalty = 3.0
    bent.generation_config.suppress_tokens = [7]
    bent.generation_config.no_repeat_ngram_size = 1
    one, other = trainer(plain).collect(0), trainer(bent).collect(0)
    assert torch.equal(one.tokens, other.tokens)
    assert bent.generation_config.repetition_penalty == 3.0
    peft = pytest.importorskip("peft")
    inner = policy()
    inner.generation_config.suppress_tokens = list(range(1, 10))
    adapted = peft.get_peft_model(inner, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = vars(adapted).keys() | set()
    assert torch.equal(trainer(adapted).collect(0).tokens, one.tokens)
    assert vars(adapted).keys() == before  # else it would hide later changes of the model inside
    asked = trainer(policy(), settings=config(generation={"suppress_tokens": [7]})).collect(0)
    assert not (asked.tokens == 7).any()


@pytest.mark.filterwarnings("ignore")
def test_a_reference_that_would_move_is_refused() -> None:
    peft = pytest.importorskip("peft")
    lora = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for kept in (
        peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        peft.LoraConfig(**lora, use_dora=True),
        peft.LoraConfig(**lora, trainable_token_indices=[1]),
    ):
        trainer(peft.get_peft_model(policy(), kept))
    moving = peft.get_peft_model(policy(), peft.LoraConfig(**lora))
    moving.get_base_model().lm_head.weight.requires_grad_(True)
    bad("trains base_model.*embed_tokens.weight beside its adapters.*pass ref_model=", model=moving)
    trainer(moving, ref_model=policy())
    trainer(moving, settings=config(kl_coef=0.0))
    biased = peft.get_peft_model(policy(attention_bias=True), peft.LoraConfig(**lora, bias="all"))
    bad("k_proj.bias, .* beside its adapters", model=biased)


def test_rewards_keep_to_themselves() -> None:
    """Their lists, their names, the arguments that they ask for."""
    rows = [{"prompt": "ab", "wanted": 1}, {"prompt": [{"role": "user", "content": "c"}], "wanted": 2}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    forms: list[tuple[Any, Any]] = []

    class Greedy:
        def __call__(self, prompts: Any, completions: Any, wanted: Any, **_: Any) -> list[float]:
            forms.extend(zip([*prompts], [*completions], strict=True))
            for mine in (prompts, completions, wanted):
                mine.clear()
            return [0.0] * 4

        def metrics(self) -> dict[str, float]:
            return {"seen": len(forms)}

    def by_wanted(completions: Any, wanted: Any) -> list[float]:
        assert len(completions) == len(wanted) == 4
        return [float(w) for w in wanted]

    model = tiny("llama", width=32, heads=2, layers=1, vocab=len(tokenizer), seed=0)
    settings = config(batch_size=4, iterations=1, minibatches=1, epochs=1)
    made = PPOTrainer(
        model,
        [Greedy(), Greedy(), by_wanted],
        settings,
        rows,
        processing_class=tokenizer,
        value_model="shared",
    )
    record = made.train()[0]
    assert {"reward/Greedy", "reward/Greedy_2", "reward/by_wanted", "Greedy/seen", "Greedy_2/seen"} <= set(
        record
    )
    assert record["reward/by_wanted"] == pytest.approx(1.5)
    for prompt, answer in forms:
        assert isinstance(answer, str if isinstance(prompt, str) else list)


def test_a_resumed_run_has_the_settings_that_it_asks_for(tmp_path: Path) -> None:
    trainer(settings=config(iterations=2), directory=tmp_path).train()
    for change in ({"learning_rate": 1e-3}, {"kl_coef": 0.5}, {"kl_target": 3.0, "kl_horizon": 99}):
        with pytest.raises(ValueError, match=f"another run .*{next(iter(change))}"):
            trainer(settings=config(iterations=3, **change), directory=tmp_path)
    assert len(trainer(settings=config(iterations=3, clip=0.1), directory=tmp_path).train()) == 3


def test_rows_and_ids_that_do_not_fit_are_named() -> None:
    """Before any work where it can be known, else with the row and the remedy instead of an index error."""
    ids = {"input_ids": [1]}
    for rows, kind, match in (
        (
            [ids, {"prompt": "a"}],
            ValueError,
            r"row 1 of train_dataset has the columns \['prompt'\], the first has",
        ),
        ([ids, {"input_ids": [1], "x": 1}], ValueError, r"row 1 .*\['input_ids', 'x'\], the first has"),
        ([ids, {"x": 1}], ValueError, "row 1 .* it needs 'prompt'"),
        ({"input_ids": [[1]]}, TypeError, "got a dict: choose a split of a DatasetDict"),
        ([{"input_ids": 3}], TypeError, "input_ids must be a list of ids, got 3"),
    ):
        with pytest.raises(kind, match=match):
            PPOTrainer(policy(), share, config(), rows, value_model="shared")
    tokenizer = byte_tokenizer()
    text = tiny("llama", width=32, heads=2, layers=1, vocab=len(tokenizer), seed=0)
    for prompt, kind, match in (
        ([{"role": "user", "content": "a"}], ValueError, "the tokenizer has no chat_template"),
        ({"role": "user", "content": "a"}, TypeError, "prompt must be text, or a list of chat messages"),
    ):
        with pytest.raises(kind, match=match):
            PPOTrainer(text, share, config(), [{"prompt": prompt}], processing_class=tokenizer)
    bad("eos_token_id=-4 is no token of the policy, which has 10: 0 to 9", settings=config(eos_token_id=-4))
    bad("pad_token_id=10 is no token", settings=config(pad_token_id=10))
    small = ValueModel.from_backbone(tiny("llama", width=32, heads=2, vocab=8, seed=0))
    bad("the value model has 8 tokens and the policy 10", value_model=small)
    short = ValueModel.from_backbone(policy(1, max_position_embeddings=8))
    with pytest.raises(ValueError, match=r"passes the 8 positions .* \(the value model reads it\)"):
        trainer(value_model=short).collect(0)
    with pytest.raises(ValueError, match="a prompt has the id 12 and the policy 10 tokens"):
        PPOTrainer(
            policy(), lambda completions: [0.0] * 16, config(), [{"input_ids": [12]}], value_model="shared"
        ).collect(0)
    bad("token_rewards must be a list of hooks", TypeError, token_rewards=Spread())
    bad("a token reward must be a callable", TypeError, token_rewards=[3])
    bad("a token reward must be a callable", TypeError, token_rewards=[Spread])
    bad("reward_weights must be finite", reward_weights=[math.nan])
    bad("Spread is a class: give an instance", TypeError, reward=Spread)


def test_a_segmenter_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"segmenter must be a callable such as FixedNgram\(5\)"):
        config(segmenter=5)
