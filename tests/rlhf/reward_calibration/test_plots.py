"""The leaderboard that moves with the strength."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from labkit import rlhf
from labkit.rlhf import reward_calibration as rc


@pytest.fixture
def board():
    rng = np.random.default_rng(0)
    skill, lengths = rng.normal(size=40), rng.uniform(500, 3000, 40)
    late = np.where(np.arange(40) % 2, skill + rng.normal(size=40), np.nan)
    rates = expit(skill + lengths / 500 - 3.5)
    return [f"m{i}" for i in range(40)], rates, lengths, {"skill": skill, "late": late}


def test_ranks_and_correlations_are_those_of_the_calibrated_rates(board):
    names, rates, lengths, known = board
    figure = rc.leaderboard_figure(*board, alpha=0.8, shown=12)
    after = rlhf.calibrate_leaderboard(rates, lengths, alpha=0.8)
    top = sorted(range(40), key=lambda i: -rates[i])[:12]
    assert list(figure.layout.yaxis.ticktext) == [names[i] for i in top]
    wanted = {
        tuple(1 + sum(values[j] > values[i] for j in top) for values in (rates, after, known["skill"]))
        for i in top
    }
    found = {tuple(t.y[i : i + 3]) for t in figure.data[:3] for i in range(0, len(t.y), 4)}
    assert found == wanted
    half = np.isfinite(known["late"])
    agree = [
        spearmanr(after, known["skill"]).statistic,
        spearmanr(after[half], known["late"][half]).statistic,
    ]
    assert list(figure.data[-1].y) == pytest.approx(agree, abs=1e-4)
    curve = figure.data[3]
    assert curve.x[8] == 0.8
    assert curve.y[8] == figure.data[-1].y[0]
    assert curve.y[0] == pytest.approx(spearmanr(rates, known["skill"]).statistic, abs=1e-4)


def test_lines_are_coloured_by_length(board):
    figure = rc.leaderboard_figure(*board, shown=40)
    lengths = dict(zip(board[0], board[2], strict=True))
    drawn = [{lengths[text.split(":")[0]] for text in trace.text} for trace in figure.data[:3]]
    assert max(drawn[0]) < min(drawn[1])
    assert max(drawn[1]) < min(drawn[2])
    assert sorted(map(len, drawn)) == [13, 13, 14]


def test_bad_leaderboards(board):
    names, rates, lengths, known = board
    with pytest.raises(ValueError, match="references is empty"):
        rc.leaderboard_figure(names, rates, lengths, {})
    with pytest.raises(ValueError, match=r"'skill' has shape \(39,\); one entry a model"):
        rc.leaderboard_figure(names, rates, lengths, {"skill": known["skill"][1:]})
    with pytest.raises(ValueError, match=r"'names' has shape \(2,\)"):
        rc.leaderboard_figure(names[:2], rates, lengths, known)
    with pytest.raises(ValueError, match="shares between 0 and 1"):
        rc.leaderboard_figure(names, rates * 100, lengths, known)
