"""The same functions as `torch_kernels.py`'s, by the compiled kernels; float32 only.

Importing it compiles them: seconds, once for a machine and a version of Numba.
"""

from __future__ import annotations

import secrets
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.numba import attention as attention_kernel
from sdconv.fast.cpu.numba import gemm as product_kernel
from sdconv.fast.cpu.numba import reductions as sum_kernels
from sdconv.fast.cpu.numba import transforms as kernels
from sdconv.fast.cpu.numba.launch import launch, threads
from sdconv.fast.cpu.tiling import Strip, scratch
from sdconv.fast.cpu.torch_kernels import Affine
from sdconv.fast.cpu.winograd import DOUBLED, OUTPUTS, PLAIN, Scheme

_KEYS = np.frombuffer(secrets.token_bytes(4 * sum_kernels.KEYS), dtype=np.uint32)

_ZEROS = torch.zeros(product_kernel.PANEL)
_LOAD = {PLAIN: kernels.load, DOUBLED: kernels.load_doubled}
_STORE = {PLAIN: kernels.store, DOUBLED: kernels.store_doubled}
# fewer are multiplied before a panel of the weight has been put in order
_MANY_ROWS = 256


def load(
    scheme: Scheme,
    rows: Tensor,
    row: int,
    above: Tensor | None,
    strip: Strip,
    affine: Affine | None,
    silu: bool,
    tiles: Tensor,
) -> None:
    """See the plain one."""
    launch(
        _LOAD[scheme],
        kernels.LOAD,
        units=strip.tile_rows * -(-strip.tile_columns // kernels.TILES),
        **_working(kernels.LOAD_SCRATCH),
        **_tiles(strip),
        height=strip.height * scheme.step // OUTPUTS,
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


def store(
    scheme: Scheme,
    products: Tensor,
    strip: Strip,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """See the plain one."""
    chunks = -(-strip.tile_columns // kernels.TILES)
    sums = torch.empty(strip.tile_rows * chunks, groups, 2, dtype=torch.float64)
    launch(
        _STORE[scheme],
        kernels.STORE,
        units=len(sums),
        **_working(kernels.STORE_SCRATCH),
        **_tiles(strip),
        height=strip.height,
        width=strip.width,
        channels=out.shape[2],
        step=products.shape[2],
        tiles=products.data_ptr(),
        bias=bias.data_ptr(),
        residual=0 if residual is None else residual.data_ptr(),
        residual_step=0 if residual is None else residual.stride(1),
        out=out.data_ptr(),
        out_row=strip.first,
        groups=groups,
        sums=sums.data_ptr(),
    )
    return sums, _counts(strip.end - strip.first, strip.width, out.shape[2] // groups)


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """See the plain one."""
    height, width, channels = rows.shape
    found = torch.empty(height, groups, 2, dtype=torch.float64)
    launch(
        sum_kernels.add_up,
        sum_kernels.SUM,
        units=height,
        **_working(sum_kernels.SUM_SCRATCH),
        width=width,
        channels=channels,
        x=rows.data_ptr(),
        groups=groups,
        sums=found.data_ptr(),
    )
    return found, torch.full((height,), width * channels // groups, dtype=torch.float64)


def width(channels: int) -> int:
    """See the plain one."""
    return -(-channels // product_kernel.LANES) * product_kernel.LANES


def pack(right: Tensor) -> Tensor:
    """See the plain one: panel after panel."""
    missing = width(right.shape[2]) - right.shape[2]
    right = functional.pad(right, (0, missing)) if missing else right
    places, depth, columns = right.shape
    packed = right.new_empty(places, depth * columns)
    for first in range(0, columns, product_kernel.PANEL):
        panel = right[:, :, first : first + product_kernel.PANEL]
        packed[:, depth * first :][:, : panel[0].numel()].view(panel.shape).copy_(panel)
    return packed


def product(left: Tensor, packed: Tensor, out: Tensor) -> None:
    """See the plain one."""
    places, rows, depth = left.shape
    panels = -(-out.shape[2] // product_kernel.PANEL)
    launch(
        product_kernel.product,
        product_kernel.PRODUCT,
        units=places * panels * -(-rows // product_kernel.CHUNK),
        rows=rows,
        depth=depth,
        width=out.shape[2],
        a=left.data_ptr(),
        b=packed.data_ptr(),
        start=_ZEROS.data_ptr(),
        out=out.data_ptr(),
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """See the plain one: of many rows and whole vectors of columns."""
    columns, depth = weight.shape
    rows = x.numel() // depth
    if rows < _MANY_ROWS or columns % product_kernel.LANES:
        return None
    panels = -(-columns // product_kernel.PANEL)
    # as many rows as leave each thread some units
    chunk = -(-rows // max(1, 4 * threads() // panels))
    start = x.new_zeros(columns) if bias is None else bias
    out = x.new_empty(*x.shape[:-1], columns)
    launch(
        product_kernel.linear,
        product_kernel.LINEAR,
        units=panels * -(-rows // chunk),
        **_working(depth * product_kernel.PANEL),
        rows=rows,
        chunk=chunk,
        depth=depth,
        width=columns,
        a=x.data_ptr(),
        b=weight.data_ptr(),
        start=start.data_ptr(),
        out=out.data_ptr(),
    )
    return out


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """See the plain one: of heads whose numbers lie beside one another, of many queries."""
    batch, heads, queries, depth = query.shape
    wide = value.shape[3]
    rows = next((rows for rows in attention_kernel.BLOCKS if wide % rows == 0), 0)
    if rows == 0 or any(one.stride(3) != 1 for one in (query, key, value)):
        return None
    # as torch's own: a head's rows beside the other heads'
    out = query.new_empty(batch, queries, heads, wide).transpose(1, 2)
    by = torch.tensor(scale, dtype=torch.float32)
    launch(
        attention_kernel.attention,
        attention_kernel.ATTENTION,
        units=batch * heads * -(-queries // product_kernel.PANEL),
        **_working(attention_kernel.scratch_size(depth, wide)),
        heads=heads,
        queries=queries,
        keys=key.shape[2],
        depth=depth,
        wide=wide,
        rows=rows,
        **_heads("q", query),
        **_heads("k", key),
        **_heads("v", value),
        **_heads("out", out),
        scale=by.data_ptr(),
        zeros=_ZEROS.data_ptr(),
    )
    return out


def fingerprint(weight: Tensor) -> bytes:
    """See the plain one; 64 bits of every 2^16 words, by keys that differ from process to process,
    so that no kind of edit can be blind to it."""
    size = weight.numel() * weight.element_size() // 4
    parts = -(-size // sum_kernels.WORDS)
    found = torch.empty(parts, dtype=torch.int64)
    launch(
        sum_kernels.fingerprint,
        sum_kernels.HASH,
        units=parts,
        words=weight.data_ptr(),
        size=size,
        keys=_KEYS.ctypes.data,
        sums=found.data_ptr(),
    )
    return found.numpy().tobytes()


@lru_cache(maxsize=256)
def _counts(height: int, width: int, channels: int) -> Tensor:
    """Values of each part that `store` sums up."""
    parts = torch.outer(_lengths(height, OUTPUTS), _lengths(width, OUTPUTS * kernels.TILES))
    return parts.flatten() * channels


def _lengths(size: int, step: int) -> Tensor:
    """How ``size`` divides into steps, the last one shorter."""
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


def _working(floats: int) -> dict[str, int]:
    """Memory for each thread, in whole cache lines."""
    memory = scratch.block("threads", 4 * threads() * floats)
    return {"scratch": memory.data_ptr(), "scratch_size": floats}
