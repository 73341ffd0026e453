"""Figures: small, comparable, legible; sliders without a kernel; still images where a browser is at hand."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest

pytest.importorskip("plotly")
from labkit.lab import figures
from labkit.lab.figures import axes, look, png

X = [5, 10, 20, 40]
TITLES = {"title": "Does it hold?", "x_title": "budget (%)", "y_title": "accuracy"}


def runs(level: float, seeds: int = 3) -> np.ndarray:
    return level + np.random.default_rng(0).random((seeds, len(X))) / 10


def as_json(fig) -> dict:
    return json.loads(json.dumps(figures.plain(fig)))


def test_importing_figures_imports_neither_plotly_nor_torch():
    code = "import sys, labkit.lab.figures, labkit.lab.widgets; print([m for m in ('plotly', 'torch', 'ipywidgets', "
    code += "'kaleido') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert found.stdout.strip() == "[]"


def test_template_is_legible():
    layout = look.template().layout
    sizes = [
        layout.font.size,
        layout.xaxis.tickfont.size,
        layout.xaxis.title.font.size,
        layout.hoverlabel.font.size,
    ]
    assert min(sizes) >= 13
    assert layout.autosize
    assert layout.width is None


def test_colours_differ_for_every_kind_of_eye():
    """Machado's matrices for full colour blindness: no two of the first six colours come close."""
    deficient = {
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
    }
    colours = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in look.COLOURS[:6]]) / 255
    for matrix in deficient.values():
        seen = np.clip(colours**2.2 @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        apart = np.abs(seen[:, None] - seen[None]).max(-1) + np.eye(len(seen))
        assert apart.min() > 0.12
    assert all(look.ink(colour) for colour in look.COLOURS)


def test_lines_draw_mean_and_band():
    values = runs(0.5)
    fig = figures.lines({"ours": values}, X, **TITLES)
    band, line = fig.data
    np.testing.assert_allclose(line.y, values.mean(0))
    np.testing.assert_allclose(band.y, [*values.min(0), *values.max(0)[::-1]])
    narrow = figures.lines({"ours": values}, X, band="95%", **TITLES)
    from labkit.lab.claims import interval

    np.testing.assert_allclose(narrow.data[1].customdata[2], interval(list(values[:, 2])))
    assert "3 seeds" in fig.layout.title.text
    assert fig.layout.xaxis.title.text == "budget (%)"


def test_lines_take_ready_bands_and_own_positions():
    fig = figures.lines(
        {"a": ([1, 2], [3.0, 4.0], [2.0, 3.0], [4.0, 5.0]), "b": ([5, 6, 7], [1, 2, 3])}, **TITLES
    )
    assert [list(trace.x) for trace in fig.data[1:]] == [[1, 2], [5, 6, 7]]
    assert fig.data[2].y == (1, 2, 3)


def test_series_differ_in_more_than_colour():
    fig = figures.lines({name: runs(i / 10) for i, name in enumerate("abcdef")}, X, **TITLES)
    shapes = [trace.marker.symbol for trace in fig.data if trace.mode == "lines+markers"]
    assert len(set(shapes)) == 6
    long = np.linspace(0, 1, 60)
    fig = figures.lines(dict.fromkeys("abcdef", long), long, **TITLES)
    assert len({trace.line.dash for trace in fig.data}) == 6


def test_direct_labels_do_not_overlap():
    fig = figures.lines({f"method {i}": runs(0.5) for i in range(6)}, X, **TITLES)
    places = sorted(note.y for note in fig.layout.annotations)
    low, high = fig.layout.yaxis.range
    pixels = fig.layout.height - fig.layout.margin.t - fig.layout.margin.b
    assert min(np.diff(places)) * pixels / (high - low) > 17
    assert not fig.layout.showlegend
    assert figures.lines({"a": [1, 2], "b": [2, 1]}, [0, 1], labels="legend", **TITLES).layout.showlegend


def test_highlight_and_quiet_choose_colours():
    series = {"base": runs(0.1), "ours": runs(0.5), "other": runs(0.3)}
    fig = figures.lines(series, X, highlight="ours", quiet=["base"], colors={"other": "#123456"}, **TITLES)
    colours = {trace.name: trace.line.color for trace in fig.data if trace.name}
    assert colours == {"base": look.QUIET, "ours": look.COLOURS[0], "other": "#123456"}
    with pytest.raises(ValueError, match="'mine' is no series; there are base, ours, other"):
        figures.lines(series, X, highlight="mine", **TITLES)


@pytest.mark.parametrize(
    ("series", "x", "message"),
    [
        ({}, X, "no series"),
        ({"a": np.zeros((2, 3))}, X, r"shape \(2, 3\); \(seeds, 4\) is needed"),
        ({"a": [1, 2]}, None, "must be"),
        ({"a": ([1, 2], [1], [1], [1])}, None, "differ"),
        ({"a": [1, 2, float("nan"), 4]}, X, "a at x=20: .*finite"),
    ],
)
def test_lines_refuse(series, x, message):
    with pytest.raises(ValueError, match=message):
        figures.lines(series, x, **TITLES)
    with pytest.raises(ValueError, match="band='all' is not allowed"):
        figures.lines({"a": [1, 2]}, [0, 1], band="all", **TITLES)


def test_bars_show_every_seed():
    fig = figures.bars(
        {"ours": [0.9, 0.8, 1.0], "random": [0.2, 0.4]}, title="Which?", value_title="accuracy"
    )
    bar, points, text = fig.data
    assert bar.y == pytest.approx((0.9, 0.3))
    assert points.y == pytest.approx((0.9, 0.8, 1.0, 0.2, 0.4))
    assert bar.error_y.array == pytest.approx((0.1, 0.1))
    assert text.text == ("0.9", "0.3")
    assert fig.layout.yaxis.range[0] == 0


def test_bars_group_and_lie_down():
    groups = {"ours": {"10%": [0.9, 0.8], "20%": [1, 1]}, "other": {"10%": [0.4, 0.2], "20%": [0.5, 0.6]}}
    fig = figures.bars(groups, title="Which?", value_title="accuracy", category_title="budget")
    assert [trace.name for trace in fig.data if trace.type == "bar"] == ["ours", "other"]
    assert fig.layout.scattermode == "group"
    lying = figures.bars(groups, title="Which?", value_title="accuracy", horizontal=True)
    # Points and labels lie on their own bars only when they say that they lie.
    assert {trace.orientation for trace in lying.data} == {"h"}
    many = figures.bars(
        {f"a method of long name {i}": [i, i + 1] for i in range(9)}, title="?", value_title="s"
    )
    assert many.data[0].orientation == "h"
    with pytest.raises(ValueError, match="either every value"):
        figures.bars({"a": [1], "b": {"c": [1]}}, title="?", value_title="s")


def test_cache_map_has_a_row_for_each_head_of_each_layer():
    reason = np.zeros((2, 3, 5), dtype=int)
    reason[1, 2, 4] = 3
    stats = {0: SimpleNamespace(reason=reason * 0), 4: SimpleNamespace(reason=reason)}
    fig = figures.cache_map(stats, 1, title="?", highlight={"fact": 4})
    assert list(fig.data[0].y)[-1] == "layer 4, head 2"
    assert fig.data[0].z[-1][4] == list(figures.KEPT).index("kept by score")
    assert len(figures.cache_map(stats, layers=[4], title="?").data[0].z) == 3
    with pytest.raises(ValueError, match="run a model under the press first"):
        figures.cache_map({}, title="?")
    with pytest.raises(ValueError, match="layer 9 is not among"):
        figures.cache_map(stats, layers=[9], title="?")


def test_the_classes_of_a_map_are_counted_as_the_presses_count_them():
    state = pytest.importorskip("labkit.kv.state")
    names = list(figures.KEPT)
    assert names[0] == "evicted"
    assert (names[state.SINK], names[state.RECENT]) == ("sink", "recent")
    assert (names[state.BY_SCORE], names[state.BY_LUCK]) == ("kept by score", "kept by luck")


def test_heatmap_of_classes():
    cells = np.array([[1, 2, 3, 0], [1, 4, 0, 0]])
    fig = figures.heatmap(
        cells,
        classes=figures.KEPT,
        title="?",
        x_title="position",
        y_title="head",
        highlight={"needle": [1, 2]},
    )
    assert fig.data[0].text[1] == ["sink", "kept by luck", "evicted", "evicted"]
    assert [trace.name for trace in fig.data[1:]] == list(figures.KEPT)
    frame = fig.layout.shapes[0]
    assert (frame.x0, frame.x1) == (0.5, 2.5)
    assert fig.layout.annotations[0].text == "<b>needle</b>"
    steps = {colour for _, colour in fig.data[0].colorscale}
    assert steps == set(figures.KEPT.values())
    assert (
        figures.heatmap(cells, classes=figures.KEPT, title="", x_title="", y_title="", hover=False)
        .data[0]
        .text
        is None
    )


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([[0, 1], [0]], {}, "all rows of one length"),
        ([[0, 7]], {"classes": ["a", "b"]}, "value 7 names no class; there are 2: a, b"),
        ([[0, 1]], {"highlight": {"needle": 2}}, "'needle' at column 2 of 2"),
        ([[0, 1]], {"x": ["a"]}, "1 names in x for 2 columns"),
    ],
)
def test_heatmap_refuses(values, options, message):
    with pytest.raises(ValueError, match=message):
        figures.heatmap(values, title="?", x_title="x", y_title="y", **options)


