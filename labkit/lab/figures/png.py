"""Still images beside the plotly figures of an executed notebook, for pages that run no script."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import shutil
import struct
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

from labkit.lab.figures.look import HEIGHT, MIME

# JupyterLab shows the still image at its natural size, without fitting it to the page: one image pixel per CSS pixel,
# and narrow enough for a laptop with the sidebar open.
WIDTH = 880
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str | None:
    """Path of a Chromium: ``BROWSER_PATH``, or the first of the usual names on the path."""
    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if os.path.exists(named) else None
    return next((path for name in CHROMIUM if (path := shutil.which(name))), None)


def attach_png(notebook: Any, *, width: int = WIDTH, scale: float = 1, replace: bool = True) -> int:
    """Put a PNG twin beside every plotly output of an executed notebook, in place.

    GitHub's preview and other pages that run no script show the PNG; JupyterLab shows it until the pointer reaches
    the figure, then draws the live one.

    Parameters
    ----------
    notebook : nbformat.NotebookNode
        Executed notebook.
    width : int
        Width of the figure in CSS pixels; its height is its own.
    scale : float
        Pixels of the image per CSS pixel. JupyterLab ignores it and shows an image of scale 2 twice as wide.
    replace : bool
        Whether PNGs that are there already are drawn anew.

    Returns
    -------
    int
        How many images were drawn: 0, with one warning, where kaleido or Chromium is missing.
    """
    outputs = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if MIME in output.get("data", {}) and (replace or "image/png" not in output["data"])
    ]
    if not outputs:
        return 0
    missing = _missing()
    if missing:
        warnings.warn(f"no PNG beside the figures: {missing}", stacklevel=2)
        return 0
    images = draw([output["data"][MIME] for output in outputs], width=width, scale=scale)
    for output, image in zip(outputs, images, strict=True):
        output["data"]["image/png"] = base64.b64encode(image).decode("ascii")
    return len(images)


def _missing() -> str:
    if importlib.util.find_spec("kaleido") is None:
        return "kaleido is not installed (pip install 'labkit[png]')"
    if chromium() is None:
        return "no Chromium or Chrome was found (install one, or name it in BROWSER_PATH)"
    return ""


def draw(figures: Sequence[Any], *, width: int = WIDTH, scale: float = 1) -> list[bytes]:
    """PNGs of figures' JSON, all drawn by one browser that talks to nobody."""

    def in_thread() -> list[bytes]:
        return asyncio.run(_draw(figures, width, scale))

    # A notebook's own thread runs an event loop already, so the browser gets another thread.
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(in_thread).result()


async def _draw(figures: Sequence[Any], width: int, scale: float) -> list[bytes]:
    from choreographer.browsers.chromium import Chromium
    from kaleido import Kaleido

    class Quiet(Chromium):  # type: ignore[misc,unused-ignore]
        """A browser without updates, metrics or any other traffic of its own."""

        def get_cli(self) -> Sequence[str]:
            extra = [
                "--disable-background-networking",
                "--disable-quic",
                "--disable-extensions",
                "--hide-scrollbars",
            ]
            return [*super().get_cli(), *extra]

    images = []
    async with Kaleido(mathjax=False, path=chromium(), browser_cls=Quiet) as browser:
        for figure in figures:
            height = figure.get("layout", {}).get("height", HEIGHT)
            options = {"format": "png", "width": width, "height": height, "scale": scale}
            image = await browser.calc_fig({k: figure[k] for k in ("data", "layout")}, opts=options)
            images.append(shrink(image))
    return images


def shrink(png: bytes, colours: int = 256) -> bytes:
    """The same picture in a palette of its most frequent colours: a third of the size, no visible change in a chart.

    Reads what browsers write (8 bits, RGB or RGBA, not interlaced); anything else comes back as it is.
    """
    import numpy as np

    pixels = _pixels(png)
    if pixels is None:
        return png
    height, width, _ = pixels.shape
    codes = pixels.astype(np.uint32) @ np.array([65536, 256, 1], dtype=np.uint32)
    found, where, counts = np.unique(codes, return_inverse=True, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:colours]
    split = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.float32)
    palette = split[frequent]
    nearest = np.empty(len(found), dtype=np.uint8)
    for start in range(0, len(found), 4096):
        distance = ((split[start : start + 4096, None] - palette[None]) ** 2).sum(-1)
        nearest[start : start + 4096] = distance.argmin(1)
    indices = nearest[where.reshape(height, width)]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), indices], axis=1)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette.astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(lines.tobytes(), 9)),
        (b"IEND", b""),
    ]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return _SIGNATURE + b"".join(chunks)


def _pixels(png: bytes) -> Any:
    """Colours of shape (height, width, 3) of an ordinary PNG, or None."""
    import numpy as np

    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", png[16:29])
    if not png.startswith(_SIGNATURE) or depth != 8 or kind not in (2, 6) or interlaced:
        return None
    packed, at = b"", 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        packed += png[at + 8 : at + 8 + size] if png[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    n = 3 if kind == 2 else 4
    raw = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * n)
    above = np.zeros((width, n), np.uint8)
    rows = np.empty((height, width, n), np.uint8)
    for y, line in enumerate(raw):
        row = line[1:].reshape(width, n)
        if line[0] == 1:
            row = np.cumsum(row, axis=0, dtype=np.uint8)
        elif line[0] == 2:
            row = row + above
        elif line[0] in (3, 4):
            row = np.array(_sequential(int(line[0]), row.tolist(), above.tolist()), np.uint8)
        rows[y] = above = row
    return rows[..., :3]


def _sequential(kind: int, row: list[list[int]], above: list[list[int]]) -> list[list[int]]:
    """Undo the filters Average (3) and Paeth (4), where a pixel needs the one before it."""
    n = len(row[0])
    left = corner = [0] * n
    for pixel, up in zip(row, above, strict=True):
        for i in range(n):
            if kind == 3:
                guess = (left[i] + up[i]) // 2
            else:
                a, b, c = left[i], up[i], corner[i]
                by_a, by_b, by_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
                guess = a if by_a <= by_b and by_a <= by_c else b if by_b <= by_c else c
            pixel[i] = (pixel[i] + guess) & 255
        left, corner = pixel, up
    return row


_SIGNATURE = b"\x89PNG\r\n\x1a\n"
