r"""How different are several answers to one prompt?

Four measures of curiosity-driven RLHF (arXiv 2501.11463), over the texts that a model gave to the same prompt:

==========================  =======================================================================  ==========
`distinct_product`          product over n = 1..5 of distinct n-grams / n-grams, texts joined         higher
`ead`                       expectation-adjusted distinct n-grams, mean over n = 1..5                 higher
`self_bleu`                 BLEU-4 of each text against the others                                    lower
`embedding_similarity`      mean cosine of the texts' embeddings                                      lower
==========================  =======================================================================  ==========

The last column says where more diverse texts lie. Each takes the texts of one prompt, or a list of such lists, of which
it returns the mean, as the paper reports it (10 samples at temperature 1 for each of 500 prompts).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "bleu",
    "distinct_n",
    "distinct_product",
    "diversity_report",
    "ead",
    "embedding_similarity",
    "self_bleu",
    "tfidf",
]

Texts = Sequence[str] | Sequence[Sequence[str]]
Embed = Callable[[list[str]], Any]
Counts = Counter[tuple[str, ...]]
ORDERS = (1, 2, 3, 4, 5)


def distinct_n(texts: Texts, n: int) -> float:
    """Share of the n-grams of the texts that are different from one another (Li et al. 2016).

    Parameters
    ----------
    texts : sequence of str, or of such sequences
        Texts of one prompt, pooled; n-grams do not cross from one to the next. Of several prompts, the mean.
    n : int

    Returns
    -------
    float
        In [0, 1]; 0 without any n-gram.

    Raises
    ------
    ValueError
        When `n` is less than 1, or a prompt has fewer than two texts.

    Examples
    --------
    >>> distinct_n(["a b", "a c"], 1)
    0.75
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")

    def one(group: list[str]) -> float:
        grams = [g for text in group for g in _ngrams(text.split(), n)]
        return len(set(grams)) / len(grams) if grams else 0.0

    return _mean(texts, one)


def distinct_product(texts: Texts, *, official: bool = False) -> float:
    """Product over n = 1..5 of distinct n-grams over n-grams: the paper's "Diversity".

    Parameters
    ----------
    texts : sequence of str, or of such sequences
        Texts of one prompt, joined by spaces; of several prompts, the mean.
    official : bool
        Count as the authors' code: the last n-gram is left out, and each repetition rate is rounded to hundredths
        of a percent before the product.

    Returns
    -------
    float
        In [0, 1]. An n without n-grams counts as 1.

    Raises
    ------
    ValueError
        When a prompt has fewer than two texts.

    Examples
    --------
    >>> distinct_product(["a b c", "a b d"])        # 4/6 * 4/5 of the first two orders, the others all differ
    0.5333333333333333
    >>> distinct_product(["yes", "yes"])
    0.5
    """

    def one(group: list[str]) -> float:
        words = " ".join(group).split()
        product = 1.0
        for n in ORDERS:
            grams = _ngrams(words, n)
            if official:
                grams = grams[:-1]
            if not grams:
                continue
            repeated = 1 - len(set(grams)) / len(grams)
            product *= 1 - (round(100 * repeated, 2) / 100 if official else repeated)
        return product

    return _mean(texts, one)