def test_text_is_coloured_token_by_token():
    words, values = ["if", " <b>", "\n", "x", "!"], [0.0, 0.5, 1.0, 0.25, 0.75]
    fig = figures.tokens(words, values, title="Where?", bold=[False, False, True, False, True], columns=3)
    assert list(fig.data[0].text) == [["if", "·&lt;b&gt;", "<b>⏎</b>"], ["x", "<b>!</b>", ""]]
    assert list(fig.data[0].z) == [[0.0, 0.5, 1.0], [0.25, 0.75, None]]
    assert figures.tokens([" " * 20], [1.0], title="?").data[0].text[0][0] == "·····…"
    both = figures.tokens(words, {"plain": values, "ours": values[::-1]}, title="Where?", columns=3)
    assert list(both.data[0].y) == ["plain 1", "plain 2", "ours 1", "ours 2"]
    assert both.data[0].z[2] == [0.75, 0.25, 1.0]
    assert [row[0] for row in both.data[0].text] == ["if", "x", "if", "x"]


@pytest.mark.parametrize(
    ("words", "values", "options", "message"),
    [
        ([], [], {}, "0 tokens in 16 columns"),
        (["a"], [1.0], {"columns": 0}, "1 tokens in 0 columns"),
        (["a"], [1.0, 2.0], {}, "2 numbers for 1 tokens"),
        (["a"], {"one": [1.0], "two": []}, {}, "0 numbers for 1 tokens in 'two'"),
        (["a"], [1.0], {"bold": [True, False]}, "2 numbers for 1 tokens in 'bold'"),
    ],
)
def test_text_refuses(words, values, options, message):
    with pytest.raises(ValueError, match=message):
        figures.tokens(words, values, title="Where?", **options)


