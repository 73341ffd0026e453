"""How nbval re-runs the committed notebooks: one thread a kernel, starts spaced, only decisive text compared.

Figures and widgets are left out of the comparison: their numbers come as binary that no rule can round, and an HTML
table repeats, with more digits, what the text twin says.
"""

from __future__ import annotations

import os

import pytest

os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    LABKIT_BATCH="1",
    PLOTLY_RENDERER="plotly_mimetype",
    PYTHONHASHSEED="0",
)

SKIPPED = (
    "text/html",
    "text/markdown",
    "text/latex",
    "image/svg+xml",
    "application/vnd.plotly.v1+json",
    "application/vnd.jupyter.widget-view+json",
    "stderr",
)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Tell nbval what not to compare."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += SKIPPED


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Space the kernels: the first cell of a notebook is about to start one."""
    parent = item.parent
    if hasattr(parent, "skip_compare") and getattr(parent, "kernel", None) is None:
        from labkit.lab import spacing

        spacing.wait_turn()
