"""Tiny Llama checkpoints, and groups that are as unequal as can be."""

from __future__ import annotations

import pytest
import torch

from labkit.kv.dha import HeadGroups
from tests.kv.dha.checkpoints import llama


@pytest.fixture
def mha():
    return llama()


@pytest.fixture
def ids():
    return torch.randint(2, 64, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def uneven():
    """Two layers of four heads: groups that cross, of unequal size, differently many in K and V and by layer."""
    return HeadGroups(
        keys=[[[0, 2, 3], [1]], [[0], [1, 2], [3]]], values=[[[0, 1], [2], [3]], [[0, 1, 2, 3]]], heads=4
    )