def test_reference_extends_the_axis():
    fig = figures.lines({"a": [1.0, 2.0]}, [0, 1], **TITLES)
    figures.reference(fig, y=9, label="paper")
    assert fig.layout.yaxis.range[1] > 9
    figures.reference(fig, x=0.5, label="here")
    assert [note.text for note in fig.layout.annotations] == ["paper", "here"]
    with pytest.raises(ValueError, match="either y or x"):
        figures.reference(fig, label="nothing")
    log = figures.lines({"a": [1.0, 100.0]}, [0, 1], log_y=True, references={"ten": 10}, **TITLES)
    assert log.layout.annotations[0].y == pytest.approx(1)


def test_framed_stores_only_what_changes():
    def one(budget):
        return figures.lines({"ours": runs(0.5) * budget, "fixed": runs(0.2)}, X, **TITLES)

    fig = figures.framed({b: one(b) for b in (1, 2, 3)}, slider="budget", start=2)
    assert [frame.name for frame in fig.frames] == ["1", "2", "3"]
    assert fig.layout.sliders[0].active == 1
    assert fig.layout.sliders[0].steps[2].args[0] == ("3",)
    moving = {fig.data[i].name or fig.data[i].legendgroup for i in fig.frames[0].traces}
    assert moving == {"ours"}
    assert all("title" not in (frame.layout.to_plotly_json()) for frame in fig.frames)
    # One range for all frames, wide enough for the highest.
    assert fig.layout.yaxis.range[1] > runs(0.5).max() * 3
    assert all(frame.layout.yaxis.range is None for frame in fig.frames)


