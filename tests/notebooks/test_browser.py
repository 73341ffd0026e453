"""Notebooks in JupyterLab in a real browser: every cell runs, and what can be dragged redraws.

``LABKIT_REQUIRE_BROWSER=1`` turns a missing browser from a skip into a failure; ``LABKIT_BROWSER_SIZE=laptop`` runs
the notebooks at the size that is committed instead of ``smoke``.
"""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from tests.notebooks import browser

NOTEBOOKS = sorted((browser.ROOT / "notebooks").rglob("*.ipynb"))
SIZE = os.environ.get("LABKIT_BROWSER_SIZE", "smoke")
pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    reason = browser.missing()
    if reason and os.environ.get("LABKIT_REQUIRE_BROWSER") == "1":
        pytest.fail(f"LABKIT_REQUIRE_BROWSER=1, but {reason}")
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("lab")
    with browser.Lab(folder) as running:
        yield running


def _name(path: Path) -> str:
    return path.relative_to(browser.ROOT / "notebooks").as_posix()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=_name)
def test_notebook_runs_and_can_be_dragged(lab, path):
    content = nbformat.read(path, as_version=4)
    tags = {tag for cell in content.cells for tag in cell.metadata.get("tags", [])}
    before = path.read_bytes()
    with lab.open(path, {"size": SIZE} if "parameters" in tags else None) as page:
        page.run_all(timeout=150 if SIZE == "smoke" else 600)
        assert page.errors() == []
        if "widget" in tags:
            moved = page.drag_widget()
            assert moved.found, "a cell is tagged widget, but there is no slider on the page"
            assert moved.changed, f"moving {moved.control!r} changed nothing in its cell"
            assert not moved.collapsed, f"the page jumps while {moved.control!r} moves"
        framed = page.drag_frames()
        assert framed.changed or not framed.found, f"the figure's slider {framed.control!r} changes nothing"
        assert page.problems == []
    assert path.read_bytes() == before


