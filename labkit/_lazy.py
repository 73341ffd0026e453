"""Lazy exports for packages (PEP 562), so that importing a package costs nothing until a name is used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attach(
    package: str, modules: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Give a package lazily imported names.

    Parameters
    ----------
    package : str
        ``__name__`` of the package.
    modules : mapping of str to sequence of str
        Submodule (dotted names are relative to the package) to the public names that it defines. An empty
        sequence exports the submodule itself.

    Returns
    -------
    getattr, dir, all
        To be bound to ``__getattr__``, ``__dir__`` and ``__all__`` in the package.
    """
    owner = {name: module for module, names in modules.items() for name in names}
    submodules = {module for module in modules if "." not in module}
    public = sorted({*owner, *(module for module, names in modules.items() if not names)})

    def __getattr__(name: str) -> Any:
        # An exported name wins over a submodule of the same spelling.
        if name in owner:
            value = getattr(importlib.import_module(f"{package}.{owner[name]}"), name)
            setattr(sys.modules[package], name, value)
            return value
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}; public names: {', '.join(public)}"
        )

    def __dir__() -> list[str]:
        return sorted({*public, *submodules})

    return __getattr__, __dir__, public
