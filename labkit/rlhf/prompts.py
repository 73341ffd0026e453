"""Rows of a data set as prompts, and the ids that end and fill responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labkit.rlhf.config import PPOConfig
from labkit.rlhf.logprobs import plain
from labkit.training.data import DatasetBatches


class Prompts:
    """Rows of a data set as ids, text and columns.

    Parameters
    ----------
    dataset : sequence of mapping
        With ``input_ids``, or ``prompt`` as text or messages.
    tokenizer : optional
    batch, seed : int
        Rows of a rollout, and of their order.

    Raises
    ------
    TypeError, ValueError
        When rows have neither column, or text has no tokenizer.
    """

    def __init__(self, dataset: Any, tokenizer: Any, batch: int, seed: int) -> None:
        if isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):
            raise TypeError(
                f"train_dataset must be a sequence of rows, got a {type(dataset).__name__}: choose a split of a "
                "DatasetDict, or make rows with datasets.Dataset.from_dict or .from_pandas"
            )
        self.batches = DatasetBatches(dataset, batch, collate=list, seed=seed)
        self.tokenizer = tokenizer
        first = dataset[0]
        columns = _columns(0, first)
        for number, row in enumerate(dataset if isinstance(dataset, list | tuple) else ()):
            if (found := _columns(number, row)) != columns:
                raise ValueError(
                    f"row {number} of train_dataset has the columns {sorted(found)}, the first has {sorted(columns)}: give "
                    "all rows the same"
                )
        taken = sorted({"prompts", "completions", "completion_ids", "prompt_ids"} & set(first))
        if taken:
            raise ValueError(
                f"train_dataset has the columns {taken}, which rewards get from the trainer: rename them"
            )
        if "input_ids" not in first and tokenizer is None:
            raise ValueError(
                "the column 'prompt' holds text: pass processing_class=tokenizer, or give 'input_ids'"
            )
        self._ids(first)  # raises what a chat template has to say

    def rows(
        self, iteration: int, first: int, last: int
    ) -> tuple[list[list[int]], list[Any], dict[str, list[Any]]]:
        """Ids, prompts as the reward sees them, and the other columns."""
        rows = self.batches.rows(iteration, first, last)
        ids = [self._ids(row) for row in rows]
        prompts = [row["prompt"] if "prompt" in row else self._text(row["input_ids"]) for row in rows]
        names = [name for name in rows[0] if name not in ("prompt", "input_ids", "attention_mask")]
        return ids, prompts, {name: [row[name] for row in rows] for name in names}

    def _ids(self, row: Mapping[str, Any]) -> list[int]:
        if "input_ids" in row:
            given = row["input_ids"]
            if not hasattr(given, "__iter__") or isinstance(given, str):
                raise TypeError(f"input_ids must be a list of ids, got {given!r}")
            return [int(i) for i in given]
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
            raise TypeError(f"prompt must be text, or a list of chat messages, got {prompt!r}")
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(
                "prompt is a list of chat messages and the tokenizer has no chat_template: set one, or give text"
            )
        return list(self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))

    def _text(self, ids: Any) -> Any:
        numbers = [int(i) for i in ids]
        return numbers if self.tokenizer is None else self.tokenizer.decode(numbers)


def _columns(number: int, row: Any) -> set[str]:
    """Columns of a row that can be a prompt."""
    if not isinstance(row, Mapping):
        raise TypeError(
            f"rows of train_dataset must be mappings with a column 'prompt' or 'input_ids', got {type(row).__name__} as row "
            f"{number}"
        )
    columns = set(row)
    if not {"prompt", "input_ids"} & columns:
        raise ValueError(
            f"row {number} of train_dataset has the columns {sorted(columns)}: it needs 'prompt' (text or messages) or "
            "'input_ids'"
        )
    return columns


def end_tokens(config: PPOConfig, tokenizer: Any, policy: Any) -> list[int]:
    """Ids that end a response."""
    asked = config.eos_token_id
    if asked is None:
        return []
    if asked != "auto":
        own = [asked] if isinstance(asked, int) else [int(i) for i in asked]  # type: ignore[union-attr]
        _check_ids("eos_token_id", own, policy)
        return own
    found: list[int] = []
    for owner in (tokenizer, getattr(plain(policy), "generation_config", None)):
        ends = getattr(owner, "eos_token_id", None)
        found += [ends] if isinstance(ends, int) else list(ends or [])
    if not found:
        raise ValueError(
            "neither tokenizer nor model names an end token: set PPOConfig(eos_token_id=...), or None for responses of "
            "exactly max_new_tokens"
        )
    return list(dict.fromkeys(found))


def vocabulary(model: Any) -> int:
    """Rows of a model's input embedding."""
    return int(plain(model).get_input_embeddings().weight.shape[0])


def _check_ids(name: str, ids: Sequence[int], policy: Any) -> None:
    rows = vocabulary(policy)
    for token in ids:
        if not 0 <= token < rows:
            raise ValueError(f"{name}={token} is no token of the policy, which has {rows}: 0 to {rows - 1}")


def pad_token(config: PPOConfig, tokenizer: Any, ends: Sequence[int], policy: Any) -> int:
    """Id that fills rows up."""
    if config.pad_token_id is not None:
        _check_ids("pad_token_id", [config.pad_token_id], policy)
    for candidate in (config.pad_token_id, getattr(tokenizer, "pad_token_id", None), *ends[:1]):
        if candidate is not None:
            return int(candidate)
    return 0
