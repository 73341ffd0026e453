"""Operations with a plain PyTorch definition, a Triton kernel and a dispatch between them."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, {})