def ead(texts: Texts, *, vocab_size: int = 256_000) -> float:
    r"""Expectation-adjusted distinct n-grams (Liu et al. 2022), mean over n = 1..5.

    .. math:: \mathrm{EAD}_n = \frac{N}{V \left(1 - \left(\frac{V-1}{V}\right)^C\right)}

    with N distinct n-grams among C, and V the vocabulary: the distinct n-grams over how many one would expect of C
    draws, so that long texts are not at a disadvantage.

    Parameters
    ----------
    texts : sequence of str, or of such sequences
        Texts of one prompt, pooled; full stops and line breaks are removed first. Of several prompts, the mean.
    vocab_size : int
        V; the paper's 256,000 is Gemma's.

    Returns
    -------
    float
        0 without any n-gram; slightly above 1 is possible for small V.

    Raises
    ------
    ValueError
        When `vocab_size` is less than 2, or a prompt has fewer than two texts.

    Examples
    --------
    >>> round(ead(["a b c d e", "v w x y z"]), 4), round(ead(["a b c d e", "a b c d e"]), 4)
    (1.0, 0.5)
    """
    if vocab_size < 2:
        raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
    shrink = math.log1p(-1 / vocab_size)

    def one(group: list[str]) -> float:
        words = [[w for w in text.replace(".", "").replace("\n", "").split(" ") if w] for text in group]
        found = []
        for n in ORDERS:
            grams = [g for text in words for g in _ngrams(text, n)]
            expected = -vocab_size * math.expm1(len(grams) * shrink)
            found.append(len(set(grams)) / expected if grams else 0.0)
        return sum(found) / len(found)

    return _mean(texts, one)


def self_bleu(texts: Texts) -> float:
    """BLEU-4 of each text against the others as references, mean over the texts (Zhu et al. 2018).

    Uniform weights, words split at white space, a precision without matches counts 0.1 matches (Chen and Cherry's
    first method), the brevity penalty takes the reference of the closest length.

    Parameters
    ----------
    texts : sequence of str, or of such sequences
        Texts of one prompt; of several prompts, the mean.

    Returns
    -------
    float
        In [0, 1]; lower is more diverse.

    Raises
    ------
    ValueError
        When a prompt has fewer than two texts.

    Examples
    --------
    >>> self_bleu(["the cat sat on the mat", "the cat sat on the mat"]), self_bleu(["a b", "c d"])
    (1.0, 0.0)
    """

    def one(group: list[str]) -> float:
        counted = [_counted(text) for text in group]
        found = [_bleu(t.split(), counted[:i] + counted[i + 1 :]) for i, t in enumerate(group)]
        return sum(found) / len(group)

    return _mean(texts, one)


def bleu(text: str, references: Sequence[str]) -> float:
    """BLEU-4 of a text against references, counted as in `self_bleu`.

    Parameters
    ----------
    text : str
    references : sequence of str
        At least one.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    ValueError
        Without references.

    Examples
    --------
    >>> bleu("the cat sat on the mat", ["a dog ran", "the cat sat on the mat"])
    1.0
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"references must be a list of at least one text, got {references!r}")
    return _bleu(text.split(), [_counted(r) for r in references])


def tfidf(texts: list[str]) -> Any:
    """Embed texts as TF-IDF vectors of their words: a stand-in where no sentence encoder is at hand.

    Parameters
    ----------
    texts : list of str

    Returns
    -------
    ndarray
        ``(len(texts), words)``, rows of length 1, or of zeros for a text without words.

    Raises
    ------
    ImportError
        Without scikit-learn.

    Examples
    --------
    >>> tfidf(["red green", "green red", "blue"]).shape
    (3, 3)
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError:
        raise ImportError("tfidf needs scikit-learn: pip install scikit-learn") from None
    if not any(text.split() for text in texts):
        return np.zeros((len(texts), 1))
    return TfidfVectorizer(token_pattern=r"\S+").fit_transform(texts).toarray()


def embedding_similarity(texts: Texts, embed: Embed = tfidf) -> float:
    """Mean cosine between the embeddings of different texts.

    Parameters
    ----------
    texts : sequence of str, or of such sequences
        Texts of one prompt; of several prompts, the mean.
    embed : callable
        From n texts to an array ``(n, d)``. The paper's "SentBERT" is
        ``SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2").encode``.

    Returns
    -------
    float
        In [-1, 1]; lower is more diverse.

    Raises
    ------
    ValueError
        When a prompt has fewer than two texts, or `embed` returns another number of rows or what is not finite.

    Examples
    --------
    >>> round(embedding_similarity(["red green", "green red"]), 6), embedding_similarity(["red", "blue"])
    (1.0, 0.0)
    """

    def one(group: list[str]) -> float:
        vectors = np.asarray(embed(group), dtype=float)
        if vectors.ndim != 2 or len(vectors) != len(group):
            raise ValueError(f"embed must return one row a text, ({len(group)}, d); got {vectors.shape}")
        wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(wrong):
            place = int(wrong[0])
            raise ValueError(
                f"embed must return finite numbers; the embedding of text {place}, {group[place]!r:.60}, holds nan or inf"
            )
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
        total = np.square(unit.sum(0)).sum() - np.square(unit).sum()
        return float(total / (len(group) * (len(group) - 1)))

    return _mean(texts, one)


