"""Curiosity: the module, what it pays, and how it learns."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from labkit.rlhf import (
    CuriosityConfig,
    CuriosityModule,
    CuriosityReward,
    CuriosityRewardFunction,
    GateBonus,
    PPOConfig,
    PPOTrainer,
    SentenceNovelty,
    TopKGate,
)
from labkit.rlhf.cd_rlhf import whitened
from labkit.testbeds.models import tiny

WIDTH = 16


@pytest.fixture
def policy():
    return tiny("llama", width=WIDTH, heads=2, layers=1, seed=0)


@pytest.fixture
def batch(policy):
    """Three responses of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return SimpleNamespace(
        ref_hidden=torch.randn(3, 6, WIDTH, generator=generator),
        tokens=torch.randint(policy.config.vocab_size, (3, 5), generator=generator),
        mask=mask,
        ranks=torch.tensor([[0, 1, 2, 0, 3], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        reduce=lambda values: values,
    )


def attached(policy, **how):
    found = CuriosityReward(**how)
    found.attach(policy)
    return found


def test_error_is_that_of_six_layers(policy, batch):
    icm = CuriosityModule.from_model(policy)
    actions = policy.get_input_embeddings()(batch.tokens)

    def through(layers, x):
        first, second, third = (m for m in layers if isinstance(m, nn.Linear))
        x = F.relu(F.linear(x, first.weight, first.bias))
        return F.linear(F.relu(F.linear(x, second.weight, second.bias)), third.weight, third.bias)

    for row, step in ((0, 0), (1, 2)):
        now, after = (through(icm.encoder, batch.ref_hidden[row, step + i]) for i in (0, 1))
        guess = through(icm.dynamics, torch.cat([now, actions[row, step]]))
        expected = (guess - after).square().sum().sqrt()
        torch.testing.assert_close(icm(batch.ref_hidden, actions)[row, step], expected)
    sizes = [tuple(m.weight.shape) for m in icm.modules() if isinstance(m, nn.Linear)]
    inner = policy.config.intermediate_size
    assert sizes == [
        (2 * WIDTH, WIDTH),
        (2 * WIDTH, 2 * WIDTH),
        (WIDTH, 2 * WIDTH),
        (inner, 2 * WIDTH),
        (inner, inner),
        (WIDTH, inner),
    ]


def test_whitening_by_hand():
    x = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    scale = (2 / 3) ** 0.5  # of 1, 2, 3
    expected = torch.tensor([[-1, 0, 0], [1, 0, 0]]) / scale
    torch.testing.assert_close(whitened(x, mask), expected, atol=1e-5, rtol=1e-5)
    # with the padding's zeros: 1, 2, 0, 3, 0, 0 has mean 1 and variance 8/6
    official = torch.tensor([[0, 1, 0], [2, 0, 0]]) / (8 / 6) ** 0.5
    torch.testing.assert_close(whitened(x, mask, padding=True), official, atol=1e-5, rtol=1e-5)
    assert whitened(torch.full((2, 3), 4.0), mask).abs().max() == 0


def test_whitening_over_two_processes():
    x, mask = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
        torch.ones(4, 6, dtype=torch.bool),
    )
    mask[1, 3:] = False
    whole, halves = whitened(x, mask), [(x[:2], mask[:2]), (x[2:], mask[2:])]

    def of(half):
        sent = iter((0, 1))

        def reduce(sums):
            if next(sent) == 0:
                other = halves[1 - half]
                return sums + torch.stack([other[1].float().sum(), (other[0] * other[1]).sum()])
            other = halves[1 - half]
            mean = (x * mask).sum() / mask.sum()
            return sums + ((other[0] * other[1] - mean).square() * other[1]).sum()

        return whitened(*halves[half], reduce=reduce)

    torch.testing.assert_close(torch.cat([of(0), of(1)]), whole)


def test_what_is_paid(policy, batch):
    reward = attached(policy, eta=0.5)
    with torch.no_grad():
        half = 0.5 * reward.error(batch.ref_hidden, batch.tokens)
    real = half[batch.mask]
    expected = (half - real.mean()) / real.var(correction=0).sqrt()
    expected = 0.5 * expected * batch.mask * (batch.ranks > 0)
    torch.testing.assert_close(reward(batch), expected, atol=1e-5, rtol=1e-4)
    shown = reward.metrics()
    assert shown["curiosity/gate_open"] == pytest.approx(4 / 9)
    assert shown["curiosity/error"] == pytest.approx(float(2 * real.mean()), rel=1e-5)
    assert shown["curiosity/paid"] == pytest.approx(float(expected.sum() / 9), abs=1e-5)
    with torch.no_grad():
        after = reward.icm.encoder(batch.ref_hidden[:, 1:])[batch.mask].norm(dim=-1)
    assert shown["curiosity/feature_norm"] == pytest.approx(float(after.mean()), rel=1e-5)
    assert (attached(policy, eta=0.5, gate=None)(batch) != 0).sum() == batch.mask.sum()
    raw = attached(policy, eta=1.0, gate=None, whiten=False, icm=reward.icm)(batch)
    torch.testing.assert_close(raw, half * batch.mask)
    assert attached(policy, eta=0.0)(batch).abs().max() == 0


def test_padding_does_not_matter(policy, batch):
    reward = attached(policy)
    padded = SimpleNamespace(**vars(batch))
    pad = torch.nn.functional.pad
    padded.ref_hidden = pad(batch.ref_hidden, (0, 0, 0, 2), value=7.0)
    padded.tokens, padded.ranks = pad(batch.tokens, (0, 2)), pad(batch.ranks, (0, 2), value=3)
    padded.mask = pad(batch.mask, (0, 2))
    torch.testing.assert_close(reward(padded)[:, :5], reward(batch))


def test_the_module_learns_what_it_sees_and_is_bored(policy, batch):
    reward = attached(policy, lr=1e-3)
    before = reward.error(batch.ref_hidden, batch.tokens)[batch.mask].mean().detach()
    losses = [reward.step(batch.ref_hidden, batch.tokens, batch.mask) for _ in range(60)]
    after = reward.error(batch.ref_hidden, batch.tokens)[batch.mask].mean()
    assert losses[0] == pytest.approx(0.5 * before.item(), rel=1e-5)
    assert after < 0.5 * before
    assert policy.get_input_embeddings().weight.grad is None


def test_squared_loss(policy, batch):
    reward = attached(policy, squared=True)
    errors = reward.error(batch.ref_hidden, batch.tokens)[batch.mask]
    assert reward.step(batch.ref_hidden, batch.tokens, batch.mask) == pytest.approx(
        0.5 * errors.square().mean().item(), rel=1e-5
    )


def test_two_halves_of_a_batch_step_as_the_whole(policy, batch):
    """As two processes do: each with its rows, sums added."""
    torch.manual_seed(0)
    whole = attached(policy, lr=1e-2)
    start = copy.deepcopy(whole.icm)
    whole.step(batch.ref_hidden, batch.tokens, batch.mask)
    gradients = []
    count = batch.mask.sum()
    for rows in (slice(0, 1), slice(1, 3)):
        part = attached(policy, lr=1e-2, icm=copy.deepcopy(start))
        calls = []

        def reduce(x, calls=calls):
            calls.append(x)
            return count if len(calls) == 1 else x

        part.step(batch.ref_hidden[rows], batch.tokens[rows], batch.mask[rows], reduce=reduce)
        gradients.append([p.grad.clone() for p in part.icm.parameters()])
    for parameter, first, second in zip(whole.icm.parameters(), *gradients, strict=True):
        torch.testing.assert_close(parameter.grad, first + second)


def test_state_goes_on_where_it_stopped(policy, batch):
    one = attached(policy, lr=1e-2)
    one.step(batch.ref_hidden, batch.tokens, batch.mask)
    other = attached(policy, lr=1e-2, icm=CuriosityModule.from_model(policy, seed=5))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for reward in (one, other):
        reward.step(batch.ref_hidden, batch.tokens, batch.mask)
    assert torch.equal(one(batch), other(batch))


def test_saved_and_loaded(policy, batch, tmp_path):
    icm = CuriosityModule.from_model(policy, seed=3)
    icm.save_pretrained(tmp_path)
    again = CuriosityModule.from_pretrained(tmp_path)
    actions = policy.get_input_embeddings()(batch.tokens)
    assert torch.equal(icm(batch.ref_hidden, actions), again(batch.ref_hidden, actions))
    assert (tmp_path / "model.safetensors").exists()


def test_making_one_leaves_the_generator_alone(policy):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = CuriosityModule.from_model(policy), CuriosityModule.from_model(policy)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.encoder[0].weight, second.encoder[0].weight)


