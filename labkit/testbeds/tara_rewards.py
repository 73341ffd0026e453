"""A reward that reads words alone, or words and what a tool said: the Bradley-Terry model with a linear r.

P(better > worse) = σ(r(better) − r(worse)), fitted as a logistic regression on differences of features. Needs
scikit-learn.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from labkit.rlhf.themis import TraceFormat
from labkit.testbeds.tara import Pair, shuffled, swapped

__all__ = ["OVERLAPS", "STRENGTHS", "BradleyTerry", "judged", "overlap"]

Array = npt.NDArray[np.float64]
#: What `overlap` counts.
OVERLAPS = ("share told", "all told", "share of numbers told", "any number told")
#: Of regularisation, that are tried.
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)
_WORD = re.compile(r"[a-z_]+|\d+(?:[.:-]\d+)*")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def overlap(question: str, answer: str, observation: str) -> list[float]:
    """The `OVERLAPS` of an answer: its words that the question lacks, looked for among the tool's.

    None of them grows with the answer. In every training pair of the code task the better answer is the longer one, in
    the test pairs one in five; a count would carry that over.

    Examples
    --------
    >>> overlap("Which day is 2023-03-04?", "2023-03-04 is Saturday", "Saturday")
    [1.0, 1.0, 0.0, 0.0]
    >>> overlap("How many days?", "It is 12", "13")
    [0.0, 0.0, 0.0, 0.0]
    """
    new = set(_words(answer)) - set(_words(question))
    told = new & set(_words(observation))
    numbers = {word for word in new if word[0].isdigit()}
    known = numbers & told
    return [
        len(told) / max(1, len(new)),
        float(bool(new) and told == new),
        len(known) / max(1, len(numbers)),
        float(bool(known)),
    ]


class BradleyTerry:
    """A linear reward of words and, with tools, of the observation's words and the `OVERLAPS`.

    Parameters
    ----------
    tools : bool
        False reads question and answer alone.
    strengths : sequence of float
        Inverse strengths of regularisation; the one that is best in five folds of the training pairs is taken.
    """

    def __init__(self, tools: bool, strengths: Sequence[float] = STRENGTHS) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.tools, self.strengths = tools, tuple(strengths)
        self.words = TfidfVectorizer(analyzer=_terms, sublinear_tf=True)
        self.told = TfidfVectorizer(analyzer=_words, sublinear_tf=True)
        self.strength = 0.0
        self.weights: Array = np.zeros(0)

    def fit(self, pairs: Sequence[Pair]) -> BradleyTerry:
        """Learn from pairs.

        Raises
        ------
        ValueError
            For fewer than ten.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import cross_val_score

        if len(pairs) < 10:
            raise ValueError(f"at least 10 pairs are needed, got {len(pairs)}")
        samples = [sample for which in (0, 1) for sample in _samples(pairs, which)]
        self.words.fit([TraceFormat().plain(question, answer) for question, answer, _ in samples])
        if self.tools:
            self.told.fit([observation for *_, observation in samples])
        difference = self._features(pairs, 0) - self._features(pairs, 1)  # (pairs, features)
        # Without an intercept a pair and its mirror image weigh the same, so one of them is enough.
        sign = np.where(np.arange(len(pairs)) % 2 == 0, 1, -1)
        mirrored = difference.multiply(sign[:, None]).tocsr()
        scores = {}
        for strength in self.strengths if len(self.strengths) > 1 else ():
            model = LogisticRegression(C=strength, fit_intercept=False, max_iter=3000)
            scores[strength] = cross_val_score(model, mirrored, sign, cv=5).mean()
        self.strength = max(self.strengths, key=lambda each: scores.get(each, 0.0))
        last = LogisticRegression(C=self.strength, fit_intercept=False, max_iter=3000).fit(mirrored, sign)
        self.weights = last.coef_[0]
        return self

    def margins(self, pairs: Sequence[Pair]) -> Array:
        """Reward of the better answer less that of the worse, of shape (pairs,)."""
        gap: Array = (self._features(pairs, 0) - self._features(pairs, 1)) @ self.weights
        return np.where(np.abs(gap) < 1e-9, 0.0, gap)

    def accuracy(self, pairs: Sequence[Pair]) -> float:
        """Share of pairs in the right order; half of the ties counts, as would a coin."""
        gap = self.margins(pairs)
        return float(np.mean(gap > 0) + 0.5 * np.mean(gap == 0))

    def _features(self, pairs: Sequence[Pair], which: int) -> Any:
        from scipy.sparse import csr_array, hstack

        samples = _samples(pairs, which)
        words = self.words.transform(
            [TraceFormat().plain(question, answer) for question, answer, _ in samples]
        )
        if not self.tools:
            return csr_array(words)
        told = self.told.transform([observation for *_, observation in samples])
        return hstack([words, told, csr_array([overlap(*sample) for sample in samples])]).tocsr()


