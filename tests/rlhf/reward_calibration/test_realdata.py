"""The authors' and AlpacaEval's own numbers."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from labkit import papers, rlhf
from labkit.lab import claims
from labkit.testbeds import alpacaeval, biased_rewards, data, recorded

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif("LABKIT_DATA" not in os.environ, reason="LABKIT_DATA is not set"),
]
REFERENCES = [alpacaeval.LC, "Arena, Feb 2024", "Arena, Aug 2024", "Arena, length-controlled"]


@pytest.fixture(scope="module")
def measured():
    return alpacaeval.measure(rlhf)


def test_the_record_is_what_is_measured(measured):
    stored = recorded.read("reward_calibration")
    for part in ("leaderboard", "judge", "length_controlled", "models"):
        for name, value in measured[part].items():
            if isinstance(value, dict):
                for key, values in value.items():
                    assert stored[part][name][key] == pytest.approx(values, abs=2e-4), (part, name, key)
            else:
                assert stored[part][name] == pytest.approx(value, abs=2e-4), (part, name)


@pytest.mark.parametrize(
    ("window", "alpha", "wanted", "game"),
    [
        ("0.7", 0.0, (0.966, 0.930, 0.950, 0.923), 0.397),
        ("0.7", 0.5, (0.992, 0.957, 0.939, 0.963), 0.230),
        ("1", 0.5, (0.991, 0.955, 0.946, 0.964), 0.196),
    ],
)
def test_leaderboard_figures(measured, window, alpha, wanted, game):
    column = measured["alphas"].index(alpha)
    found = [measured["leaderboard"][window][name][column] for name in REFERENCES]
    assert found == pytest.approx(wanted, abs=0.0015)
    assert measured["leaderboard"][window]["gameability"][column] == pytest.approx(game, abs=0.0015)


def test_the_values_of_the_claims_are_the_recorded_ones(measured):
    found = alpacaeval.gains(measured)
    assert found == pytest.approx(alpacaeval.gains(recorded.read("reward_calibration")), abs=2e-4)
    table = alpacaeval.leaderboard()
    rates, lengths = table.win_rate.to_numpy(), table.length.to_numpy()
    raw, half, full = (
        alpacaeval.reference_correlations(table, rlhf.calibrate_leaderboard(rates, lengths, 0.7, 0, alpha))
        for alpha in (0.0, 0.5, 1.0)
    )
    helped = {name for name in raw if half[name] > raw[name]}
    assert helped == set(REFERENCES) - {"Arena, Aug 2024"}
    assert found["half"] == pytest.approx(min(half[name] - raw[name] for name in helped), abs=2e-4)
    assert found["full"] == pytest.approx(max(full[name] - raw[name] for name in raw), abs=2e-4)
    paper = papers.load("reward_calibration")
    ids = {"judge": "judge-nearer-to-lc", "half": "half-strength-helps", "full": "full-strength-hurts"}
    for name, claim in ids.items():
        verdict = claims.judge(paper.claim(claim), "laptop", [found[name]])
        assert verdict.verdict == claims.REPRODUCED, claim


def test_full_strength_takes_quality_away(measured):
    column = measured["alphas"].index(1.0)
    for window in ("0.7", "1"):
        swept = measured["leaderboard"][window]
        assert 0.79 < swept[alpacaeval.LC][column] < 0.83
        assert 0.74 < swept["Arena, Aug 2024"][column] < 0.82


def test_length_control_and_counts(measured):
    found = [measured["length_controlled"][name] for name in REFERENCES]
    assert found == pytest.approx([1, 0.975, 0.957, 0.972], abs=0.001)
    assert measured["models"] == {"leaderboard": 223, "judge": 57, "triples": 6}
    table = alpacaeval.leaderboard()
    assert [int(table[name].notna().sum()) for name in REFERENCES] == [223, 37, 51, 51]


def test_judge_figures(measured):
    assert measured["judge"]["raw"] == pytest.approx(0.961, abs=0.001)
    assert measured["judge"]["0.1"] == pytest.approx(0.973, abs=0.001)
    assert measured["judge"]["1"] == pytest.approx(0.960, abs=0.001), "robust rounds discard the wins"
    seen = alpacaeval.judge()
    rates = dict(zip(seen.models, 100 * np.nanmean(seen.probabilities, axis=1), strict=True))
    name = "gpt-3.5-turbo-1106"
    assert [rates[f"{name}{kind}"] for kind in ("", "_verbose", "_concise")] == pytest.approx(
        [9.2, 12.8, 7.4], abs=0.05
    )
    step = 0.01 * float(np.ptp(seen.lengths))
    after = rlhf.calibrate_judge(
        seen.probabilities, seen.lengths, seen.baseline_lengths, rlhf.LowessCalibrator(0.1, delta=step)
    )
    kept = dict(zip(seen.models, after, strict=True))
    assert kept[f"{name}_concise"] < kept[name] < kept[f"{name}_verbose"]


def test_win_rates_are_the_leaderboards():
    table, seen = alpacaeval.leaderboard(), alpacaeval.judge()
    rates = np.nanmean(seen.probabilities, axis=1)
    assert np.abs(rates - table.win_rate[seen.models].to_numpy()).max() < 1e-6


def test_the_paper_table():
    table = pd.read_csv(data.find("reward_calibration/paper_alpacaeval_spearman.csv"))
    assert len(table) == 204
    by_models = table[~table.reward_model.str.startswith("gpt4")]
    assert by_models.reward_model.nunique() == 8
    means = by_models.pivot_table("spearman", "reference_ranking", "method")
    wanted = {
        "AlpacaEval2-LC": (0.896, 0.902, 0.949, 0.940),
        "Arena-2024-02": (0.845, 0.889, 0.947, 0.949),
        "Arena-2024-08": (0.886, 0.864, 0.897, 0.895),
        "Arena-2024-08-length-controlled": (0.853, 0.858, 0.918, 0.921),
    }
    for reference, row in wanted.items():
        found = means.loc[reference, ["original", "length_penalty", "LC", "RC-LWR"]]
        assert found.tolist() == pytest.approx(row, abs=0.0011), reference


def test_the_dpo_table():
    table = pd.read_csv(data.find("reward_calibration/paper_dpo_alpacaeval2.csv")).set_index("run")
    assert table.length_controlled_winrate.round(1).tolist() == [51.4, 50.5, 69.5, 70.5]
    assert table.avg_length.tolist() == [1867, 1858, 1798, 1780]


def test_synthetic_lengths_resemble_the_real_ones():
    stand_in, real = (
        np.concatenate(make(20_000))
        for make in (biased_rewards.answer_lengths, biased_rewards.alpacaeval_lengths)
    )
    assert stand_in.mean() == pytest.approx(real.mean(), rel=0.03)
    assert stand_in.std() == pytest.approx(real.std(), rel=0.08)
    assert np.quantile(stand_in, [0.1, 0.5, 0.9, 0.99]) == pytest.approx(
        np.quantile(real, [0.1, 0.5, 0.9, 0.99]), rel=0.3
    )
    a, b = biased_rewards.alpacaeval_lengths(20_000)
    c, d = biased_rewards.answer_lengths(20_000)
    assert spearmanr(a, b).statistic == pytest.approx(spearmanr(c, d).statistic, abs=0.03)


def test_the_card_claims_hold_on_real_lengths():
    pairs = biased_rewards.pairs(seed=60, lengths="alpacaeval")
    models = biased_rewards.reward_models(pairs, seed=60)
    rows = pd.DataFrame(
        row | {"model": i}
        for i, model in enumerate(models)
        for row in biased_rewards.evaluate(pairs, model, {"RC-LWR": rlhf.LowessCalibrator()})
    ).set_index(["method", "model"])
    gain = rows.accuracy["RC-LWR"] - rows.accuracy["none"]
    assert gain.mean() >= 3
    assert gain.min() >= -2
    assert rows.left["RC-LWR"].mean() < 0.05
