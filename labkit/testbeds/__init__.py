"""Small worlds for experiments: corpora, tokenizers, tiny Hugging Face models and synthetic tasks."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {})
