"""Texts that grow from round to round, and what a model keeps of them so as not to read them again.

A text is tokenised anew, as a whole, in every round. Keys and values are kept up to the first token that differs from
what was read, so a model sees the same tokens with a cache as without, whatever a tokenizer makes of the pieces.

Rows have read different numbers of tokens, and a batch can only be read on by the same number in all of them: by the
most that any row has not read yet, N. The other rows read some of their last tokens again. So the batch stays padded
on the left only, (B, S + N), with the first S columns kept and no hole between kept and new.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from labkit.rlhf.positions import longest_input


class Judge(Protocol):
    """What traces need of a reward model."""

    @property
    def device(self) -> torch.device:
        """Where texts are read."""

    @property
    def config(self) -> Any:
        """Config of the language model."""

    @property
    def pooling(self) -> str:
        """``last`` or ``mean``."""

    def eval(self) -> Any:
        """Into evaluation mode."""

    def modules(self) -> Iterator[nn.Module]:
        """All parts."""

    def check_tokenizer(self, tokenizer: Any) -> dict[str, int]:
        """Ids of the three tokens, or ValueError."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As ``generate`` of transformers."""

    def score(self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Any = None) -> Tensor:
        """Rewards ``(B,)``."""


@dataclass
class _Kept:
    """Keys and values of a batch, padded on the left, and the tokens of each row that they are of."""

    cache: Any
    rows: dict[int, int]
    tokens: list[list[int]]
    pads: list[int]


