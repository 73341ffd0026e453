"""What a function of a user's takes of what could be handed to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def taken(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given arguments that a function names, or all for one with ``**kwargs``, or that hides what it takes.

    Examples
    --------
    >>> taken(lambda prompts, answer: None, {"answer": [3], "level": [1]})
    {'answer': [3]}
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return dict(given)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(given)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in given.items() if name in names}
