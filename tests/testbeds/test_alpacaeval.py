"""What is known of AlpacaEval's data without having it."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit import papers
from labkit.lab import claims
from labkit.testbeds import alpacaeval, biased_rewards, data, recorded

CLAIMS = {"judge": "judge-nearer-to-lc", "half": "half-strength-helps", "full": "full-strength-hurts"}


def test_without_the_data_the_error_names_the_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(data.ENVIRONMENT, str(tmp_path))
    for call in (
        alpacaeval.leaderboard,
        alpacaeval.judge,
        lambda: biased_rewards.pairs(20, lengths="alpacaeval"),
    ):
        with pytest.raises(FileNotFoundError, match=r'LABKIT_DATA name its parent.*data="synthetic" shows'):
            call()
    (tmp_path / "reward_calibration").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"holds no 'alpacaeval2_leaderboard.csv'.*data=\"synthetic\""
    ):
        alpacaeval.leaderboard()


def test_gains_of_the_record_read_off_by_hand() -> None:
    found = alpacaeval.gains(recorded.read("reward_calibration"))
    # At 0.5: +.0256, +.0266, -.0111, +.0396. At 1: -.1459, -.0641, -.2045, -.0963.
    assert found == pytest.approx({"judge": 0.0118, "half": 0.0256, "full": -0.0641}, abs=1e-9)


def test_a_worse_board_would_not_pass() -> None:
    record = recorded.read("reward_calibration")
    board = record["leaderboard"]["0.7"]
    for name in (alpacaeval.LC, "Arena, Feb 2024"):
        board[name] = [board[name][0] - 0.01 * step for step in range(16)]
    board["Arena, length-controlled"][10] = 0.99
    record["judge"]["0.1"] = 0.96
    paper = papers.load("reward_calibration")
    for name, value in alpacaeval.gains(record).items():
        verdict = claims.judge(paper.claim(CLAIMS[name]), "laptop", [value])
        assert verdict.verdict == claims.NOT_REPRODUCED, name


def test_claims_without_the_data_say_so() -> None:
    paper = papers.load("reward_calibration")
    for claim in CLAIMS.values():
        verdict = claims.judge(paper.claim(claim), "laptop", None)
        assert (verdict.verdict, verdict.reason[:17]) == (claims.UNTESTABLE, "AlpacaEval's data"), claim


@pytest.mark.parametrize("size", ["gpu", "paper"])
def test_sizes_that_are_not_wired_are_refused_before_anything_runs(size: str) -> None:
    with pytest.raises(ValueError, match=f"size='{size}': reward_calibration has the sizes smoke, laptop"):
        papers.load("reward_calibration").check({"size": size})
