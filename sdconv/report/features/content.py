"""What the page holds of each map: statistics, thumbnails and pictures, within so many bytes."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdconv.errors import InputError
from sdconv.report.features.pictures import (
    Pixels,
    in_colour,
    in_grey,
    principal,
    shrunk,
    statistics,
)
from sdconv.report.features.sprites import Sheet, sheet_of
from sdconv.report.features.views import FeatureMap, Shot, Values

SIDES = (64, 48, 32, 24, 16, 8)
"""Of thumbnails, in pixels: the first that fits."""

LARGE_SIDES = (256, 128, 64, 32)
"""Of the pictures of a whole map."""

SMALL = 40
"""Of the pictures in the drawing."""

_LARGE_SHARE, _SMALL_SHARE = 0.1, 0.05  # of the bytes
_PER_SHOT, _PER_CHANNEL, _FIXED = 1200, 22, 120_000  # bytes beside the pictures, at most
_LEAST = 300  # bytes for the pictures of one map
_IN_BASE64 = 4 / 3

Progress = Callable[[str, int, int], object]


class Content:
    """The pages' data blocks, made one by one, so that one map is in memory at a time.

    Of the bytes that are left, each map may use its part by its number of pixels.

    Args:
        maps: in the page's order.
        limit: bytes of the whole page.
        progress: called with a map's name, how many calls' maps are done, and how many there are.

    Raises:
        InputError: so many that there is no room for pictures.
    """

    def __init__(self, maps: Sequence[FeatureMap], limit: int, progress: Progress) -> None:
        self._maps, self._progress = maps, progress
        shots = [shot for one in maps for shot in one.shots]
        self.total = len(shots)
        self.thumbnail: int | None = None
        self.facts: list[list[dict[str, Any]]] = [[] for _ in maps]
        self._small: list[list[Pixels]] = [[] for _ in maps]
        self._weight = sum(map(_weight, shots))
        numbers = sum(shot.shape[0] for shot in shots) * _PER_CHANNEL
        room = (limit - _FIXED - self.total * _PER_SHOT - numbers) / _IN_BASE64
        self._for_frames = room * _SMALL_SHARE
        self._left = room - self._for_frames
        if self._left < self.total * _LEAST:
            raise InputError(
                "too many maps for one page",
                where=f"{self.total} maps of {len(maps)} layers",
                expected=f"what fits into {limit / 1e6:.1f} MB",
                hint="choose fewer layers (--layers) or calls (--keep)",
            )

    def shots(self) -> Iterator[tuple[str, str]]:
        """Names and texts of the blocks of single maps."""
        done = 0
        for one, facts, small in zip(self._maps, self.facts, self._small, strict=True):
            directions: Values | None = None
            for shot in one.shots:
                self._progress(one.name, done, self.total)
                name = f"shot-{done}"
                text, told, picture, directions = self._shot(shot, directions)
                facts.append({"id": name, **told})
                small.append(picture)
                yield name, text
                done += 1
        self._progress("", done, self.total)

    def frames(self, shown: Sequence[int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Names, texts and facts of the blocks of the drawing's pictures, one for each call.

        Args:
            shown: numbers of the maps, in the order of their pictures.
        """
        calls = list(dict.fromkeys((shot.step, shot.half) for m in self._maps for shot in m.shots))
        for number, (step, half) in enumerate(calls):
            tiles = np.stack([self._small[at][self._nearest(at, step, half)] for at in shown])
            smaller = (tiles, tiles[:, ::2, ::2], tiles[:, ::4, ::4])
            sheet = sheet_of(smaller, int(self._for_frames / len(calls)))
            name = f"frame-{number}"
            told = {"id": name, "step": step, "half": half, "columns": sheet.columns}
            yield name, _base64(sheet.data), told

    def _nearest(self, at: int, step: int, half: str | None) -> int:
        shots = self._maps[at].shots
        apart = [(shot.half != half, abs(shot.step - step)) for shot in shots]
        return apart.index(min(apart))

    def _shot(self, shot: Shot, like: Values | None) -> tuple[str, dict[str, Any], Pixels, Values]:
        """Text of its block, what the index says of it, its small picture, its directions."""
        maps = shot.read()
        told = statistics(maps)
        large = shrunk(maps, LARGE_SIDES[0])
        components, directions, share = principal(large, like)
        planes = np.stack([large.mean(0), large.std(0)])

        allowed = self._left * _weight(shot) / self._weight
        colours = sheet_of(_in_colour(components), int(allowed * _LARGE_SHARE))
        greys, bounds = _in_grey(planes, LARGE_SIDES, int(allowed * _LARGE_SHARE))
        rest = int(allowed) - len(colours.data) - len(greys.data)
        sheet, ranges = _in_grey(maps, SIDES, rest)
        self._weight -= _weight(shot)
        self._left -= len(colours.data) + len(greys.data) + len(sheet.data)
        side = max(sheet.width, sheet.height)
        if side < min(SIDES[0], max(shot.shape[1:])):
            self.thumbnail = min(side, self.thumbnail or side)

        numbers = np.stack([told.mean, told.variance, *ranges.T]).astype("<f4")
        block = {
            "columns": sheet.columns,
            "width": sheet.width,
            "height": sheet.height,
            "sheet": _base64(sheet.data),
            "planesColumns": greys.columns,
            "planesWidth": greys.width,
            "planesHeight": greys.height,
            "planes": _base64(greys.data),
            "pca": _base64(colours.data),
            "numbers": _base64(numbers.tobytes()),
        }
        facts = {
            "step": shot.step,
            "timestep": shot.timestep,
            "half": shot.half,
            "channels": len(maps),
            "size": maps.shape[1:],
            "low": _short(told.low),
            "high": _short(told.high),
            "counts": told.counts.tolist(),
            "bad": told.not_finite,
            "pca": _short(share),
            "planes": [[_short(value) for value in pair] for pair in bounds.tolist()],
        }
        return json.dumps(block), facts, _square(in_colour(components)), directions


def _weight(shot: Shot) -> float:
    """For how many bytes a shot's pictures count, beside the others'."""
    channels, height, width = shot.shape
    factor = min(1.0, SIDES[0] / max(height, width))
    return channels * height * width * factor**2 + 2000


def _in_colour(components: Values) -> Iterator[Pixels]:
    for side in dict.fromkeys(min(side, max(components.shape[1:])) for side in LARGE_SIDES):
        yield in_colour(shrunk(components, side))[None]


def _in_grey(maps: Values, sides: Sequence[int], allowed: int) -> tuple[Sheet, Values]:
    """A sheet of the maps, and what its black and white stand for in each."""
    taken: list[Values] = []

    def versions() -> Iterator[Pixels]:
        smaller = maps
        for side in dict.fromkeys(min(side, max(maps.shape[1:])) for side in sides):
            smaller = shrunk(smaller, side)
            tiles, ranges = in_grey(smaller)
            taken.append(ranges)
            yield tiles

    return sheet_of(versions(), allowed), taken[-1]


def _square(picture: Pixels) -> Pixels:
    """The middle of a picture ``(H, W, 3)`` at the size that it has in the drawing."""
    image = Image.fromarray(picture)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    how = Image.Resampling.BOX if side > SMALL else Image.Resampling.NEAREST
    return np.asarray(image.resize((SMALL, SMALL), how))


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _short(number: float) -> float:
    return float(f"{number:.4g}")
