"""Launches the kernels of Winograd's convolution: transforms, products, all of it in bands, and the
packing of weights.

The functions are those of the protocol :class:`sdconv.fast.cpu.kernels.Kernels`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.buffer_pool import copied_borders, scratch
from sdconv.fast.cpu.numba import bands, gemm, packing, tile_products, transforms
from sdconv.fast.cpu.numba.launch import launch, thread_jobs, thread_scratch, threads
from sdconv.fast.cpu.numba.sixteen_bits import CODES
from sdconv.fast.cpu.tiling import Bands, Strip, part_channels
from sdconv.fast.cpu.winograd import (
    CONV3X3,
    DOWNSAMPLE_CONV,
    OUTPUT_TILE,
    UPSAMPLE_CONV,
    Scheme,
)

Affine = tuple[Tensor, Tensor]

_INPUT_TRANSFORM = {
    CONV3X3: transforms.input_transform,
    UPSAMPLE_CONV: transforms.upsample_input_transform,
    DOWNSAMPLE_CONV: transforms.downsample_input_transform,
}
_OUTPUT_TRANSFORM = {
    CONV3X3: transforms.output_transform,
    UPSAMPLE_CONV: transforms.upsample_output_transform,
    DOWNSAMPLE_CONV: transforms.downsample_output_transform,
}
_PACK = {
    CONV3X3: packing.pack_kernels,
    UPSAMPLE_CONV: packing.pack_upsample_kernels,
    DOWNSAMPLE_CONV: packing.pack_downsample_kernels,
}
_PRODUCTS = {
    CONV3X3: tile_products.products,
    UPSAMPLE_CONV: tile_products.upsample_products,
}


def input_transform(
    strip: Strip,
    rows: Tensor,
    row: int,
    above: Tensor | None,
    affine: Affine | None,
    silu: bool,
    tiles: Tensor,
) -> None:
    launch(
        _INPUT_TRANSFORM[strip.scheme],
        transforms.INPUT,
        **thread_scratch(transforms.INPUT_SCRATCH),
        **_input(strip, rows, row, affine, silu, tiles),
        above=0 if above is None else above.data_ptr(),
        below=0,
    )


def _input(
    strip: Strip, rows: Tensor, row: int, affine: Affine | None, silu: bool, tiles: Tensor
) -> dict[str, int]:
    """Fields of the input transform's job."""
    return {
        **_tiles(strip),
        "plane": tiles.stride(1),
        "height": strip.input_height,
        "width": rows.shape[1],
        "channels": rows.shape[2],
        "dtype": CODES[rows.dtype],
        "x": rows.data_ptr(),
        "x_row": row,
        "scale": 0 if affine is None else affine[0].data_ptr(),
        "shift": 0 if affine is None else affine[1].data_ptr(),
        "silu": silu,
        "tiles": tiles.data_ptr(),
        "block": tiles.stride(0),
        "block_channels": tiles.shape[3],
    }


