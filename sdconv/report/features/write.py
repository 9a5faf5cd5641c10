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
from sdconv.report.features.content import DETAILED, Content, Progress
from sdconv.report.features.drawing import WHOLE, Branch, Drawing
from sdconv.report.features.feature_maps import FeatureMap
from sdconv.report.features.geometry import KIND_WORDS, geometry
from sdconv.report.features.kernels import Kernels, kernel_blocks

SCRIPTS = (
    "decode.js",
    "colours.js",
    "address.js",
    "network.js",
    "kernels.js",
    "compare.js",
    "large.js",
    "page.js",
)
"""The page's script in parts, in this order."""

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
    kernels: Sequence[Kernels] = (),
    store: str | None = None,
    limit: int = LIMIT,
    detailed: int = DETAILED,
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
        kernels: the network's convolutions.
        store: where the feature maps can be opened, for the page's reader.
        limit: the largest size in bytes.
        detailed: the number of channels of each feature map whose exact values are on the page, as
            far as they fit.
        progress: called with the name of a feature map, the number of snapshots done, and the
            number in all.

    Raises:
        InputError: no feature maps, or too many for one page.
        CheckpointError: the file cannot be written.
    """
    if not maps:
        raise InputError("there is no feature map to show", where=path, hint="capture some")
    learned = list(kernel_blocks(kernels))
    room = limit - sum(len(text) + 400 for _, text in learned)
    content = Content(maps, room, detailed, progress)
    head, rest = _template().split("<!--data-->")

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.write(head)
            for name, text in content.snapshots():
                file.write(_block(name, text))
            for name, text in learned:
                file.write(_block(name, text))
            index = _drawn(drawing, maps, sizes or {})
            frames = []
            for name, text, facts_ in content.frames(index.pop("shown")):
                file.write(_block(name, text))
                frames.append(facts_)
            for listed, snapshots in zip(index["maps"], content.facts, strict=True):
                listed["snapshots"] = snapshots
            small = None if image is None else _data_url(image)
            index |= {
                "title": title,
                "facts": list(facts.items()),
                "frames": frames,
                "kernels": _listed(kernels, [box.name for box in drawing.boxes]),
                "start": _start(drawing, maps),
                "store": store,
            }
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
    page, style, *scripts = (
        (folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", *SCRIPTS)
    )
    return page.replace("/*style*/", style).replace("/*script*/", "".join(scripts))


def _listed(kernels: Sequence[Kernels], boxes: Sequence[str]) -> list[dict[str, Any]]:
    """The convolutions in the page's index, with the numbers of their boxes."""
    return [
        {"name": one.name, "block": boxes.index(one.box), "facts": list(one.facts.items())}
        for one in kernels
    ]


def _start(drawing: Drawing, maps: Sequence[FeatureMap]) -> dict[str, Any]:
    """What the page opens on: of a U-Net the last step, on the up path if that was captured, where
    an image can be seen; else the first feature map."""
    calls = [shot.step for one in maps for shot in one.snapshots]
    if not drawing.skips:
        return {"map": 0, "step": min(calls)}
    up = {box.name for box in drawing.boxes if box.branch is Branch.up and box.kind in WHOLE}
    inside = [at for at, one in enumerate(maps) if one.box in up]
    shown = [at for at in inside if maps[at].name in up] or inside or [0]
    # two thirds of the way up: fine enough to show the image, and not yet the noise that is left
    return {"map": shown[(2 * len(shown)) // 3], "step": max(calls)}


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
                "unit": one.unit,
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
