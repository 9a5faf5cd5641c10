"""What the fast backend does to rows round its matrix products, in plain torch operations.

Runs where Numba is not installed and in other dtypes than float32; the compiled engine is held to
it. Rows are ``(rows, W, C)``.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from sdconv.ops.strips import Strip
from sdconv.ops.winograd import OUTPUTS, input_transform, output_transform

Affine = tuple[Tensor, Tensor]


def load(
    rows: Tensor,
    row: int,
    above: Tensor | None,
    strip: Strip,
    affine: Affine | None,
    silu: bool,
    tiles: Tensor,
) -> None:
    """Fills ``tiles`` (36, T, C) from the normalised rows, the first of which is the map's
    ``row``-th; ``above``, if given, stands for the row before the strip."""
    rows = rows[max(strip.first - 1, 0) - row : strip.end + 1 - row]
    if above is not None:
        rows = torch.cat([above.unsqueeze(0), rows[1:]])
    if affine is not None:
        rows = rows * affine[0] + affine[1]
        rows = functional.silu(rows) if silu else rows
    before = int(strip.first == 0)
    after = OUTPUTS * strip.tile_rows + 2 - before - len(rows)
    beside = OUTPUTS * strip.tile_columns + 1 - strip.width
    tiles.copy_(input_transform(functional.pad(rows, (0, 0, 1, beside, before, after))))


def store(
    products: Tensor, strip: Strip, bias: Tensor, residual: Tensor | None, out: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Fills ``out``, the strip's own rows, from ``products`` (36, T, O); gives each group's sums
    and sums of squares in parts, ``(parts, groups, 2)``, and how many values each part has."""
    rows = output_transform(products, strip.tile_rows)
    rows = rows[: strip.end - strip.first, : strip.width] + bias
    out.copy_(rows if residual is None else rows + residual)
    return sums(out, groups)


def sums(rows: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares, one part for each row."""
    parts = [row.double().view(-1, groups, row.shape[1] // groups) for row in rows]
    found = torch.stack([torch.stack([p.sum((0, 2)), p.square().sum((0, 2))], -1) for p in parts])
    return found, torch.full((len(rows),), rows[0].numel() // groups, dtype=torch.float64)


def differences(
    rows: Tensor, row: int, first: int, end: int, height: int, into: tuple[Tensor, Tensor, Tensor]
) -> None:
    """For the map's rows ``first`` to ``end``, each pixel less the one before it, zeros round the
    map: along a row (n, W + 1, C), along a column (n + 1, W, C), and along both."""
    across, down, both = into
    have = rows[max(first - 1, 0) - row : min(end + 1, height) - row]
    have = functional.pad(have, (0, 0, 0, 0, int(first == 0), int(end == height)))
    down.copy_(have[1:] - have[:-1])
    wide = functional.pad(have, (0, 0, 1, 1))
    wide = wide[:, 1:] - wide[:, :-1]
    across.copy_(wide[1:-1])
    both.copy_(wide[1:] - wide[:-1])


def meet(
    products: tuple[Tensor, Tensor, Tensor, Tensor], bias: Tensor, out: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """Fills ``out`` (2n, 2W, O) from the products of the pixels (n, W, O) and of their differences
    along rows (n, W + 1, 2, O), along columns (n + 1, W, 2, O) and along both (n + 1, W + 1, 4, O);
    sums as `store`'s."""
    plain, across, down, both = products
    count, width = plain.shape[:2]
    for i in range(2):
        for j in range(2):
            out[i::2, j::2] = (
                plain
                + across[:, j : j + width, j]
                + down[i : i + count, :, i]
                + both[i : i + count, j : j + width, 2 * i + j]
                + bias
            )
    return sums(out, groups)


def width(channels: int) -> int:
    """Columns that a product with so many channels has: what is beyond them is undefined."""
    return channels


def pack(right: Tensor) -> Tensor:
    """Right factors ``(P, K, several, O)`` as `product` reads them: ``several`` beside one another,
    each `width` wide."""
    return right.flatten(2).contiguous()


def product(left: Tensor, packed: Tensor, out: Tensor) -> None:
    """Fills ``out`` (P, T, width) with the products of ``left`` (P, T, K) and what was packed."""
    torch.bmm(left, packed, out=out)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``x`` (..., K) times the transpose of ``weight`` (O, K), plus ``bias`` (O,), all dense; None
    where torch's own kernel is as good."""
    return None


def fingerprint(weight: Tensor) -> bytes:
    """Of every bit of a dense weight."""
    flat = weight.as_strided((weight.numel(),), (1,))
    return hashlib.blake2b(flat.view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
