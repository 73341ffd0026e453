"""A room for code that nobody has read: run a program with no network, no host files, and limits on all it uses."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "languages": ["LANGUAGES", "Language", "get_language"],
        "limits": ["Limits"],
        "kinds": ["KINDS", "available_kinds"],
        "opening": ["SandboxResult", "SandboxUnavailable"],
        "room": ["Sandbox"],
    },
)
