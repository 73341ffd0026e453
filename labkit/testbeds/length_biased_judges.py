"""A small reward model that learned to like length, because the people whose preferences it was trained on do.

An answer is a list of tokens. Some tokens are *good*; the quality of an answer is the share of good tokens in it,
whatever its length. The annotators compare qualities, but also lean towards the longer answer. A Llama classifier
trained on their choices learns both. Picking the best of several answers by its score then picks long ones, and models
that write long answers lead a leaderboard that it judges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from scipy.stats import spearmanr

__all__ = ["PROMPT", "Answers", "answers", "best_of", "leaderboard", "picks", "reading", "train_reward_model"]

VOCAB, GOOD, PAD = 65, 32, 0  # tokens 1 to 31 are good, 32 to 63 are not
PROMPT = [64]  # the same for all answers; a model can only count what it attends to against something
SHORTEST, LONGEST = 8, 48
_EAGER, _LEANING = 8.0, 1.5  # what annotators give for quality, and for length in spreads of it


@dataclass(frozen=True, eq=False)
class Answers:
    """Answers as token ids, with their true quality, of shape (answers,), and their lengths in tokens."""

    ids: list[list[int]]
    quality: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)


def answers(count: int, seed: int = 0) -> Answers:
    """Draw answers whose quality is independent of their length.

    Examples
    --------
    >>> some = answers(500)
    >>> bool(abs(np.corrcoef(some.quality, some.lengths)[0, 1]) < 0.15)
    True
    """
    rng = np.random.default_rng([seed, 7])
    lengths = np.clip(np.round(SHORTEST + rng.gamma(1.55, 9.0, count)), SHORTEST, LONGEST).astype(int)
    wanted = rng.uniform(0.2, 0.8, count)
    ids, quality = _written(rng, lengths, wanted)
    return Answers(ids, quality, lengths.astype(float))


def _written(
    rng: np.random.Generator, lengths: npt.NDArray[Any], wanted: npt.NDArray[np.float64]
) -> tuple[list[list[int]], npt.NDArray[np.float64]]:
    """Token ids of answers of given lengths with a given share of good tokens, and the share after rounding."""
    ids, quality = [], np.empty(len(lengths))
    for row, (length, share) in enumerate(zip(lengths, wanted, strict=True)):
        good = rng.permutation(length) < round(share * length)
        tokens = np.where(good, rng.integers(1, GOOD, length), rng.integers(GOOD, VOCAB - 1, length))
        ids.append(tokens.tolist())
        quality[row] = good.mean()
    return ids, quality


def train_reward_model(
    seed: int = 0, pairs: int = 4000, steps: int = 150, batch: int = 32, leaning: float = _LEANING
) -> Any:
    """Train a Llama sequence classifier on the annotators' choices (Bradley-Terry loss).

    Parameters
    ----------
    seed : int
        Of the answers, the choices and the weights.
    pairs : int
        Compared answers, two each.
    steps, batch : int
        Updates, and pairs in each.
    leaning : float
        How strongly annotators lean towards length: log-odds for a standard deviation of it. 0 for fair ones.

    Returns
    -------
    LlamaForSequenceClassification
        With one label, in evaluation mode.
    """
    from transformers import LlamaConfig, LlamaForSequenceClassification

    world = answers(2 * pairs, seed)
    rng = np.random.default_rng([seed, 8])
    a, b = np.split(rng.permutation(2 * pairs), 2)
    spread = world.lengths.std()
    odds = (
        _EAGER * (world.quality[a] - world.quality[b])
        + leaning * (world.lengths[a] - world.lengths[b]) / spread
    )
    first = rng.random(pairs) < 1 / (1 + np.exp(-odds))
    chosen, rejected = np.where(first, a, b), np.where(first, b, a)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * LONGEST,
        pad_token_id=PAD,
    )
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        rows = rng.integers(0, pairs, batch)
        ids, mask = _padded([PROMPT + world.ids[row] for row in (*chosen[rows], *rejected[rows])])
        scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
        loss = -torch.nn.functional.logsigmoid(scores[:batch] - scores[batch:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the right, and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    return ids, (ids != PAD).long()


def best_of(
    scores: npt.NDArray[np.float64], values: npt.NDArray[np.float64], n: int, group: int = 16
) -> float:
    """Mean value of the answers with the highest score among the first n of each group.

    Examples
    --------
    >>> best_of(np.array([1.0, 2.0, 5.0, 4.0]), np.array([10.0, 20.0, 30.0, 40.0]), n=2, group=2)
    25.0
    """
    best = scores.reshape(-1, group)[:, :n].argmax(axis=1)
    return float(values.reshape(-1, group)[np.arange(len(best)), best].mean())


def picks(scores: Mapping[str, Any], of: Answers, choices: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Quality and length (over the mean length) of the answers that several scores pick, out of n of 16, for each n.

    Yields
    ------
    dict
        ``by`` the name of the score, ``n``, ``quality``, ``length``.
    """
    for name, values in scores.items():
        for n in choices:
            rank = np.asarray(values, dtype=float)
            yield {
                "by": name,
                "n": n,
                "quality": best_of(rank, of.quality, n),
                "length": best_of(rank, of.lengths / of.lengths.mean(), n),
            }


