"""The site: complete, escaped, without a single outside request, and working in a browser."""

from __future__ import annotations

import base64
import csv
import json
import os
import re
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from labkit import papers
from labkit.lab import doctor, gallery, notebook, runner
from labkit.lab.site import board, build, glyphs, pages, render, settings, speed, sweep

from .small import build as small

PLOTLY = "application/vnd.plotly.v1+json"
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


def claim(verdict="reproduced", **changes):
    values = {
        "id": "first", "text": "A <b>bold</b> claim", "metric": "accuracy", "unit": "", "direction": ">=",
        "threshold": 0.3, "values": [0.2, 0.4], "mean": 0.32, "interval": [0.05, 0.58], "verdict": verdict,
        "close": True, "reason": "", "paper_figure": "", "setting": "",
    }  # fmt: skip
    return values | changes


def executed():
    """A notebook with figure, formula, badge, strip and a script from elsewhere."""
    nb = small("run.sizes(smoke=dict(seeds=1), laptop=dict(seeds=3))", "fig")
    title = "# Title\n\n[![Binder](https://mybinder.org/badge.svg)](https://mybinder.org/v2/x)"
    nb.cells[0] = new_markdown_cell(title)
    nb.cells[1:1] = [
        new_markdown_cell("### Found\n\n| a |\n| - |\n| strip |", metadata={"tags": ["verdict-strip"]}),
        new_markdown_cell("## The method\n\n$$\\frac{a}{b}$$ and $x^2$ of haystacks"),
        new_markdown_cell("## Results"),
    ]
    figure = {"data": [{"y": [1, 2]}], "layout": {"title": {"text": "</script><script>bad()"}}, "frames": []}
    remote = '<script src="https://cdn.example/x.js"></script>kept'
    nb.cells[-1].outputs = [
        new_output("display_data", data={PLOTLY: figure, "image/png": PNG, "text/plain": "Figure"}),
        new_output("display_data", data={"text/html": remote}),
    ]
    return nb


@pytest.fixture
def out(tmp_path):
    """Two recorded runs: one with verdicts, figure, formula and badge; one that failed."""
    folder = tmp_path / "out"
    for slug, key, status, size in (
        ("nacl", "smoke-seed0", "ok", "smoke"),
        ("other", "laptop-seed0", "failed", "laptop"),
    ):
        directory = folder / slug / key
        directory.mkdir(parents=True)
        error = None if status == "ok" else {"cell": 3, "name": "E", "message": "<i>", "traceback": ["<tb>"]}
        parameters = {"size": size, "seed": 0}
        stamp = "2026-01-02T03:04:05+00:00"
        result = runner.RunResult(
            slug, key, directory, status, parameters, 3.0, 400.0, {}, error, "f", finished=stamp
        )
        (directory / "run.json").write_text(json.dumps(result.record()))
        nbformat.write(executed(), result.notebook)
    rows = [
        claim(),
        claim("not reproduced", id="second"),
        claim("untestable here", id="third", threshold=None, reason="why"),
    ]
    gpu = {"claims": rows, "device": "cuda", "environment": {"gpu": "A Large GPU"}}
    (folder / "nacl" / "smoke-seed0" / "verdicts.json").write_text(json.dumps(gpu))
    return folder


