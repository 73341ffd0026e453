"""The verdict table and the pages: complete, escaped, and without a single outside request."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_markdown_cell, new_output

from labkit.lab import report, runner

from .small import build

PLOTLY = "application/vnd.plotly.v1+json"


def claim(verdict="reproduced", **changes):
    values = {
        "id": "first", "text": "A <b>bold</b> claim", "metric": "accuracy", "unit": "", "direction": ">=",
        "threshold": 0.3, "values": [0.2, 0.4], "mean": 0.32, "interval": [0.05, 0.58], "verdict": verdict,
        "close": True, "reason": "", "paper_figure": "", "setting": "",
    }  # fmt: skip
    return values | changes


@pytest.fixture
def out(tmp_path):
    """Two recorded runs: one with verdicts, figure, formula and badge; one that failed."""
    nb = build("fig")
    nb.cells.insert(
        1,
        new_markdown_cell(
            "[![Binder](https://mybinder.org/badge.svg)](https://mybinder.org/v2/x)\n\n$$\\frac{a}{b}$$ and $x^2$"
        ),
    )
    figure = {"data": [{"y": [1, 2]}], "layout": {"title": {"text": "</script><script>bad()"}}, "frames": []}
    nb.cells[-1].outputs = [
        new_output("display_data", data={PLOTLY: figure, "image/png": "aGk=", "text/plain": "Figure"}),
        new_output(
            "display_data", data={"text/html": '<script src="https://cdn.example/x.js"></script>kept'}
        ),
    ]
    folder = tmp_path / "out"
    for slug, key, status, size in (
        ("nacl", "smoke-seed0", "ok", "smoke"),
        ("other", "laptop-seed0", "failed", "laptop"),
    ):
        directory = folder / slug / key
        directory.mkdir(parents=True)
        error = None if status == "ok" else {"cell": 3, "name": "E", "message": "<i>", "traceback": ["<tb>"]}
        parameters = {"size": size, "seed": 0}
        result = runner.RunResult(slug, key, directory, status, parameters, 3.0, 400.0, {}, error, "f")
        (directory / "run.json").write_text(json.dumps(result.record()))
        nbformat.write(nb, result.notebook)
    rows = [
        claim(),
        claim("not reproduced", id="second"),
        claim("untestable here", threshold=None, reason="why"),
    ]
    (folder / "nacl" / "smoke-seed0" / "verdicts.json").write_text(
        json.dumps({"claims": rows, "device": "cpu"})
    )
    return folder


def test_pages_are_complete_and_self_contained(out):
    index = report.write(out)
    assert index == out / "report" / "index.html"
    names = sorted(path.name for path in index.parent.iterdir())
    assert names == ["index.html", "nacl--smoke-seed0.html", "other--laptop-seed0.html", "plotly.min.js"]
    for name in names[:-1]:
        text = (index.parent / name).read_text()
        fetched = re.findall(r'(?:\ssrc|<link[^>]*\shref)="([^"]*)"', text)
        assert set(fetched) <= {"plotly.min.js", "data:,"}, name
        assert "url(" not in text
        assert "@import" not in text
        assert 'name="viewport"' in text
    page = (index.parent / "nacl--smoke-seed0.html").read_text()
    assert page.count("<math") == 2
    assert "bad()" in page
    assert "</script><script>bad()" not in page
    assert "image/png" not in page
    text = index.read_text()
    assert "A &lt;b&gt;bold&lt;/b&gt; claim" in text
    assert "&lt;tb&gt;" in text
    assert "not reproduced" in text
    assert text.count('class="gauge') == 2
    assert 'href="nacl--smoke-seed0.html"' in text


def test_pages_of_runs_that_are_gone_are_removed(out):
    import shutil

    report.write(out)
    shutil.rmtree(out / "other")
    report.write(out)
    assert not (out / "report" / "other--laptop-seed0.html").exists()


def test_terminal_table(out, capsys):
    report.show(runner.load_all(out))
    text = capsys.readouterr().out
    assert "0.320 [0.050, 0.580]" in text
    assert "other laptop-seed0: failed in cell 3: E" in text
    assert "<tb>" in text


def test_an_unknown_macro_keeps_its_source():
    assert "notamacro" in report.mathml(r"\notamacro{<x>}", "block")
    assert "<x>" not in report.mathml(r"\begin{nothing", "inline").replace("<math", "")


def test_gauge_puts_mean_and_threshold_in_order():
    text = str(report.gauge(claim(direction="<=", mean=0.5, interval=None)))
    threshold = float(re.search(r'class="limit" x1="([\d.]+)"', text)[1])
    mean = float(re.search(r'cx="([\d.]+)"', text)[1])
    assert threshold < mean
    assert report.gauge(claim(mean=None)) == ""


@pytest.mark.browser
def test_pages_draw_without_errors_or_requests(out):
    sync_api = pytest.importorskip("playwright.sync_api")
    from labkit.lab import doctor

    if doctor.chromium() is None:
        pytest.skip("no Chromium; `labkit doctor` says how to get one")
    index = report.write(out)
    problems = []
    with sync_api.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=doctor.chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        outside = ("http:", "https:", "ws:")
        page.on(
            "request",
            lambda request: problems.append(request.url) if request.url.startswith(outside) else None,
        )
        page.goto(index.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.click("a.open")
        page.wait_for_selector("figure.plot[data-drawn] svg.main-svg")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert problems == []
