"""Figures (to come with its own module)."""


def setup() -> None:
    """Nothing to set up yet."""
