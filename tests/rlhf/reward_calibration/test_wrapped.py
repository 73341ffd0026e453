"""Wrapped rewards: transformers classifiers, reward functions, running curves, files, trainers' calls."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from sklearn.exceptions import NotFittedError

from labkit import rlhf
from labkit.testbeds import length_biased_judges
from labkit.testbeds.language import text_tokenizer
from labkit.testbeds.models import tiny


def likes_length(prompts, completions, **columns):
    return [0.01 * len(text) for text in completions]


TEXTS = ["word " * n for n in range(2, 42)]
PROMPTS = ["say something: "] * len(TEXTS)


def classifier(kind="llama", labels=1, vocab=2048, **more):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=vocab, num_key_value_heads=2, **shape, **more)
    elif kind == "gpt_neox":
        config = transformers.GPTNeoXConfig(vocab_size=vocab, max_position_embeddings=512, **shape, **more)
    else:
        config = transformers.RobertaConfig(vocab_size=vocab, max_position_embeddings=512, **shape, **more)
    config.num_labels = labels
    config.pad_token_id = 0
    made = {
        "llama": transformers.LlamaForSequenceClassification,
        "gpt_neox": transformers.GPTNeoXForSequenceClassification,
        "roberta": transformers.RobertaForSequenceClassification,
    }[kind]
    return made(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "roberta"])
def test_a_classifier_is_scored_as_by_hand(kind):
    model, tokenizer = classifier(kind), text_tokenizer()
    wrapped = rlhf.CalibratedRewardModel(model, rlhf.LinearCalibrator(), tokenizer=tokenizer, batch_size=7)
    raw = wrapped.raw_scores(PROMPTS, TEXTS)
    with torch.inference_mode():
        for row in (0, 13, 39):
            ids = torch.tensor([tokenizer(PROMPTS[row] + TEXTS[row])["input_ids"]])
            assert raw[row] == pytest.approx(
                float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]), abs=1e-5
            )
    assert not model.training


def test_calibrated_rewards_are_the_formula_and_keep_the_level():
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.LinearCalibrator(alpha=0.5)).fit(PROMPTS, TEXTS)
    raw = np.array(likes_length(PROMPTS, TEXTS))
    rewards = wrapped(PROMPTS, TEXTS)
    assert isinstance(rewards, list)
    assert isinstance(rewards[0], float)
    assert np.allclose(rewards, raw - 0.5 * (raw - raw.mean()))
    assert np.mean(rewards) == pytest.approx(raw.mean())
    assert wrapped.__name__ == "calibrated_likes_length"
    assert set(wrapped.metrics()) == {"length", "raw_reward", "length_correlation_raw", "length_correlation"}


def test_saving_a_classifier_saves_the_knots(tmp_path):
    model, tokenizer = classifier(), text_tokenizer()
    wrapped = rlhf.CalibratedRewardModel(
        model, rlhf.LowessCalibrator(), ["token_length", "char_length"][0], tokenizer=tokenizer
    ).fit(PROMPTS, TEXTS)
    wrapped.save_pretrained(tmp_path / "rm")
    stored = json.loads((tmp_path / "rm" / "calibrator.json").read_text())
    assert stored["state"]["knots_"] == wrapped.calibrator.knots_.tolist()
    loaded = rlhf.CalibratedRewardModel.from_pretrained(tmp_path / "rm")
    assert np.allclose(loaded(PROMPTS, TEXTS), wrapped(PROMPTS, TEXTS), atol=1e-6)
    assert not list((tmp_path / "rm").rglob("*.bin"))
    assert not list((tmp_path / "rm").rglob("*.pkl"))


def test_saving_a_function_asks_for_it_again(tmp_path):
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.LowessCalibrator()).fit(PROMPTS, TEXTS)
    wrapped.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="hand it in as rm="):
        rlhf.CalibratedRewardModel.from_pretrained(tmp_path)
    loaded = rlhf.CalibratedRewardModel.from_pretrained(tmp_path, rm=likes_length)
    assert loaded(PROMPTS, TEXTS) == wrapped(PROMPTS, TEXTS)
    with pytest.raises(FileNotFoundError, match="was not written by save_pretrained"):
        rlhf.CalibratedRewardModel.from_pretrained(tmp_path / "nothing")


def test_a_feature_of_ones_own_and_several():
    def commas(texts):
        return [text.count(",") for text in texts]

    texts = [text + "," * (i % 5) for i, text in enumerate(TEXTS)]
    both = rlhf.MultiFeatureCalibrator([rlhf.LinearCalibrator(), rlhf.LinearCalibrator()])
    wrapped = rlhf.CalibratedRewardModel(likes_length, both, ["char_length", commas]).fit(PROMPTS, texts)
    assert wrapped.measure(texts).shape == (40, 2)
    assert np.ptp(wrapped(PROMPTS, texts)) < 1e-9


def test_chat_messages_and_token_ids():
    chat = [[{"role": "assistant", "content": text}] for text in TEXTS]
    wrapped = rlhf.CalibratedRewardModel(
        lambda completions, **c: [len(m[0]["content"]) for m in completions], rlhf.LinearCalibrator()
    )
    wrapped.fit([[]] * 40, chat)
    assert np.ptp(wrapped([[]] * 40, chat)) < 1e-9
    some = length_biased_judges.answers(20, seed=3)
    model = classifier(vocab=length_biased_judges.VOCAB)
    by_ids = rlhf.CalibratedRewardModel(model, rlhf.LinearCalibrator(), "token_length").fit(
        [[64]] * 20, some.ids
    )
    assert by_ids.measure(some.ids).tolist() == some.lengths.tolist()
    # Where the trainer hands the ids over, texts are not tokenised again.
    assert by_ids.measure(["?"] * 20, completion_ids=some.ids).tolist() == some.lengths.tolist()


def test_a_running_curve_learns_from_each_batch():
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.RunningLowess(warmup=60, every=1, window=100))
    first = wrapped(PROMPTS, TEXTS)
    assert first == likes_length(PROMPTS, TEXTS), "unchanged before the warm-up"
    second = wrapped(PROMPTS, TEXTS)
    assert np.ptp(second) < 0.1 * np.ptp(first)
    with pytest.raises(TypeError, match="trainer's checkpoint"):
        wrapped.save_pretrained("nowhere")


def test_inside_a_trainer_the_curve_learns_once_per_rollout_from_all_processes():
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.RunningLowess(warmup=60, every=1))
    calls = []

    def gather(rows):
        calls.append(rows.shape)
        return torch.cat([rows, rows])  # two processes

    wrapped.setup(SimpleNamespace(gather=gather))
    wrapped(PROMPTS, TEXTS)
    assert len(wrapped.calibrator._lengths) == 0
    wrapped.update(batch=None)
    assert calls == [(40, 2)]
    assert len(wrapped.calibrator._lengths) == 80
    assert np.ptp(wrapped(PROMPTS, TEXTS)) < 0.5 * np.ptp(likes_length(PROMPTS, TEXTS))
    again = rlhf.CalibratedRewardModel(likes_length, rlhf.RunningLowess(warmup=60, every=1))
    again.load_state_dict(json.loads(json.dumps(wrapped.state_dict())))
    assert again.calibrator.transform([50.0], [1.0]) == wrapped.calibrator.transform([50.0], [1.0])


def test_a_function_gets_what_it_names():
    def narrow(prompts, completions):
        return likes_length(prompts, completions)

    def graded(completions, level):
        return [one * factor for one, factor in zip(likes_length(None, completions), level, strict=True)]

    def kept(prompts, completions, **columns):
        assert set(columns) == set(given)
        return likes_length(prompts, completions)

    given = {"level": [2.0] * 40, "completion_ids": [[1]] * 40, "prompt_ids": [[2]] * 40}
    for function, factor in ((narrow, 1.0), (graded, 2.0), (kept, 1.0)):
        wrapped = rlhf.CalibratedRewardModel(function, rlhf.LinearCalibrator(alpha=0.0))
        raw = wrapped.fit(PROMPTS, TEXTS, **given)(PROMPTS, TEXTS, **given)
        assert np.allclose(raw, factor * np.array(likes_length(PROMPTS, TEXTS)))
        scores = rlhf.call_reward(
            wrapped, PROMPTS, TEXTS, [[1]] * 40, {"level": [2.0] * 40}, prompt_ids=[[2]] * 40
        )
        assert np.allclose(scores, raw)


def test_lengths_are_those_of_the_answers_whatever_a_function_does_to_its_list():
    def emptying(prompts, completions):
        found = likes_length(prompts, completions)
        completions[:] = [""] * len(completions)
        return found

    texts = list(TEXTS)
    wrapped = rlhf.CalibratedRewardModel(emptying, rlhf.LinearCalibrator()).fit(PROMPTS, texts)
    assert texts == TEXTS
    assert np.ptp(wrapped(PROMPTS, texts)) < 1e-9


def sometimes(prompts, completions):
    # Texts of 15 words or a multiple get no reward; their lengths would bend any curve.
    return [None if len(text) % 75 == 0 else 0.01 * len(text) for text in completions]


@pytest.mark.parametrize(
    "make", [rlhf.LinearCalibrator, rlhf.LowessCalibrator, lambda: rlhf.RunningLowess(warmup=20, every=1)]
)
def test_none_stays_none_and_is_left_out(make):
    wrapped = rlhf.CalibratedRewardModel(sometimes, make()).fit(PROMPTS, TEXTS)
    some = [text for text in TEXTS if len(text) % 75]
    assert 30 < len(some) < 40
    alone = rlhf.CalibratedRewardModel(sometimes, make()).fit(PROMPTS[: len(some)], some)
    found = wrapped(PROMPTS, TEXTS)
    assert [one is None for one in found] == [len(text) % 75 == 0 for text in TEXTS]
    assert [one for one in found if one is not None] == alone(PROMPTS[: len(some)], some)
    assert wrapped.metrics() == alone.metrics()
    assert rlhf.call_reward(wrapped, PROMPTS, TEXTS, [[1]] * 40).isfinite().all()
    assert wrapped([""], ["x" * 75]) == [None]
    assert wrapped.metrics() == {}


def test_after_a_training_the_curve_learns_from_each_batch_again():
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.RunningLowess(warmup=60, every=1, window=100))
    tokenizer = text_tokenizer()
    config = rlhf.PPOConfig(iterations=2, batch_size=4, max_new_tokens=3, eos_token_id=None)
    policy = tiny("llama", width=16, heads=2, layers=1, vocab=len(tokenizer))
    trainer = rlhf.PPOTrainer(policy, wrapped, config, [{"prompt": "hi"}], processing_class=tokenizer)
    for done, _ in enumerate(trainer, start=1):
        assert wrapped.calibrator._batches == done
        wrapped(PROMPTS, TEXTS)
        assert wrapped.calibrator._batches == done + (done == 2), "amid a training only rollouts count"
    assert len(wrapped.calibrator._lengths) == 48
    assert np.ptp(wrapped(PROMPTS, TEXTS)) < 0.2 * np.ptp(likes_length(PROMPTS, TEXTS))
    other = rlhf.PPOTrainer(policy, wrapped, config, [{"prompt": "hi"}], processing_class=tokenizer)
    wrapped(PROMPTS, TEXTS)
    assert (wrapped.calibrator._batches, other.remaining) == (4, 2)


def test_a_trainers_curve_learns_without_those_that_are_none():
    wrapped = rlhf.CalibratedRewardModel(sometimes, rlhf.RunningLowess(warmup=20, every=1))
    trainer = SimpleNamespace(gather=lambda rows: torch.cat([rows, rows]))
    wrapped.setup(trainer)
    wrapped(PROMPTS, TEXTS)
    wrapped.update(batch=None)
    assert len(wrapped.calibrator._rewards) == 2 * sum(one is not None for one in sometimes(PROMPTS, TEXTS))
    assert np.isfinite(wrapped.calibrator._rewards).all()


def test_running_lowess_is_a_fit_on_its_window():
    rng = np.random.default_rng(0)
    running = rlhf.RunningLowess(window=200, every=2, warmup=50, frac=0.5, alpha=0.8)
    seen = []
    for _ in range(6):
        c = rng.integers(1, 500, 60).astype(float)
        r = np.log(c) + rng.normal(size=60)
        seen.append((c, r))
        found = running(c, r)
    c, r = (np.concatenate(part)[-200:] for part in zip(*seen, strict=True))
    fit = rlhf.LowessCalibrator(0.5, alpha=0.8).fit(c, r)
    wanted = seen[-1][1] - 0.8 * (fit.bias_(seen[-1][0]) - fit.level_)
    assert np.allclose(found, wanted)


def test_trl_takes_it_as_a_reward_function():
    """trl's GRPO calls functions with keywords and logs them by ``__name__``."""
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.LowessCalibrator()).fit(PROMPTS, TEXTS)
    out = wrapped(
        prompts=PROMPTS[:2],
        completions=TEXTS[:2],
        completion_ids=[[1], [2]],
        trainer_state=None,
        answer=["a", "b"],
    )
    assert len(out) == 2
    assert wrapped.__name__


