"""The page, assembled from its modules, the weights that ship and the photo."""

from __future__ import annotations

import re
from base64 import b64encode
from importlib.resources import files
from io import BytesIO
from pathlib import Path

from PIL import Image

from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import SdconvError
from sdconv.hub.shipped import shipped
from sdconv.images import example_image
from sdconv.report.explainer.bundle import bundle
from sdconv.report.explainer.kernels import kernels

LIMIT = 6_000_000
"""Bytes of the page at most."""

WEIGHTS = "tiny-vae.safetensors"


def write_explainer(path: Path) -> int:
    """Write the page, completely or not at all.

    Returns:
        Its size in bytes.

    Raises:
        CheckpointError: the file cannot be written.
    """
    html = explainer()
    write_whole(path, lambda part: part.write_text(html, encoding="utf-8", newline="\n"))
    return len(html.encode())


def explainer() -> str:
    """The page as HTML: style, scripts, kernels, weights and photo, all inside."""
    folder = files("sdconv.report.explainer") / "page"
    sources = {
        f"{prefix}{file.name}": file.read_text(encoding="utf-8")
        for prefix in ("", "core/", "ui/", "sections/")
        for file in (folder / prefix if prefix else folder).iterdir()
        if file.name.endswith((".js", ".css", ".html"))
    }
    parts = {
        "style": sources["style.css"],
        "script": bundle("main.js", sources),
        "worker": bundle("core/worker.js", sources),
        "kernels": _base64(kernels(fused=False)),
        "kernels-fused": _base64(kernels(fused=True)),
        "weights": _base64(shipped(WEIGHTS).read_bytes()),
        "photo": "data:image/png;base64," + _base64(_png(example_image())),
    }
    for name in ("script", "worker"):
        if "</script" in parts[name]:
            raise SdconvError("a script would close its element", where=name)
    return re.sub(r"/\*([\w-]+)\*/", lambda match: parts[match[1]], sources["index.html"])


def _png(photo: Image.Image) -> bytes:
    """The photo without loss, so that the page computes with the pixels that Python reads."""
    file = BytesIO()
    photo.save(file, "PNG", optimize=True)
    return file.getvalue()


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