def test_framed_refuses():
    def one(name="a"):
        return figures.lines({name: [1, 2]}, [0, 1], **TITLES)

    with pytest.raises(ValueError, match="61 frames"):
        figures.framed({i: one() for i in range(61)})
    with pytest.raises(ValueError, match="from 1 to 60"):
        figures.framed({})
    with pytest.raises(ValueError, match="start=5 is no frame"):
        figures.framed({1: one()}, start=5)
    with pytest.raises(ValueError, match="has the traces"):
        figures.framed({1: one(), 2: figures.heatmap([[1, 2]], title="", x_title="", y_title="")})
    noise = np.random.default_rng(0).random((20, 1000))
    with pytest.raises(ValueError, match=r"kB of JSON, more than 150 kB"):
        figures.framed({i: figures.lines({"a": row}, range(1000), **TITLES) for i, row in enumerate(noise)})


def test_figures_are_plain_rounded_json():
    import plotly.graph_objects as go

    fig = go.Figure(
        go.Scatter(x=np.arange(3), y=np.array([0.123456, np.nan, 1e-7]), customdata=np.ones((3, 1)))
    )
    assert as_json(fig)["data"][0]["y"] == [0.1235, None, 1e-07]
    assert as_json(fig)["data"][0]["x"] == [0, 1, 2]
    packed = json.loads(fig.to_json())  # base64 from plotly itself
    assert "bdata" in packed["data"][0]["y"]
    assert figures.plain(packed)["data"][0]["y"] == [0.1235, None, 1e-07]
    assert look.number(123456.7) == 123457
    with pytest.raises(TypeError, match="has no plain form"):
        figures.plain({"a": object()})


def test_setup_renders_json_and_a_line_of_text(monkeypatch):
    import plotly.io

    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    before = plotly.io.renderers.default, plotly.io.templates.default
    try:
        figures.setup()
        fig = figures.lines({"ours": runs(0.5)}, X, **TITLES)
        bundle = plotly.io.renderers._build_mime_bundle(fig.to_dict())
        assert set(bundle) == {look.MIME, "text/plain"}
        assert bundle["text/plain"].startswith("Does it hold? ours 0.5")
        assert "bdata" not in json.dumps(bundle)
        assert bundle[look.MIME]["config"]["responsive"]
        monkeypatch.setenv("PLOTLY_RENDERER", "json")
        plotly.io.renderers.default = "json"
        figures.setup()
        assert plotly.io.renderers.default == "json"
    finally:
        plotly.io.renderers.default, plotly.io.templates.default = before


