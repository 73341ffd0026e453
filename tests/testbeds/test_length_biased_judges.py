"""A leaderboard of models that a judge ranks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from labkit.testbeds.length_biased_judges import GOOD, answers, leaderboard, reading


def judge(input_ids: torch.Tensor, attention_mask: torch.Tensor, length: float = 0.0) -> SimpleNamespace:
    """Pays 8 for the share of good tokens, and for each token of the answer; the prompt is one token."""
    tokens = attention_mask.sum(1) - 1
    good = ((input_ids > 0) & (input_ids < GOOD)).sum(1)
    return SimpleNamespace(logits=(8 * good / tokens + length * tokens)[:, None])


def long_winded(**inputs: torch.Tensor) -> SimpleNamespace:
    return judge(**inputs, length=0.2)


def correlation(table, one: str, other: str) -> float:
    return float(spearmanr(table[one], table[other]).statistic)


def test_a_fair_judge_ranks_by_quality_and_a_biased_one_by_length() -> None:
    fair, biased = (leaderboard(who, together=0.0, prompts=60) for who in (judge, long_winded))
    assert correlation(fair, "win_rate", "true quality") > 0.95
    assert abs(correlation(fair, "win_rate", "length")) < 0.4
    assert correlation(biased, "win_rate", "length") > 0.9 > correlation(biased, "win_rate", "true quality")
    assert fair.win_rate.between(0, 1, inclusive="neither").all()
    assert fair.length.equals(biased.length)


@pytest.mark.parametrize("together", [-0.9, 0.0, 0.9])
def test_quality_and_length_go_together_as_asked(together: float) -> None:
    table = leaderboard(judge, together, models=60, prompts=60)
    assert np.corrcoef(table.length, table["true quality"])[0, 1] == pytest.approx(together, abs=0.15)


def test_reading_is_the_correlation_within_thirds_by_length() -> None:
    some = answers(900, seed=3)
    order = np.argsort(some.lengths, kind="stable")
    scores = some.quality.copy()
    short = some.lengths <= some.lengths[order[299]]
    scores[short] = -scores[short]
    found = reading(scores, some)
    assert found["shortest third"] == pytest.approx(-1)
    assert found["middle third"] == found["longest third"] == pytest.approx(1)
    assert found["all answers"] == pytest.approx(spearmanr(scores, some.quality).statistic)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="together=1.5 is not allowed"):
        leaderboard(judge, 1.5)
    with pytest.raises(ValueError, match="models=3: at least 10"):
        leaderboard(judge, models=3)