def test_constant_bonus(batch):
    bonus = GateBonus(0.25, TopKGate(2))
    assert bonus(batch).tolist() == [[0, 0, 0.25, 0, 0.25], [0] * 5, [0] * 5]
    assert bonus.metrics()["curiosity/gate_open"] == pytest.approx(2 / 9)


def test_whole_answers_in_trl_form(policy):
    """The sum of what PPO would pay token by token, on the same rows."""
    ref = tiny("llama", width=WIDTH, heads=2, layers=1, seed=1)
    reward = attached(policy, eta=0.5, lr=0.0, weight_decay=0.0)
    function = CuriosityRewardFunction(reward, policy, ref)
    prompts, answers = [[5, 6, 7], [8]], [[1, 2], [3, 4, 9]]
    found = function(["", ""], ["", ""], prompt_ids=prompts, completion_ids=answers)
    errors, closed = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            hidden = ref(ids, output_hidden_states=True).hidden_states[-1][:, len(prompt) - 1 :]
            logits = policy(ids).logits[0, len(prompt) - 1 : -1]
            errors.append(0.5 * reward.error(hidden, torch.tensor([answer]))[0])
        closed.append(logits.argmax(-1) == torch.tensor(answer))
    flat = torch.cat(errors)
    for number, (error, shut) in enumerate(zip(errors, closed, strict=True)):
        paid = (error - flat.mean()) / flat.var(correction=0).sqrt() * ~shut
        assert found[number] == pytest.approx(float(0.5 * paid.sum()), rel=1e-3, abs=1e-4)
    per_token = CuriosityRewardFunction(reward, policy, ref, per_token=True)
    means = per_token(["", ""], ["", ""], prompt_ids=prompts, completion_ids=answers)
    assert means == pytest.approx([found[0] / 2, found[1] / 3])


