"""plotly, which figures need and nothing else does."""

from __future__ import annotations

from typing import Any


def graph_objects() -> Any:
    """``plotly.graph_objects``, or an ImportError that says how to get it."""
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise ImportError("figures need plotly: pip install 'labkit[notebooks]'") from None
    return go
