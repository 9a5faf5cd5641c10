"""The protocol :class:`sdconv.fast.cpu.kernels.Kernels` in Numba, for float32 only.

Importing this module compiles the kernels, which takes seconds, once for each machine and version
of Numba.
"""

from __future__ import annotations

import math
import secrets
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.buffer_pool import scratch
from sdconv.fast.cpu.numba import attention as attention_kernel
from sdconv.fast.cpu.numba import gemm, reductions, tile_products, transforms
from sdconv.fast.cpu.numba import linear as linear_kernels
from sdconv.fast.cpu.numba.launch import launch, threads
from sdconv.fast.cpu.numba.vectors import LANES
from sdconv.fast.cpu.tiling import MULTIPLE, Strip, part_channels
from sdconv.fast.cpu.winograd import CONV3X3, OUTPUT_TILE, UPSAMPLE_CONV, Scheme

_HASH_KEYS = np.frombuffer(secrets.token_bytes(4 * reductions.KEYS), dtype=np.uint32)
_ZEROS = torch.zeros(gemm.PANEL)
_INPUT_TRANSFORM = {
    CONV3X3: transforms.input_transform,
    UPSAMPLE_CONV: transforms.upsample_input_transform,
}
_OUTPUT_TRANSFORM = {
    CONV3X3: transforms.output_transform,
    UPSAMPLE_CONV: transforms.upsample_output_transform,
}
_PRODUCTS = {
    CONV3X3: tile_products.products,
    UPSAMPLE_CONV: tile_products.upsample_products,
}
# with fewer rows, packing a panel of the weight in each call takes longer than it saves
_LEAST_ROWS = 256
# with more, each panel of columns touches more pages than the processor has addresses of at hand
_MOST_ROWS = 1024