def test_sentence_novelty():
    novelty = SentenceNovelty(references=2, seed=1)
    assert novelty(["q"] * 2, ["red fox jumps over", "blue sea lies still"]) == [0.0, 0.0]
    known, new = novelty(["q"] * 2, ["red fox jumps over", "green tea tastes fine"])
    assert known == pytest.approx(-1 - 0.5)  # its twin among two references: BLEU 1, mean cosine 1/2
    assert new == 0
    again = SentenceNovelty(references=2, seed=9)
    again.load_state_dict(novelty.state_dict())
    texts = ["red fox sits down", "blue sea lies there"]
    assert again(["q"] * 2, texts) == novelty(["q"] * 2, texts)
    fresh = SentenceNovelty()
    fresh(["q"], ["red fox jumps over"])
    assert fresh(["q"], [[{"role": "assistant", "content": "red fox jumps over"}]]) == pytest.approx([-2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda policy: CuriosityReward(eta=-0.1), "eta must be a finite number from 0, got -0.1"),
        (lambda policy: GateBonus(eta=float("nan")), "eta must be a finite number from 0, got nan"),
        (lambda policy: CuriosityReward(lr=-1), "lr must be at least 0, got -1"),
        (lambda policy: TopKGate(0), "k must be a whole number from 1, got 0"),
        (lambda policy: TopKGate(1.5), "got 1.5"),
        (lambda policy: attached(policy, gate=TopKGate(10**6)), "never opens"),
        (lambda policy: TopKGate(1)(None), "pass gate=None"),
        (lambda policy: CuriosityConfig(0, 4), "hidden_size must be a whole number from 1, got 0"),
        (
            lambda policy: attached(policy, icm=CuriosityModule(CuriosityConfig(8, 8))),
            "embeddings have width 16, the curiosity module 8",
        ),
        (
            lambda policy: attached(policy).error(None, torch.zeros(1, 1, dtype=torch.long)),
            "decoder-only reference",
        ),
        (
            lambda policy: attached(policy).error(torch.zeros(1, 3, 8), torch.zeros(1, 2, dtype=torch.long)),
            "hidden states have 8",
        ),
        (
            lambda policy: attached(policy).error(
                torch.zeros(1, 2, WIDTH), torch.zeros(1, 2, dtype=torch.long)
            ),
            r"states must be \(B, T \+ 1, D\)",
        ),
        (
            lambda policy: CuriosityRewardFunction(CuriosityReward(), policy, policy),
            "ref_model is the policy",
        ),
        (
            lambda policy: CuriosityRewardFunction(
                CuriosityReward(), policy, tiny("t5", width=WIDTH, heads=2, layers=1)
            ),
            "is an encoder-decoder",
        ),
        (
            lambda policy: CuriosityRewardFunction(CuriosityReward(), policy, copy.deepcopy(policy))(
                ["a"], ["b"], completion_ids=[[1]]
            ),
            "give processing_class",
        ),
        (lambda policy: SentenceNovelty(bleu_weight=-1), "bleu_weight must be at least 0, got -1"),
        (lambda policy: SentenceNovelty(buffer=0), "buffer must be at least 1, got 0"),
    ],
)
def test_bad_input(policy, call, message):
    with pytest.raises(ValueError, match=message):
        call(policy)


