"""Reward models whose length bias is known, because we put it there.

A pair has a better answer (*chosen*) and a worse one, of given lengths. A reward model sees the quality of each with
noise, and adds a bias that depends on the length alone: straight, logarithmic, saturating, or a hump. What calibration
should take away is known exactly.

Quality is drawn apart from length, with one exception: in 60 % of the pairs the shorter answer is the better one, as in
RewardBench. That is all that length tells about quality here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import gammaincinv, ndtr
from scipy.stats import spearmanr

from labkit.testbeds import alpacaeval

__all__ = [
    "SHAPES",
    "BiasedRewardModel",
    "Pairs",
    "accuracy",
    "accuracy_by_size",
    "answer_lengths",
    "evaluate",
    "pairs",
    "penalty_effect",
    "reward_models",
    "tuned_penalty",
]

Array = npt.NDArray[np.float64]

# Lengths of AlpacaEval's answers: mean 1548 and standard deviation 1243 characters, which a gamma distribution of this shape
# and scale has, and a rank correlation of 0.49 between two models' answers to one prompt.
_SHAPE, _SCALE, _TOGETHER = 1.55, 1000.0, 0.51
_NOISE = 0.8  # of a score, in spreads of the quality: without any bias 78 % of the pairs are ranked right

#: Bias as a function of the length in characters, before it is brought to spread 1.
SHAPES: dict[str, Callable[[Array], Array]] = {
    "linear": lambda c: c,
    "log": np.log1p,
    "saturating": lambda c: 1 - np.exp(-c / 1000),
    "hump": lambda c: np.exp(-0.5 * ((np.log1p(c) - np.log(1500)) / 0.7) ** 2),
}


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of a better and a worse answer: lengths in characters and qualities, each of shape (pairs,)."""

    lengths_chosen: Array
    lengths_rejected: Array
    quality_chosen: Array
    quality_rejected: Array

    @property
    def lengths(self) -> Array:
        """Of all answers, chosen first, of shape (2 * pairs,)."""
        return np.concatenate([self.lengths_chosen, self.lengths_rejected])

    @property
    def shorter_is_better(self) -> float:
        """Share of the pairs, those of equal length aside."""
        differ = self.lengths_chosen != self.lengths_rejected
        return float((self.lengths_chosen < self.lengths_rejected)[differ].mean())


@dataclass(frozen=True, eq=False)
class BiasedRewardModel:
    """A synthetic reward model's scores of all pairs.

    Attributes
    ----------
    shape, strength : str, float
        Of its bias; a strength of 1 is as large as the spread of the quality.
    chosen, rejected : ndarray of shape (pairs,)
        Scores.
    bias : ndarray of shape (2 * pairs,)
        What is in the scores for length alone, chosen first.
    """

    shape: str
    strength: float
    chosen: Array
    rejected: Array
    bias: Array

    @cached_property
    def scores(self) -> Array:
        """Of all answers, chosen first, of shape (2 * pairs,)."""
        return np.concatenate([self.chosen, self.rejected])

    @property
    def margins(self) -> Array:
        """Chosen minus rejected."""
        return self.chosen - self.rejected


def answer_lengths(count: int, seed: int = 0) -> tuple[Array, Array]:
    """Lengths of pairs of answers of two models to the same prompt, in characters: a stand-in for AlpacaEval's.

    Gamma-distributed, with the mean and the spread of AlpacaEval's answers and their correlation within a prompt.

    Examples
    --------
    >>> a, b = answer_lengths(2000)
    >>> bool(1450 < a.mean() < 1650), bool(0.4 < np.corrcoef(a, b)[0, 1] < 0.6)
    (True, True)
    """
    rng = np.random.default_rng([seed, 1])
    prompt, own = rng.normal(size=count), rng.normal(size=(2, count))
    ranks = ndtr(np.sqrt(_TOGETHER) * prompt + np.sqrt(1 - _TOGETHER) * own)  # uniform
    a, b = np.maximum(np.round(_SCALE * gammaincinv(_SHAPE, ranks)), 1)
    return a, b


