"""JupyterLab in a real browser: open a notebook, run it, drag what can be dragged, look at it.

In tests::

    with Lab(folder) as lab, lab.open("nacl.ipynb") as page:
        page.run_all()
        assert not page.errors()
        assert page.drag_widget().changed

By hand, to see a notebook as its readers do::

    python -m tests.notebooks.browser shot notebooks/kv/nacl.ipynb --out shots

The server listens on localhost only, behind a token, with configuration, workspaces and runtime files of its own;
notebooks are copied, so that nothing that happens in the browser reaches the committed file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.lab.figures.png import chromium

ROOT = Path(__file__).resolve().parents[2]
# No sandbox, as CI runs as root; the rest keeps the browser from any traffic of its own.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
)
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    # Every cell is in the page, also those that are not in view.
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none", "autoRenderMarkdownCells": True},
    "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
}


def missing() -> str:
    """Why no notebook can be opened here; empty if it can."""
    for module in ("playwright", "jupyterlab", "ipywidgets", "plotly"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return "" if chromium() else "no Chromium or Chrome is on the path or in BROWSER_PATH"


@dataclass(frozen=True)
class CellError:
    """An error output of a cell, or a cell that did not run."""

    cell: int
    name: str
    message: str


@dataclass(frozen=True)
class Drag:
    """What moving a control did."""

    found: bool
    changed: bool = False
    seconds: float = 0.0
    collapsed: bool = False  # whether the output lost its height while it was redrawn
    control: str = ""


@dataclass
class Lab:
    """A JupyterLab server for a folder of its own; a context manager.

    Parameters
    ----------
    folder : Path
        An empty folder: notebooks are copied into it, and the server's own files live beside them.
    environment : dict
        Variables for the server and its kernels, beside those of this process.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    width: int = 1280
    height: int = 900

    def __enter__(self) -> Lab:
        from playwright.sync_api import sync_playwright

        self._stack = contextlib.ExitStack()
        try:
            self._start_server()
            playwright = self._stack.enter_context(sync_playwright())
            self._browser = playwright.chromium.launch(executable_path=chromium(), args=list(FLAGS))
            self._stack.callback(self._browser.close)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *problem: object) -> None:
        self._stack.close()

    def _start_server(self) -> None:
        self.work = self.folder / "work"
        own = self.folder / "jupyter"
        for path in (self.work, own):
            path.mkdir(parents=True, exist_ok=True)
        for name, values in SETTINGS.items():
            path = own / "settings" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.token = secrets.token_hex(16)
        environment = {
            **os.environ,
            "IPYTHONDIR": str(own / "ipython"),
            "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
            "JUPYTER_CONFIG_DIR": str(own / "config"),
            "JUPYTER_DATA_DIR": str(own / "data"),
            "JUPYTER_RUNTIME_DIR": str(own / "runtime"),
            "JUPYTER_TOKEN": self.token,
            "LABKIT_BATCH": "0",  # somebody is watching: panels and progress bars are live
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
            "OMP_NUM_THREADS": "1",
            **self.environment,
        }
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1",
            f"--port={self.port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.work}",
            "--LabApp.expose_app_in_browser=True", "--LabApp.collaborative=False",
            "--ServerApp.log_level=WARN",
        ]  # fmt: skip
        log = self._stack.enter_context((self.folder / "server.log").open("wb"))
        self._server = subprocess.Popen(command, env=environment, cwd=self.work, stdout=log, stderr=log)
        self._stack.callback(self._stop_server)
        deadline = time.monotonic() + 90
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"JupyterLab did not start:\n{said}")
            time.sleep(0.3)

    def _answers(self) -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/api/status")
        request.add_header("Authorization", f"token {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _stop_server(self) -> None:
        self._server.terminate()  # ends its kernels, too
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait(10)

    @contextlib.contextmanager
    def open(self, notebook: Path | str, parameters: dict[str, Any] | None = None) -> Iterator[Page]:
        """Copy a notebook, with some of its parameters replaced, and open the copy."""
        source = Path(notebook)
        target = self.work / source.name
        content = json.loads(source.read_text(encoding="utf-8"))
        if parameters:
            set_parameters(content, parameters)
        content["metadata"].setdefault(
            "kernelspec", {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        )
        target.write_text(json.dumps(content), encoding="utf-8")
        context = self._browser.new_context(viewport={"width": self.width, "height": self.height})
        try:
            tab = context.new_page()
            tab.set_default_timeout(60_000)
            page = Page(tab)
            tab.goto(f"http://127.0.0.1:{self.port}/doc/tree/{target.name}?token={self.token}")
            page.wait_until_open()
            yield page
            page.shut_down_kernel()
        finally:
            context.close()


def set_parameters(content: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Replace defaults in the cell tagged ``parameters``; a name that is not there is an error."""
    cells = [cell for cell in content["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    if len(cells) != 1:
        raise ValueError(f"{len(cells)} cells are tagged parameters; one is needed")
    text = "".join(cells[0]["source"])
    for name, value in parameters.items():
        text, count = re.subn(
            rf"(?m)^({re.escape(name)}\s*(?::[^=\n]+)?=\s*)[^#\n]*?(\s*#.*)?$",
            lambda found, value=value: f"{found[1]}{value!r}{found[2] or ''}",
            text,
        )
        if count != 1:
            raise ValueError(f"parameter {name!r} is set {count} times in the parameters cell")
    cells[0]["source"] = text


class Page:
    """A notebook that is open in the browser."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.problems: list[str] = []  # errors that the page itself met
        tab.on("pageerror", lambda error: self.problems.append(str(error)))

    def wait_until_open(self) -> None:
        """Wait for JupyterLab, the notebook's cells and, where it has one, its kernel."""
        self.tab.wait_for_function("() => window.jupyterapp?.shell?.currentWidget?.context?.isReady")
        self.tab.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
        self.tab.locator(".jp-Notebook .jp-Cell").first.wait_for()
        self.tab.wait_for_timeout(1000)  # Markdown, equations and stored figures are drawn after the cells

    def shut_down_kernel(self) -> None:
        """End the notebook's kernel, so that the next notebook has the machine to itself."""
        self.tab.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")

    def content(self) -> dict[str, Any]:
        """The notebook as it is on the page now."""
        found: dict[str, Any] = self.tab.evaluate(
            "() => window.jupyterapp.shell.currentWidget.content.model.toJSON()"
        )
        return found

    def run_all(self, timeout: float = 180) -> float:
        """Run All Cells; returns the seconds until all have run and the kernel is idle.

        Raises
        ------
        TimeoutError
            Naming the cell that was running.
        """
        begun = time.monotonic()
        self.tab.evaluate(
            """() => {
                window.labkitDone = false;
                const app = window.jupyterapp;
                app.commands.execute("notebook:run-all-cells").finally(() => { window.labkitDone = true; });
            }"""
        )
        idle = "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
        while not self.tab.evaluate(f"() => window.labkitDone && {idle}"):
            if time.monotonic() - begun > timeout:
                busy = self.tab.evaluate(
                    """() => [...document.querySelectorAll(".jp-Notebook .jp-Cell")]
                        .findIndex(cell => cell.querySelector(".jp-InputPrompt")?.textContent.includes("*"))"""
                )
                raise TimeoutError(f"cell {busy} still runs after {timeout:.0f} s")
            self.tab.wait_for_timeout(200)
        self.tab.wait_for_timeout(500)
        return time.monotonic() - begun

    def errors(self) -> list[CellError]:
        """Errors of the cells, and code cells that have not run."""
        found = []
        for index, cell in enumerate(self.content()["cells"]):
            if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
                continue
            found += [
                CellError(index, output["ename"], output["evalue"])
                for output in cell["outputs"]
                if output["output_type"] == "error"
            ]
            if cell["execution_count"] is None:
                found.append(CellError(index, "NotRun", "the cell has no execution count"))
        return found

    # What is drawn in a cell's outputs: figures by their data and what is written into them, else the text.
    _DRAWN = """(cell) => {
        const plots = [...cell.querySelectorAll(".js-plotly-plot")].map(plot => JSON.stringify(
            [plot.data, plot.layout.annotations, plot.layout.shapes, plot.layout.title]));
        const texts = [...cell.querySelectorAll(".widget-output .jp-OutputArea-output")].map(e => e.innerText);
        return plots.concat(texts).join("\\n");
    }"""

    def _settle(self, cell: Any, before: str, timeout: float) -> tuple[bool, float]:
        """Wait until what a cell shows is not what it was."""
        begun = time.monotonic()
        while time.monotonic() - begun < timeout:
            now = cell.evaluate(self._DRAWN)
            if now and now != before:
                return True, time.monotonic() - begun
            self.tab.wait_for_timeout(50)
        return False, time.monotonic() - begun

    def drag_widget(self, index: int = 0, steps: int = 1, timeout: float = 15) -> Drag:
        """Move the `index`-th ipywidgets slider of the notebook by its keys, and see whether its cell changed."""
        handles = self.tab.locator(".jp-OutputArea .widget-slider .noUi-handle")
        if handles.count() <= index:
            return Drag(found=False)
        handle = handles.nth(index)
        handle.scroll_into_view_if_needed()
        cell = handle.evaluate_handle("e => e.closest('.jp-Cell')")
        label = handle.evaluate(
            "e => (e.closest('.labkit-control') ?? e.closest('.widget-slider')).innerText.split('\\n')[0]"
        )
        before = cell.evaluate(self._DRAWN)
        cell.evaluate(
            """(cell) => {
                const area = cell.querySelector(".widget-output") ?? cell;
                const first = area.offsetHeight;
                cell.labkitLowest = first; cell.labkitFirst = first;
                const watch = () => {
                    cell.labkitLowest = Math.min(cell.labkitLowest, area.offsetHeight);
                    if (!cell.labkitStop) requestAnimationFrame(watch);
                };
                cell.labkitStop = false; watch();
            }"""
        )
        handle.focus()
        at_end = handle.evaluate("e => e.getAttribute('aria-valuenow') === e.getAttribute('aria-valuemax')")
        for _ in range(steps):
            handle.press("ArrowLeft" if at_end else "ArrowRight")
        changed, seconds = self._settle(cell, before, timeout)
        self.tab.wait_for_timeout(300)
        first, lowest = cell.evaluate("c => { c.labkitStop = true; return [c.labkitFirst, c.labkitLowest]; }")
        return Drag(True, changed, seconds, lowest < 0.5 * first, label)

    def drag_frames(self, index: int = 0, timeout: float = 10) -> Drag:
        """Move the slider inside the `index`-th plotly figure that has one; no kernel is asked."""
        self.wake_figures()
        rails = self.tab.locator(".js-plotly-plot .slider-rail-touch-rect")
        if rails.count() <= index:
            return Drag(found=False)
        rail = rails.nth(index)
        rail.scroll_into_view_if_needed()
        cell = rail.evaluate_handle("e => e.closest('.jp-Cell')")
        before = cell.evaluate(self._DRAWN)
        box = rail.bounding_box()
        active = rail.evaluate("e => e.closest('.js-plotly-plot')._fullLayout.sliders[0].active")
        share = 0.03 if active else 0.97
        self.tab.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)
        changed, seconds = self._settle(cell, before, timeout)
        name = rail.evaluate("e => e.closest('.js-plotly-plot').layout.sliders[0].currentvalue.prefix ?? ''")
        return Drag(True, changed, seconds, control=name)

    def wake_figures(self) -> int:
        """Turn the still pictures of stored figures into live ones, as the pointer does; returns how many."""
        count: int = self.tab.evaluate(
            """() => {
                const still = [...document.querySelectorAll("img.plot-img")].filter(e => e.offsetHeight > 0);
                for (const image of still) image.dispatchEvent(new MouseEvent("mouseenter"));
                return still.length;
            }"""
        )
        if count:
            self.tab.wait_for_timeout(1500)
        return count

    def screenshot(self, path: Path) -> Path:
        """What the window shows now."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tab.screenshot(path=path)
        return path

    def pages(self, folder: Path) -> list[Path]:
        """Screenshots of the whole notebook, one window after the other."""
        scroller = self.tab.locator(".jp-Notebook .jp-WindowedPanel-outer, .jp-WindowedPanel-outer").first
        shots, top = [], 0
        while True:
            scroller.evaluate("(e, top) => e.scrollTo({top, behavior: 'instant'})", top)
            self.tab.wait_for_timeout(400)
            shots.append(self.screenshot(folder / f"page-{len(shots) + 1:02d}.png"))
            # JupyterLab leaves an empty window below the last cell.
            seen, height, below = scroller.evaluate(
                """e => [e.scrollTop, e.clientHeight, [...e.querySelectorAll(".jp-Cell")].at(-1)
                    .getBoundingClientRect().bottom - e.getBoundingClientRect().bottom]"""
            )
            if below <= 0 or len(shots) >= 60:
                return shots
            top = seen + height - 40


def main(arguments: list[str] | None = None) -> None:
    """Screenshots from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.notebooks.browser", description=__doc__)
    parser.add_argument("command", choices=["shot"], help="take screenshots of a notebook, page by page")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, default=Path("shots"), help="folder of the screenshots")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=1000)
    parser.add_argument("--run", action="store_true", help="run all cells first (otherwise stored outputs)")
    parser.add_argument("--size", help="with --run: the size in the copy's parameters cell, such as smoke")
    parser.add_argument("--live", action="store_true", help="draw stored figures live instead of as pictures")
    chosen = parser.parse_args(arguments)
    if reason := missing():
        parser.exit(1, f"{reason}\n")
    parameters = {"size": chosen.size} if chosen.size else None
    with (
        tempfile.TemporaryDirectory() as folder,
        Lab(Path(folder), width=chosen.width, height=chosen.height) as lab,
        lab.open(chosen.notebook, parameters) as page,
    ):
        if chosen.run:
            print(f"ran in {page.run_all(timeout=900):.0f} s")
            for error in page.errors():
                print(f"cell {error.cell}: {error.name}: {error.message}")
        if chosen.live:
            page.wake_figures()
        for shot in page.pages(chosen.out):
            print(shot)
        for problem in page.problems:
            print(f"page error: {problem}")


if __name__ == "__main__":
    main()
