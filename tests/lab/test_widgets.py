"""Panels: drawn without a front end, honest about errors, and harmless in a batch."""

from __future__ import annotations

import nbformat
import pytest

ipywidgets = pytest.importorskip("ipywidgets")
pytest.importorskip("plotly")

from labkit.lab import figures, widgets  # noqa: E402
from labkit.lab.figures import look  # noqa: E402


def draw(power, loud=False):
    fig = figures.lines({"curve": [0, power]}, [0, 1], title=f"Power {power}?", x_title="x", y_title="y")
    return fig, "loud" * loud


def test_controls_follow_their_specification():
    own = ipywidgets.IntText(value=7)
    box = widgets.panel(
        lambda **values: str(values), n=(1, 9, 2), s=(0.0, 1.0, 0.25, 0.5), kind=["a", "b"], on=True, own=own
    )
    types = {name: type(control).__name__ for name, control in box.controls.items()}
    assert types == {
        "n": "IntSlider",
        "s": "FloatSlider",
        "kind": "Dropdown",
        "on": "Checkbox",
        "own": "IntText",
    }
    assert box.text == "{'n': 1, 's': 0.5, 'kind': 'a', 'on': True, 'own': 7}"
    assert not box.controls["n"].continuous_update
    assert box.controls["s"].readout_format == ".2f"
    assert isinstance(box, ipywidgets.VBox)


def test_a_move_draws_anew():
    box = widgets.panel(draw, power=(1, 5, 1), loud=False)
    assert "Power 1?" in box.figure.layout.title.text
    box.controls["power"].value = 4
    assert "Power 4?" in box.figure.layout.title.text
    box.controls["loud"].value = True
    assert box.text == "loud"
    assert [sorted(output["data"]) for output in box._output.outputs] == [
        [look.MIME, "text/plain"], ["text/html", "text/plain"]]  # fmt: skip
    assert box.milliseconds > 0
    assert " ms" in box._status.value


def test_errors_are_shown_and_the_figure_stays():
    def update(n):
        if n == 2:
            raise ValueError("two is <b>not</b> allowed\nsecond line")
        return str(n)

    box = widgets.panel(update, n=(1, 3, 1))
    box.controls["n"].value = 2
    assert box.error == "ValueError: two is <b>not</b> allowed"
    assert "&lt;b&gt;" in box._status.value
    assert box.text == "1"
    box.controls["n"].value = 3
    assert box.error is None
    assert box.text == "3"
    odd = widgets.panel(lambda n: 3, n=(1, 3, 1))
    assert odd.error == "TypeError: update returned a int; return a plotly figure, a text, or (figure, text)"


def test_refresh_sees_what_changed_outside():
    state = {"word": "first"}
    box = widgets.panel(lambda: state["word"])
    state["word"] = "second"
    box.refresh()
    assert box.text == "second"


def test_names_stand_above_the_controls():
    box = widgets.panel(draw, labels={"power": "the power of x & y"}, power=(1, 5, 1), loud=False)
    sliders, boxes = box.children[0].children
    assert "the power of x &amp; y" in sliders.children[0].value
    assert boxes.children[0].description == "loud"
    assert box.children[0].layout.flex_flow == "row wrap"


@pytest.mark.parametrize(
    ("controls", "problem"),
    [
        ({"n": (1, 2)}, TypeError), ({"n": "text"}, TypeError), ({"n": (5, 1, 1)}, ValueError),
        ({"n": (1, 5, 0)}, ValueError), ({"n": (1, 5, 1, 9)}, ValueError), ({"n": []}, ValueError),
        ({"n": ipywidgets.HBox()}, TypeError),
    ],
)  # fmt: skip
def test_bad_controls(controls, problem):
    with pytest.raises(problem, match="panel: n"):
        widgets.panel(lambda n: "", **controls)
    with pytest.raises(ValueError, match="label for 'm'"):
        widgets.panel(lambda n: "", labels={"m": "x"}, n=(1, 2, 1))


@pytest.fixture
def shown(monkeypatch):
    import IPython.display

    bundles = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw=False: bundles.append(bundle))
    return bundles


def test_in_a_batch_a_panel_is_a_figure(shown, monkeypatch):
    monkeypatch.setenv("LABKIT_BATCH", "1")
    widgets.panel(draw, power=(1, 5, 1), loud=True)._ipython_display_()
    assert shown[0]["text/plain"] == "Run this notebook to drag: power, loud."
    assert look.MIME in shown[1]
    assert shown[2]["text/plain"] == "loud"
    broken = widgets.panel(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        broken._ipython_display_()


def test_alive_a_panel_is_a_widget(shown, monkeypatch):
    monkeypatch.setenv("LABKIT_BATCH", "0")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    widgets.panel(draw, power=(1, 5, 1))._ipython_display_()
    assert "application/vnd.jupyter.widget-view+json" in shown[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["1", "0"])
def test_panel_survives_nbclient(batch, tmp_path, monkeypatch):
    """No error, and after the widgets' state is stripped nothing large is left in the notebook."""
    import os
    from pathlib import Path

    from nbclient import NotebookClient

    import labkit

    monkeypatch.setenv("LABKIT_BATCH", batch)
    root = str(Path(labkit.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    source = (
        "from labkit.lab import figures, widgets\n"
        "def draw(power):\n"
        "    return figures.lines({'a': [0, power]}, [0, 1], title='?', x_title='x', y_title='y'), 'text'\n"
        "box = widgets.panel(draw, power=(1, 5, 1))\nbox"
    )
    move = "box.controls['power'].value = 3\nbox.refresh()\nprint(box.figure.data[0].y[1])"
    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell(move)]
    nb = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(
        nb, timeout=60, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    kinds = [sorted(output["data"]) for output in nb.cells[0].outputs]
    if batch == "1":
        assert kinds == [["text/html", "text/plain"], [look.MIME, "text/plain"], ["text/html", "text/plain"]]
    else:
        assert kinds == [["application/vnd.jupyter.widget-view+json", "text/plain"]]
    assert nb.cells[1].outputs[0]["text"] == "3.0\n"
    nb.metadata.pop("widgets", None)
    assert len(nbformat.writes(nb)) < 20_000
