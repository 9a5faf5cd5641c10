"""The page's data about each feature map: statistics, thumbnails and images, within a byte
budget."""

from __future__ import annotations

import json
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from sdconv.errors import InputError
from sdconv.features.rendering import (
    CLIPPED,
    Pixels,
    Values,
    downscaled,
    is_signed,
    principal_components,
    statistics,
    to_grey,
    to_rgb,
)
from sdconv.report.features.feature_maps import FeatureMap, Snapshot
from sdconv.report.features.sprites import Sheet, sheet_of

SIDES = (64, 48, 32, 24, 16, 8)
"""Sides of thumbnails in pixels; the first that fits is used."""

LARGE_SIDES = (256, 128, 64, 32)
"""Sides of the images of a whole feature map, likewise."""

SMALL = 40
"""Side of the images in the drawing."""

DETAILED = 16
"""Channels of a feature map whose exact values are on the page, unless others are asked for."""

FLOAT32 = "float32:"
"""The beginning of exact values that are in float32."""

_LARGE_SHARE, _SMALL_SHARE, _EXACT_SHARE = 0.1, 0.05, 0.3  # of the bytes
_PER_SNAPSHOT, _PER_CHANNEL, _FIXED = 1400, 33, 160_000  # bytes in addition to images, at most
_LEAST = 300  # bytes for the images of one feature map
_IN_BASE64 = 4 / 3

Progress = Callable[[str, int, int], object]