def test_summary_is_one_line():
    for fig in (
        figures.bars({"a": [1.0, 2.0]}, title="Which\none?", value_title="s"),
        figures.heatmap([[0.5, 1.25]], title="Where?", x_title="x", y_title="y"),
        figures.framed({1: figures.lines({"a": [1, 2]}, [0, 1], **TITLES)}),
    ):
        assert "\n" not in figures.summary(fig)
        assert "<" not in figures.summary(fig)


def test_labels_move_apart_only_as_far_as_needed():
    assert axes.apart([0, 5, 10], 2, 0, 10) == [0, 5, 10]
    assert axes.apart([9.5, 9.6, 9.7], 2, 0, 10) == [6, 8, 10]


def test_fold_keeps_the_content():
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("a = [\n1,\n2]\nb")])
    data = {
        look.MIME: {"data": [{"y": [1, None, -2.5e-7], "z": [[1, 2], [3, 4]], "t": ['a, "b"', "c\n", "[\\"]}]}
    }
    nb.cells[0].outputs = [nbformat.v4.new_output("display_data", data)]
    text = nbformat.writes(nb)
    folded = figures.fold(text)
    assert json.loads(folded) == json.loads(text)
    assert "[1, null, -2.5e-07]" in folded
    assert '"source": [\n' in folded


def _executed() -> nbformat.NotebookNode:
    bundles = [
        {
            look.MIME: figures.plain(figures.lines({"a": runs(0.5), "b": runs(0.2)}, X, **TITLES)),
            "text/plain": "a",
        },
        {"text/plain": "no figure"},
        {look.MIME: figures.plain(figures.bars({"a": [1, 2]}, title="?", value_title="s"))},
    ]
    cells = [
        nbformat.v4.new_code_cell("fig", outputs=[nbformat.v4.new_output("display_data", b)]) for b in bundles
    ]
    return nbformat.v4.new_notebook(cells=cells)


def test_attach_png_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    nb = _executed()
    with pytest.warns(UserWarning, match="no PNG beside the figures") as said:
        assert figures.attach_png(nb) == 0
    assert len(said) == 1
    assert "image/png" not in nb.cells[0].outputs[0].data


@pytest.mark.browser
@pytest.mark.skipif(bool(png._missing()), reason=png._missing() or "-")
def test_attach_png_draws_every_figure():
    nb = _executed()
    assert figures.attach_png(nb) == 2
    for cell in (nb.cells[0], nb.cells[2]):
        image = base64.b64decode(cell.outputs[0].data["image/png"])
        assert image.startswith(b"\x89PNG")
        assert int.from_bytes(image[16:20], "big") == png.WIDTH
        assert len(image) < 40_000
    assert figures.attach_png(nb, replace=False) == 0
    nbformat.validate(nb)


def test_shrink_reads_every_filter():
    """A picture of few colours, stored with each of PNG's five filters, comes out the same."""
    import struct
    import zlib

    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (7, 4), dtype=np.uint8)
    pixels = palette[rng.integers(0, 7, (10, 6))]
    lines, above = [], np.zeros((6, 4), int)
    for y, row in enumerate(pixels.astype(int)):
        left = np.vstack([np.zeros((1, 4), int), row[:-1]])
        corner = np.vstack([np.zeros((1, 4), int), above[:-1]])
        p = left + above - corner
        distances = np.stack([abs(p - left), abs(p - above), abs(p - corner)])
        paeth = np.choose(distances.argmin(0), [left, above, corner])
        guess = [0 * row, left, above, (left + above) // 2, paeth][y % 5]
        lines.append(bytes([y % 5]) + ((row - guess) % 256).astype(np.uint8).tobytes())
        above = row
    header = struct.pack(">IIBBBBB", 6, 10, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    source = png._SIGNATURE + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )
    np.testing.assert_array_equal(png._pixels(source), pixels[..., :3])
    small = png.shrink(source)
    assert small[25] == 3  # palette
    assert png.shrink(small) == small