def alpacaeval_lengths(count: int, seed: int = 0) -> tuple[Array, Array]:
    """Lengths of pairs of real answers to the same AlpacaEval prompt, of two models drawn at random.

    Raises
    ------
    FileNotFoundError
        Without the data, see :mod:`labkit.testbeds.data`.
    """
    with np.load(alpacaeval.locate("alpacaeval_output_lengths.npz")) as file:
        table = file["len_char"].astype(float)
    rng = np.random.default_rng([seed, 1])
    first, second = rng.integers(0, table.shape[0], (2, 2 * count))
    prompt = rng.integers(0, table.shape[1], 2 * count)
    a, b = table[first, prompt], table[second, prompt]
    usable = np.flatnonzero((first != second) & (a >= 0) & (b >= 0))[:count]
    return a[usable], b[usable]


def pairs(count: int = 2985, seed: int = 0, lengths: str = "synthetic", shorter_better: float = 0.6) -> Pairs:
    """Make pairs.

    Parameters
    ----------
    count : int
        2985 is RewardBench's number.
    seed : int
        Of lengths and qualities.
    lengths : {"synthetic", "alpacaeval"}
        Stand-ins of the same mean and spread, or real ones where the data is.
    shorter_better : float
        Share of the pairs whose shorter answer is the better one.

    Raises
    ------
    ValueError
        For an unknown source, or no pairs.

    Examples
    --------
    >>> bool(abs(pairs().shorter_is_better - 0.6) < 0.03)
    True
    """
    sources = {"synthetic": answer_lengths, "alpacaeval": alpacaeval_lengths}
    if lengths not in sources:
        raise ValueError(f"lengths={lengths!r} is not allowed; one of {', '.join(sources)}")
    if count < 10:
        raise ValueError(f"count={count}: at least 10 pairs are needed")
    a, b = sources[lengths](count, seed)
    rng = np.random.default_rng([seed, 2])
    quality = np.sort(rng.normal(size=(2, count)), axis=0)
    short_first = rng.random(count) < shorter_better
    short, long = np.minimum(a, b), np.maximum(a, b)
    chosen = np.where(short_first, short, long)
    return Pairs(chosen, short + long - chosen, quality[1], quality[0])


def reward_models(
    of: Pairs, count: int = 33, seed: int = 0, strength: tuple[float, float] = (-0.3, 2.5)
) -> list[BiasedRewardModel]:
    """Reward models of different bias, scoring the same pairs.

    Parameters
    ----------
    of : Pairs
    count : int
        33 is the paper's number; shapes take turns.
    seed : int
        Of noise and strengths.
    strength : pair of float
        Strengths are drawn uniformly from this range; a negative one favours short answers (or those outside of the hump).

    Examples
    --------
    >>> models = reward_models(pairs(100), count=5)
    >>> [model.shape for model in models]
    ['linear', 'log', 'saturating', 'hump', 'linear']
    """
    rng = np.random.default_rng([seed, 3])
    quality = np.concatenate([of.quality_chosen, of.quality_rejected])
    made = []
    for number in range(count):
        shape = list(SHAPES)[number % len(SHAPES)]
        curve = SHAPES[shape](of.lengths)
        size = rng.uniform(*strength)
        bias = size * (curve - curve.mean()) / curve.std()
        scores = quality + bias + _NOISE * rng.normal(size=len(bias))
        chosen, rejected = np.split(scores, 2)
        made.append(BiasedRewardModel(shape, float(size), chosen, rejected, bias))
    return made


def accuracy(margins: Array) -> float:
    """Per cent of the pairs whose better answer has the strictly higher score."""
    return 100 * float((margins > 0).mean())