def _samples(pairs: Sequence[Pair], which: int) -> list[tuple[str, str, str]]:
    return [(pair.question, pair.answers[which], pair.observations[which]) for pair in pairs]


def _terms(text: str) -> list[str]:
    said = _words(text)
    return said + [f"{first} {second}" for first, second in itertools.pairwise(said)]


def judged(
    train: Mapping[str, Sequence[Pair]],
    test: Mapping[str, Sequence[Pair]],
    trainings: Sequence[str] = ("single", "mixed"),
) -> dict[str, Any]:
    """Accuracy on each task's test pairs, of rewards trained on each task alone and on all together.

    Parameters
    ----------
    train, test : mapping
        Task to pairs, the same tasks in both.
    trainings : sequence of str
        Of ``single`` and ``mixed``.

    Returns
    -------
    dict
        ``single`` and ``mixed``: by task ``text``, ``tool`` and ``shuffled`` (a reward with tools that was trained and
        tested on `shuffled` observations) and ``text, best`` (``text`` with the strength that suits the test pairs best,
        which no choice among them could beat), and under ``average`` the mean over all pairs. ``swapped``: by training and
        task, of the pairs that the reward with tools has in order, how many it turns round when they are `swapped`.
        ``strengths``: what was chosen.

    Raises
    ------
    ValueError
        When training and test tasks differ, or a training is unknown.
    """
    if set(train) != set(test):
        raise ValueError(
            f"train has the tasks {sorted(train)} and test {sorted(test)}; they must be the same"
        )
    unknown = sorted(set(trainings) - {"single", "mixed"})
    if unknown:
        raise ValueError(f"trainings must be of single and mixed, got {unknown}")
    mix = {task: shuffled(pairs, 0) for task, pairs in train.items()}
    control = {task: shuffled(pairs, 1) for task, pairs in test.items()}
    arms: dict[str, tuple[bool, Mapping[str, Sequence[Pair]], Mapping[str, Sequence[Pair]]]] = {
        "text": (False, train, test),
        "tool": (True, train, test),
        "shuffled": (True, mix, control),
    }
    out: dict[str, Any] = {"swapped": {}, "strengths": {}}
    for training in trainings:
        table: dict[str, dict[str, float]] = {task: {} for task in test}
        turned: dict[str, dict[str, int]] = {}
        strengths: dict[str, dict[str, float]] = {}
        best = [_accuracies(_train(training, False, train, (each,)), test) for each in STRENGTHS]
        for task in test:
            table[task]["text, best"] = round(max(found[task] for found in best), 4)
        for name, (tools, learned, tried) in arms.items():
            models = _train(training, tools, learned)
            strengths[name] = {task: model.strength for task, model in models.items()}
            for task in test:
                table[task][name] = round(models[task].accuracy(tried[task]), 4)
                if name == "tool":
                    turned[task] = _turned(models[task], tried[task])
        sizes = [len(test[task]) for task in test]
        average = {
            name: round(float(np.average([table[task][name] for task in test], weights=sizes)), 4)
            for name in ("text, best", *arms)
        }
        out[training] = {**table, "average": average}
        out["swapped"][training] = {**turned, "all": _total(turned.values())}
        out["strengths"][training] = strengths
    return out


def _train(
    training: str, tools: bool, pairs: Mapping[str, Sequence[Pair]], strengths: Sequence[float] = STRENGTHS
) -> dict[str, BradleyTerry]:
    if training == "single":
        return {task: BradleyTerry(tools, strengths).fit(found) for task, found in pairs.items()}
    mixed = BradleyTerry(tools, strengths).fit([pair for found in pairs.values() for pair in found])
    return dict.fromkeys(pairs, mixed)


def _accuracies(models: Mapping[str, BradleyTerry], test: Mapping[str, Sequence[Pair]]) -> dict[str, float]:
    return {task: models[task].accuracy(pairs) for task, pairs in test.items()}


def _turned(model: BradleyTerry, pairs: Sequence[Pair]) -> dict[str, int]:
    before, after = model.margins(pairs), model.margins([swapped(pair) for pair in pairs])
    right = before > 0
    return {"flipped": int((right & (after < 0)).sum()), "of": int(right.sum())}


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    rows = list(counts)
    return {key: sum(row[key] for row in rows) for key in ("flipped", "of")}