def test_gallery_is_filtered_by_its_menus(lab):
    with lab.open(browser.ROOT / "notebooks" / "index.ipynb") as page:
        page.run_all(timeout=90)
        assert page.errors() == []
        papers = page.tab.locator(".widget-output table tbody tr")
        papers.first.wait_for()
        everything = papers.count()
        page.tab.locator(".labkit-control input").fill("no such word")
        page.tab.keyboard.press("Enter")
        page.tab.get_by_text("No paper fits.").wait_for()
        page.tab.locator(".labkit-control input").fill("")
        page.tab.keyboard.press("Enter")
        papers.first.wait_for()
        assert papers.count() == everything
        # In a gallery the titles open the notebooks.
        assert page.tab.locator(
            ".widget-output a[href*='.ipynb'], .widget-output a[data-commandlinker-args]"
        ).count()
        assert page.problems == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A notebook with one of everything."""
    cells = [
        v4.new_markdown_cell("# A small notebook\n\nWith an equation, $F_j = \\sum_p A_{pj}$, and figures."),
        v4.new_code_cell('size: str = "laptop"  # smoke | laptop', metadata={"tags": ["parameters"]}),
        v4.new_code_cell(
            "import numpy as np\nfrom labkit.lab import figures, widgets\n\nfigures.setup()\nprint(size)"
        ),
        v4.new_code_cell(
            "x = [5, 10, 20, 40]\nrng = np.random.default_rng(0)\n"
            'runs = {name: level + rng.random((3, 4)) / 10 for name, level in {"one": 0.2, "two": 0.6}.items()}\n'
            'figures.lines(runs, x, title="Which one is higher?", x_title="budget (%)", y_title="accuracy")'
        ),
        v4.new_code_cell(
            "def kept(budget):\n"
            "    return figures.heatmap(\n"
            "        rng.integers(0, 5, (4, 30)) if budget < 50 else np.full((4, 30), 2), classes=figures.KEPT,\n"
            '        title="What stays?", x_title="position", y_title="head", highlight={"needle": 7},\n'
            "    )\n\n\n"
            'figures.framed({b: kept(b) for b in (10, 20, 50)}, slider="budget (%)")'
        ),
        v4.new_code_cell(
            "def update(power, loud):\n"
            "    if power == 3:\n"
            '        raise ValueError("three is not allowed")\n'
            "    y = np.linspace(0, 1, 11) ** power\n"
            '    figure = figures.lines({"curve": y}, np.linspace(0, 1, 11), title=f"Power {power}?",\n'
            '                           x_title="x", y_title="y")\n'
            '    return figure, f"the mean is {y.mean():.3f}" + "!" * loud\n\n\n'
            'widgets.panel(update, power=(1, 6, 1), loud=False, labels={"power": "the power of x"})',
            metadata={"tags": ["widget"]},
        ),
    ]
    path = tmp_path_factory.mktemp("small") / "small.ipynb"
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


def test_helper_runs_and_drags(lab, small, tmp_path):
    before = small.read_bytes()
    with lab.open(small, {"size": "smoke"}) as page:
        page.run_all(timeout=90)
        assert page.errors() == []
        assert page.content()["cells"][2]["outputs"][0]["text"] == "smoke\n"
        first = page.drag_widget()
        assert first.found
        assert first.changed
        assert not first.collapsed
        assert first.control == "the power of x"
        framed = page.drag_frames()
        assert framed.found
        assert framed.changed
        assert page.drag_widget(index=5) == browser.Drag(found=False)
        # The next value raises: the figure stays, and the message is in the panel.
        assert not page.drag_widget(timeout=2).changed
        assert page.tab.get_by_text("ValueError: three is not allowed").count() == 1
        assert len(page.pages(tmp_path / "shots")) > 1
        assert page.problems == []
    assert small.read_bytes() == before


def test_helper_reports_errors(lab, tmp_path):
    path = tmp_path / "broken.ipynb"
    cells = [v4.new_code_cell("1"), v4.new_code_cell("1 / 0"), v4.new_code_cell("2")]
    nbformat.write(v4.new_notebook(cells=cells), path)
    with lab.open(path) as page:
        page.run_all(timeout=60)
        assert [(error.cell, error.name) for error in page.errors()] == [
            (1, "ZeroDivisionError"),
            (2, "NotRun"),
        ]


def test_stored_figures_come_alive(lab, small):
    """Opened and not run: the still picture is as wide as it should be, and turns into a figure that can be dragged."""
    from labkit.lab import figures
    from labkit.lab.figures import look

    fig = figures.framed(
        {n: figures.bars({"a": [n], "b": [1]}, title="?", value_title="s") for n in (1, 2, 3)}, slider="n"
    )
    nb = nbformat.read(small, as_version=4)
    output = v4.new_output("display_data", {look.MIME: figures.plain(fig)})
    nb.cells = [v4.new_code_cell("fig", outputs=[output], execution_count=1)]
    drawn = figures.attach_png(nb)
    path = small.with_name("stored.ipynb")
    nbformat.write(nb, path)
    with lab.open(path) as page:
        if drawn:
            still = page.tab.locator("img.plot-img")
            assert still.bounding_box()["width"] == 880
        assert page.drag_frames().changed
        assert page.problems == []


def test_a_missing_browser_is_named(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    assert "BROWSER_PATH" in browser.missing()


def test_parameters_are_replaced_by_name():
    content = {
        "cells": [
            {"metadata": {"tags": ["parameters"]}, "source": ['size: str = "a"  # a | b\n', "seed = 0"]}
        ]
    }
    browser.set_parameters(content, {"size": "b"})
    assert content["cells"][0]["source"] == "size: str = 'b'  # a | b\nseed = 0"
    with pytest.raises(ValueError, match="'sise' is set 0 times"):
        browser.set_parameters(content, {"sise": "b"})
