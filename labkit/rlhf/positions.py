"""How long a text a model can read."""

from __future__ import annotations

from typing import Any


def longest_input(model: Any) -> int | None:
    """Tokens that a transformers model has positions for.

    Parameters
    ----------
    model : PreTrainedModel, PeftModel, or a module that has its ``config``

    Returns
    -------
    int or None
        None where the config names no limit. For rotary positions it is the length that the model was made for, though
        it would read on.

    Examples
    --------
    >>> from labkit.testbeds.models import tiny
    >>> longest_input(tiny("llama")), longest_input(tiny("roberta", pad_token_id=1))
    (2048, 512)
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from behind the padding's row on.
        padding = getattr(module, "padding_idx", None) if name.endswith("position_embeddings") else None
        if padding is not None:
            return int(module.num_embeddings) - int(padding) - 1
    return positions


def check_length(tokens: int, model: Any, what: str, remedy: str) -> None:
    """Raise for a text that a model has no positions for.

    Raises
    ------
    ValueError
        Naming both lengths and the remedy.
    """
    limit = longest_input(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{what} of {tokens} tokens passes the {limit} positions of {type(model).__name__}: {remedy}"
        )
