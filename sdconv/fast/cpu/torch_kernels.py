"""What the fast backend does to rows round its matrix products, in plain torch operations.

Runs where Numba is not installed and in other dtypes than float32; the compiled engine is held to
it. Rows are ``(rows, W, C)``.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.fast.cpu.tiling import Strip
from sdconv.fast.cpu.winograd import Scheme

Affine = tuple[Tensor, Tensor]


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
    """Fills ``tiles`` (places, T, C) from the normalised rows, the first of which is the map's
    ``row``-th; ``above``, if given, stands for the row before the strip."""
    first, end = strip.reads(scheme)
    rows = rows[first - row : end - row]
    if above is not None:
        rows = torch.cat([above.unsqueeze(0), rows[1:]])
    if affine is not None:
        rows = rows * affine[0] + affine[1]
        rows = functional.silu(rows) if silu else rows
    before = int(strip.tile_row == 0)
    after = scheme.step * strip.tile_rows + 2 - before - len(rows)
    beside = scheme.step * strip.tile_columns + 1 - rows.shape[1]
    tiles.copy_(scheme.input_transform(functional.pad(rows, (0, 0, 1, beside, before, after))))


def store(
    scheme: Scheme,
    products: Tensor,
    strip: Strip,
    bias: Tensor,
    residual: Tensor | None,
    out: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Fills ``out``, the strip's own rows, from ``products`` (places, T, O); gives each group's
    sums and sums of squares in parts, ``(parts, groups, 2)``, and how many values each part has."""
    rows = scheme.output_transform(products, strip.tile_rows)
    rows = rows[: strip.end - strip.first, : strip.width] + bias
    out.copy_(rows if residual is None else rows + residual)
    return sums(out, groups)


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares, one part for each row."""
    parts = [row.double().view(-1, groups, row.shape[1] // groups) for row in rows]
    found = torch.stack([torch.stack([p.sum((0, 2)), p.square().sum((0, 2))], -1) for p in parts])
    return found, torch.full((len(rows),), rows[0].numel() // groups, dtype=torch.float64)


def width(channels: int) -> int:
    """Columns that a product with so many channels has: what is beyond them is undefined."""
    return channels


def pack(right: Tensor) -> Tensor:
    """Right factors ``(P, K, O)`` as `product` reads them."""
    return right.contiguous()


def product(left: Tensor, packed: Tensor, out: Tensor) -> None:
    """Fills ``out`` (P, T, width) with the products of ``left`` (P, T, K) and what was packed."""
    torch.bmm(left, packed, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x`` (..., K) times the transpose of ``weight`` (O, K), plus ``bias`` (O,), all dense; None
    where torch's own kernel is as good."""
    return None


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Softmax attention: each of ``query`` (B, heads, T, D) mixes ``value`` (B, heads, S, E) by its
    products with ``key`` (B, heads, S, D), times ``scale``: ``(B, heads, T, E)``; None where
    torch's own kernel is as good."""
    return None


def fingerprint(weight: Tensor) -> bytes:
    """Of every bit of a dense weight."""
    flat = weight.as_strided((weight.numel(),), (1,))
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
