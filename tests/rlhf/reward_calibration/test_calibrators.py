"""Calibrators: the mathematics, scikit-learn's manners, files, and bad input."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from labkit import rlhf
from labkit.rlhf import reward_calibration as rc
from labkit.testbeds import biased_rewards

CALIBRATORS = [
    rlhf.LengthPenalty(0.002, alpha=0.5),
    rlhf.LinearCalibrator(alpha=0.7),
    rlhf.LocalMeanCalibrator(ratio=8, min_num=5),
    rlhf.LowessCalibrator(frac=0.4, it=1, delta=3.0),
]


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    lengths = np.round(rng.gamma(1.5, 800, 600)) + 1
    return lengths, 0.5 * np.log(lengths) + rng.normal(size=600)


@pytest.fixture(scope="module")
def pairs():
    made = biased_rewards.pairs(800, seed=50)
    return made, biased_rewards.reward_models(made, 8, seed=50)


@pytest.mark.parametrize("price", [-0.01, 0.001, 0.05])
@pytest.mark.parametrize("frac", [0.3, 0.9])
def test_a_price_on_the_same_length_changes_no_margin_of_rc_lwr(pairs, price, frac):
    """Local lines reproduce lines: the paper's RC-LWR-Penalty differs only through the prompt's length."""
    made, models = pairs
    for model in models[:4]:
        assert biased_rewards.penalty_effect(made, model, rlhf.LowessCalibrator(frac), price) < 1e-9
        assert biased_rewards.penalty_effect(made, model, rlhf.LocalMeanCalibrator(), price) > 1e-3


def test_margins_are_the_paper_formula(scored):
    c, r = scored
    fit = rlhf.LowessCalibrator(0.5, alpha=0.6).fit(c, r)
    bias = rc.lowess(c, r, 0.5)
    wanted = r[:300] - r[300:] - 0.6 * (bias[:300] - bias[300:])
    assert np.allclose(fit.margins(c[:300], r[:300], c[300:], r[300:]), wanted)
    assert np.allclose(fit.bias_(c), bias)
    assert np.array_equal(fit.compare(c[:300], r[:300], c[300:], r[300:]), wanted > 0)
    assert fit.level_ == pytest.approx(bias.mean())


def test_the_true_bias_is_found(pairs):
    made, models = pairs
    for model in models:
        fit = rlhf.LowessCalibrator(0.5).fit(made.lengths, model.scores)
        off = fit.bias_(made.lengths) - model.bias
        # Quality leans against length in these pairs (the shorter one is better in 60 %), so not exactly.
        assert np.std(off) < 0.3 * max(1.0, np.std(model.bias))


def test_rc_mean_leaves_lonely_pairs_as_they_are():
    c = np.concatenate([np.full(30, 100.0), np.full(30, 200.0), [10_000.0]])
    r = np.concatenate([np.zeros(30), np.ones(30), [5.0]])
    fit = rlhf.LocalMeanCalibrator(distance=10, min_num=20).fit(c, r)
    assert fit.margins([200.0], [1.0], [100.0], [0.0]) == pytest.approx([0.0])
    assert fit.margins([10_000.0], [5.0], [100.0], [0.0]).tolist() == [5.0]
    assert fit.bias_([100.0, 150.0, 200.0]) == pytest.approx([0.0, 0.5, 1.0])


def test_rc_mean_takes_its_distance_from_the_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.integers(1, 100, 50).astype(float), rng.integers(1, 100, 50).astype(float)
    fit = rlhf.LocalMeanCalibrator(ratio=2, min_num=1).fit_pairs(a, a, b, b)
    assert fit.distance_ == pytest.approx(np.abs(a - b).mean() / 2)
    both = np.concatenate([a, b])
    by_hand = np.abs(both[:, None] - both).mean() / 2
    assert rlhf.LocalMeanCalibrator(ratio=2, min_num=1).fit(both, both).distance_ == pytest.approx(by_hand)


def test_new_lengths_are_interpolated_and_held_at_the_ends(scored):
    fit = rlhf.LowessCalibrator(0.5).fit(*scored)
    knots = fit.knots_
    middle = (knots[4] + knots[5]) / 2
    assert fit.bias_([middle])[0] == pytest.approx((fit.values_[4] + fit.values_[5]) / 2)
    with pytest.warns(UserWarning, match=r"50.0% of the lengths lie outside of \["):
        ends = fit.bias_([knots[-1], knots[-1] + 1000])
    assert ends[0] == ends[1] == fit.values_[-1]


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda c: type(c).__name__)
def test_scikit_learns_manners(calibrator, scored):
    made = clone(calibrator)
    assert made.get_params() == calibrator.get_params()
    assert repr(made.set_params(alpha=0.25)).endswith("alpha=0.25)") or made.alpha == 0.25
    with pytest.raises(NotFittedError, match="call fit"):
        made.transform(*scored)
    assert made.fit(*scored) is made
    assert np.allclose(clone(made).fit_transform(*scored), made.transform(*scored))
    assert not hasattr(clone(made), "level_")


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=lambda c: type(c).__name__)
def test_files_hold_the_knots(calibrator, scored, tmp_path):
    fit = clone(calibrator).fit(*scored)
    path = rlhf.save_calibrator(fit, tmp_path / "calibrator.json")
    loaded = rlhf.load_calibrator(path)
    assert type(loaded) is type(fit)
    assert loaded.get_params() == fit.get_params()
    assert np.array_equal(loaded.transform(*scored), fit.transform(*scored))
    if hasattr(fit, "knots_"):
        assert json.loads(path.read_text())["state"]["knots_"] == fit.knots_.tolist()


def test_files_refuse_what_they_cannot_hold(tmp_path, scored):
    with pytest.raises(ValueError, match="is not fitted"):
        rlhf.save_calibrator(rlhf.LowessCalibrator(), tmp_path / "a.json")
    with pytest.raises(TypeError, match="cannot save a dict"):
        rlhf.save_calibrator({}, tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"class": "Pickle", "params": {}, "state": {}}')
    with pytest.raises(ValueError, match="unknown calibrator 'Pickle'"):
        rlhf.load_calibrator(tmp_path / "b.json")
    (tmp_path / "c.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no calibrator"):
        rlhf.load_calibrator(tmp_path / "c.json")


def test_several_features_in_order(tmp_path, scored):
    c, r = scored
    marks = np.random.default_rng(1).integers(0, 9, len(c)).astype(float)
    r = r + 0.3 * marks
    both = np.column_stack([c, marks])
    parts = [rlhf.LowessCalibrator(0.5), rlhf.LinearCalibrator(alpha=0.5)]
    fit = rlhf.MultiFeatureCalibrator(parts).fit(both, r)
    first = rlhf.LowessCalibrator(0.5).fit(c, r)
    left = r - first.bias_(c)
    second = rlhf.LinearCalibrator(alpha=0.5).fit(marks, left)
    assert np.allclose(fit.transform(both, r), left - 0.5 * second.bias_(marks))
    assert not hasattr(parts[0], "level_"), "calibrators are cloned, not fitted"
    assert clone(fit).get_params()["calibrators"][0].frac == 0.5
    loaded = rlhf.load_calibrator(rlhf.save_calibrator(fit, tmp_path / "both.json"))
    assert np.array_equal(loaded.transform(both, r), fit.transform(both, r))
    with pytest.raises(NotFittedError):
        clone(fit).bias_(both)
    with pytest.raises(ValueError, match=r"shape \(answers, 2\), a column per calibrator; got \(600,\)"):
        fit.fit(c, r)
    with pytest.raises(ValueError, match="needs a calibrator per feature"):
        rlhf.MultiFeatureCalibrator().fit(both, r)


def test_equal_lengths_are_nothing_to_calibrate():
    rng = np.random.default_rng(0)
    r = rng.normal(size=40)
    for calibrator in CALIBRATORS:
        with pytest.warns(UserWarning, match="nothing to calibrate"):
            fit = clone(calibrator).fit(np.full(40, 7.0), r)
        margins = fit.margins(np.full(20, 7.0), r[:20], np.full(20, 7.0), r[20:])
        assert np.allclose(margins, r[:20] - r[20:])


@pytest.mark.parametrize(
    ("lengths", "rewards", "message"),
    [
        (range(20), range(19), "lengths has 20 values and rewards has 19"),
        (range(5), range(5), "5 points are too few to calibrate on"),
        ([-1] + [5] * 19, range(20), r"lengths\[0\] is -1; a length or count cannot be negative"),
        (range(20), [np.nan] * 20, r"rewards\[0\] is nan"),
        (range(20), [[1, 2]] * 20, "scores and not margins"),
    ],
)
def test_bad_answers_are_refused(lengths, rewards, message):
    with pytest.raises(ValueError, match=message):
        rlhf.LowessCalibrator().fit(lengths, rewards)


@pytest.mark.parametrize(
    ("calibrator", "message"),
    [
        (rlhf.LowessCalibrator(frac=2), "frac=2 is not allowed"),
        (rlhf.LowessCalibrator(frac=0.05), "at least 3 are needed"),
        (rlhf.LowessCalibrator(delta="small"), "delta='small' is not allowed; 'auto'"),
        (rlhf.LowessCalibrator(alpha=np.inf), "alpha=inf is not allowed"),
        (rlhf.LocalMeanCalibrator(ratio=0), "ratio=0 is not allowed"),
        (rlhf.LocalMeanCalibrator(min_num=0), "min_num=0 is not allowed"),
        (rlhf.LocalMeanCalibrator(min_num=100), "no length has 100 answers within"),
        (rlhf.LengthPenalty(np.nan), "penalty=nan is not allowed"),
    ],
)
def test_bad_settings_are_refused(calibrator, message):
    with pytest.raises(ValueError, match=message):
        calibrator.fit(range(30), range(30))


def test_plots_need_no_data(scored):
    fit = rlhf.LowessCalibrator().fit(*scored)
    assert len(fit.plot().data) == 1
    assert len(fit.plot(*scored).data) == 2
    halves = tuple((part[:300], part[300:]) for part in scored)
    figure = rc.flips_figure(*halves, fit, xaxis={"title": "characters"})
    assert figure.layout.xaxis.title.text == "characters"
    assert figure.data[0].name == "answers"
    assert rc.flips_figure(*halves, fit, shown=100).data[0].name == "answers (100 of 300 pairs)"
    assert {trace.name for trace in figure.data} >= {"wrong, now right", "right, now wrong"}


def test_features():
    text = "# Head\n\n   ### Third\n    # code\n- one\n* two\n1. three, in 1999. Then **bold** and __more__\n#hash"
    assert rlhf.markdown_count([text]).tolist() == [2 + 2 + 2 + 2]
    assert rlhf.char_length([text, [{"role": "assistant", "content": "abc"}]]).tolist() == [len(text), 3]
    assert rlhf.features.char_length is rlhf.char_length
    assert rlhf.token_length(None)([[1, 2], [3]]).tolist() == [2, 1]
    with pytest.raises(ValueError, match="give a tokenizer"):
        rlhf.token_length(None)(["text"])
    with pytest.raises(TypeError, match="must be a list of texts"):
        rlhf.char_length("one text")
    with pytest.raises(TypeError, match="an answer is a text"):
        rlhf.char_length([3.5])


def test_importing_the_family_imports_neither_torch_nor_sklearn():
    import subprocess
    import sys

    code = "import sys, labkit.rlhf; print([m for m in ('torch', 'sklearn', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_calibration_of_synthetic_models_gains_what_the_card_promises(pairs):
    made, models = pairs
    methods = {"mean": rlhf.LocalMeanCalibrator(), "lwr": rlhf.LowessCalibrator()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = [{r["method"]: r for r in biased_rewards.evaluate(made, m, methods)} for m in models]
    gains = np.array([row["lwr"]["accuracy"] - row["none"]["accuracy"] for row in rows])
    best = np.array([row["bias known"]["accuracy"] - row["none"]["accuracy"] for row in rows])
    assert gains.mean() > 0.6 * best.mean() > 2
    assert np.mean([row["lwr"]["left"] for row in rows]) < 0.3 * np.mean(
        [row["none"]["left"] for row in rows]
    )
