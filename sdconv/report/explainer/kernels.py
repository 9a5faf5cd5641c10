"""The four loops of the page in which nearly all its time goes, as WebAssembly.

Feature maps are channels-last, in float32, with a channel count that is a multiple of 8. Addresses
and strides are in bytes. `page/core/band.js` calls these functions, and says what is where.
"""

from __future__ import annotations

from sdconv.report.explainer.wasm import (
    I32,
    V128,
    Function,
    Value,
    constant,
    load,
    module,
    multiply_add,
    splat,
)

ROWS = (6, 2, 1)
"""Rows of a block of `gemm`: six rows by eight columns fill the vector registers."""


def kernels(fused: bool) -> bytes:
    """The module; ``fused`` uses relaxed SIMD's multiply-add, which not every browser has."""
    return module([_gemm(fused), _activate(fused), _winograd_in(), _winograd_out()])


def _gemm(fused: bool) -> Function:
    """``c[m, n] += a[m, k] @ b[k, n]``: k a multiple of 4, n of 8; rows ``lda``, ... bytes apart.

    Every convolution is a sum of these: one for each of the kernel's nine positions.
    """
    f = Function("gemm", ("a", "b", "c", "m", "k", "n", "lda", "ldb", "ldc"))
    a, b, c, m, k, n, lda, ldb, ldc = f.arguments()
    row, depth, left = f.local(I32), f.local(I32), f.local(I32)
    from_row, to_row, from_b = f.local(I32), f.local(I32), f.local(I32)
    pointers = [f.local(I32) for _ in range(ROWS[0])]
    sums = [[f.local(V128), f.local(V128)] for _ in range(ROWS[0])]
    b0, b1 = f.local(V128), f.local(V128)
    f.set(left, n)
    with f.loop(left, 8):
        f.set(row, m)
        f.set(from_row, a)
        f.set(to_row, c)
        for rows in ROWS:
            with f.loop(row, rows):
                target = f.local(I32, to_row)
                for r in range(rows):
                    f.set(pointers[r], from_row)
                    f.set(from_row, from_row + lda)
                    for half in range(2):
                        f.set(sums[r][half], load(target, 16 * half))
                    f.set(target, target + ldc)
                f.set(from_b, b)
                f.set(depth, k)
                with f.loop(depth, 4):
                    for step in range(4):
                        f.set(b0, load(from_b))
                        f.set(b1, load(from_b, 16))
                        f.set(from_b, from_b + ldb)
                        for r in range(rows):
                            x = f.local(V128, splat(pointers[r], 4 * step))
                            f.set(sums[r][0], multiply_add(x, b0, sums[r][0], fused))
                            f.set(sums[r][1], multiply_add(x, b1, sums[r][1], fused))
                    for r in range(rows):
                        f.set(pointers[r], pointers[r] + 16)
                for r in range(rows):
                    for half in range(2):
                        f.store(to_row, sums[r][half], 16 * half)
                    f.set(to_row, to_row + ldc)
        f.set(b, b + 32)
        f.set(c, c + 32)
    return f


def _activate(fused: bool) -> Function:
    """``y = silu(x * scale + shift)`` for ``count`` pixels of ``channels``; GroupNorm is the scale
    and the shift. Without SiLU where ``plain`` is not 0."""
    f = Function("activate", ("x", "y", "count", "channels", "scale", "shift", "plain"))
    x, y, count, channels, scale, shift, plain = f.arguments()
    left, at = f.local(I32), f.local(I32)
    u, power, rest, result = (f.local(V128) for _ in range(4))
    with f.loop(count, 1):
        f.set(left, channels)
        f.set(at, constant(0, I32))
        with f.loop(left, 4):
            f.set(u, load(x) * load(scale + at) + load(shift + at))
            f.set(result, u)
            with f.when(Value(I32, plain.code + b"\x45")):
                # exp(-u) = 2^power * exp(rest), with |rest| <= ln(2) / 2
                f.set(rest, (constant(0, V128) - u).at_least(-87.0).at_most(88.0))
                f.set(power, (rest * 1.4426950408889634).nearest())
                f.set(rest, rest - power * 0.693359375 - power * -2.12194440e-4)
                exp = constant(1.9875691500e-4, V128)
                for coefficient in (
                    1.3981999507e-3,
                    8.3334519073e-3,
                    4.1665795894e-2,
                    1.6666665459e-1,
                    5.0000001201e-1,
                ):
                    exp = multiply_add(exp, rest, constant(coefficient, V128), fused)
                f.set(result, exp * rest * rest + rest + 1.0)
                f.set(result, u / (result * power.power_of_two() + 1.0))
            f.store(y, result)
            for moved in (x, y, at):
                f.set(moved, moved + 16)
    return f


def _winograd_in() -> Function:
    """The input transform of Winograd's F(2x2, 3x3) for ``count`` tiles of 4x4 pixels in a row.

    Tiles are 2 pixels apart. Position p of a tile goes to ``v + p * position``.
    Source: Lavin and Gray 2016, https://arxiv.org/abs/1509.09308.
    """
    f = Function("winograd_in", ("x", "row", "pixel", "v", "position", "count", "channels"))
    x, row, pixel, v, position, count, channels = f.arguments()
    left, from_row, to = f.local(I32), f.local(I32), f.local(I32)
    with f.loop(count, 1):
        f.set(left, channels)
        with f.loop(left, 4):
            tile = []
            f.set(from_row, x)
            for _ in range(4):
                at = f.local(I32, from_row)
                line = []
                for _ in range(4):
                    line.append(f.local(V128, load(at)))
                    f.set(at, at + pixel)
                tile.append([f.local(V128, one) for one in _input_side(line)])
                f.set(from_row, from_row + row)
            columns = [_input_side([tile[r][c] for r in range(4)]) for c in range(4)]
            f.set(to, v)
            for p in range(16):
                f.store(to, columns[p % 4][p // 4])
                f.set(to, to + position)
            f.set(x, x + 16)
            f.set(v, v + 16)
        f.set(x, x + pixel)  # the channels were one pixel already
    return f


def _input_side(d: list[Value]) -> list[Value]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _winograd_out() -> Function:
    """The output transform: 16 positions to 2x2 pixels, plus the bias."""
    f = Function(
        "winograd_out", ("m", "position", "y", "row", "pixel", "bias", "count", "channels")
    )
    m, position, y, row, pixel, bias, count, channels = f.arguments()
    left, at, shift = f.local(I32), f.local(I32), f.local(I32)
    with f.loop(count, 1):
        f.set(left, channels)
        f.set(shift, bias)
        with f.loop(left, 4):
            f.set(at, m)
            half = []
            for _ in range(4):
                line = []
                for _ in range(4):
                    line.append(f.local(V128, load(at)))
                    f.set(at, at + position)
                half.append([f.local(V128, one) for one in _output_side(line)])
            for c in range(2):
                for r, value in enumerate(_output_side([half[p][c] for p in range(4)])):
                    target = y
                    target = target + pixel if c else target
                    target = target + row if r else target
                    f.store(target, value + load(shift))
            for moved in (m, y, shift):
                f.set(moved, moved + 16)
        f.set(y, y + pixel)
    return f


def _output_side(d: list[Value]) -> list[Value]:
    return [d[0] + d[1] + d[2], d[1] - d[2] - d[3]]
