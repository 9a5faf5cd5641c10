"""The protocol :class:`sdconv.fast.cpu.kernels.Kernels` in plain torch operations, for any floating
dtype.

They run where Numba is not installed, and the Numba kernels are tested against them.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.winograd import Scheme


def input_transform(
    strip: Strip,
    rows: Tensor,
    row: int,
    above: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    silu: bool,
    tiles: Tensor,
) -> None:
    scheme, (first, end) = strip.scheme, strip.input_rows
    rows = rows[first - row : end - row]
    if above is not None:
        rows = torch.cat([above.unsqueeze(0), rows[1:]])
    rows = rows.to(tiles.dtype)
    if affine is not None:
        rows = rows * affine[0] + affine[1]
        rows = functional.silu(rows) if silu else rows
    left, beyond = scheme.before, scheme.input_tile - scheme.step
    top = left if strip.tile_row == 0 else 0
    bottom = scheme.step * strip.tile_rows + beyond - top - len(rows)
    right = scheme.step * strip.tile_columns + beyond - left - rows.shape[1]
    made = scheme.input_transform(functional.pad(rows, (0, 0, left, right, top, bottom)))
    tiles.copy_(made.view(*made.shape[:2], len(tiles), -1).permute(2, 0, 1, 3))


def output_transform(
    strip: Strip,
    products: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    rows = strip.scheme.output_transform(products, strip.tile_rows)
    rows = rows[: strip.end - strip.first, : strip.width] + bias
    rows = rows if residual is None else rows + residual
    out.copy_(rows.relu() if relu else rows)
    return sums(out, groups)


def conv_in_bands(*args: object) -> None:
    return None


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    parts = [row.double().view(-1, groups, row.shape[1] // groups) for row in rows]
    found = torch.stack([torch.stack([p.sum((0, 2)), p.square().sum((0, 2))], -1) for p in parts])
    return found, found.new_full((len(rows),), rows[0].numel() // groups)


def padded(channels: int) -> int:
    return channels


def pack(right: Tensor) -> Tensor:
    return right.contiguous()


def pack_kernels(scheme: Scheme, weight: Tensor) -> Tensor:
    return scheme.kernel_transform(weight)


def bmm(left: Tensor, packed: Tensor, out: Tensor, order: Tensor | None = None) -> None:
    if order is None:
        torch.bmm(left, packed, out=out)
        return
    for item, number in enumerate(order.tolist()):  # without a copy of the factors that are shared
        torch.mm(left[item], packed[number], out=out[item])


def multiply_tiles(scheme: Scheme, tiles: Tensor, weight: Tensor, out: Tensor) -> None:
    rows = tiles.permute(1, 2, 0, 3).flatten(2)
    torch.bmm(rows, scheme.kernel_transform(weight).to(tiles.dtype), out=out)


def image_conv(*args: object) -> None:
    return None


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor | None:
    return None


def geglu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    return None


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    return None


def fingerprint(weight: Tensor) -> bytes:
    flat = weight.as_strided((weight.numel(),), (1,))
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