def evaluate(of: Pairs, model: BiasedRewardModel, calibrators: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What each calibrator makes of a reward model, fitted on all of its scores.

    Parameters
    ----------
    of : Pairs
    model : BiasedRewardModel
    calibrators : mapping of name to calibrator
        With ``fit_pairs``, ``margins`` and ``transform``.

    Yields
    ------
    dict
        ``method`` (``"none"`` first, ``"bias known"`` last), ``accuracy`` in per cent, ``left`` the absolute Spearman
        correlation of reward and length, ``flipped`` the share of preferences turned, ``lean`` that correlation before.
    """
    a, b = (of.lengths_chosen, model.chosen), (of.lengths_rejected, model.rejected)
    lean = abs(float(spearmanr(of.lengths, model.scores).statistic))
    yield {"method": "none", "accuracy": accuracy(model.margins), "left": lean, "flipped": 0.0, "lean": lean}
    known = np.split(model.scores - model.bias, 2)
    for name, calibrator in [*calibrators.items(), ("bias known", None)]:
        if calibrator is None:
            after, scores = known[0] - known[1], np.concatenate(known)
        else:
            after = calibrator.fit_pairs(*a, *b).margins(*a, *b)
            scores = calibrator.transform(of.lengths, model.scores)
        left = abs(float(spearmanr(of.lengths, scores).statistic))
        flipped = float(((after > 0) != (model.margins > 0)).mean())
        yield {"method": name, "accuracy": accuracy(after), "left": left, "flipped": flipped, "lean": lean}


def tuned_penalty(
    of: Pairs, models: Sequence[BiasedRewardModel], prices: npt.ArrayLike | None = None
) -> float:
    """Mean accuracy of one price per character for all models, on scores of spread 1, the best of 13 *by the labels*."""
    gap = of.lengths_chosen - of.lengths_rejected
    tried = np.geomspace(1e-5, 1e-2, 13) if prices is None else np.asarray(prices, dtype=float)
    table = [[accuracy(m.margins / m.scores.std() - price * gap) for price in tried] for m in models]
    return float(np.mean(table, axis=0).max())


def accuracy_by_size(
    of: Pairs, models: Sequence[BiasedRewardModel], calibrator: Any, sizes: Sequence[int], seed: int = 0
) -> Array:
    """Mean accuracy on all pairs when the calibrator is fitted to so many answers drawn at random, one per size."""
    rng = np.random.default_rng([seed, 4])
    table = np.empty((len(models), len(sizes)))
    for row, model in enumerate(models):
        pair = (of.lengths_chosen, model.chosen, of.lengths_rejected, model.rejected)
        for column, size in enumerate(sizes):
            some = rng.permutation(len(model.scores))[:size]
            table[row, column] = accuracy(calibrator.fit(of.lengths[some], model.scores[some]).margins(*pair))
    return table.mean(axis=0)


def penalty_effect(of: Pairs, model: BiasedRewardModel, calibrator: Any, price: float = 0.001) -> float:
    """Largest change of a calibrated margin when every character is charged a price before the fit.

    A smoother that reproduces straight lines swallows the price at full strength. At strength alpha it leaves a share
    1 - alpha of it.

    Examples
    --------
    >>> from labkit import rlhf
    >>> some = pairs(100)
    >>> model = reward_models(some, count=1)[0]
    >>> bool(penalty_effect(some, model, rlhf.LowessCalibrator()) < 1e-9)
    True
    >>> gap = abs(some.lengths_chosen - some.lengths_rejected).max()
    >>> half = penalty_effect(some, model, rlhf.LowessCalibrator(alpha=0.5))
    >>> bool(abs(half - 0.5 * 0.001 * gap) < 1e-9)
    True
    """
    a, b = of.lengths_chosen, of.lengths_rejected
    free, charged = ((a, model.chosen - cost * a, b, model.rejected - cost * b) for cost in (0.0, price))
    plain = calibrator.fit_pairs(*free).margins(*free)
    return float(np.abs(calibrator.fit_pairs(*charged).margins(*charged) - plain).max())
