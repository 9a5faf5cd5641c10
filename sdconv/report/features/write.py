"""Write the page: one file with its images, its style and its script."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from sdconv.checkpoint.io.write import write_whole
from sdconv.errors import InputError
from sdconv.report.features.content import Content, Progress
from sdconv.report.features.drawing import Drawing
from sdconv.report.features.feature_maps import FeatureMap
from sdconv.report.features.geometry import KIND_WORDS, geometry

LIMIT = 30_000_000
"""Bytes of a page; thumbnails are made coarser to stay below it."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page that was written.

    Attributes:
        path, bytes: the file and its size.
        maps: number of hook points.
        snapshots: number of feature maps, counting each call.
        thumbnail: the longer side in pixels of the coarsest thumbnails; None if all are in full
            size.
    """

    path: Path
    bytes: int
    maps: int
    snapshots: int
    thumbnail: int | None


def write_page(
    path: Path,
    maps: Sequence[FeatureMap],
    drawing: Drawing,
    *,
    title: str,
    facts: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]] | None = None,
    image: Image.Image | None = None,
    limit: int = LIMIT,
    progress: Progress = lambda name, done, total: None,
) -> Page:
    """Write the page, completely or not at all. Feature maps are read one by one.

    Args:
        path: the file.
        maps: each belongs to a box of ``drawing``.
        drawing: of the whole network, also of what was not captured.
        title: the network, and its weights.
        facts: shown under the title, label -> text.
        sizes: rows and columns of the outputs of boxes.
        image: the network's input.
        limit: the largest size in bytes.
        progress: called with the name of a feature map, the number of snapshots done, and the
            number in all.

    Raises:
        InputError: no feature maps, or too many for one page.
        CheckpointError: the file cannot be written.
    """
    if not maps:
        raise InputError("there is no feature map to show", where=path, hint="capture some")
    content = Content(maps, limit, progress)
    head, rest = _template().split("<!--data-->")

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.write(head)
            for name, text in content.snapshots():
                file.write(_block(name, text))
            index = _drawn(drawing, maps, sizes or {})
            frames = []
            for name, text, facts_ in content.frames(index.pop("shown")):
                file.write(_block(name, text))
                frames.append(facts_)
            for listed, snapshots in zip(index["maps"], content.facts, strict=True):
                listed["snapshots"] = snapshots
            small = None if image is None else _data_url(image)
            index |= {"title": title, "facts": list(facts.items()), "frames": frames}
            file.write(_block("index", json.dumps({**index, "image": small})))
            file.write(rest)

    write_whole(path, write)
    return Page(
        path=path,
        bytes=path.stat().st_size,
        maps=len(maps),
        snapshots=content.total,
        thumbnail=content.thumbnail,
    )


def _template() -> str:
    """The page with its style and script inserted."""
    folder = files("sdconv.report.features") / "page"
    page, style, decode, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "decode.js", "page.js")
    )
    return page.replace("/*style*/", style).replace("/*script*/", decode + script)


def _block(name: str, text: str) -> str:
    """A data block, which the page decodes when it needs it; JSON or base64."""
    # no name in a checkpoint may close the script element
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _drawn(
    drawing: Drawing, maps: Sequence[FeatureMap], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Boxes, feature maps and lines for the page's index."""
    placed = geometry(drawing, sizes)
    corners = placed.pop("corners")
    numbers = {box.name: at for at, box in enumerate(drawing.boxes)}
    inside: dict[str, list[int]] = {name: [] for name in numbers}
    for at, one in enumerate(maps):
        inside[one.box].append(at)
    boxes, shown = [], list[int]()
    for box in drawing.boxes:
        own = inside[box.name]
        whole = [at for at in own if maps[at].name == box.name]
        main = next(iter(whole or own[-1:]), None)
        boxes.append(
            {
                "name": box.name,
                "kind": box.kind,
                "words": KIND_WORDS.get(box.kind, box.kind),
                "x": round(corners[box.name][0], 3),
                "y": round(corners[box.name][1], 3),
                "maps": own,
                "main": main,
                "tile": None if main is None else len(shown),
            }
        )
        if main is not None:
            shown.append(main)
    for line in placed["lines"]:
        line["ends"] = [numbers[name] for name in line["ends"]]
    kinds = dict.fromkeys(box.kind for box in drawing.boxes if box.kind in KIND_WORDS)
    return {
        "drawing": {**placed, "kinds": [[kind, KIND_WORDS[kind]] for kind in kinds]},
        "blocks": boxes,
        "tiles": len(shown),
        "shown": shown,
        "maps": [
            {
                "name": one.name,
                "block": numbers[one.box],
                "label": one.label,
                "facts": list(one.facts.items()),
            }
            for one in maps
        ],
    }


def _data_url(image: Image.Image) -> str:
    """A small copy of an image as a data URL."""
    small = image.convert("RGB")
    small.thumbnail((192, 192))
    file = BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + b64encode(file.getvalue()).decode("ascii")