def test_best_of_n_no_longer_takes_the_longest():
    learned = length_biased_judges.train_reward_model(seed=102)
    known, new = (length_biased_judges.answers(n, seed=71 + n) for n in (400, 800))
    wrapped = rlhf.CalibratedRewardModel(learned, rlhf.LowessCalibrator(), "token_length", batch_size=64)
    wrapped.fit([length_biased_judges.PROMPT] * 400, known.ids)
    after = np.array(wrapped([length_biased_judges.PROMPT] * 800, new.ids))
    raw = wrapped.last["raw"]
    assert rlhf.length_correlation(new.lengths, raw) > 0.2
    assert abs(rlhf.length_correlation(new.lengths, after)) < 0.1
    long, short = (length_biased_judges.best_of(scores, new.lengths, 8) for scores in (raw, after))
    assert short < 0.9 * long


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: rlhf.CalibratedRewardModel(3, rlhf.LinearCalibrator()),
            TypeError,
            "rm must be a sequence classifier",
        ),
        (lambda: rlhf.CalibratedRewardModel(likes_length, None), TypeError, "calibrator must be one such as"),
        (
            lambda: rlhf.CalibratedRewardModel(likes_length, rlhf.LinearCalibrator(), "mood"),
            ValueError,
            "feature='mood' is not known",
        ),
        (
            lambda: rlhf.CalibratedRewardModel(classifier(labels=3), rlhf.LinearCalibrator()),
            ValueError,
            "has 3 labels",
        ),
        (
            lambda: rlhf.CalibratedRewardModel(likes_length, rlhf.LinearCalibrator(), batch_size=0),
            ValueError,
            "batch_size=0",
        ),
        (lambda: rlhf.RunningLowess(window=5), ValueError, "window=5 is not allowed"),
        (lambda: rlhf.RunningLowess(window=32, warmup=64), ValueError, "warmup=64 is more than window=32"),
    ],
)
def test_bad_wrapping_is_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_a_reward_function_needs_no_torch():
    code = (
        "import sys; from labkit.rlhf import CalibratedRewardModel, LinearCalibrator\n"
        "f = lambda prompts, completions: [len(text) + 0.0 for text in completions]\n"
        "w = CalibratedRewardModel(f, LinearCalibrator()).fit([''] * 20, ['x' * n for n in range(20)])\n"
        "assert max(map(abs, w([''] * 2, ['x', 'xxxx']))) < 99\n"
        "sys.exit(sorted({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bad_calls_are_refused():
    wrapped = rlhf.CalibratedRewardModel(likes_length, rlhf.LinearCalibrator())
    with pytest.raises(NotFittedError):
        wrapped(PROMPTS, TEXTS)
    short = rlhf.CalibratedRewardModel(lambda **columns: [1.0], rlhf.LinearCalibrator())
    with pytest.raises(ValueError, match="1,\\) scores for 40 completions"):
        short.fit(PROMPTS, TEXTS)
    nan = rlhf.CalibratedRewardModel(lambda completions, **c: [None, np.nan, 1.0], rlhf.LinearCalibrator())
    with pytest.raises(ValueError, match="reward of completion 1 is nan"):
        nan.fit(["", "", ""], ["a", "b", "c"])
    with pytest.raises(ValueError, match="needs its tokenizer"):
        rlhf.CalibratedRewardModel(classifier(), rlhf.LinearCalibrator()).fit(PROMPTS, TEXTS)
    model = classifier()
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="no pad_token_id"):
        rlhf.CalibratedRewardModel(model, rlhf.LinearCalibrator())
