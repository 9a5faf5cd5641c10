"""The page itself: one file with the maps' pictures, its style and its script."""

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
from sdconv.report.features.geometry import KIND_WORDS, geometry
from sdconv.report.features.views import FeatureMap

LIMIT = 30_000_000
"""Bytes of a page, which it keeps within by making thumbnails coarser."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What was written: ``maps`` places in ``shots`` calls all in all. ``thumbnail``: the longer
    side of the smallest thumbnails that had to be made coarser, None if none had."""

    path: Path
    bytes: int
    maps: int
    shots: int
    thumbnail: int | None


def write_page(
    path: Path,
    maps: Sequence[FeatureMap],
    drawing: Drawing,
    *,
    title: str,
    facts: Mapping[str, str],
    sizes: Mapping[str, tuple[int, int]] | None = None,
    picture: Image.Image | None = None,
    limit: int = LIMIT,
    progress: Progress = lambda name, done, total: None,
) -> Page:
    """Writes the page, whole or not at all. Maps are read one by one.

    Args:
        path: the file.
        maps: of which each belongs to a block of ``drawing``.
        drawing: the whole network's, also what was not captured.
        title: the network, and what passed through it.
        facts: shown under the title, label -> words.
        sizes: rows and columns of what comes out of a block.
        picture: what went in.
        limit: bytes that it may have.
        progress: called with a map's name, how many calls' maps are done, and how many there are.

    Raises:
        InputError: no map, or too many for one page.
        CheckpointError: the file cannot be written.
    """
    if not maps:
        raise InputError("no map to show", where=path, hint="capture some")
    content = Content(maps, limit, progress)
    head, rest = _template().split("<!--data-->")

    def write(part: Path) -> None:
        with part.open("w", encoding="utf-8") as file:
            file.write(head)
            for name, text in content.shots():
                file.write(_block(name, text))
            index = _drawn(drawing, maps, sizes or {})
            frames = []
            for name, text, told in content.frames(index.pop("shown")):
                file.write(_block(name, text))
                frames.append(told)
            for listed, shots in zip(index["maps"], content.facts, strict=True):
                listed["shots"] = shots
            shown = None if picture is None else _picture(picture)
            index |= {"title": title, "facts": list(facts.items()), "frames": frames}
            file.write(_block("index", json.dumps({**index, "picture": shown})))
            file.write(rest)

    write_whole(path, write)
    return Page(
        path=path,
        bytes=path.stat().st_size,
        maps=len(maps),
        shots=content.total,
        thumbnail=content.thumbnail,
    )


def _template() -> str:
    """The page with its style and script in it."""
    folder = files("sdconv.report.features") / "page"
    page, style, decode, script = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "decode.js", "page.js")
    )
    return page.replace("/*style*/", style).replace("/*script*/", decode + script)


def _block(name: str, text: str) -> str:
    """Data that the page reads when it needs it; JSON or base64."""
    # no name in a checkpoint may end the block
    text = text.replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def _drawn(
    drawing: Drawing, maps: Sequence[FeatureMap], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Blocks, maps and lines as the page's index has them."""
    placed = geometry(drawing, sizes)
    corners = placed.pop("corners")
    numbers = {block.name: at for at, block in enumerate(drawing.path)}
    inside: dict[str, list[int]] = {name: [] for name in numbers}
    for at, one in enumerate(maps):
        inside[one.block].append(at)
    blocks, shown = [], list[int]()
    for block in drawing.path:
        own = inside[block.name]
        whole = [at for at in own if maps[at].name == block.name]
        main = next(iter(whole or own[-1:]), None)
        blocks.append(
            {
                "name": block.name,
                "kind": block.kind,
                "words": KIND_WORDS.get(block.kind, block.kind),
                "x": round(corners[block.name][0], 3),
                "y": round(corners[block.name][1], 3),
                "maps": own,
                "main": main,
                "tile": None if main is None else len(shown),
            }
        )
        if main is not None:
            shown.append(main)
    for line in placed["lines"]:
        line["ends"] = [numbers[name] for name in line["ends"]]
    kinds = dict.fromkeys(block.kind for block in drawing.path if block.kind in KIND_WORDS)
    return {
        "drawing": {**placed, "kinds": [[kind, KIND_WORDS[kind]] for kind in kinds]},
        "blocks": blocks,
        "tiles": len(shown),
        "shown": shown,
        "maps": [
            {
                "name": one.name,
                "block": numbers[one.block],
                "label": one.label,
                "facts": list(one.facts.items()),
            }
            for one in maps
        ],
    }


def _picture(image: Image.Image) -> str:
    """A small copy as a page has pictures in it."""
    small = image.convert("RGB")
    small.thumbnail((192, 192))
    file = BytesIO()
    small.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + b64encode(file.getvalue()).decode("ascii")
