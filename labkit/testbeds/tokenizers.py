"""Two small tokenizers, both real ``PreTrainedTokenizerFast`` objects: bytes, and byte-level pairs (BPE).

Both encode any text and decode it back unchanged, and add no special tokens by themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import tokenizers as _tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, MASK = "<pad>", "<bos>", "<eos>", "<mask>"
SPECIAL_TOKENS = (PAD, BOS, EOS, MASK)


def _byte_alphabet() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes."""
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(spare)) for byte in range(256)]


def _wrap(core: _tokenizers.Tokenizer, specials: Sequence[str]) -> PreTrainedTokenizerFast:
    roles = {"<pad>": "pad_token", "<bos>": "bos_token", "<eos>": "eos_token", "<mask>": "mask_token"}
    named: dict[str, Any] = {roles[token]: token for token in specials}
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False, **named)


def byte_tokenizer(special_tokens: Sequence[str] = SPECIAL_TOKENS) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose token is a UTF-8 byte and whose token id is that byte's value.

    Parameters
    ----------
    special_tokens : sequence of str
        Any of "<pad>", "<bos>", "<eos>", "<mask>"; they get the ids from 256 on. Empty gives exactly 256
        tokens.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    Examples
    --------
    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("né")["input_ids"], len(tokenizer), tokenizer.pad_token_id
    ([110, 195, 169], 260, 256)
    >>> tokenizer.decode([110, 195, 169])
    'né'
    """
    unknown = set(special_tokens) - set(SPECIAL_TOKENS)
    if unknown:
        raise ValueError(
            f"special_tokens {sorted(unknown)} are not known; allowed: {', '.join(SPECIAL_TOKENS)}"
        )
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    core = _tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special_tokens))
    return _wrap(core, special_tokens)


def train_bpe(
    text: str,
    vocab_size: int = 512,
    *,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    sample_bytes: int = 2_000_000,
    rebuild: bool = False,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, or read it from the cache when the same text was seen before.

    Parameters
    ----------
    text : str
        Training text.
    vocab_size : int
        Size V, special tokens and 256 bytes included: at least 260 with the usual special tokens.
    special_tokens : sequence of str
        Get the first ids in this order. Those of `SPECIAL_TOKENS` get their roles, for example padding.
    sample_bytes : int
        Train on the first so many characters at most; a small vocabulary needs no more.
    rebuild : bool
        Train anew even if the cache has it.

    Returns
    -------
    transformers.PreTrainedTokenizerFast

    Raises
    ------
    ValueError
        When the vocabulary is too small or the text is empty.
    """
    if vocab_size < 256 + len(special_tokens):
        raise ValueError(f"vocab_size must be at least {256 + len(special_tokens)}, got {vocab_size}")
    if not text:
        raise ValueError("text is empty: nothing to train on")
    from labkit.lab.cache import cached

    sample = text[:sample_bytes]

    def build() -> str:
        core = _tokenizers.Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(special_tokens),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(sample.splitlines(keepends=True), trainer)
        return str(core.to_str())

    key = {
        "sha256": hashlib.sha256(sample.encode()).hexdigest(),
        "vocab_size": vocab_size,
        "special_tokens": list(special_tokens),
        "tokenizers": _tokenizers.__version__,
    }
    return from_json(cached("bpe", key, build, kind="json", rebuild=rebuild))


def from_json(serialised: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer from the JSON of the ``tokenizers`` library, with our special tokens."""
    core = _tokenizers.Tokenizer.from_str(serialised)
    return _wrap(core, [token for token in SPECIAL_TOKENS if core.token_to_id(token) is not None])


def encode(tokenizer: PreTrainedTokenizerFast, text: str, piece: int = 200_000) -> torch.Tensor:
    """Encode a long text as one stream of ids, without special tokens.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerFast
        Any fast tokenizer.
    text : str
        The text; it is cut at line ends into pieces of about `piece` characters, which are encoded in turn.

    Returns
    -------
    (N,) int64 tensor

    Examples
    --------
    >>> encode(byte_tokenizer(), "hi").tolist()
    [104, 105]
    """
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + piece) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    ids = [tokenizer.backend_tokenizer.encode(part, add_special_tokens=False).ids for part in pieces]
    return torch.tensor([token for part in ids for token in part], dtype=torch.long)