def reading(scores: npt.ArrayLike, of: Answers) -> dict[str, float]:
    """How well scores read true quality: Spearman's correlation over all answers, and in each third by length.

    Examples
    --------
    >>> some = answers(300)
    >>> found = reading(np.where(some.lengths > 20, some.quality, 0.1 * some.lengths), some)
    >>> found["longest third"] > 0.99 > 0.5 > found["shortest third"]
    True
    """
    values = np.asarray(scores, dtype=float)
    third = np.searchsorted(np.quantile(of.lengths, [1 / 3, 2 / 3]), of.lengths)
    parts = {"all answers": third >= 0}
    parts |= {f"{name} third": third == k for k, name in enumerate(("shortest", "middle", "longest"))}
    return {name: float(spearmanr(values[rows], of.quality[rows]).statistic) for name, rows in parts.items()}


def leaderboard(
    judge: Any, together: float = 0.5, models: int = 24, prompts: int = 30, seed: int = 0
) -> pd.DataFrame:
    """Models that answer the same prompts, ranked by a judge: win rates against one of their own number.

    Models differ in the quality and in the length of their answers; the baseline is of average quality and length. A win
    rate is the mean of the sigmoid of the difference of the two answers' scores.

    Parameters
    ----------
    judge : LlamaForSequenceClassification
        Such as `train_reward_model` returns.
    together : float
        Correlation of quality and length over models, -0.95 to 0.95. Above 0 better models write longer answers, as on
        real leaderboards, and calibration's assumption fails.
    models, prompts : int
        Models, and answers of each.
    seed : int

    Returns
    -------
    pandas.DataFrame
        Indexed by model: ``win_rate`` in (0, 1), mean ``length`` in tokens, ``true quality``.

    Raises
    ------
    ValueError
        For a correlation outside of the range, or fewer than 10 models.
    """
    if not -0.95 <= together <= 0.95:
        raise ValueError(f"together={together} is not allowed; a correlation of -0.95 to 0.95")
    if models < 10:
        raise ValueError(f"models={models}: at least 10 are needed for a curve over models")
    rng = np.random.default_rng([seed, 9])
    draw = rng.normal(size=(2, models))
    draw = np.linalg.solve(np.linalg.cholesky(np.cov(draw)), draw - draw.mean(axis=1, keepdims=True))
    skill = np.append(draw[0], 0.0)  # the last is the baseline
    wordy = np.append(together * draw[0] + np.sqrt(1 - together**2) * draw[1], 0.0)
    row = np.repeat(np.arange(models + 1), prompts)
    lengths = np.round(26 + 9 * wordy[row] + 3 * rng.normal(size=len(row)))
    lengths = np.clip(lengths, SHORTEST, LONGEST).astype(int)
    ids, quality = _written(
        rng, lengths, np.clip(0.5 + 0.05 * skill[row] + 0.05 * rng.normal(size=len(row)), 0, 1)
    )
    with torch.no_grad():
        tokens, mask = _padded([PROMPT + answer for answer in ids])
        scores = judge(input_ids=tokens, attention_mask=mask).logits[:, 0].double().numpy()
    table = scores.reshape(models + 1, prompts)
    return pd.DataFrame(
        {
            "win_rate": (1 / (1 + np.exp(table[-1] - table[:-1]))).mean(axis=1),
            "length": lengths.reshape(table.shape)[:-1].mean(axis=1),
            "true quality": quality.reshape(table.shape)[:-1].mean(axis=1),
        },
        index=pd.Index([f"model {number}" for number in range(1, models + 1)], name="model"),
    )