@pytest.fixture
def top(tmp_path, monkeypatch):
    """A repository with the committed notebook of one paper, a benchmark, and its results."""
    top = tmp_path / "repository"
    (top / "notebooks" / "kv").mkdir(parents=True)
    (top / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setenv("LABKIT_ROOT", str(top))
    nb = executed()
    rows = [
        {
            **{name: claim()[name] for name in ("mean", "interval", "unit", "close", "reason")},
            **{"id": item.id, "direction": item.direction, "threshold": item.threshold["laptop"]},
            "verdict": "reproduced" if i % 2 else "not reproduced",
        }
        for i, item in enumerate(papers.load("nacl").claims)
    ]
    nb.metadata.labkit = {
        "slug": "nacl", "size": "laptop", "seconds": 61, "peak_memory_mb": 700, "claims": rows,
        "code_hash": notebook.code_hash(nb), "date": "2026-01-01", "device": "cpu", "seed": 0,
    }  # fmt: skip
    nbformat.write(nb, top / "notebooks" / "kv" / "nacl.ipynb")
    results = top / "benchmarks" / "results" / "nacl.jsonl"
    results.write_text("".join(json.dumps(_point(shape=f"S={n}")) + "\n" for n in (4, 8)))
    return top


@pytest.fixture
def swept(tmp_path):
    """A sweep over two parameters as ``labkit sweep`` records it: two seeds a run, one run died."""
    folder = tmp_path / "sweeps" / "first"
    folder.mkdir(parents=True)
    rows = []
    for budget in (0.1, 0.2, 0.4):
        for seed in (0, 1):
            dead = (budget, seed) == (0.4, 1)
            values = [budget, budget + 0.1]
            claims = {
                "claim.chance-helps": "" if dead else sum(values) / 2,
                "claim.chance-helps.low": "" if dead else 0,
                "claim.chance-helps.high": "" if dead else 1,
                "claim.chance-helps.verdict": "" if dead else "reproduced",
                "claim.chance-helps.values": "" if dead else json.dumps(values),
                "metric.full": "" if dead else 0.99,
            }
            head = {
                "run": f"r{budget}-{seed}",
                "size": "laptop",
                "seed": seed,
                "device": "auto",
                "budget": budget,
            }
            cost = {"status": "died" if dead else "ok", "seconds": 60.5, "peak_memory_mb": 512}
            more = {"exploratory": "" if dead else budget != 0.1, "env.device": "cpu", "env.torch": "2.13"}
            rows.append({**head, **cost, **more, **claims})
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    head = {
        "schema": 1, "slug": "nacl", "started": "2026-01-03T00:00:00+00:00", "varied": ["budget", "seed"],
        "parameters": ["size", "seed", "device", "budget"], "runs": [],
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(head))
    return folder


# ------------------------------------------------------------------------------------------- the whole


def test_pages_are_complete_and_self_contained(out, top, swept):
    index = build.write(out, sweeps=[swept.parent])
    folder = index.parent
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html"))
    assert names == [
        "benchmarks.html", "index.html", "papers/nacl.html", "runs/nacl--smoke-seed0.html",
        "runs/other--laptop-seed0.html", "settings.html", "sweeps.html", "sweeps/nacl--first.html", "verdicts.html",
    ]  # fmt: skip
    for name in names:
        text = (folder / name).read_text()
        fetched = re.findall(r'(?:\ssrc|<link[^>]*\shref)="([^"]*)"', text)
        assert not [item for item in fetched if re.match(r"(\w+:)?//", item)], name
        for item in fetched:
            assert item.startswith("data:") or (folder / name).parent.joinpath(item).is_file(), (name, item)
        for item in re.findall(r'<a[^>]*\shref="([^"]*)"', text):
            target = item.split("#")[0]
            local = not re.match(r"https?:", item)
            assert not local or not target or (folder / name).parent.joinpath(target).is_file(), (name, item)
        assert "@import" not in text
        assert 'name="viewport"' in text
        assert text.count("<h1") >= 1, name
    styles = (folder / "assets" / "site.css").read_text()
    assert "url(" not in styles
    assert "http" not in (folder / "assets" / "site.js").read_text()


def test_a_paper_page_shows_its_notebook_with_live_figures(out, top):
    folder = build.write(out).parent
    page = (folder / "papers" / "nacl.html").read_text()
    assert page.count("<math") == 2
    assert "bad()" in page
    assert "</script><script>bad()" not in page
    assert "image/png" not in page
    assert "<td>strip</td>" not in page
    assert 'id="verdicts"' in page
    assert page.count('class="gauge') == len(papers.load("nacl").claims)
    assert '<a href="#the-method">The method</a>' in page
    assert (folder / "papers" / "nacl.ipynb").is_file()


def test_the_gallery_and_the_search_know_the_paper(out, top):
    folder = build.write(out).parent
    page = (folder / "index.html").read_text()
    assert 'src="assets/nacl.png"' in page
    assert 'data-family="kv"' in page
    assert 'data-verdicts="yes no "' in page
    script = (folder / "assets" / "search.js").read_text()
    found = json.loads(script.removeprefix("window.labkitSearch = ").rstrip(";\n"))
    assert any(item["to"] == "papers/nacl.html#the-method" and "haystacks" in item["text"] for item in found)
    assert sum(item["to"].endswith("#verdicts") for item in found) == len(papers.load("nacl").claims)


def test_the_board_shows_every_run_with_size_device_and_date(out, top):
    folder = build.write(out).parent
    page = (folder / "verdicts.html").read_text()
    assert "A &lt;b&gt;bold&lt;/b&gt; claim" in page
    assert "&lt;tb&gt;" in page
    assert "A Large GPU" in page
    assert "2026-01-02" in page
    assert "2026-01-01" in page
    assert 'href="runs/nacl--smoke-seed0.html"' in page
    assert "failed in cell 3: E" in page


def test_what_is_gone_is_removed_and_what_is_foreign_stays(out, top):
    folder = build.write(out).parent
    (folder / "mine.html").write_text("mine")
    shutil.rmtree(out / "other")
    build.write(out)
    assert not (folder / "runs" / "other--laptop-seed0.html").exists()
    assert (folder / "mine.html").read_text() == "mine"


def test_without_runs_or_notebooks_there_are_still_pages(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("LABKIT_ROOT", str(tmp_path))
    index = build.write(tmp_path / "runs")
    assert "no notebook yet" in index.read_text()
    assert "No runs are recorded yet" in (index.parent / "verdicts.html").read_text()
    assert "labkit sweep" in (index.parent / "sweeps.html").read_text()


# ------------------------------------------------------------------------------------------- its parts


def test_an_unknown_macro_keeps_its_source():
    assert "notamacro" in render.mathml(r"\notamacro{<x>}", "block")
    assert "<x>" not in render.mathml(r"\begin{nothing", "inline").replace("<math", "")


def test_headings_get_ids_that_differ():
    nb = small()
    nb.cells += [new_markdown_cell("## Same"), new_markdown_cell("## Same")]
    assert [part.anchor for part in render.sections(render.body(nb))] == [
        "a-small-notebook",
        "same",
        "same-2",
    ]


def test_thumbnail_is_the_tagged_picture_else_the_first_result():
    nb = small()
    pictures = [base64.b64encode(name).decode() for name in (b"a", b"b", b"c")]
    for picture, heading in zip(pictures, ("Data", "Results", "Claims"), strict=True):
        output = new_output("display_data", data={"image/png": picture})
        nb.cells += [new_markdown_cell(f"## {heading}"), new_code_cell("fig", outputs=[output])]
    assert render.thumbnail(nb) == b"b"
    nb.cells[-1].metadata["tags"] = ["thumbnail"]
    assert render.thumbnail(nb) == b"c"
    assert render.thumbnail(small()) is None


def test_gauge_puts_mean_and_threshold_in_order():
    text = str(glyphs.gauge(claim(direction="<=", mean=0.5, interval=None)))
    threshold = float(re.search(r'class="limit" x1="([\d.]+)"', text)[1])
    mean = float(re.search(r'cx="([\d.]+)"', text)[1])
    assert threshold < mean
    assert glyphs.gauge(claim(mean=None)) == ""


def test_marks_put_what_fails_below_the_line_and_escape():
    failing = claim("not reproduced", mean=0.1, interval=[0.0, 0.2], text='a "quoted" <claim>')
    text = str(glyphs.marks([failing, claim("untestable here", threshold=None)]))
    assert float(re.search(r"<i style=\"top:([\d.]+)%", text)[1]) > 50
    assert "&quot;quoted&quot; &lt;claim&gt;" in text
    assert 'aria-label="1 not reproduced, 1 untestable here"' in text


def test_settings_are_read_without_running():
    nb = small(
        "%matplotlib inline",
        "a, b = 'x/y', [1, 2]\nsettings = run.sizes(smoke=dict(m=a, n=None), laptop={'m': b, 'n': True}, huge=dict())",
    )
    found = settings.sizes(nb)
    assert found == {"smoke": {"m": "x/y", "n": "–"}, "laptop": {"m": "1, 2", "n": "yes"}}
    assert settings.sizes(small("x = 1")) == {}


def test_sweep_knows_what_varies_and_what_was_measured(swept):
    (found,) = sweep.find(swept.parent)
    assert found.parameters == ["budget", "seed"]
    assert found.fixed == {"size": "laptop", "device": "auto"}
    assert [measure.kind for measure in found.measures] == ["claim", "metric", "cost", "cost"]
    registered = next(item for item in papers.load("nacl").claims if item.id == "chance-helps")
    assert found.measures[0].threshold == registered.threshold["laptop"]
    assert found.states == {"ok": 5, "died": 1}
    assert found.machines == {"device": "cpu", "torch": "2.13"}
    assert found.exploratory == 3
    data = sweep.payload(found)
    assert data["measures"][0]["missing"] == 1
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_a_seed_that_two_runs_share_counts_once(swept):
    (found,) = sweep.find(swept.parent)
    claim, metric = found.measures[:2]
    # Seeds 0 and 1 of one run, 1 and 2 of the next: three points; the last setting has one run alone.
    lowest = [point for point in sweep.points(found, claim) if point[0] == 0.1]
    assert lowest == [[0.1, 0, 0.1], [0.1, 1, 0.2], [0.1, 2, 0.2]]
    assert len(sweep.points(found, claim)) == 3 + 3 + 2
    assert len(sweep.points(found, metric)) == 5
    by_budget, by_seed = sweep.summaries(found)
    assert [row["value"] for row in by_seed["rows"]] == [0, 1, 2]
    assert by_budget["rows"][0]["cells"][0] == "0.167 (0.100 to 0.200)"
    assert by_budget["rows"][2]["runs"] == 2


def test_a_broken_sweep_is_left_out(swept):
    (swept / "table.csv").unlink()
    assert sweep.find(swept.parent) == []
    (swept / "table.csv").write_text("budget\n")
    (swept / "sweep.json").write_text("{")
    assert sweep.find(swept.parent) == []


def _point(**changes):
    record = {
        "kind": "comparison", "op": "sum", "baseline": "loop", "candidate": "fast", "shape": "S=4", "mode": "forward",
        "dtype": "float32", "device": "cpu", "clock": "cpu", "speedup": 2.0, "low": 1.5, "high": 2.5, "rounds": 7,
        "seconds": {"loop": 0.004, "fast": 0.002}, "memory": {"loop": 2e6, "fast": 1e6}, "failure": None,
        "environment": {"processor": "P", "threads": 1, "date": "2026-01-01T00:00:00"},
    }  # fmt: skip
    return record | changes


def test_benchmarks_show_the_newest_point_and_every_losing_one():
    records = [
        _point(speedup=9.0),
        _point(shape="S=8", speedup=0.5, low=0.4, high=0.6),
        _point(shape="S=9", speedup=1.1, low=0.9, high=1.2),
        _point(shape="S=10", speedup=None, low=None, high=None, failure="off by <1>"),
        _point(),
    ]
    (group,) = speed.of_records("bench", records)
    assert [(row.labels[0], row.state) for row in group.rows] == [
        ("S=8", "slower"), ("S=9", "even"), ("S=10", "wrong"), ("S=4", "faster"),
    ]  # fmt: skip
    assert group.rows[-1].speedup == 2.0
    assert group.losing == 3
    page = pages.benchmarks([group])
    assert "wrong: off by &lt;1&gt;" in page
    assert "no faster" in page
    assert ">slower<" in page


def test_races_become_speedups_over_the_baseline():
    race = {
        "kind": "race", "race": "presses", "baseline": "full", "setting": {"prompt": 8}, "phase": "prefill",
        "clock": "cpu", "memory": 1000, "environment": {},
    }  # fmt: skip
    full = {**race, "provider": "full", "time_ratio": 1.0, "low": 1.0, "high": 1.0, "seconds": 2.0}
    half = {**race, "provider": "half", "time_ratio": 0.5, "low": 0.4, "high": 0.8, "seconds": 1.0}
    (group,) = speed.of_records("bench", [full, half])
    assert [row.state for row in group.rows] == ["baseline", "faster"]
    assert group.rows[1].speedup == 2
    assert (group.rows[1].low, group.rows[1].high) == (1.25, 2.5)
    assert group.losing == 0


def test_device_is_the_gpu_by_name(out):
    run = next(run for run in runner.load_all(out) if run.slug == "nacl")
    assert board.device(run) == "A Large GPU"


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def tab(request):
    """A page of a browser on a narrow dark screen; it fails the test on an error or an outside request."""
    required = os.environ.get("LABKIT_REQUIRE_BROWSER") == "1"
    if not required:
        pytest.importorskip("playwright.sync_api")
    if doctor.chromium() is None:
        (pytest.fail if required else pytest.skip)("no Chromium; `labkit doctor` says how to get one")
    from playwright.sync_api import sync_playwright

    problems = []
    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=doctor.chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "console",
            lambda message: problems.append(message.text) if message.type in ("error", "warning") else None,
        )
        page.on(
            "request",
            lambda request: (
                problems.append(request.url)
                if not request.url.startswith(("file:", "data:", "blob:"))
                else None
            ),
        )
        yield page
        browser.close()
    assert problems == []


def _fits(page):
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_every_page_opens_from_a_folder_on_a_phone(tab, out, top, swept):
    index = build.write(out, sweeps=[swept.parent])
    for path in sorted(index.parent.rglob("*.html")):
        tab.goto(path.as_uri())
        assert _fits(tab), path.name
        for figure in tab.locator("figure.plot, figure.sweep-plot").all():
            figure.scroll_into_view_if_needed()
        drawn = "[...document.querySelectorAll('figure.plot, figure.sweep-plot')].every(f => f.dataset.drawn)"
        tab.wait_for_function(drawn)
        assert _fits(tab), path.name


@pytest.mark.browser
def test_gallery_filters_search_and_theme_work_by_keyboard(tab, out, top):
    index = build.write(out)
    tab.goto(index.as_uri())
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to content"
    tab.focus(".chip[data-verdict=open]")
    tab.keyboard.press("Enter")
    assert tab.locator("#cards > li:visible").count() == 0
    assert "No paper fits" in tab.inner_text("#filter-note")
    tab.reload()  # the filter is in the address
    assert tab.locator("#cards > li:visible").count() == 0
    tab.keyboard.press("Tab")
    tab.focus(".chip[data-verdict=open]")
    tab.keyboard.press("Space")
    assert tab.locator("#cards > li:visible").count() == len(papers.slugs())
    tab.focus("#theme")
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    tab.keyboard.press("/")
    tab.keyboard.type("haystacks method")
    tab.locator("#search-found li").first.wait_for()
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowUp")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/papers/nacl.html#the-method")
    tab.wait_for_selector("figure.plot[data-drawn] svg.main-svg")
    tab.keyboard.press("/")
    tab.keyboard.press("Escape")
    assert not tab.evaluate("document.getElementById('search').open")


