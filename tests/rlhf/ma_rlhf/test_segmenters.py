"""Termination rules against hand-made cases and the boundaries of the authors' code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from labkit.rlhf import (
    ConstituencyCutoff,
    FixedNgram,
    PerplexityRise,
    RandomNgram,
    RegexBoundary,
    WholeResponse,
    boundaries,
    check_segments,
    constituents,
)
from labkit.testbeds.tokenizers import byte_tokenizer, train_bpe


def response(*lengths: int) -> tuple[Tensor, Tensor]:
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    tokens = torch.randint(0, 50, mask.shape, generator=torch.Generator().manual_seed(0))
    return tokens, mask


def sizes(ids: Tensor) -> list[int]:
    return [len(list(group)) for key, group in itertools.groupby(ids.tolist()) if key >= 0]


def test_boundaries_of_the_authors_code() -> None:
    """Prompt of 6 tokens: states are numbered from 5. With 21 tokens their last group is preceded by an empty one."""
    tokens, mask = response(23, 21)
    theirs = boundaries(FixedNgram(5, phantom=True)(tokens, mask), start=5)
    assert theirs == [[5, 10, 15, 20, 25, 27], [5, 10, 15, 20, 25, 25]]
    ours = FixedNgram(5)(tokens, mask)
    assert boundaries(ours, start=5) == [[5, 10, 15, 20, 25, 27], [5, 10, 15, 20, 25]]
    assert sizes(ours[0]) == [5, 5, 5, 5, 2, 1]
    assert sizes(ours[1]) == [5, 5, 5, 5, 1]
    together = FixedNgram(5, last_alone=False)(tokens, mask)
    assert [sizes(row) for row in together] == [[5, 5, 5, 5, 3], [5, 5, 5, 5, 1]]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 100])
def test_fixed_groups_are_a_loop_over_each_row(n: int) -> None:
    lengths = (1, 2, 3, 10, 11, 12)
    tokens, mask = response(*lengths)
    ids = FixedNgram(n)(tokens, mask)
    check_segments(ids, mask)
    for row, length in enumerate(lengths):
        body = [min(n, length - 1 - start) for start in range(0, length - 1, n)]
        assert sizes(ids[row]) == [*body, 1]


def test_the_whole_response_is_one_action_and_its_end() -> None:
    tokens, mask = response(7, 1)
    assert [sizes(row) for row in WholeResponse()(tokens, mask)] == [[6, 1], [1]]
    assert [sizes(row) for row in WholeResponse(last_alone=False)(tokens, mask)] == [[7], [1]]


def test_random_lengths_are_a_shuffled_deck() -> None:
    rule = RandomNgram(lengths=(2, 3, 5, 10), repeat=3, seed=1)
    tokens, mask = response(100, 30, 4)
    ids = rule(tokens, mask)
    check_segments(ids, mask)
    found = sizes(ids[0])
    assert sorted(found[:12]) == sorted([2, 3, 5, 10] * 3)
    assert found[12:] == [100 - 60 - 1, 1]
    assert sizes(ids[1]) != found[: len(sizes(ids[1]))]  # an order of its own
    # the order belongs to the answer, not to its place in the batch
    again = rule(tokens.flip(0), mask.flip(0)).flip(0)
    assert torch.equal(again, ids)
    assert torch.equal(rule(tokens[1:2, :30], mask[1:2, :30]), ids[1:2, :30])
    assert not torch.equal(RandomNgram(seed=2)(tokens, mask), ids)


def test_perplexity_within_a_group_only_falls() -> None:
    tokens, mask = response(40, 17)
    logprobs = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 5
    ids = PerplexityRise(last_alone=False)(tokens, mask, logprobs)
    check_segments(ids, mask)
    for row, length in enumerate((40, 17)):
        ppl = [math.exp(-x) for x in logprobs[row, :length].tolist()]
        for t in range(1, length):
            assert bool(ids[row, t] > ids[row, t - 1]) == (ppl[t] > ppl[t - 1])


def test_the_prefix_mode_and_the_early_boundary() -> None:
    tokens, mask = response(30)
    logprobs = -torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) * 5
    prefix = PerplexityRise("prefix", last_alone=False)(tokens, mask, logprobs)
    running = [math.exp(-float(logprobs[0, : t + 1].mean())) for t in range(30)]
    for t in range(1, 30):
        assert bool(prefix[0, t] > prefix[0, t - 1]) == (running[t] > running[t - 1])
    late = boundaries(PerplexityRise(last_alone=False)(tokens, mask, logprobs)[:, :30])[0]
    early = boundaries(PerplexityRise(early=True, last_alone=False)(tokens, mask, logprobs)[:, :30])[0]
    assert early == sorted({0, *(start - 1 for start in late[1:])})


def test_every_rule_takes_rows_without_tokens() -> None:
    tokens, mask = response(5, 3)
    mask = mask.clone()
    mask[1] = False
    tokenizer = byte_tokenizer()
    rules = [FixedNgram(2, phantom=True), RandomNgram(), WholeResponse(), PerplexityRise(), RegexBoundary()]
    for rule in rules:
        ids = rule(tokens, mask, torch.zeros(mask.shape), tokenizer)
        assert (ids[1] == -1).all()
        check_segments(ids, mask, allow_empty=True)


def batch_of(tokenizer, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return tokens, torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]


def groups_of(rule, tokenizer, text: str) -> list[str]:
    tokens, mask = batch_of(tokenizer, [text])
    ids = rule(tokens, mask, tokenizer=tokenizer)
    check_segments(ids, mask)
    return [
        tokenizer.decode(tokens[0][ids[0] == k].tolist(), clean_up_tokenization_spaces=False)
        for k in range(int(ids.max()) + 1)
    ]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe("the old cat sat on the mat and the dog ran. one two three four. Hi there! " * 20, 320)


def test_patterns_end_groups(bpe) -> None:
    text = "one two. three! Four"
    for tokenizer in (byte_tokenizer(), bpe):
        pieces = groups_of(RegexBoundary(last_alone=False), tokenizer, text)
        assert "".join(pieces) == text
        assert [p.strip() for p in pieces] == ["one two.", "three!", "Four"]
    # characters that are several byte tokens
    accents = groups_of(RegexBoundary(last_alone=False), byte_tokenizer(), "häß! ñandú")
    assert [a.strip() for a in accents] == ["häß!", "ñandú"]


TREES = {
    "the old cat sat on the mat.": [["the", "old", "cat"], [["sat"], ["on", ["the", "mat"]]], ["."]],
    "Hi there!": ["Hi", "there", "!"],
}


def test_constituents_follow_the_rule() -> None:
    tree = TREES["the old cat sat on the mat."]
    assert constituents(tree, 9) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert constituents(tree, 8) == [[0, 1, 2], [3, 4, 5, 6, 7]]
    assert constituents(tree, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert constituents(tree, 3) == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert constituents(tree, 2) == [
        [0, 1, 2, 3, 4, 5, 6, 7]
    ]  # nothing but single leaves: one group a sentence


def test_constituents_become_groups_of_tokens(bpe) -> None:
    rule = ConstituencyCutoff(TREES.__getitem__, cutoff=4, last_alone=False)
    for tokenizer in (byte_tokenizer(), bpe):
        pieces = groups_of(rule, tokenizer, "the old cat sat on the mat. Hi there!")
        assert "".join(pieces) == "the old cat sat on the mat. Hi there!"
        assert [p.strip() for p in pieces] == ["the old cat sat", "on the mat.", "Hi there!"]


def test_a_parser_that_rewrites_falls_back_to_tokens() -> None:
    rule = ConstituencyCutoff(lambda text: text.upper().split(), cutoff=3)
    tokenizer = byte_tokenizer()
    tokens, mask = batch_of(tokenizer, ["one two three.", "ONE TWO THREE."])
    with pytest.warns(UserWarning, match="leaf 'ONE' is not in the sentence"):
        ids = rule(tokens, mask, tokenizer=tokenizer)
    assert sizes(ids[0]) == [1] * 14
    assert len(sizes(ids[1])) < 14


def test_a_tree_without_leaves_falls_back_to_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokens, mask = batch_of(tokenizer, ["one two three."])
    for tree in ([], [[], [[]]]):
        assert constituents(tree, 3) == []
        rule = ConstituencyCutoff(lambda text, tree=tree: tree, cutoff=3)
        with pytest.warns(UserWarning, match="tree of the sentence 'one two three.' has no leaf"):
            ids = rule(tokens, mask, tokenizer=tokenizer)
        assert sizes(ids[0]) == [1] * 14
    assert constituents([[], ["a", "b"], [[]], ["c"]], 3) == [[0, 1, 2]]


@pytest.mark.parametrize("tree", [None, 3, ["one", [None]]])
def test_a_parser_that_returns_no_tree_is_named(tree: object) -> None:
    rule = ConstituencyCutoff(lambda text: tree)
    with pytest.raises(
        TypeError, match=r"result for the sentence 'one two': a tree must be .* got (None|3) \("
    ):
        rule.places("one two")


@pytest.mark.parametrize("n", [0, -3, 2.0, True, "5", math.inf])
def test_n_must_be_a_whole_number(n: object) -> None:
    with pytest.raises(ValueError, match=f"n must be a whole number of at least 1, got {n!r}"):
        FixedNgram(n)  # type: ignore[arg-type]


def test_misuse_is_named() -> None:
    tokens, mask = response(4)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        PerplexityRise()(tokens, mask)
    with pytest.raises(ValueError, match=r"ref_logprobs must be \(1, 5\)"):
        PerplexityRise()(tokens, mask, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="mode must be 'token' or 'prefix', got 'running'"):
        PerplexityRise("running")
    with pytest.raises(TypeError, match="needs a parser: pass a function"):
        ConstituencyCutoff()
    with pytest.raises(ValueError, match="cutoff must be a whole number of at least 2, got 1"):
        ConstituencyCutoff(str.split, cutoff=1)
    with pytest.raises(ValueError, match="RegexBoundary reads the text: pass tokenizer"):
        RegexBoundary()(tokens, mask)
    with pytest.raises(ValueError, match="is not a regular expression"):
        RegexBoundary("(")
    with pytest.raises(ValueError, match="lengths is empty"):
        RandomNgram(lengths=())
    with pytest.raises(ValueError, match="a length must be a whole number of at least 1, got 0"):
        RandomNgram(lengths=(0, 2))
    with pytest.raises(ValueError, match="needs last_alone=True"):
        FixedNgram(2, phantom=True, last_alone=False)
    with pytest.raises(ValueError, match=r"tokens and mask must both be \(B, T\)"):
        FixedNgram(2)(tokens, mask[:, :2])
