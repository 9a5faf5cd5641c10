"""A page of the patches on which each channel is largest; it opens from the disk."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from sdconv.checkpoint.io.write import write_whole
from sdconv.dataset.patches import Patch, TopPatches

SIDE = 72
"""Pixels of a patch on the page, along its longer side."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 74rem; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .25rem; font-size: 1.15rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 1rem; opacity: .75; }
.channels { display: grid; gap: 1rem; }
.channels { grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); }
figure { margin: 0; } figcaption { font-size: .85rem; opacity: .75; }
img { image-rendering: auto; max-width: 100%; border-radius: 3px; display: block; }
nav a { margin-right: 1rem; white-space: nowrap; }
"""


def write_patches(found: TopPatches, path: Path, *, title: str) -> int:
    """Writes the page, and returns its length in bytes.

    Args:
        found: the patches. path: the file.
        title: of the page.

    Raises:
        CheckpointError: the file cannot be written.
    """
    sections = [_section(number, name, found) for number, name in enumerate(found.channels)]
    links = "".join(
        f'<a href="#p{number}">{escape(name)}</a> ' for number, name in enumerate(found.channels)
    )
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><h1>{escape(title)}</h1>"
        f"<p>For each channel the places among {found.images} images where it is largest, one of "
        "each image, as much of it as the value depends on through convolutions.</p>"
        f"<nav>{links}</nav>{''.join(sections)}</html>"
    )
    write_whole(path, lambda part: part.write_text(page, encoding="utf-8"))
    return len(page.encode())


def _section(number: int, name: str, found: TopPatches) -> str:
    channels = found.channels[name]
    rows, columns = found.fields[name]
    shown, every = len(channels), found.count[name]
    part = f"the first {shown} of {every} channels" if shown < every else f"{every} channels"
    figures = "".join(_figure(channel, patches) for channel, patches in channels.items())
    return (
        f'<h2 id="p{number}">{escape(name)}</h2>'
        f"<p>{part}; receptive field {rows} x {columns} pixels</p>"
        f'<div class="channels">{figures}</div>'
    )


def _figure(channel: int, patches: Sequence[Patch]) -> str:
    words = "\n".join(f"{one.value:.3g}: {one.key}, {_where(one)}" for one in patches)
    return (
        f'<figure><img src="{_strip(patches)}" alt="channel {channel}" '
        f'title="{escape(words, quote=True)}" loading="lazy">'
        f"<figcaption>channel {channel}: {patches[0].value:.3g}</figcaption></figure>"
    )


def _where(patch: Patch) -> str:
    top, left, bottom, right = patch.box
    return f"rows {top} to {bottom - 1}, columns {left} to {right - 1}"


def _strip(patches: Sequence[Patch]) -> str:
    """The patches of a channel next to each other, as a data URI."""
    strip = Image.new("RGB", (len(patches) * (SIDE + 4) - 4, SIDE), "white")
    for number, patch in enumerate(patches):
        image = Image.fromarray(patch.pixels)
        zoom = SIDE / max(image.size)
        size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
        way = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
        strip.paste(image.resize(size, way), (number * (SIDE + 4), 0))
    data = io.BytesIO()
    strip.save(data, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
