"""Measures of how different several answers to a prompt are."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from labkit.rlhf import (
    distinct_n,
    distinct_product,
    diversity_report,
    ead,
    embedding_similarity,
    self_bleu,
)


@pytest.fixture
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices("abcde", k=draw.randint(6, 9))) for _ in range(5)]


def test_distinct_product_by_hand():
    # joined: a b a b c; 3/5 words, 3/4 pairs (a b twice), then all differ
    assert distinct_product(["a b a", "b c"]) == pytest.approx(3 / 5 * 3 / 4)
    # without the last n-gram: a b a b -> 2/4; ab ba ab -> 2/3, of which 33.33 % repeats; then all differ
    assert distinct_product(["a b a", "b c"], official=True) == pytest.approx(0.5 * (1 - 0.3333))
    assert distinct_product(["", ""]) == 1
    assert distinct_product(["a", ""], official=True) == 1  # its only word is the last one


def test_distinct_n_stays_inside_a_text():
    assert distinct_n(["a b", "b a"], 2) == 1
    assert distinct_n(["a b", "a b"], 2) == 0.5
    assert distinct_n(["a", "b"], 2) == 0


def test_ead_by_its_formula(texts):
    expected = []
    for n in range(1, 6):
        grams = [tuple(t.split()[i : i + n]) for t in texts for i in range(len(t.split()) - n + 1)]
        expected.append(len(set(grams)) / (50 * (1 - (49 / 50) ** len(grams))))
    assert ead(texts, vocab_size=50) == pytest.approx(np.mean(expected))


def test_ead_ignores_stops_and_breaks_and_does_not_lose_digits():
    assert ead(["a.b c", "d e\n"]) == ead(["ab c", "d e"])
    # among 256,000 words a single repetition is visible: 3 of 4 words, and no longer n-grams at all
    assert ead(["a b", "a c"]) == pytest.approx((3 / 4 + 1) / 5, abs=1e-4)
    assert ead(["", ""]) == 0


def test_self_bleu_by_hand():
    # candidate a b c d against a b d c: all words, one pair of three, triples and quadruples smoothed (0.1 of 2, of 1)
    precision = math.exp((math.log(1) + math.log(1 / 3) + math.log(0.1 / 2) + math.log(0.1 / 1)) / 4)
    assert self_bleu(["a b c d", "a b d c"]) == pytest.approx(precision)
    # two words of four against themselves, and the penalty of the shorter one; orders beyond a text count 0.1 of 1
    short = math.exp((0 + 0 + 2 * math.log(0.1)) / 4) * math.exp(1 - 4 / 2)
    long = math.exp((math.log(2 / 4) + math.log(1 / 3) + math.log(0.1 / 2) + math.log(0.1)) / 4)
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((short + long) / 2)


def test_self_bleu_prefers_the_shorter_of_two_close_references():
    # lengths 2 and 4 are equally far from 3: with 2 there is no penalty, with 4 there would be
    one = "a b c"
    found = 3 * self_bleu([one, "a b", "a b x y"])
    others = [self_bleu_of(i, [one, "a b", "a b x y"]) for i in (1, 2)]
    expected = math.exp((math.log(2 / 3) + math.log(1 / 2) + 2 * math.log(0.1)) / 4)
    assert found - sum(others) == pytest.approx(expected)


def self_bleu_of(index, texts):
    """BLEU of one text, from nothing but counts."""
    words = [t.split() for t in texts]
    own, rest = words[index], [w for i, w in enumerate(words) if i != index]
    logs = 0.0
    for n in (1, 2, 3, 4):

        def grams(text, n=n):
            return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]

        matched = sum(min(grams(own).count(g), max(grams(r).count(g) for r in rest)) for g in set(grams(own)))
        if n == 1 and not matched:
            return 0.0
        logs += math.log((matched or 0.1) / max(1, len(grams(own))))
    nearest = sorted((abs(len(r) - len(own)), len(r)) for r in rest)[0][1]
    return math.exp(logs / 4) * (1 if len(own) > nearest else math.exp(1 - nearest / len(own)))


def test_self_bleu_against_plain_counts(texts):
    assert self_bleu(texts) == pytest.approx(np.mean([self_bleu_of(i, texts) for i in range(len(texts))]))


def test_embedding_similarity_is_the_mean_of_the_pairs(texts):
    vectors = np.random.default_rng(0).normal(size=(5, 7))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(5) for j in range(5) if i != j]
    assert embedding_similarity(texts, lambda group: vectors) == pytest.approx(np.mean(pairs))
    assert embedding_similarity(["", ""]) == 0


def test_several_prompts_give_the_mean_and_a_row_each(texts):
    same = [texts[0]] * 3
    for measure in (distinct_product, ead, self_bleu, embedding_similarity):
        assert measure([texts, same]) == pytest.approx((measure(texts) + measure(same)) / 2)
    table = diversity_report([texts, same])
    assert list(table) == ["distinct_product", "ead", "self_bleu", "tfidf_similarity"]
    assert table.loc[1, "self_bleu"] == 1
    assert "embedding_similarity" in diversity_report([same], embed=lambda group: np.ones((len(group), 2)))


def test_order_does_not_matter(texts):
    turned = texts[::-1]
    for measure in (ead, self_bleu, embedding_similarity):
        assert measure(turned) == pytest.approx(measure(texts))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ead(["one"]), ValueError, "at least two texts of a prompt; prompt 0 has 1"),
        (lambda: self_bleu([["a", "b"], ["c"]]), ValueError, "prompt 1 has 1"),
        (lambda: self_bleu("text"), TypeError, "list of texts"),
        (lambda: self_bleu(["a", ["b"]]), TypeError, "mixes"),
        (lambda: self_bleu([["a", 3]]), TypeError, "must be str, got int"),
        (lambda: distinct_n(["a", "b"], 0), ValueError, "n must be at least 1, got 0"),
        (lambda: ead(["a", "b"], vocab_size=1), ValueError, "vocab_size must be at least 2, got 1"),
        (
            lambda: embedding_similarity(["a", "b"], lambda group: np.ones(2)),
            ValueError,
            r"one row a text, \(2, d\); got \(2,\)",
        ),
        (
            lambda: embedding_similarity(["a", "b"], lambda group: np.array([[1.0, 2.0], [1.0, np.nan]])),
            ValueError,
            "finite numbers; the embedding of text 1, 'b', holds nan or inf",
        ),
        (
            lambda: diversity_report([["a", "b"]], embed=lambda group: np.full((2, 3), np.inf)),
            ValueError,
            "the embedding of text 0, 'a', holds nan or inf",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