def output_transform(
    strip: Strip,
    products: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    found = torch.empty(_units(strip), groups, 2, dtype=torch.float64, device="cpu")
    launch(
        _OUTPUT_TRANSFORM[strip.scheme],
        transforms.OUTPUT,
        **thread_scratch(transforms.OUTPUT_SCRATCH),
        **_output(strip, products, bias, residual, relu, out, groups),
        out_row=strip.first,
        sums=found.data_ptr(),
    )
    return found, _counts(strip.end - strip.first, strip.width, out.shape[2] // groups)


def _output(
    strip: Strip,
    products: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
    groups: int,
) -> dict[str, int]:
    """Fields of the output transform's job."""
    assert residual is None or residual.dtype in (out.dtype, torch.float32)
    return {
        **_tiles(strip),
        "plane": products.stride(0),
        "height": strip.height,
        "width": strip.width,
        "channels": out.shape[2],
        "products_step": products.shape[2],
        "products": products.data_ptr(),
        "bias": bias.data_ptr(),
        "residual_dtype": CODES[torch.float32 if residual is None else residual.dtype],
        "residual": 0 if residual is None else residual.data_ptr(),
        "residual_step": 0 if residual is None else residual.stride(1),
        "dtype": CODES[out.dtype],
        "out": out.data_ptr(),
        "relu": relu,
        "groups": groups,
    }


def bmm(left: Tensor, packed: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    count, rows = left.shape[:2]
    panels = -(-out.shape[2] // gemm.PANEL)
    units = count * panels * -(-rows // gemm.CHUNK)
    launch(gemm.bmm, gemm.BMM, units=units, **_bmm(left, packed, out, order))


def _bmm(left: Tensor, packed: Tensor, out: Tensor, order: Tensor | None = None) -> dict[str, int]:
    """Fields of a product's job."""
    return {
        "rows": left.shape[1],
        "depth": left.shape[2],
        "width": out.shape[2],
        "a": left.data_ptr(),
        "a_step": left.stride(0),
        "b": packed.data_ptr(),
        "order": 0 if order is None else order.data_ptr(),
        "start": gemm.ZEROS.data_ptr(),
        "out": out.data_ptr(),
        "out_step": out.stride(0),
    }


def conv_in_bands(
    whole: Strip,
    division: Bands,
    rows: Tensor,
    affine: Affine | None,
    silu: bool,
    packed: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    shortcut: Tensor | None,
    relu: bool,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    count, units = threads(), division.count
    positions, tiles = whole.scheme.positions, division.strip_rows * whole.tile_columns
    width, channels = rows.shape[1:]
    columns = gemm.padded(out.shape[2])
    # each thread's planes come after those of the thread before
    given = scratch.planes("tiles", count * positions, (tiles, channels), torch.float32)
    made = scratch.planes("products", count * positions, (tiles, columns), torch.float32)
    own = thread_scratch(max(transforms.INPUT_SCRATCH, transforms.OUTPUT_SCRATCH))
    further = {"scratch": 4 * own["scratch_size"]}
    given_step, made_step = (4 * positions * one.stride(0) for one in (given, made))
    inputs = thread_jobs(
        transforms.INPUT,
        count,
        {**own, **_input(whole, rows, 0, affine, silu, given[None])},
        {**further, "tiles": given_step},
    )
    products = thread_jobs(
        gemm.BMM,
        count,
        _bmm(given[:positions], packed, made[:positions], whole.scheme.order),
        {"a": given_step, "out": made_step},
    )
    added, shortcuts, widened, pixels = residual, products, None, OUTPUT_TILE**2 * tiles
    if shortcut is not None and residual is not None:
        added = scratch.take("shortcut", (count, pixels, columns), torch.float32)
        left = residual.flatten(0, 1)[None]
        if residual.dtype is not torch.float32:
            widened = scratch.take("residual", (count, pixels, left.shape[2]), torch.float32)
            left = widened[:1]
        shortcuts = thread_jobs(
            gemm.BMM,
            count,
            _bmm(left, shortcut, added[:1]),
            {"out": 4 * added.stride(0)},
        )
    outputs = thread_jobs(
        transforms.OUTPUT,
        count,
        {**own, **_output(whole, made, bias, added, relu, out, groups)},
        {**further, "products": made_step},
    )
    above = borders = None
    if rows.data_ptr() == out.data_ptr():
        above = scratch.take("above", (count, width, channels), rows.dtype)
        starts = [OUTPUT_TILE * (whole.tile_rows * band // units) for band in range(1, units)]
        borders = copied_borders(rows, starts)
    found = torch.empty(_units(whole), groups, 2, dtype=torch.float64, device="cpu")
    panels = -(-columns // gemm.PANEL)
    launch(
        bands.conv,
        bands.CONV,
        units=units,
        scratch=0,
        scratch_size=0,
        tile_rows=whole.tile_rows,
        tile_columns=whole.tile_columns,
        strip_rows=division.strip_rows,
        height=whole.height,
        width=whole.width,
        input_kernel=_INPUT_TRANSFORM[whole.scheme].address,
        bmm_kernel=gemm.bmm.address,
        output_kernel=_OUTPUT_TRANSFORM[whole.scheme].address,
        input_jobs=inputs.ctypes.data,
        product_jobs=products.ctypes.data,
        shortcut_jobs=shortcuts.ctypes.data,
        output_jobs=outputs.ctypes.data,
        product_panels=positions * panels,
        shortcut_panels=0 if shortcut is None else panels,
        x=rows.data_ptr(),
        row=width * channels * rows.element_size(),
        above=0 if above is None else above.data_ptr(),
        borders=0 if borders is None else borders.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        residual_dtype=CODES[torch.float32 if residual is None else residual.dtype],
        residual_row=0 if residual is None else residual.stride(0),
        widened=0 if widened is None else widened.data_ptr(),
        widened_step=0 if widened is None else widened.stride(0),
        shortcut_row=whole.width * columns,
        sums=found.data_ptr(),
        groups=groups,
    )
    return found, _counts(whole.height, whole.width, out.shape[2] // groups)


def pack_kernels(scheme: Scheme, weight: Tensor) -> Tensor:
    out_channels, channels = weight.shape[:2]
    width = gemm.padded(out_channels)
    packed = weight.new_empty(scheme.kernels, channels * width, dtype=torch.float32)
    for first, part in _parts(weight):
        missing = -len(part) % gemm.PANEL
        part = functional.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else part
        launch(
            _PACK[scheme],
            packing.PACK,
            units=len(part) // gemm.PANEL,
            **thread_scratch(packing.PACK_SCRATCH),
            channels=channels,
            width=width,
            first=first,
            dtype=CODES[part.dtype],
            b=part.data_ptr(),
            out=packed.data_ptr(),
            out_step=packed.stride(0),
        )
    return packed


def _parts(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A weight in contiguous memory: itself, or copies of parts of its output channels. Each comes
    with the number of its first."""
    if weight.is_contiguous():
        yield 0, weight
        return
    step = part_channels(weight.shape[1], threads())
    for first in range(0, len(weight), step):
        part = weight[first : first + step]
        yield first, scratch.take("weight", tuple(part.shape), weight.dtype).copy_(part)


def multiply_tiles(scheme: Scheme, tiles: Tensor, weight: Tensor, out: Tensor) -> None:
    for first, part in _parts(weight):
        _multiply_part(scheme, tiles, part, out[:, :, first:])


def _multiply_part(scheme: Scheme, tiles: Tensor, weight: Tensor, out: Tensor) -> None:
    rows, panels = out.shape[1], len(weight) // gemm.PANEL
    # as many rows as leave each thread some units
    chunks = max(1, min(4 * threads() // panels, rows // gemm.ROWS))
    chunk = -(-rows // chunks)
    launch(
        _PRODUCTS[scheme],
        tile_products.PRODUCTS,
        units=panels * -(-rows // chunk),
        **thread_scratch(tile_products.scratch_size(chunk)),
        rows=rows,
        chunk=chunk,
        channels=weight.shape[1],
        columns=len(weight),
        width=out.stride(1),
        dtype=CODES[weight.dtype],
        a=tiles.data_ptr(),
        a_step=tiles.stride(1),
        block=tiles.stride(0),
        b=weight.data_ptr(),
        start=gemm.ZEROS.data_ptr(),
        out=out.data_ptr(),
        out_step=out.stride(0),
    )


@lru_cache(maxsize=256)
def _counts(height: int, width: int, channels: int) -> Tensor:
    """The number of values in each part of `output_transform`'s sums."""
    parts = torch.outer(
        _lengths(height, OUTPUT_TILE), _lengths(width, OUTPUT_TILE * transforms.TILES)
    )
    return parts.flatten() * channels


def _lengths(size: int, step: int) -> Tensor:
    """Lengths of the pieces that ``size`` divides into: ``step`` each, the last one shorter."""
    starts = torch.arange(0, size, step, dtype=torch.float64, device="cpu")
    return (size - starts).clamp(max=step)


def _tiles(strip: Strip) -> dict[str, int]:
    return {
        "units": _units(strip),
        "tile_row": strip.tile_row,
        "tile_rows": strip.tile_rows,
        "tile_columns": strip.tile_columns,
    }


def _units(strip: Strip) -> int:
    """The transforms' units of work."""
    return strip.tile_rows * -(-strip.tile_columns // transforms.TILES)
