r"""Post-hoc reward calibration: estimate what a reward model pays for length alone, and subtract it.

Huang, Qiu, Wang, Ponti, Titov, "Post-hoc Reward Calibration: A Case Study on Length Bias", ICLR 2025, arXiv 2409.17407.

The idea: a reward is a true reward plus a bias that depends on a feature c(x) of the answer, here its length in characters.
If the true reward does not depend on the length in expectation, the mean reward at a length is the bias plus a constant,

.. math::

    r(x) = r^*(x) + b(c(x)), \qquad \mathbb{E}[r \mid c] = \mathrm{const} + b(c),
    \qquad
    D^* = r(x_1) - r(x_2) - \alpha \big(\hat b(c_1) - \hat b(c_2)\big) .

So smooth the rewards of a batch of answers that were scored anyway against their lengths, and subtract the curve: no
labels, no training, a fraction of a second on one CPU.

Symbols and arguments: c ``lengths``, r ``rewards``, :math:`\hat b` ``bias_``, α ``alpha``. Two smoothers: the mean of the
neighbours (RC-Mean, :class:`LocalMeanCalibrator`) and robust locally weighted regression (RC-LWR,
:class:`LowessCalibrator`, with :func:`lowess` in numpy). Baselines: a fixed penalty per character
(:class:`LengthPenalty`) and the best straight line (:class:`LinearCalibrator`). AlpacaEval's own length
control also needs the difficulty of each prompt and the rows of two gamed baselines: compare with the leaderboard's column.

Local linear regression reproduces straight lines. So at full strength a fixed penalty on the very same length changes
nothing: RC-LWR(r - k·c) has the margins of RC-LWR(r) for every k. At strength α a share 1 - α of the penalty stays. RC-Mean
does not have this property.

Where this differs from the authors' code, and why:

* New answers get the curve interpolated between the lengths it was fitted at, and held constant beyond them (with a
  warning). Theirs looks up the very points it was fitted on.
* The neighbourhood of RC-Mean holds all points within the distance. A slice of theirs drops the last one
  (``exclude_last=True`` does the same) and leaves the order of ties to chance.
* Above 10,000 different lengths LOWESS fits at distances of 1 % of the range and interpolates (``delta="auto"``);
  theirs fits at every point.
* In their AlpacaEval script the penalty before RC-LWR charges the baseline's answer with the other model's length, and the
  row of RC-Mean is overwritten by the penalised run. We do neither.

When the assumption fails (better models do write longer answers), full strength takes quality away with the bias; ``alpha``
below 1 is the remedy, and there is no way to read the right value off the rewards alone.
"""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "calibrators": [
            "LengthPenalty",
            "LinearCalibrator",
            "LocalMeanCalibrator",
            "LowessCalibrator",
        ],
        "features": ["char_length", "markdown_count", "token_length"],
        "judge": ["calibrate_judge", "calibrate_leaderboard"],
        "multi": ["MultiFeatureCalibrator"],
        "online": ["RunningLowess"],
        "moving_board": ["leaderboard_figure"],
        "plots": ["bias_figure", "flips_figure"],
        "report": [
            "Flips",
            "RewardBenchReport",
            "gameability",
            "length_correlation",
            "logit_gameability",
            "preference_flips",
            "win_rate",
        ],
        "saving": ["load_calibrator", "save_calibrator"],
        "smoothers": ["local_mean", "lowess", "lowess_curve", "lowess_delta"],
        "wrapped": ["CalibratedRewardModel"],
    },
)
