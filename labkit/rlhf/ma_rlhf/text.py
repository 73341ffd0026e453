"""Termination rules that read the answer's text."""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.ma_rlhf.segmenters import Segmenter

_BRACKETS = {
    "-LRB-": "(",
    "-RRB-": ")",
    "-LSB-": "[",
    "-RSB-": "]",
    "-LCB-": "{",
    "-RCB-": "}",
    "``": '"',
    "''": '"',
}


def token_ends(ids: list[int], tokenizer: Any) -> tuple[str, list[int]]:
    """Text of tokens, and where in it each of them ends."""
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    text = tokenizer.decode(ids, **options)
    pieces = [tokenizer.decode([i], **options) for i in ids]
    if "".join(pieces) != text:  # characters of several tokens, or spaces that depend on what stands before
        prefixes = [tokenizer.decode(ids[: i + 1], **options) for i in range(len(ids))]
        return text, [min(len(prefix), len(text)) for prefix in prefixes]
    ends, position = [], 0
    for piece in pieces:
        position += len(piece)
        ends.append(position)
    return text, ends


@dataclass(frozen=True, kw_only=True)
class _TextSegmenter(Segmenter):
    """Base of rules that find places in the text where groups start."""

    @abstractmethod
    def places(self, text: str) -> list[int] | None:
        """Where groups start; None where the rule fails, and every token gets a group of its own."""

    def starts(self, tokens: Tensor, mask: Tensor, ref_logprobs: Tensor | None, tokenizer: Any) -> Tensor:
        """The tokens that hold those places."""
        if tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} reads the text: pass tokenizer (processing_class of the trainer)"
            )
        found = torch.zeros_like(mask)
        for row, (ids, real) in enumerate(zip(tokens, mask, strict=True)):
            own = ids[real].tolist()
            text, ends = token_ends(own, tokenizer)
            places = self.places(text)
            if places is None:
                found[row, : len(own)] = True
                continue
            token = 0
            for place in sorted(places):
                while token < len(ends) and ends[token] <= place:
                    token += 1
                if token < len(ends):
                    found[row, token] = True
        return found


@dataclass(frozen=True)
class RegexBoundary(_TextSegmenter):
    r"""A group ends where a match of a pattern ends.

    Parameters
    ----------
    pattern : str
        By default the end of a sentence or line.
    last_alone, phantom
        See `Segmenter`.

    Raises
    ------
    ValueError
        When the pattern is not a regular expression, or no tokenizer is given at the call.

    Examples
    --------
    >>> RegexBoundary(r"[.!?]\s+").places("One. Two! Three")
    [5, 10]
    """

    pattern: str = r"[.!?]+\s+|\n+"

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None

    def places(self, text: str) -> list[int]:
        """Ends of the matches that are not empty."""
        return [match.end() for match in re.finditer(self.pattern, text) if match.group()]


def constituents(tree: Any, cutoff: int) -> list[list[int]]:
    """Cut a constituency tree into groups of leaves.

    Depth first: a node of fewer than `cutoff` leaves, and more than one, is a group; a node of one leaf joins the group
    before it; larger nodes are cut further.

    Parameters
    ----------
    tree : str or sequence
        A leaf is a string, a node a sequence of trees, such as an ``nltk.Tree``.
    cutoff : int

    Returns
    -------
    list of list of int
        Indices of the leaves, in order; none without a leaf.

    Raises
    ------
    TypeError
        For what is no tree.

    Examples
    --------
    >>> tree = [["the", "old", "cat"], ["sat", ["on", ["the", "mat"]]], "."]
    >>> constituents(tree, cutoff=4)
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    >>> constituents(tree, cutoff=5)
    [[0, 1, 2], [3, 4, 5, 6, 7]]
    """
    groups: list[list[int]] = []
    seen = 0

    def visit(node: Any) -> None:
        nonlocal seen
        size = len(leaves(node))
        if size == 0:
            return
        if size == 1:
            if not groups:
                groups.append([])
            groups[-1].append(seen)
            seen += 1
        elif size < cutoff:
            groups.append(list(range(seen, seen + size)))
            seen += size
        else:
            for child in node:
                visit(child)

    visit(tree)
    return groups


