"""Key-value caches: what to keep of them, and how to make them smaller."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {})
