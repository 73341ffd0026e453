"""What the operations share to choose their implementation."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch


@functools.cache
def triton_installed() -> bool:
    """Whether ``import triton`` would find a package (it is not imported here)."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes tensors of the CPU (tests only)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def check_backend(backend: str, allowed: Sequence[str]) -> None:
    """Raise ``ValueError`` for a backend that the operation does not have."""
    if backend not in allowed:
        raise ValueError(f"backend must be one of {', '.join(map(repr, allowed))}; got {backend!r}")


def check_triton(device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Raise ``ValueError`` with the remedy where an explicit ``backend="triton"`` cannot be had."""
    if not triton_installed():
        raise ValueError("backend='triton' needs the package triton: pip install 'labkit[gpu]'")
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"backend='triton' runs on CUDA tensors; these are on {device}. Use backend='auto', or set "
            "TRITON_INTERPRET=1 before the first import to run the kernel in Triton's interpreter"
        )
    if any(dtype not in (torch.float32, torch.float16, torch.bfloat16) for dtype in dtypes):
        raise ValueError(
            f"backend='triton' takes float32, float16 and bfloat16; got {', '.join(map(str, dtypes))}"
        )
