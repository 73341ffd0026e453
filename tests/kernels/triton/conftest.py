"""Kernels under Triton's interpreter, which reads its variable when a kernel is decorated: a process of its own.

Run as ``TRITON_INTERPRET=1 python -m pytest tests/kernels/triton``; without the variable every test is skipped.
"""

from __future__ import annotations

import importlib.util
import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") != "1":
        reason = "needs its own process: TRITON_INTERPRET=1 python -m pytest tests/kernels/triton"
    for item in items:
        if reason and "kernels/triton" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))