def diversity_report(
    texts: Sequence[Sequence[str]],
    *,
    embed: Embed | None = None,
    vocab_size: int = 256_000,
    official: bool = False,
) -> pd.DataFrame:
    """All measures, a row a prompt; ``.mean()`` is what the paper reports.

    Parameters
    ----------
    texts : sequence of sequences of str
        Several texts for each prompt. The texts of a single prompt will do too.
    embed : callable, optional
        As for `embedding_similarity`. Without it the column is ``tfidf_similarity``, which cannot be compared with the
        paper's.
    vocab_size : int
        As for `ead`.
    official : bool
        As for `distinct_product`.

    Returns
    -------
    pandas.DataFrame
        Columns ``distinct_product``, ``ead``, ``self_bleu`` and ``embedding_similarity`` or ``tfidf_similarity``.

    Raises
    ------
    ValueError
        When a prompt has fewer than two texts.

    Examples
    --------
    >>> diversity_report([["a b c d", "e f g h"], ["a b c d", "a b c d"]]).round(2).self_bleu.tolist()
    [0.0, 1.0]
    """
    import pandas as pd

    name = "tfidf_similarity" if embed is None else "embedding_similarity"
    rows = [
        {
            "distinct_product": distinct_product(group, official=official),
            "ead": ead(group, vocab_size=vocab_size),
            "self_bleu": self_bleu(group),
            name: embedding_similarity(group, embed or tfidf),
        }
        for group in _groups(texts)
    ]
    return pd.DataFrame(rows).rename_axis("prompt")


def _bleu(words: list[str], references: Sequence[tuple[int, list[Counts]]]) -> float:
    """BLEU-4 of one text against references, each given by its length and its counts."""
    length, logs = len(words), 0.0
    for order in range(4):
        own = Counter(_ngrams(words, order + 1))
        matches = sum(min(n, max(counts[order][gram] for _, counts in references)) for gram, n in own.items())
        if order == 0 and matches == 0:
            return 0.0
        logs += math.log((matches or 0.1) / max(1, length - order)) / 4
    closest = min((n for n, _ in references), key=lambda n: (abs(n - length), n))
    return math.exp(logs) * (1.0 if length > closest else math.exp(1 - closest / length))


def _counted(text: str) -> tuple[int, list[Counts]]:
    words = text.split()
    return len(words), [Counter(_ngrams(words, n)) for n in (1, 2, 3, 4)]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _groups(texts: Texts) -> list[list[str]]:
    if isinstance(texts, str) or not all(isinstance(t, str | Sequence) for t in texts):
        raise TypeError(f"texts must be a list of texts, or one such list a prompt; got {texts!r:.80}")
    lists: list[Sequence[str]] = [t for t in texts if not isinstance(t, str)]
    if lists and len(lists) < len(texts):
        raise TypeError("texts mixes texts and lists of texts: give one list a prompt")
    groups = [list(group) for group in lists] if lists else [[t for t in texts if isinstance(t, str)]]
    for number, group in enumerate(groups):
        if len(group) < 2:
            raise ValueError(
                f"diversity needs at least two texts of a prompt; prompt {number} has {len(group)}"
            )
        wrong = next((t for t in group if not isinstance(t, str)), None)
        if wrong is not None:
            raise TypeError(f"texts of prompt {number} must be str, got {type(wrong).__name__}")
    return groups


def _mean(texts: Texts, measure: Callable[[list[str]], float]) -> float:
    groups = _groups(texts)
    return sum(measure(group) for group in groups) / len(groups)