class Reader:
    """A model that reads texts on where it left off.

    Parameters
    ----------
    model : ThemisRewardModel
    tokenizer
        Padding on the left.
    reuse : bool
        False reads every text from its beginning.
    options : mapping
        For ``generate``.

    Texts are known by a number that stays the same from round to round.
    """

    def __init__(self, model: Judge, tokenizer: Any, reuse: bool, options: Mapping[str, Any]) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, dict(options)
        self.reuse = reuse
        self.limit = longest_input(model)
        self._kept: _Kept | None = None

    def check(self, texts: Mapping[int, str]) -> None:
        """Raise where a text leaves the model no room to write.

        Raises
        ------
        ValueError
            Naming the text by its number.
        """
        for name, room in self._room(texts).items():
            if room < 1:
                assert self.limit is not None
                raise ValueError(
                    f"question and answer {name} have {self.limit - room} tokens with what stands around them, and the "
                    f"model {self.limit} positions: shorten them"
                )

    def write(self, texts: Mapping[int, str]) -> dict[int, str | None]:
        """What the model writes behind each text; None where its positions end before it does."""
        room = self._room(texts)
        short = {name: left for name, left in room.items() if left < self.options["max_new_tokens"]}
        said: dict[int, str | None] = {}
        roomy = {name: text for name, text in texts.items() if name not in short}
        if roomy:
            said |= self._together(roomy)
        for name, left in short.items():
            said[name] = self._at_the_end(texts[name], left) if left > 0 else None
        return said

    def _room(self, texts: Mapping[int, str]) -> dict[int, int]:
        """Tokens that may still be written behind each text, the end-of-text token among them."""
        if self.limit is None:
            return {}
        lengths = map(len, self.tokenizer(list(texts.values()), add_special_tokens=False)["input_ids"])
        return {name: self.limit - length for name, length in zip(texts, lengths, strict=True)}

    def _together(self, texts: Mapping[int, str]) -> dict[int, str]:
        names = list(texts)
        ids, mask, tokens = self._encode(list(texts.values()))
        width = ids.shape[1]
        past = self._take(names, tokens)
        self._kept = None  # what a round has read replaces what was kept
        more = {} if past is None else {"past_key_values": past}
        out = self._generate(ids, mask, **more)
        sequences = out.sequences
        if self.reuse:
            self._keep(
                names, getattr(out, "past_key_values", None), sequences, [width - len(t) for t in tokens]
            )
        return dict(zip(names, self._decoded(sequences[:, width:]), strict=True))

    def _at_the_end(self, text: str, room: int) -> str | None:
        """As `_together`, for a text that has less room than a round may need: a batch would cut the others short."""
        ids, mask, _ = self._encode([text])
        new = self._generate(ids, mask, max_new_tokens=room).sequences[:, ids.shape[1] :]
        ended = int(new[0, -1]) in self.options["eos_token_id"]
        return self._decoded(new)[0] if ended or new.shape[1] < room else None

    def _generate(self, ids: Tensor, mask: Tensor, **more: Any) -> Any:
        options = {**self.options, **more}
        return self.model.generate(
            input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options
        )

    def _decoded(self, new: Tensor) -> list[str]:
        """Text up to its end; marks stay in it."""
        ends = [token for token in (self.tokenizer.eos_token, self.tokenizer.pad_token) if token]
        out = []
        for text in self.tokenizer.batch_decode(new, skip_special_tokens=False):
            for token in ends:
                text = text.partition(token)[0]
            out.append(text)
        return out

    def score(self, texts: Mapping[int, str]) -> dict[int, float]:
        """The reward of each text with the end-of-text token behind it."""
        if not texts:
            return {}
        end = self.tokenizer.eos_token or ""
        ids, mask, tokens = self._encode([text + end for text in texts.values()])
        if self.limit is not None and ids.shape[1] > self.limit:
            # Rows are padded on the left, so only those that are too long lose their beginning.
            ids, mask, past = ids[:, -self.limit :], mask[:, -self.limit :], None
        else:
            past = self._take(list(texts), tokens) if self.model.pooling == "last" else None
        new = _new(ids, past)
        rewards = self.model.score(ids[:, -new:], mask, past)
        return dict(zip(texts, rewards.tolist(), strict=True))

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, list[list[int]]]:
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        tokens = [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]
        return ids.to(self.model.device), mask.to(self.model.device), tokens

    def _keep(self, names: list[int], cache: Any, sequences: Tensor, pads: list[int]) -> None:
        # Not kept: states of recurrent layers, which cannot be taken back, windows that have slid, and whatever beams
        # or assistants have put into another order. These models read everything again.
        if not isinstance(cache, DynamicCache) or len(sequences) != len(names):
            return
        read = sequences.shape[1] - 1  # the last token has been written but not read
        for layer in cache.layers:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                return
            keys: Any = getattr(layer, "keys", None)
            if keys is None or keys.shape[0] != len(names) or keys.shape[-2] != read:
                return
        rows = sequences[:, :read].tolist()
        tokens = [row[pad:] for row, pad in zip(rows, pads, strict=True)]
        self._kept = _Kept(cache, {name: row for row, name in enumerate(names)}, tokens, pads)

    def _take(self, names: list[int], tokens: list[list[int]]) -> Any:
        """A cache of the first columns of these rows, or None where nothing can be saved."""
        kept = self._kept
        if kept is None or not all(name in kept.rows for name in names):
            return None
        rows = [kept.rows[name] for name in names]
        width = max(map(len, tokens))
        unread = max(len(new) - _common(new, kept.tokens[row]) for new, row in zip(tokens, rows, strict=True))
        columns = width - max(unread, 1)
        if columns < 1:
            return None
        # Column j is token j - (padding) of its row, before as now.
        shift = torch.tensor(
            [kept.pads[row] - (width - len(new)) for new, row in zip(tokens, rows, strict=True)]
        )
        place = (torch.arange(columns) + shift[:, None]).clamp(min=0)  # (B, S)
        cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        for number, layer in enumerate(kept.cache.layers):
            cache.update(_gather(layer.keys, rows, place), _gather(layer.values, rows, place), number)
        return cache


def _new(ids: Tensor, past: Any) -> int:
    """Columns that are read."""
    return ids.shape[1] - (0 if past is None else int(past.get_seq_length()))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two rows begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))


def _gather(states: Tensor, rows: list[int], place: Tensor) -> Tensor:
    """Some columns of some rows, each row its own: (B, H, T, d) -> (B', H, S, d)."""
    place = place.to(states.device)[:, None, :, None]
    chosen = states[rows]
    return chosen.gather(2, place.expand(-1, states.shape[1], -1, states.shape[3]))
