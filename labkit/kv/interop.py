"""NACL inside kvpress: the method as a ``ScorerPress``, so that kvpress's wrappers, pipeline and evaluation take it.

kvpress is imported when one of these functions is called, and not before: importing it patches the attention
functions of transformers for the whole process.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from labkit.kv.budget import round_half_up
from labkit.kv.nacl.press import NACLPress
from labkit.kv.nacl.split import split_budget

_classes: dict[type, type] = {}


def scorer_press_class() -> type:
    """Make (once) the subclass of kvpress's ``ScorerPress`` that selects as NACL does.

    Raises
    ------
    ImportError
        If kvpress is not installed.
    """
    try:
        base = importlib.import_module("kvpress").ScorerPress
    except ImportError as error:
        raise ImportError(
            "kvpress is not installed: pip install kvpress (0.5.5 needs transformers < 5.3, so give it an "
            "environment of its own)"
        ) from error
    if base in _classes:
        return _classes[base]

    class KVPressNACL(base):  # type: ignore[misc, valid-type]
        """NACL for kvpress. ``compression_ratio`` may be set by wrappers; the rest is the wrapped press's."""

        def __init__(self, nacl: NACLPress, compression_ratio: float) -> None:
            super().__init__(compression_ratio=compression_ratio)
            self.nacl = nacl

        def post_init_from_model(self, model: Any) -> None:
            self.nacl._generators.clear()

        def score(
            self,
            module: Any,
            hidden_states: Tensor,
            keys: Tensor,
            values: Tensor,
            attentions: Tensor | None,
            kwargs: dict[str, Any],
        ) -> Tensor:
            """Scores whose top K is NACL's choice, float32, ``(B, K, n)``."""
            n, config = keys.shape[2], self.nacl.config
            # kvpress floors: the division is that of the entries it will keep.
            budget = max(1, int(n * (1 - self.compression_ratio)))
            recent = round_half_up(config.recent * n) if isinstance(config.recent, float) else config.recent
            split = split_budget(n, budget, config.sink, recent, config.random_share)
            return self.nacl.score(module, hidden_states, keys, values, attentions, kwargs, split)

    _classes[base] = KVPressNACL
    return KVPressNACL


def scorer_press_of(press: NACLPress) -> Any:
    """Wrap a press's settings as a kvpress ``ScorerPress``.

    Raises
    ------
    ValueError
        If the budget is in tokens or a split of its own (kvpress asks for a share), or for ``decode_interval``
        and ``min_length``.
    """
    if press.compression_ratio is None or press.config.split is not None:
        raise ValueError(
            "kvpress budgets are shares: give NACLPress a compression_ratio "
            "(not budget_tokens, paper_table or official)"
        )
    if press.config.decode_interval is not None or press.min_length:
        raise ValueError(
            "decode_interval and min_length are not available in kvpress: leave them out (it has a DecodingPress)"
        )
    return scorer_press_class()(press, press.compression_ratio)


def nacl_scorer_press(compression_ratio: float = 0.0, **settings: Any) -> Any:
    """NACL as an instance of a subclass of kvpress's ``ScorerPress``.

    Parameters
    ----------
    compression_ratio : float, default 0.0
        Share of the prompt to evict.
    **settings
        The other fields of :class:`labkit.kv.NACLConfig`, without ``budget_tokens``, ``split``,
        ``decode_interval`` and ``min_length``. ``proxy_tokens`` may not be a callable: kvpress does not hand on
        the token ids.

    Returns
    -------
    ScorerPress
        To be used as any press of kvpress: ``with nacl_scorer_press(0.8)(model): ...``, inside
        ``AdaKVPress(...)``, or in its pipeline.

    Raises
    ------
    ImportError
        If kvpress is not installed.
    """
    return scorer_press_of(NACLPress(compression_ratio, **settings))
