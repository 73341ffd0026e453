"""Something to drag: controls above a figure that is computed anew whenever one of them moves."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from labkit.lab.figures import look
from labkit.lab.progress import is_batch

if TYPE_CHECKING:
    import ipywidgets

__all__ = ["panel"]


def panel(
    update: Callable[..., Any], labels: Mapping[str, str] | None = None, **controls: Any
) -> ipywidgets.VBox:
    """Controls and what `update` makes of their values.

    Parameters
    ----------
    update : callable
        Called with the value of each control by name; returns a plotly figure (or anything with an HTML form, such
        as a table), a text, or a pair of both. It should take less than half a second, as it runs at every move.
    labels : mapping of str to str, optional
        What a control is called on the page; by default its name, with spaces for underscores.
    **controls
        One per argument of `update`: ``(low, high, step)`` or ``(low, high, step, default)`` for a slider (whole
        numbers if all of them are), a list of choices, a bool, or an ipywidgets widget of your own.

    Returns
    -------
    ipywidgets.VBox
        Shown when it is the value of a cell. ``panel.controls`` holds the widgets by name, and setting a ``value``
        draws anew; ``panel.refresh()`` draws by hand; ``panel.figure``, ``panel.text``, ``panel.error`` and
        ``panel.milliseconds`` tell of the last draw. None of this needs a front end.

    Raises
    ------
    TypeError, ValueError
        For a control that is none of the above, or a label without a control.

    Notes
    -----
    An error in `update` is shown in the panel, and the figure before it stays. In a batch (``LABKIT_BATCH``) there
    is nobody to drag: the cell then shows the figure and text at the defaults as ordinary outputs, which every page
    can draw, and an error is raised as in any other cell.

    Examples
    --------
    >>> box = panel(lambda n, loud: "ab" * n + "!" * loud, n=(1, 5, 1, 2), loud=False)
    >>> box.text
    'abab'
    >>> box.controls["n"].value = 3
    >>> box.text
    'ababab'
    """
    names = dict(labels or {})
    if odd := set(names) - set(controls):
        raise ValueError(
            f"panel: label for {sorted(odd)[0]!r}, which is no control; there are {', '.join(controls)}"
        )
    made = {name: _control(name, spec, names.get(name)) for name, spec in controls.items()}
    box: ipywidgets.VBox = _panel_class()(update, made, names)
    return box


def _control(name: str, spec: Any, label: str | None) -> Any:
    """The widget that a short specification stands for."""
    import ipywidgets as ui

    # Descriptions left of a control would squeeze it on a narrow page: `_labelled` puts the name above.
    common = {"layout": ui.Layout(margin="0", width="100%"), "style": {"description_width": "initial"}}
    if isinstance(spec, ui.Widget):
        if not hasattr(spec, "value"):
            raise TypeError(f"panel: {name} is a {type(spec).__name__}, which has no value")
        if label:
            spec.description = label
        return spec
    if isinstance(spec, bool):
        return ui.Checkbox(value=spec, indent=False, description=_name(name, label), **common)
    if isinstance(spec, list):
        if not spec:
            raise ValueError(f"panel: {name} has no choices")
        return ui.Dropdown(options=[(str(item), item) for item in spec], value=spec[0], **common)
    numeric = isinstance(spec, tuple) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in spec
    )
    if not numeric or len(spec) not in (3, 4):
        raise TypeError(
            f"panel: {name}={spec!r} is no control; use (low, high, step[, default]), a list, a bool or a widget"
        )
    low, high, step, *default = spec
    value = default[0] if default else low
    if not low <= value <= high or step <= 0:
        raise ValueError(f"panel: {name}={spec!r} needs low <= default <= high and step > 0")
    whole = all(isinstance(v, int) for v in spec)
    decimals = max(len(f"{v:.10f}".rstrip("0").split(".")[1]) for v in (low, step))
    return (ui.IntSlider if whole else ui.FloatSlider)(
        value=value, min=low, max=high, step=step, continuous_update=False,
        readout_format="d" if whole else f".{min(decimals, 4)}f", **common,
    )  # fmt: skip


def _name(name: str, label: str | None) -> str:
    return label or name.replace("_", " ")


def _labelled(name: str, control: Any, label: str | None) -> Any:
    """A control with its name above it, in a box that wraps with its neighbours."""
    import ipywidgets as ui

    layout = ui.Layout(
        flex="1 1 250px", margin="2px 0", max_width="440px", min_width="200px", overflow="hidden"
    )
    heading = []
    if not getattr(control, "description", ""):
        style = f"font-size:13px;line-height:1.4;color:{look.INK}"
        heading = [ui.HTML(f'<span style="{style}">{html.escape(_name(name, label))}</span>')]
    box = ui.VBox([*heading, control], layout=layout)
    box.add_class("labkit-control")
    return box


@cache
def _panel_class() -> type:
    """The class behind :func:`panel`, made at first use so that importing this module imports no widgets."""
    import ipywidgets as ui

    class Panel(ui.VBox):  # type: ignore[misc,no-any-unimported,unused-ignore]
        """Controls, a line of status, and an output that is replaced whole at every draw."""

        def __init__(
            self, update: Callable[..., Any], controls: dict[str, Any], labels: dict[str, str]
        ) -> None:
            self.update = update
            self.controls = controls
            self._names = {name: _name(name, labels.get(name)) for name in controls}
            self.figure: Any = None
            self.text = ""
            self.error: str | None = None
            self.milliseconds = 0.0
            self._status = ui.HTML()
            self._output = ui.Output()
            row = ui.Box(
                [_labelled(name, control, labels.get(name)) for name, control in controls.items()],
                layout=ui.Layout(
                    align_items="flex-end", display="flex", flex_flow="row wrap", grid_gap="2px 32px"
                ),
            )
            super().__init__([row, self._status, self._output], layout=ui.Layout(width="100%"))
            self.refresh()
            for control in controls.values():
                control.observe(self._moved, names="value")

        def _moved(self, change: Any) -> None:
            self.refresh()

        def refresh(self) -> None:
            """Call the update with the controls' values and show what it returns; errors are shown, not raised."""
            begun = time.perf_counter()
            try:
                figure, text = _parts(self.update(**{name: c.value for name, c in self.controls.items()}))
                outputs = _outputs(figure, text)
            except Exception as problem:
                first = (str(problem).strip().splitlines() or ["no message"])[0]
                self.error = f"{type(problem).__name__}: {first}"
            else:
                self.figure, self.text, self.error = figure, text, None
                # Assigned, not printed into `with output:`, which nbclient and nbval divert into the wrong place.
                self._output.outputs = tuple(outputs)
            self.milliseconds = 1000 * (time.perf_counter() - begun)
            self._status.value = _status(self.error, self.milliseconds)

        def _ipython_display_(self, **kwargs: Any) -> None:
            from IPython.display import display

            if not is_batch():
                display(self._repr_mimebundle_(), raw=True)
                return
            if self.error:
                raise RuntimeError(f"the panel could not be drawn: {self.error}")
            note = f"Run this notebook to drag: {', '.join(self._names.values())}."
            display({"text/html": f"<small>{html.escape(note)}</small>", "text/plain": note}, raw=True)
            for output in _outputs(self.figure, self.text):
                display(output["data"], raw=True)

    return Panel


