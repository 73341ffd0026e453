"""What a notebook needs around the science: start, claims, figures, widgets, progress, runs and reports."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "bench": [],
        "cache": [],
        "claims": ["Verdict", "Verdicts"],
        "figures": [],
        "gallery": [],
        "progress": [],
        "session": ["Run", "environment", "start"],
        "sweeps": ["sweep"],
        "widgets": [],
    },
)