@pytest.mark.browser
def test_sweep_plots_follow_the_choice(tab, out, top, swept):
    index = build.write(out, sweeps=[swept.parent])
    tab.goto((index.parent / "sweeps" / "nacl--first.html").as_uri())
    tab.wait_for_selector("figure.sweep-plot[data-drawn] svg.main-svg")
    assert "1 of 6 runs have no value" in tab.inner_text("#pick-note")
    means = "document.querySelector('figure.sweep-plot').data.filter(t => t.mode === 'lines+markers').map(t => t.y)"
    assert tab.evaluate(f"{means}[0].map(v => Math.round(v * 1000))") == [167, 267, 450]
    tab.select_option("#apart", label="seed")
    assert tab.evaluate(f"{means}.length") == 3
    tab.select_option("#measure", label="seconds")
    tab.wait_for_function("document.querySelector('figure.sweep-plot').dataset.drawn === '2'")
    assert tab.evaluate(f"{means}[0]") == [60.5, 60.5, 60.5]


# ------------------------------------------------------------------------------------------- the gallery


def test_gallery_table_filters_and_has_a_text_twin(top):
    claims = len(papers.load("nacl").claims)
    good, bad = claims // 2, claims - claims // 2  # the fixture's verdicts take turns, the first one failing
    lines = {line.split()[1]: line for line in str(gallery.table()).splitlines() if len(line.split()) > 1}
    assert lines["nacl"].split()[:6] == ["kv", "nacl", str(good), "✓", str(bad), "✗"]
    assert "href='kv/nacl.ipynb'" in gallery.table()._repr_html_()
    assert str(gallery.table(family="climate")) == "no paper fits"
    assert str(gallery.table(verdict="untestable here")) == "no paper fits"
    assert "nacl" in str(gallery.table(words="EVICT proxy", verdict="reproduced"))
    with pytest.raises(ValueError, match="verdict 'reproducd' is unknown; did you mean 'reproduced'?"):
        gallery.table(verdict="reproducd")
    # Claims of papers without a notebook count as registered.
    every = [papers.load(slug) for slug in papers.slugs()]
    total = sum(len(paper.claims) for paper in every)
    assert (
        gallery.headline() == f"{len(every)} papers, {total} claims: {good} reproduced, {bad} not reproduced"
    )


def test_gallery_panel_filters(top):
    box = gallery.panel()
    assert "nacl" in str(box.figure)
    box.controls["verdict"].value = "untestable here"
    assert str(box.figure) == "no paper fits"
    assert box.error is None


def test_gallery_figure_has_a_mark_a_claim(top):
    fig = gallery.figure()
    assert sum(len(trace.x) for trace in fig.data) == len(papers.load("nacl").claims)
    assert all(-1 <= value <= 1 for trace in fig.data for value in trace.y)


def test_readme_changes_only_between_the_markers(top):
    path = top / "README.md"
    assert not gallery.write_readme()
    path.write_text("no markers")
    assert not gallery.write_readme()
    path.write_text(f"a\n{gallery.BEGIN}\nold\n{gallery.END}\nb")
    assert gallery.write_readme()
    text = path.read_text()
    assert text.startswith(f"a\n{gallery.BEGIN}\n| paper |")
    assert text.endswith(f"{gallery.END}\nb")
    assert "\nold\n" not in text
    assert "[notebook](notebooks/kv/nacl.ipynb)" in text
    assert not gallery.write_readme()