def _parts(result: Any) -> tuple[Any, str]:
    """Figure and text of what an update returned."""
    if isinstance(result, str):
        return None, result
    figure, text = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    shown = hasattr(figure, "to_plotly_json") or hasattr(figure, "_repr_html_")
    if not shown or not isinstance(text, str):
        given = f"a {type(result).__name__}"
        raise TypeError(f"update returned {given}; return a plotly figure, a text, or (figure, text)")
    return figure, text


def _outputs(figure: Any, text: str) -> list[dict[str, Any]]:
    """Notebook outputs of a draw."""
    bundles: list[dict[str, Any]] = []
    if hasattr(figure, "to_plotly_json"):
        bundles.append(look.renderer().to_mimebundle(figure.to_dict()))
    elif figure is not None:
        bundles.append({"text/html": figure._repr_html_(), "text/plain": str(figure)})
    if text:
        markup = f'<div style="font-size:14px;line-height:1.5;white-space:pre-wrap">{html.escape(text)}</div>'
        bundles.append({"text/html": markup, "text/plain": text})
    return [{"output_type": "display_data", "data": bundle, "metadata": {}} for bundle in bundles]


def _status(error: str | None, milliseconds: float) -> str:
    if error:
        style = f"background:#FFF4E5;border-left:3px solid {look.COLOURS[1]};padding:2px 8px;line-height:1.5"
        return f'<div style="{style}">⚠ {html.escape(error)}</div>'
    return f'<span style="color:{look.FAINT};font-size:12px">{milliseconds:.0f} ms</span>'
