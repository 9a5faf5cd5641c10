"""Divides the output of a Winograd convolution into strips of tile rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from sdconv.fast.cpu.winograd import OUTPUT_TILE, Scheme

# of channels in and out, where a weight is not packed beforehand
MULTIPLE = 64
# channels in and out that AMX's kernel takes at a time
AMX_BLOCK = 32
# bytes of a part of a weight that is copied because of its dtype or memory layout
_PART = 4 << 20
# bytes of scratch memory for a strip, at least and at most: few enough for a cache, many enough for
# an efficient matrix product
LEAST_BYTES, MOST_BYTES = 4 << 20, 24 << 20
# bytes of a packed weight, at most, and tile rows for each thread, at least, with which threads
# have strips of their own
_MOST_IN_BANDS, _LEAST_ROWS = 12 << 20, 8


def strip_bytes(weight: int) -> int:
    """Bytes of scratch memory for a strip, given those of the packed weight.

    A large weight does not fit a cache and is read again for every strip, so strips are large; a
    small weight and a small strip fit a cache together.
    """
    return min(max(LEAST_BYTES, weight), MOST_BYTES)


def part_channels(channels: int, threads: int) -> int:
    """Output channels of a part of a weight ``(O, channels, 3, 3)`` that is copied in parts: enough
    for a panel for each thread."""
    return MULTIPLE * max(threads, _PART // (36 * channels * MULTIPLE))


@dataclass(frozen=True)
class Strip:
    """``tile_rows`` rows of tiles of a ``height`` x ``width`` output, from ``tile_row`` on."""

    scheme: Scheme
    height: int
    width: int
    tile_row: int
    tile_rows: int

    @cached_property
    def tile_columns(self) -> int:
        return -(-self.width // OUTPUT_TILE)

    @cached_property
    def tiles(self) -> int:
        return self.tile_rows * self.tile_columns

    @cached_property
    def first(self) -> int:
        """The strip's first row of the output."""
        return OUTPUT_TILE * self.tile_row

    @cached_property
    def end(self) -> int:
        """The row of the output after the strip's last."""
        return min(self.first + OUTPUT_TILE * self.tile_rows, self.height)

    @cached_property
    def input_height(self) -> int:
        """Rows of the whole input."""
        return self.height * self.scheme.step // OUTPUT_TILE

    @cached_property
    def input_rows(self) -> tuple[int, int]:
        """Rows of the input that the strip depends on: the first, and the one after the last."""
        scheme = self.scheme
        first = scheme.step * self.tile_row - scheme.before
        end = first + scheme.step * (self.tile_rows - 1) + scheme.input_tile
        return max(first, 0), min(end, self.input_height)


@lru_cache(maxsize=256)
def whole_strip(scheme: Scheme, height: int, width: int) -> Strip:
    """The strip of all tile rows of a ``height`` x ``width`` output."""
    return Strip(scheme, height, width, 0, -(-height // OUTPUT_TILE))


@lru_cache(maxsize=256)
def strips(
    scheme: Scheme, height: int, width: int, channels: int, out_channels: int
) -> tuple[Strip, ...]:
    """Strips of about equal height, from the top, whose scratch memory is about `strip_bytes`.

    Args:
        height, width: of the output.
    """
    whole = whole_strip(scheme, height, width)
    tiles = _tiles(scheme, channels, out_channels)
    fitting = max(1, tiles // whole.tile_columns)
    step = -(-whole.tile_rows // -(-whole.tile_rows // fitting))
    return tuple(
        Strip(scheme, height, width, row, min(step, whole.tile_rows - row))
        for row in range(0, whole.tile_rows, step)
    )


def _weight_bytes(scheme: Scheme, channels: int, out_channels: int) -> int:
    """Bytes of a packed weight."""
    return 4 * scheme.kernels * channels * out_channels


def _tiles(scheme: Scheme, channels: int, out_channels: int) -> int:
    """The tiles whose values and products take `strip_bytes`."""
    weight = _weight_bytes(scheme, channels, out_channels)
    return strip_bytes(weight) // (4 * scheme.positions * (channels + out_channels))


@dataclass(frozen=True)
class Bands:
    """``count`` bands of tile rows, of which each thread takes one at a time, in strips of at most
    ``strip_rows`` tile rows."""

    count: int
    strip_rows: int


@lru_cache(maxsize=256)
def bands(whole: Strip, channels: int, out_channels: int, threads: int) -> Bands | None:
    """The bands of a whole output; None where threads should share strips: where the weight is so
    large that not every thread should read all of it, or where bands would differ much in height.
    """
    weight = _weight_bytes(whole.scheme, channels, out_channels)
    if weight > _MOST_IN_BANDS or whole.tile_rows < _LEAST_ROWS * threads:
        return None
    tiles = _tiles(whole.scheme, channels, out_channels)
    rows = max(1, tiles // whole.tile_columns)
    # some for each thread, so that one that is held up takes fewer
    count = min(max(threads, whole.tile_rows // rows), 4 * threads)
    return Bands(count, min(rows, -(-whole.tile_rows // count)))
