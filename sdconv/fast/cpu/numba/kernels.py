"""The protocol :class:`sdconv.fast.cpu.kernels.Kernels` in Numba, which computes in float32.

Importing this module compiles the kernels, which takes seconds, once for each machine and version
of Numba.
"""

from __future__ import annotations

import math
import secrets
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.numba import attention as attention_kernel
from sdconv.fast.cpu.numba import gemm, reductions
from sdconv.fast.cpu.numba import image_conv as image_conv_kernel
from sdconv.fast.cpu.numba import linear as linear_kernels
from sdconv.fast.cpu.numba.gemm import padded
from sdconv.fast.cpu.numba.launch import launch, thread_scratch, threads
from sdconv.fast.cpu.numba.sixteen_bits import CODES
from sdconv.fast.cpu.numba.vectors import LANES
from sdconv.fast.cpu.numba.winograd import (
    bmm,
    conv_in_bands,
    input_transform,
    multiply_tiles,
    output_transform,
    pack_kernels,
)

__all__ = [
    "attention",
    "bmm",
    "conv_in_bands",
    "fingerprint",
    "geglu",
    "image_conv",
    "input_transform",
    "linear",
    "multiply_tiles",
    "output_transform",
    "pack",
    "pack_kernels",
    "padded",
    "sums",
]

_HASH_KEYS = np.frombuffer(secrets.token_bytes(4 * reductions.KEYS), dtype=np.uint32)
# with fewer rows, packing a panel of the weight in each call takes longer than it saves
_LEAST_ROWS = 256
# with more, each panel of columns touches more pages than the processor has addresses of at hand
_MOST_ROWS = 1024


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    height, width, channels = rows.shape
    found = torch.empty(height, groups, 2, dtype=torch.float64, device="cpu")
    launch(
        reductions.group_sums,
        reductions.SUMS,
        units=height,
        **thread_scratch(reductions.SUMS_SCRATCH),
        width=width,
        channels=channels,
        dtype=CODES[rows.dtype],
        x=rows.data_ptr(),
        groups=groups,
        sums=found.data_ptr(),
    )
    counts = found.new_full((height,), width * channels // groups)
    return found, counts


def pack(right: Tensor) -> Tensor:
    missing = padded(right.shape[2]) - right.shape[2]
    right = functional.pad(right, (0, missing)) if missing else right
    count, depth, columns = right.shape
    packed = right.new_empty(count, depth * columns)
    for first in range(0, columns, gemm.PANEL):
        panel = right[:, :, first : first + gemm.PANEL]
        packed[:, depth * first :][:, : panel[0].numel()].view(panel.shape).copy_(panel)
    return packed


def image_conv(
    rows: Tensor, packed: Tensor, bias: Tensor, out: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    height, width, out_channels = out.shape
    found = torch.empty(height, groups, 2, dtype=torch.float64, device="cpu")
    launch(
        image_conv_kernel.image_conv,
        image_conv_kernel.IMAGE_CONV,
        units=height,
        **thread_scratch(image_conv_kernel.IMAGE_CONV_SCRATCH),
        columns=width,
        channels=rows.shape[2],
        width=out_channels,
        x=rows.data_ptr(),
        b=packed.data_ptr(),
        bias=bias.data_ptr(),
        dtype=CODES[out.dtype],
        out=out.data_ptr(),
        groups=groups,
        sums=found.data_ptr(),
    )
    return found, found.new_full((height,), width * out_channels // groups)


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
        **thread_scratch(linear_kernels.scratch_size(depth)),
        rows=rows,
        chunk=chunk,
        depth=depth,
        width=columns,
        a=x.data_ptr(),
        dtype=CODES[weight.dtype],
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
    scale_in_memory = torch.tensor(scale * math.log2(math.e), dtype=torch.float32, device="cpu")
    size = attention_kernel.unit_queries(queries, batch * heads, threads())
    launch(
        attention_kernel.attention,
        attention_kernel.ATTENTION,
        units=batch * heads * -(-queries // size),
        **thread_scratch(attention_kernel.scratch_size(depth, value_depth, size)),
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
    found = torch.empty(parts, dtype=torch.int64, device="cpu")
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


def _heads(name: str, x: Tensor) -> dict[str, int]:
    batch, head, row, _ = x.stride()
    steps = {"batch": batch, "head": head, "row": row}
    return {name: x.data_ptr(), **{f"{name}_{step}": size for step, size in steps.items()}}