def leaves(tree: Any) -> list[str]:
    """Leaves of a tree, from the left.

    Raises
    ------
    TypeError
        For what is neither a string nor a sequence of trees.

    Examples
    --------
    >>> leaves([["a", "b"], "c"])
    ['a', 'b', 'c']
    """
    if isinstance(tree, str):
        return [tree]
    if not isinstance(tree, Iterable):
        raise TypeError(
            f"a tree must be a string or a sequence of trees, such as an nltk.Tree; got {tree!r:.60} "
            f"({type(tree).__name__})"
        )
    return [leaf for child in tree for leaf in leaves(child)]


@dataclass(frozen=True)
class ConstituencyCutoff(_TextSegmenter):
    """Groups are small constituents of each sentence's parse tree.

    Leaves are found again in the text by their characters, so that the parser may split words otherwise than the
    policy's tokenizer does. Where a leaf is not in the text (a parser that rewrites it), or a sentence's tree has none,
    the row falls back to token PPO, with a warning.

    Parameters
    ----------
    parser : callable
        ``parser(sentence)``: a tree whose leaves are strings and whose nodes are sequences of trees, such as an
        ``nltk.Tree``. With spaCy and benepar:
        ``lambda text: nltk.Tree.fromstring(next(nlp(text).sents)._.parse_string)``.
    cutoff : int
        C: constituents with fewer leaves stay whole. The paper's is 5; a small one leaves few boundaries inside a sentence.
    last_alone, phantom
        See `Segmenter`.

    Raises
    ------
    TypeError
        Without a parser; at a call, when it returns no tree.
    ValueError
        When the cutoff is below 2.

    Examples
    --------
    >>> halves = lambda text: [text.split()[:2], text.split()[2:]]
    >>> ConstituencyCutoff(halves, cutoff=3).places("two words are here. and now there too")
    [0, 10, 20, 28]
    """

    parser: Callable[[str], Any] | None = None
    cutoff: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.parser):
            raise TypeError(
                "ConstituencyCutoff needs a parser: pass a function from a sentence to a tree of strings. With spaCy and "
                "benepar installed: parser=lambda text: nltk.Tree.fromstring(next(nlp(text).sents)._.parse_string)"
            )
        if isinstance(self.cutoff, bool) or not isinstance(self.cutoff, int) or self.cutoff < 2:
            raise ValueError(f"cutoff must be a whole number of at least 2, got {self.cutoff!r}")

    def places(self, text: str) -> list[int] | None:
        """Where the constituents of all sentences start."""
        assert self.parser is not None
        found = []
        for match in re.finditer(r"\S(?:[^\n]*?[.!?]+(?=\s|$)|[^\n]*)", text):
            sentence = match.group()
            tree = self.parser(sentence)
            where, cursor = [], 0
            words = self._words(tree, sentence)
            if not words:
                warnings.warn(
                    f"the parser's tree of the sentence {sentence[:60]!r} has no leaf: every token of this answer is an "
                    f"action of its own. Let the parser return the sentence itself where it finds no structure.",
                    stacklevel=2,
                )
                return None
            for leaf in words:
                place = sentence.find(_BRACKETS.get(leaf, leaf), cursor)
                if place < 0:
                    warnings.warn(
                        f"the parser's leaf {leaf!r} is not in the sentence {sentence[:60]!r}: every token of this answer "
                        f"is an action of its own. Let the parser keep the words as they are.",
                        stacklevel=2,
                    )
                    return None
                where.append(place)
                cursor = place + len(_BRACKETS.get(leaf, leaf))
            found += [match.start() + where[group[0]] for group in constituents(tree, self.cutoff)]
        return found

    @staticmethod
    def _words(tree: Any, sentence: str) -> list[str]:
        try:
            return leaves(tree)
        except TypeError as error:
            raise TypeError(f"the parser's result for the sentence {sentence[:60]!r}: {error}") from None
