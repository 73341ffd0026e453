"""Batches of pairs of traces, with the labels of their parts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from labkit.rlhf.themis.bank import FAILED
from labkit.rlhf.themis.losses import IGNORE, PARTS
from labkit.rlhf.themis.traces import Example, Step, TraceFormat, parse_actions, token_ids

_CHOSEN, _REJECTED = "pos_answer", "neg_answer"


@dataclass
class ThemisCollator:
    """Turn rows of the released data's form into batches, better answers first.

    A row holds ``question``, perhaps ``context``, and ``pos_answer`` and ``neg_answer``, each with ``answer``,
    ``actions`` (see `parse_actions`; a list of `Step` is fine too) and ``score_agent["explanation"]`` or ``rationale``.

    Parameters
    ----------
    tokenizer : fast tokenizer with the three tokens
    max_length : int
        In tokens; a longer text loses its beginning, so that the place where the reward is read stays.
    imitate : bool
        Also learn the text of the better answer, as the authors' code.
    drop_observation : float
        Chance that an observation is replaced by a failed call, to make a model bear failing tools.
    failed_rationale : str, optional
        What a rationale says where an observation was replaced. By default it stays as it is; but then it tells what the
        observation no longer does, and a model learns to make it up.
    form : TraceFormat
    seed : int
        Of `drop_observation`. Draws follow one another from batch to batch; those of `repeatable` hang on the batch alone.

    Returns
    -------
    dict of str to Tensor
        ``input_ids``, ``attention_mask``, ``labels``, ``parts``, each (2B, T), padded on the left.

    Examples
    --------
    >>> from labkit.rlhf import ThemisRewardModel
    >>> from labkit.testbeds.models import tiny
    >>> from labkit.testbeds.tokenizers import byte_tokenizer
    >>> from labkit.testbeds.tool_questions import rows
    >>> tokenizer = byte_tokenizer()
    >>> model = ThemisRewardModel.from_causal_lm(tiny("llama", vocab=len(tokenizer)), tokenizer)
    >>> batch = ThemisCollator(tokenizer)(rows("week_day", 2))
    >>> len(batch["input_ids"]), bool(model(**batch).loss > 0)
    (4, True)
    """

    tokenizer: Any
    max_length: int = 1024
    imitate: bool = True
    drop_observation: float = 0.0
    failed_rationale: str | None = None
    form: TraceFormat = field(default_factory=TraceFormat)
    seed: int = 0

    def __post_init__(self) -> None:
        token_ids(self.tokenizer)
        if not getattr(self.tokenizer, "is_fast", False):
            raise TypeError("the tokenizer must be a fast one: parts are found by the offsets of its tokens")
        if self.tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer needs an eos token: the reward is read there")
        if not 0 <= self.drop_observation <= 1:
            raise ValueError(f"drop_observation must be between 0 and 1, got {self.drop_observation}")
        if self.max_length < 8:
            raise ValueError(f"max_length must be at least 8 tokens, got {self.max_length}")
        self._rng = random.Random(self.seed)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("a batch needs at least one row")
        encoded = [self.encode(row, which) for which in (_CHOSEN, _REJECTED) for row in rows]
        width = max(len(ids) for ids, _, _ in encoded)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        fill = {"input_ids": pad, "attention_mask": 0, "labels": IGNORE, "parts": 0}
        out: dict[str, list[list[int]]] = {name: [] for name in fill}
        for ids, labels, parts in encoded:
            columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels, "parts": parts}
            for name, values in columns.items():
                out[name].append([fill[name]] * (width - len(values)) + list(values))
        return {name: torch.tensor(values) for name, values in out.items()}

    def repeatable(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """As calling it, but what `drop_observation` replaces hangs on the seed and these rows, not on the batches before.

        So a training that is resumed, or evaluated in between, sees what it would have seen otherwise; a row that comes
        again in another batch is drawn anew.

        Examples
        --------
        >>> from labkit.testbeds.tool_questions import rows
        >>> from labkit.testbeds.tokenizers import byte_tokenizer
        >>> from labkit.rlhf.themis import SPECIAL_TOKENS
        >>> tokenizer, some = byte_tokenizer(), rows("week_day", 4)
        >>> _ = tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        >>> collate = ThemisCollator(tokenizer, drop_observation=0.5)
        >>> first, second = collate.repeatable(some), collate.repeatable(some)
        >>> bool((first["input_ids"] == second["input_ids"]).all())
        True
        """
        said = [
            (row.get("question"), *((row.get(which) or {}).get("answer") for which in (_CHOSEN, _REJECTED)))
            for row in rows
        ]
        self._rng = random.Random(f"{self.seed} {said}")
        return self(rows)

    def encode(self, row: Mapping[str, Any], which: str) -> tuple[list[int], list[int], list[int]]:
        """Tokens, labels and parts of one of a row's two answers, the end-of-text token included."""
        if not isinstance(row.get(which), Mapping):
            raise ValueError(
                f"a row without {which!r}: each has a better and a worse answer, pos_answer and neg_answer"
            )
        side = row[which]
        example = Example(row["question"], side["answer"], row.get("context"))
        given = side["actions"]
        steps = (
            list(given)
            if isinstance(given, Sequence) and not isinstance(given, str)
            else parse_actions(given)
        )
        whole, steps = steps, [self._dropped(step) for step in steps]
        rationale = side.get("rationale", (side.get("score_agent") or {}).get("explanation"))
        if self.failed_rationale is not None and any(a is not b for a, b in zip(whole, steps, strict=True)):
            rationale = self.failed_rationale
        pieces = self.form.parts(example, steps, rationale)
        learned = {"tool", "observation", "rationale"}
        if self.imitate and which == _CHOSEN:
            learned.add("answer")
        text = "".join(piece for _, piece in pieces)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ends, end = [], 0
        for part, piece in pieces:
            end += len(piece)
            ends.append((end, part))
        ids, labels, parts = [], [], []
        place = 0
        for token, (begin, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token belongs where it ends: a space before a piece is often part of its first token.
            middle = max(begin, stop - 1)
            while place < len(ends) - 1 and middle >= ends[place][0]:
                place += 1
            part = ends[place][1]
            ids.append(token)
            labels.append(token if part in learned else IGNORE)
            parts.append(PARTS.index(part) if part in PARTS else 0)
        last = PARTS.index(pieces[-1][0])
        ids.append(self.tokenizer.eos_token_id)
        labels.append(self.tokenizer.eos_token_id)
        parts.append(last)
        return ids[-self.max_length :], labels[-self.max_length :], parts[-self.max_length :]

    def _dropped(self, step: Step) -> Step:
        if self.drop_observation and step.action and self._rng.random() < self.drop_observation:
            return replace(step, observation=FAILED)
        return step