class Content:
    """The page's data blocks, made one by one, so that only one feature map is in memory at a time.

    Each feature map gets a share of the remaining bytes in proportion to its pixels. The channels
    with the largest variance are also there at their own resolution, in float16 if that holds them.

    Args:
        maps: in the page's order.
        limit: bytes of the whole page.
        detailed: the number of those channels, as far as the bytes allow.
        progress: called with the name of a feature map, the number of snapshots done, and the
            number in all.

    Raises:
        InputError: too many feature maps to leave room for their images.
    """

    def __init__(
        self, maps: Sequence[FeatureMap], limit: int, detailed: int, progress: Progress
    ) -> None:
        self._maps, self._progress, self._detailed = maps, progress, detailed
        snapshots = [snapshot for one in maps for snapshot in one.snapshots]
        self.total = len(snapshots)
        self.thumbnail: int | None = None
        self.facts: list[list[dict[str, Any]]] = [[] for _ in maps]
        self._small: list[list[Pixels]] = [[] for _ in maps]
        self._weight = sum(map(_weight, snapshots))
        numbers = sum(snapshot.shape[0] for snapshot in snapshots) * _PER_CHANNEL
        room = (limit - _FIXED - self.total * _PER_SNAPSHOT - numbers) / _IN_BASE64
        self._for_frames = room * _SMALL_SHARE
        self._exact_weight = sum(map(self._values, snapshots))
        # compressed, two bytes for each value are enough
        most = 2.1 * self._exact_weight + 100 * detailed * self.total
        self._for_exact = min(room * _EXACT_SHARE, most)
        self._left = room - self._for_frames - self._for_exact
        if self._left < self.total * _LEAST:
            raise InputError(
                "too many feature maps for one page",
                where=f"{self.total} feature maps of {len(maps)} layers",
                expected=f"what fits into {limit / 1e6:.1f} MB",
                hint="choose fewer layers (--layers) or calls (--keep)",
            )

    def snapshots(self) -> Iterator[tuple[str, str]]:
        """Names and texts of the data blocks of single snapshots, two for each: images, and exact
        values."""
        done = 0
        for one, facts, small in zip(self._maps, self.facts, self._small, strict=True):
            directions: Values | None = None
            for snapshot in one.snapshots:
                self._progress(one.name, done, self.total)
                name = f"snapshot-{done}"
                maps = snapshot.read()
                text, known, image, directions = self._snapshot(snapshot, maps, directions)
                small.append(image)
                yield name, text
                exact = self._exact(snapshot, maps)
                facts.append({"id": name, "exact": list(map(int, exact)), **known})
                yield f"exact-{done}", json.dumps(exact)
                done += 1
        self._progress("", done, self.total)

    def frames(self, shown: Sequence[int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Names, texts and facts of the data blocks of the drawing's images, one for each call.

        Args:
            shown: numbers of the feature maps, in the order of their images.
        """
        calls = list(
            dict.fromkeys((one.step, one.half) for maps in self._maps for one in maps.snapshots)
        )
        for number, (step, half) in enumerate(calls):
            tiles = np.stack([self._small[at][self._nearest(at, step, half)] for at in shown])
            smaller = (tiles, tiles[:, ::2, ::2], tiles[:, ::4, ::4])
            sheet = sheet_of(smaller, int(self._for_frames / len(calls)))
            name = f"frame-{number}"
            facts = {"id": name, "step": step, "half": half, "columns": sheet.columns}
            yield name, _base64(sheet.data), facts

    def _nearest(self, at: int, step: int, half: str | None) -> int:
        snapshots = self._maps[at].snapshots
        distances = [(one.half != half, abs(one.step - step)) for one in snapshots]
        return distances.index(min(distances))

    def _values(self, snapshot: Snapshot) -> int:
        channels, height, width = snapshot.shape
        return min(channels, self._detailed) * height * width

    def _exact(self, snapshot: Snapshot, maps: Values) -> dict[str, str]:
        """Values of the channels with the largest variance, as many as there is room for: float16,
        the low bytes before the high ones, compressed; by number of the channel. What is too large
        for float16 is float32, and marked."""
        share = self._values(snapshot) / max(self._exact_weight, 1)
        allowed = self._for_exact * share
        order = np.argsort(-np.nan_to_num(maps.var((1, 2))), kind="stable")[: self._detailed]
        found: dict[str, str] = {}
        used = 0
        for channel in order.tolist():
            with np.errstate(over="ignore"):
                values = np.ascontiguousarray(maps[channel].astype("<f2"))
            mark = ""
            if (np.isinf(values) != np.isinf(maps[channel])).any():
                values, mark = np.ascontiguousarray(maps[channel].astype("<f4")), FLOAT32
            planes = values.view(np.uint8).reshape(-1, values.itemsize).T
            data = zlib.compress(planes.tobytes(), 5)
            if used + len(data) > allowed:
                break
            used += len(data)
            found[str(channel)] = mark + _base64(data)
        self._exact_weight -= self._values(snapshot)
        self._for_exact -= used
        return found

    def _snapshot(
        self, snapshot: Snapshot, maps: Values, like: Values | None
    ) -> tuple[str, dict[str, Any], Pixels, Values]:
        """The text of its data block, its entry in the index, its image in the drawing, and its
        principal directions."""
        found = statistics(maps)
        large = downscaled(maps, LARGE_SIDES[0])
        components, directions, share = principal_components(large, like)
        planes = np.stack([large.mean(0), large.std(0)])

        allowed = self._left * _weight(snapshot) / self._weight
        colours = sheet_of(_rgb_sheets(components), int(allowed * _LARGE_SHARE))
        greys, bounds = _grey_sheet(planes, LARGE_SIDES, int(allowed * _LARGE_SHARE))
        rest = int(allowed) - len(colours.data) - len(greys.data)
        sheet, ranges = _grey_sheet(maps, SIDES, rest)
        self._weight -= _weight(snapshot)
        self._left -= len(colours.data) + len(greys.data) + len(sheet.data)
        side = max(sheet.width, sheet.height)
        if side < min(SIDES[0], max(snapshot.shape[1:])):
            self.thumbnail = min(side, self.thumbnail or side)

        ends = _ends(maps)
        numbers = np.stack([found.mean, found.variance, *ranges.T, *ends]).astype("<f4")
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
            "step": snapshot.step,
            "timestep": snapshot.timestep,
            "half": snapshot.half,
            "channels": len(maps),
            "size": maps.shape[1:],
            "low": _short(found.low),
            "high": _short(found.high),
            "counts": found.counts.tolist(),
            "notFinite": found.not_finite,
            "pca": _short(share),
            "planes": [
                [_short(value) for value in four]
                for four in np.stack([*bounds.T, *_ends(planes)], 1).tolist()
            ],
            "signed": is_signed(*_clipped_range(maps)),
        }
        return json.dumps(block), facts, _square(to_rgb(components)), directions


def _ends(maps: Values) -> tuple[Values, Values]:
    """The smallest and the largest value of each channel, without NaN and infinity."""
    flat = maps.reshape(len(maps), -1)
    finite = np.isfinite(flat)
    low = np.where(finite, flat, np.inf).min(1)
    high = np.where(finite, flat, -np.inf).max(1)
    return np.nan_to_num(low, posinf=0.0), np.nan_to_num(high, neginf=0.0)


def _clipped_range(maps: Values) -> tuple[float, float]:
    """The range of all values but the few that are clipped, estimated from some of them."""
    finite = maps[np.isfinite(maps)]
    some = finite[:: max(1, finite.size // 100_000)]
    if not some.size:
        return 0.0, 0.0
    low, high = np.percentile(some, (CLIPPED, 100 - CLIPPED))
    return float(low), float(high)


def _weight(snapshot: Snapshot) -> float:
    """The share of a snapshot's images in the budget, relative to the others'."""
    channels, height, width = snapshot.shape
    factor = min(1.0, SIDES[0] / max(height, width))
    return channels * height * width * factor**2 + 2000


def _rgb_sheets(components: Values) -> Iterator[Pixels]:
    for side in dict.fromkeys(min(side, max(components.shape[1:])) for side in LARGE_SIDES):
        yield to_rgb(downscaled(components, side))[None]


def _grey_sheet(maps: Values, sides: Sequence[int], allowed: int) -> tuple[Sheet, Values]:
    """A sheet of the channels, and the values of black and white in each."""
    taken: list[Values] = []

    def versions() -> Iterator[Pixels]:
        smaller = maps
        for side in dict.fromkeys(min(side, max(maps.shape[1:])) for side in sides):
            smaller = downscaled(smaller, side)
            tiles, ranges = to_grey(smaller)
            taken.append(ranges)
            yield tiles

    return sheet_of(versions(), allowed), taken[-1]


def _square(pixels: Pixels) -> Pixels:
    """The centre of an image ``(H, W, 3)``, resized for the drawing."""
    image = Image.fromarray(pixels)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    how = Image.Resampling.BOX if side > SMALL else Image.Resampling.NEAREST
    return np.asarray(image.resize((SMALL, SMALL), how))


def _base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def _short(number: float) -> float:
    return float(f"{number:.4g}")
