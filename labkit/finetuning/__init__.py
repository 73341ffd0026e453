"""Fine-tuning that keeps what a model knew, and that says which weights it moves."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {},
)