def input_transform(
    strip: Strip,
    rows: Tensor,
    row: int,
    above: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    silu: bool,
    tiles: Tensor,
) -> None:
    launch(
        _INPUT_TRANSFORM[strip.scheme],
        transforms.INPUT,
        units=strip.tile_rows * -(-strip.tile_columns // transforms.TILES),
        **_scratch(transforms.INPUT_SCRATCH),
        **_tiles(strip),
        plane=tiles.stride(0),
        height=strip.input_height,
        width=rows.shape[1],
        channels=rows.shape[2],
        x=rows.data_ptr(),
        x_row=row,
        above=0 if above is None else above.data_ptr(),
        scale=0 if affine is None else affine[0].data_ptr(),
        shift=0 if affine is None else affine[1].data_ptr(),
        silu=silu,
        tiles=tiles.data_ptr(),
    )


def output_transform(
    strip: Strip,
    products: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    chunks = -(-strip.tile_columns // transforms.TILES)
    found = torch.empty(strip.tile_rows * chunks, groups, 2, dtype=torch.float64)
    launch(
        _OUTPUT_TRANSFORM[strip.scheme],
        transforms.OUTPUT,
        units=len(found),
        **_scratch(transforms.OUTPUT_SCRATCH),
        **_tiles(strip),
        plane=products.stride(0),
        height=strip.height,
        width=strip.width,
        channels=out.shape[2],
        products_step=products.shape[2],
        products=products.data_ptr(),
        bias=bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        residual_step=0 if residual is None else residual.stride(1),
        out=out.data_ptr(),
        out_row=strip.first,
        relu=relu,
        groups=groups,
        sums=found.data_ptr(),
    )
    return found, _counts(strip.end - strip.first, strip.width, out.shape[2] // groups)


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    height, width, channels = rows.shape
    found = torch.empty(height, groups, 2, dtype=torch.float64)
    launch(
        reductions.group_sums,
        reductions.SUMS,
        units=height,
        **_scratch(reductions.SUMS_SCRATCH),
        width=width,
        channels=channels,
        x=rows.data_ptr(),
        groups=groups,
        sums=found.data_ptr(),
    )
    return found, torch.full((height,), width * channels // groups, dtype=torch.float64)


def padded(channels: int) -> int:
    return -(-channels // LANES) * LANES


def pack(right: Tensor) -> Tensor:
    missing = padded(right.shape[2]) - right.shape[2]
    right = functional.pad(right, (0, missing)) if missing else right
    count, depth, columns = right.shape
    packed = right.new_empty(count, depth * columns)
    for first in range(0, columns, gemm.PANEL):
        panel = right[:, :, first : first + gemm.PANEL]
        packed[:, depth * first :][:, : panel[0].numel()].view(panel.shape).copy_(panel)
    return packed


def bmm(left: Tensor, packed: Tensor, out: Tensor) -> None:
    count, rows, depth = left.shape
    panels = -(-out.shape[2] // gemm.PANEL)
    launch(
        gemm.bmm,
        gemm.BMM,
        units=count * panels * -(-rows // gemm.CHUNK),
        rows=rows,
        depth=depth,
        width=out.shape[2],
        a=left.data_ptr(),
        a_step=left.stride(0),
        b=packed.data_ptr(),
        start=_ZEROS.data_ptr(),
        out=out.data_ptr(),
        out_step=out.stride(0),
    )


def multiply_tiles(scheme: Scheme, tiles: Tensor, weight: Tensor, out: Tensor) -> None:
    positions, rows, channels = tiles.shape
    shape = channels // MULTIPLE, positions, rows, MULTIPLE
    # a block's tiles next to each other: in their own order each row of each position is on a page
    # of its own, more pages than the processor has addresses of at hand
    blocks = scratch.take("blocks", shape, torch.float32)
    blocks.permute(1, 2, 0, 3).copy_(tiles.unfold(2, shape[3], shape[3]))
    whole = weight.dtype is torch.float32 and weight.is_contiguous()
    step = len(weight) if whole else part_channels(channels, threads())
    for first in range(0, len(weight), step):
        part = weight[first : first + step]
        if not whole:
            part = scratch.take("weight", tuple(part.shape), torch.float32).copy_(part)
        _multiply_part(scheme, blocks, part, out[:, :, first:])


def _multiply_part(scheme: Scheme, blocks: Tensor, weight: Tensor, out: Tensor) -> None:
    rows, panels = out.shape[1], len(weight) // gemm.PANEL
    # as many rows as leave each thread some units
    chunks = max(1, min(4 * threads() // panels, rows // gemm.ROWS))
    chunk = -(-rows // chunks)
    launch(
        _PRODUCTS[scheme],
        tile_products.PRODUCTS,
        units=panels * -(-rows // chunk),
        **_scratch(tile_products.scratch_size(chunk)),
        rows=rows,
        chunk=chunk,
        channels=weight.shape[1],
        columns=len(weight),
        width=out.stride(1),
        a=blocks.data_ptr(),
        b=weight.data_ptr(),
        start=_ZEROS.data_ptr(),
        out=out.data_ptr(),
        out_step=out.stride(0),
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor | None:
    return _linear(linear_kernels.linear, x, weight, bias, residual, len(weight))


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    return _linear(linear_kernels.geglu, x, weight, bias, None, len(weight) // 2)


def _linear(
    kernel: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    columns: int,
) -> Tensor | None:
    """A kernel's output ``(..., columns)`` for an input ``(..., K)`` and a weight ``(O, K)``."""
    depth = weight.shape[1]
    rows = x.numel() // depth
    if rows < _LEAST_ROWS or columns % LANES:
        return None
    panels = -(-columns // gemm.PANEL)
    # as many rows as leave each thread some units
    chunks = max(1, 4 * threads() // panels, -(-rows // _MOST_ROWS))
    chunk = -(-rows // chunks)
    start = x.new_zeros(len(weight)) if bias is None else bias
    out = x.new_empty(*x.shape[:-1], columns)
    launch(
        kernel,
        linear_kernels.LINEAR,
        units=panels * -(-rows // chunk),
        **_scratch(linear_kernels.scratch_size(depth)),
        rows=rows,
        chunk=chunk,
        depth=depth,
        width=columns,
        a=x.data_ptr(),
        b=weight.data_ptr(),
        start=start.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        out=out.data_ptr(),
    )
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    batch, heads, queries, depth = query.shape
    value_depth = value.shape[3]
    if not attention_kernel.has_kernel(value_depth):
        return None
    if any(one.stride(3) != 1 for one in (query, key, value)):
        return None
    # in the memory layout of torch's own kernel: a query's heads next to each other
    out = query.new_empty(batch, queries, heads, value_depth).transpose(1, 2)
    scale_in_memory = torch.tensor(scale * math.log2(math.e), dtype=torch.float32)
    size = attention_kernel.unit_queries(queries, batch * heads, threads())
    launch(
        attention_kernel.attention,
        attention_kernel.ATTENTION,
        units=batch * heads * -(-queries // size),
        **_scratch(attention_kernel.scratch_size(depth, value_depth, size)),
        heads=heads,
        queries=queries,
        unit_queries=size,
        keys=key.shape[2],
        depth=depth,
        value_depth=value_depth,
        **_heads("q", query),
        **_heads("k", key),
        **_heads("v", value),
        **_heads("out", out),
        scale=scale_in_memory.data_ptr(),
    )
    return out


def fingerprint(weight: Tensor) -> bytes:
    """A 64-bit hash of every 2^16 words. The keys differ from process to process, so that no edit
    goes unnoticed in all of them."""
    size = weight.numel() * weight.element_size() // 4
    parts = -(-size // reductions.WORDS)
    found = torch.empty(parts, dtype=torch.int64)
    launch(
        reductions.fingerprint,
        reductions.HASH,
        units=parts,
        words=weight.data_ptr(),
        size=size,
        keys=_HASH_KEYS.ctypes.data,
        hashes=found.data_ptr(),
    )
    return found.numpy().tobytes()


@lru_cache(maxsize=256)
def _counts(height: int, width: int, channels: int) -> Tensor:
    """The number of values in each part of `output_transform`'s sums."""
    parts = torch.outer(
        _lengths(height, OUTPUT_TILE), _lengths(width, OUTPUT_TILE * transforms.TILES)
    )
    return parts.flatten() * channels


def _lengths(size: int, step: int) -> Tensor:
    """Lengths of the pieces that ``size`` divides into: ``step`` each, the last one shorter."""
    starts = torch.arange(0, size, step, dtype=torch.float64)
    return (size - starts).clamp(max=step)


def _heads(name: str, x: Tensor) -> dict[str, int]:
    batch, head, row, _ = x.stride()
    steps = {"batch": batch, "head": head, "row": row}
    return {name: x.data_ptr(), **{f"{name}_{step}": size for step, size in steps.items()}}


def _tiles(strip: Strip) -> dict[str, int]:
    return {
        "tile_row": strip.tile_row,
        "tile_rows": strip.tile_rows,
        "tile_columns": strip.tile_columns,
    }


def _scratch(floats: int) -> dict[str, int]:
    """Scratch memory of ``floats`` for each thread."""
    memory = scratch.block("threads", 4 * threads() * floats)
    return {"scratch": memory.data_ptr(), "scratch_size": floats}
