"""3x3 convolutions of bfloat16 by a processor's matrix units (Intel AMX): direct summation, which
is faster there than Winograd's method in float32.

As in the reference, what is multiplied is rounded to bfloat16, normalised inputs included, and
products are summed in float32; but a block's inputs and sums are rounded less often. A kernel after
upsampling is rounded too, which the reference's is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.buffer_pool import copied_borders
from sdconv.fast.cpu.tiling import AMX_BLOCK as BLOCK
from sdconv.fast.cpu.weight_cache import Pack
from sdconv.fast.cpu.winograd import Kind

# bytes of scratch memory for a band, half of a core's second cache; rows of a band, at least; units
# of work for each thread, at most: rows at the border of two are normalised twice
_BAND, _LEAST_ROWS, _UNITS = 1 << 20, 4, 8


def _packed(taps: Tensor) -> Tensor:
    """``(O, C, taps)`` in the order in which the kernel reads it, with zeros up to whole blocks:
    for each block of output channels, block of input channels and tap, two tiles of 16 pairs of
    input channels by 16 output channels."""
    missing = [-size % BLOCK for size in taps.shape[:2]]
    whole = functional.pad(taps, (0, 0, 0, missing[1], 0, missing[0])).to(torch.bfloat16)
    out_channels, channels, count = whole.shape
    parts = whole.view(out_channels // BLOCK, 2, 16, channels // BLOCK, 16, 2, count)
    return parts.permute(0, 3, 6, 1, 4, 2, 5).contiguous().flatten()


def pack_conv(weight: Tensor) -> Tensor:
    """``(O, C, K, K)`` for stride 1: 3x3 and 1x1 kernels."""
    return _packed(weight.flatten(2))


def pack_upsample(weight: Tensor) -> Tensor:
    """``(O, C, 3, 3)`` for an upsampled input: for each of the four outputs at a pixel, a kernel of
    2x2. Of the three taps along an axis, two meet the same pixel and are added; the sums are
    rounded to bfloat16."""

    def pairs(taps: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, middle, last = taps.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    rows = pairs(weight.float(), 2)
    return torch.cat([_packed(part.flatten(2)) for row in rows for part in pairs(row, 3)])


# rows of the output for each row of the input
FACTOR: dict[Kind, int] = {"conv3x3": 1, "upsample_conv": 2}
PACK: dict[Kind, Pack] = {"conv3x3": pack_conv, "upsample_conv": pack_upsample}


def packed_bytes(kind: Kind, channels: int, out_channels: int) -> int:
    """Bytes of the packed weight, of which each number is multiplied once per pixel of the
    input."""
    taps = {"conv3x3": 9, "upsample_conv": 4 * 4}[kind]
    return 2 * taps * math.prod(-(-count // BLOCK) * BLOCK for count in (channels, out_channels))


def packing_bytes(kind: Kind, weight: Tensor) -> int:
    """Bytes of memory, at most, that packing a weight takes next to its result."""
    return {"conv3x3": 4, "upsample_conv": 16}[kind] * weight.numel()


@lru_cache(maxsize=256)
def _taps(kind: Kind, pitch: int) -> Tensor:
    """How many pixels after the upper left neighbour of a pixel each tap is, ``(kernels, taps)``,
    in rows of ``pitch`` pixels."""
    size, corners = (3, [(0, 0)]) if kind == "conv3x3" else (2, [*product(range(2), repeat=2)])
    offsets = [
        [(down + row) * pitch + across + column for row, column in product(range(size), repeat=2)]
        for down, across in corners
    ]
    with torch.inference_mode(False):
        return torch.tensor(offsets, device="cpu")


def _plane(rows: int, width: int) -> int:
    """Numbers of a block of channels of a band in scratch memory: with a border, and with as many
    pixels as the last ones that are multiplied at a time may lack."""
    return BLOCK * ((rows + 2) * (width + 2) + 2 * BLOCK)


def band_rows(height: int, width: int, planes: int) -> tuple[int, int]:
    """Rows of a band, which fits a cache, and of a unit of work: bands that a thread computes one
    after another. All are of the same height, and there are some for each thread."""
    threads = torch.get_num_threads()
    fitting = max(_LEAST_ROWS, _BAND // (2 * BLOCK * (width + 2) * planes) - 2)
    count = max(-(-height // fitting), min(height, 2 * threads))
    rows = -(-height // count)
    return rows, rows * max(1, count // (_UNITS * threads))


def scratch_bytes(height: int, width: int, channels: int) -> int:
    """Bytes of scratch memory, at most, of a convolution without a shortcut."""
    planes = -(-channels // BLOCK)
    band = 2 * planes * _plane(band_rows(height, width, planes)[0], width)
    return torch.get_num_threads() * (band + (8 << 10))


@dataclass(frozen=True)
class AmxConv:
    """A convolution by AMX of one image's rows, all ``(rows, W, C)`` in bfloat16 and contiguous.

    ``packed``: the weight, by `PACK`, for ``out_channels``. ``offsets``: ``(O,)`` in float32.
    ``affine``: the normalisation's scale and shift, ``(C,)`` each in float32; ``C`` is a multiple
    of 16 then. ``silu``: whether SiLU follows. ``shortcut``: the packed weight by which the
    residual is multiplied. ``relu``: whether ReLU follows.
    """

    kind: Kind
    packed: Tensor
    out_channels: int
    offsets: Tensor
    affine: tuple[Tensor, Tensor] | None = None
    silu: bool = False
    shortcut: Tensor | None = None
    relu: bool = False

    def run(
        self, x: Tensor, first: int, end: int, residual: Tensor | None, out: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes rows ``first`` up to ``end`` of the input's size into ``out``, which has these
        only, as ``residual`` has; what is beyond ``x`` counts as 0. If all rows of ``x`` are
        computed, ``out`` may be ``x``.

        Returns:
            Each channel's sums in each row, ``(rows, O, 2)``, and their counts, see
            `group_stats.combine`.
        """
        # compiles the kernel, which only such a processor can run
        from sdconv.fast.cpu.numba import amx as kernels
        from sdconv.fast.cpu.numba.launch import launch, thread_scratch

        height, width, channels = x.shape
        steps, added_steps = -(-channels // BLOCK), 0
        if residual is not None and self.shortcut is not None:
            added_steps = -(-residual.shape[2] // BLOCK)
        rows, unit_rows = band_rows(end - first, width, steps + added_steps)
        units, borders = -(-(end - first) // unit_rows), None
        if out.data_ptr() == x.data_ptr():
            borders = copied_borders(x, range(unit_rows, height, unit_rows))
        plane = _plane(rows, width)
        offsets = functional.pad(self.offsets, (0, -self.out_channels % BLOCK))
        taps = _taps(self.kind, width + 2) * (2 * BLOCK)
        sums = torch.zeros(end - first, 2, self.out_channels, dtype=torch.float64, device="cpu")
        pixels = FACTOR[self.kind] ** 2  # for each of the input
        skipped = pixels * first * width * 2  # bytes of the rows that out does not have
        launch(
            kernels.conv,
            kernels.CONV,
            units=units,
            **thread_scratch((kernels.BEFORE + 64 + 2 * plane * (steps + added_steps)) // 4),
            rows=rows,
            unit_rows=unit_rows,
            plane=plane,
            first=first,
            end=end,
            height=height,
            width=width,
            channels=channels,
            steps=steps,
            out_channels=self.out_channels,
            x=x.data_ptr(),
            borders=0 if borders is None else borders.data_ptr(),
            scale=0 if self.affine is None else self.affine[0].data_ptr(),
            shift=0 if self.affine is None else self.affine[1].data_ptr(),
            silu=int(self.silu),
            taps=taps.data_ptr(),
            tap_count=taps.shape[1],
            phases=len(taps),
            weight=self.packed.data_ptr(),
            offsets=offsets.data_ptr(),
            residual=0 if residual is None else residual.data_ptr() - skipped * residual.shape[2],
            residual_channels=0 if residual is None else residual.shape[2],
            residual_steps=added_steps,
            shortcut=0 if self.shortcut is None else self.shortcut.data_ptr(),
            relu=int(self.relu),
            out=out.data_ptr() - skipped * self.out_channels,
            sums=sums.data_ptr() - first * 16 * self.out_channels,
        )
        counts = sums.new_full((end - first,), pixels * width)
        return sums.transpose(1, 2), counts


def rows_of(x: Tensor) -> Tensor:
    """``(C, H, W)`` as rows, without a copy if it is in channels-last order."""
    return x.permute(1, 2, 0).contiguous()