def ppo(policy, tmp_path=None, iterations=3, hooks=(), **how):
    """A run on rows of ids, paid for even tokens."""

    def evens(completion_ids, **columns):
        return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]

    config = PPOConfig(
        iterations=iterations,
        batch_size=8,
        minibatches=2,
        max_new_tokens=5,
        eos_token_id=None,
        learning_rate=5e-3,
        kl_coef=0.05,
        **how,
    )
    return PPOTrainer(
        policy,
        evens,
        config,
        [{"input_ids": [1, 2]}, {"input_ids": [3]}],
        token_rewards=hooks,
        value_model="shared",
        directory=tmp_path,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CuriosityReward(gate=3), "gate must be a TopKGate, such as .*; got 3"),
        (lambda: GateBonus(gate=TopKGate), "gate must be a TopKGate"),
        (lambda: CuriosityReward(icm=5), "icm must be a CuriosityModule, .*; got 5"),
    ],
)
def test_parts_of_another_type_are_named(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_reference_of_another_width_is_refused_at_the_start():
    narrow, wide = (tiny("llama", width=w, heads=2, layers=1, vocab=20, seed=0) for w in (8, WIDTH))
    with pytest.raises(ValueError, match="reference's hidden states have width 8, the policy's .* 16"):
        PPOTrainer(
            wide,
            lambda completions, **_: [0.0] * len(completions),
            PPOConfig(iterations=1, batch_size=2, eos_token_id=None),
            [{"input_ids": [1]}],
            ref_model=narrow,
            token_rewards=[CuriosityReward()],
            value_model="shared",
        )


def test_the_modules_rate_can_follow_the_policys(policy, batch):
    """Two updates at factors 1 and 0: the second changes nothing, also when it comes after a resume."""
    factors = [1.0, 0.0]
    reward = attached(policy, lr=1e-2, schedule=factors.__getitem__)
    start = reward.icm.encoder[0].weight.clone()
    reward.update(batch)
    first = reward.icm.encoder[0].weight.clone()
    assert not torch.equal(first, start)
    again = attached(policy, lr=1e-2, schedule=factors.__getitem__)
    again.load_state_dict(copy.deepcopy(reward.state_dict()))
    for one in (reward, again):
        one.update(batch)
        assert torch.equal(one.icm.encoder[0].weight, first)


def test_in_ppo_eta_zero_is_plain_rlhf_to_the_bit():
    plain, free, paid = (tiny("llama", width=WIDTH, heads=2, layers=1, vocab=20, seed=0) for _ in range(3))
    history = ppo(plain).train()
    curious = CuriosityReward(eta=0.0, lr=1e-3)
    trainer = ppo(free, hooks=[curious])
    found = trainer.train()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, free.get_parameter(name))
    assert [r["objective/scores"] for r in found] == [r["objective/scores"] for r in history]
    assert found[-1]["curiosity/loss"] < found[0]["curiosity/loss"]
    batch = trainer.collect(3)
    assert torch.equal(curious(batch), torch.zeros_like(curious(batch)))
    ppo(paid, hooks=[CuriosityReward(eta=0.5)]).train()
    assert any(not torch.equal(p, paid.get_parameter(n)) for n, p in plain.named_parameters())


def test_in_ppo_the_gate_reads_the_ranks_of_the_sampling():
    policy = tiny("llama", width=WIDTH, heads=2, layers=1, vocab=20, seed=0)
    batch = ppo(policy, hooks=[CuriosityReward()]).collect(0)
    ids = torch.cat([batch.prompt_ids, batch.tokens], 1)
    seen = torch.cat([batch.prompt_mask, batch.mask], 1).long()
    with torch.no_grad():
        logits = policy(ids, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0)).logits
    best = logits[:, batch.prompt_ids.shape[1] - 1 : -1].argmax(-1) == batch.tokens
    assert torch.equal(TopKGate(1)(batch.ranks), ~best)


def test_in_ppo_a_run_resumes_with_its_module(tmp_path):
    def policy():
        return tiny("llama", width=WIDTH, heads=2, layers=1, vocab=20, seed=0)

    whole, first = policy(), policy()
    ppo(whole, iterations=4, hooks=[CuriosityReward(eta=0.5, lr=1e-3)]).train()
    stopped = ppo(
        first, tmp_path, iterations=4, hooks=[CuriosityReward(eta=0.5, lr=1e-3)], checkpoint_every=2
    )
    for record in stopped:
        if record["iteration"] == 2:
            break
    again = policy()
    ppo(again, tmp_path, iterations=4, hooks=[CuriosityReward(eta=0.5, lr=1e-3)], checkpoint_every=2).train()
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
