"""The loops of the page in which nearly all its time goes, as WebAssembly.

Feature maps are channels-last, in float32, with a channel count that is a multiple of 8. Addresses
and strides are in bytes. `page/core/band.js` calls these functions, and says what is where.
"""

from __future__ import annotations

from sdconv.report.explainer.wasm import (
    F64X2,
    I32,
    ROUNDING,
    V128,
    Constants,
    Function,
    Value,
    constant,
    load,
    module,
    multiply_add,
    splat,
    zero,
)

ROWS = (6, 2, 1)
"""Rows of a block of `gemm`: six rows by eight columns fill the vector registers."""

POINTS = (3 / 4, 3 / 2)
"""Winograd's F(4x4, 3x3) interpolates at 0, at these, at their negatives and at infinity, as the
fast backend does (`sdconv/fast/cpu/winograd.py`)."""


def kernels(fused: bool) -> bytes:
    """The module; ``fused`` uses relaxed SIMD's multiply-add, which not every browser has."""
    number = Constants()
    functions = [
        _gemm("gemm", fused, adds=True),
        _gemm("product", fused, adds=False),
        _activate(number, fused),
        _sums(),
        _plus(),
        _winograd_in(number, fused),
        _winograd_out(number, fused),
    ]
    return module(functions, number.data())


def _gemm(name: str, fused: bool, adds: bool) -> Function:
    """``c[m, n] += a[m, k] @ b[k, n]``, or ``=`` unless it ``adds``: k a multiple of 4, n of 8;
    rows ``lda``, ... bytes apart.

    Every convolution is a sum of these: one for each of the kernel's nine positions.
    """
    f = Function(name, ("a", "b", "c", "m", "k", "n", "lda", "ldb", "ldc"))
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
                        f.set(sums[r][half], load(target, 16 * half) if adds else zero())
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


def _activate(number: Constants, fused: bool) -> Function:
    """``y = silu(x * scale + shift)`` for ``count`` pixels of ``channels``; GroupNorm is the scale
    and the shift. Without SiLU where ``plain`` is not 0."""
    f = Function("activate", ("x", "y", "count", "channels", "scale", "shift", "plain"))
    x, y, count, channels, scale, shift, plain = f.arguments()
    left, at = f.local(I32), f.local(I32)
    u, rounded, power, rest, result = (f.local(V128) for _ in range(5))
    with f.loop(count, 1):
        f.set(left, channels)
        f.set(at, constant(0))
        with f.loop(left, 4):
            f.set(u, load(x) * load(scale + at) + load(shift + at))
            f.set(result, u)
            with f.when(Value(I32, plain.code + b"\x45")):
                # exp(-u) = 2^power * exp(rest), with |rest| <= ln(2) / 2
                f.set(rest, (zero() - u).at_least(number(-87.0)).at_most(number(88.0)))
                rounding = number(ROUNDING)
                f.set(rounded, multiply_add(rest, number(1.4426950408889634), rounding, fused))
                f.set(power, rounded - rounding)
                f.set(rest, multiply_add(power, number(-0.693359375), rest, fused))
                f.set(rest, multiply_add(power, number(2.12194440e-4), rest, fused))
                exp = number(1.9875691500e-4)
                for coefficient in (
                    1.3981999507e-3,
                    8.3334519073e-3,
                    4.1665795894e-2,
                    1.6666665459e-1,
                    5.0000001201e-1,
                    1.0,
                    1.0,
                ):
                    exp = multiply_add(exp, rest, number(coefficient), fused)
                f.set(result, multiply_add(exp, rounded.power_of_two(), number(1.0), fused))
                f.set(result, u / result)
            f.store(y, result)
            for moved in (x, y, at):
                f.set(moved, moved + 16)
    return f


def _sums() -> Function:
    """Adds to ``to`` the sums of ``count`` pixels of each channel, then those of their squares, in
    float64: what GroupNorm needs."""
    f = Function("sums", ("x", "to", "count", "channels", "pixel"))
    x, to, count, channels, pixel = f.arguments()
    left, number, at = f.local(I32), f.local(I32), f.local(I32)
    squares = f.local(I32, to + channels * 8)
    totals = [f.local(F64X2) for _ in range(4)]
    places = [(to, 0), (to, 16), (squares, 0), (squares, 16)]
    four = f.local(V128)
    f.set(left, channels)
    with f.loop(left, 4):
        f.set(at, x)
        f.set(number, count)
        for total, (address, offset) in zip(totals, places, strict=True):
            f.set(total, load(address, offset, F64X2))
        with f.loop(number, 1):
            f.set(four, load(at))
            f.set(at, at + pixel)
            for half, value in enumerate(four.halves()):
                f.set(totals[half], totals[half] + value)
                f.set(totals[2 + half], totals[2 + half] + value * value)
        for total, (address, offset) in zip(totals, places, strict=True):
            f.store(address, total, offset)
        f.set(x, x + 16)
        f.set(to, to + 32)
        f.set(squares, squares + 32)
    return f


def _plus() -> Function:
    """``y += x`` for ``count`` floats."""
    f = Function("plus", ("y", "x", "count"))
    y, x, count = f.arguments()
    with f.loop(count, 4):
        f.store(y, load(y) + load(x))
        f.set(x, x + 16)
        f.set(y, y + 16)
    return f


def _winograd_in(number: Constants, fused: bool) -> Function:
    """The input transform of Winograd's F(4x4, 3x3) for ``count`` tiles of 6x6 pixels in a row.

    Tiles are 4 pixels apart. Position p of a tile goes to ``v + p * position``.
    """
    f = Function("winograd_in", ("x", "row", "pixel", "v", "position", "count", "channels"))
    x, row, pixel, v, position, count, channels = f.arguments()
    left, from_row, to = f.local(I32), f.local(I32), f.local(I32)
    with f.loop(count, 1):
        f.set(left, channels)
        with f.loop(left, 4):
            tile = []
            f.set(from_row, x)
            for _ in range(6):
                at = f.local(I32, from_row)
                line = []
                for _ in range(6):
                    line.append(f.local(V128, load(at)))
                    f.set(at, at + pixel)
                tile.append([f.local(V128, one) for one in _input_side(f, number, line, fused)])
                f.set(from_row, from_row + row)
            columns = [
                _input_side(f, number, [tile[r][c] for r in range(6)], fused) for c in range(6)
            ]
            f.set(to, v)
            for p in range(36):
                f.store(to, columns[p % 6][p // 6])
                f.set(to, to + position)
            f.set(x, x + 16)
            f.set(v, v + 16)
        f.set(x, x + pixel * 3)  # the channels were one pixel already
    return f


def _input_side(f: Function, number: Constants, d: list[Value], fused: bool) -> list[Value]:
    """``B^T d``."""
    p, q = POINTS
    pp, qq = p * p, q * q

    def plus(sum_: Value, by: float, value: Value) -> Value:
        return multiply_add(value, number(by), sum_, fused)

    even = [f.local(V128, plus(d[4], -square, d[2])) for square in (qq, pp)]
    odd = [f.local(V128, plus(d[3], -square, d[1])) for square in (qq, pp)]
    return [
        plus(plus(d[4], -pp - qq, d[2]), pp * qq, d[0]),
        plus(even[0], p, odd[0]),
        plus(even[0], -p, odd[0]),
        plus(even[1], q, odd[1]),
        plus(even[1], -q, odd[1]),
        plus(plus(d[5], -pp - qq, d[3]), pp * qq, d[1]),
    ]


def _winograd_out(number: Constants, fused: bool) -> Function:
    """The output transform: 36 positions to 4x4 pixels, plus the bias."""
    f = Function(
        "winograd_out", ("m", "position", "y", "row", "pixel", "bias", "count", "channels")
    )
    m, position, y, row, pixel, bias, count, channels = f.arguments()
    left, at, shift, target = f.local(I32), f.local(I32), f.local(I32), f.local(I32)
    constant_ = f.local(V128)
    with f.loop(count, 1):
        f.set(left, channels)
        f.set(shift, bias)
        with f.loop(left, 4):
            f.set(at, m)
            half = []
            for _ in range(6):
                line = []
                for _ in range(6):
                    line.append(f.local(V128, load(at)))
                    f.set(at, at + position)
                half.append([f.local(V128, one) for one in _output_side(f, number, line, fused)])
            f.set(constant_, load(shift))
            for c in range(4):
                f.set(target, y)
                for _ in range(c):
                    f.set(target, target + pixel)
                for value in _output_side(f, number, [half[p][c] for p in range(6)], fused):
                    f.store(target, value + constant_)
                    f.set(target, target + row)
            for moved in (m, y, shift):
                f.set(moved, moved + 16)
        f.set(y, y + pixel * 3)
    return f


def _output_side(f: Function, number: Constants, m: list[Value], fused: bool) -> list[Value]:
    """``A^T m``."""
    p, q = POINTS

    def plus(sum_: Value, by: float, value: Value) -> Value:
        return multiply_add(value, number(by), sum_, fused)

    sums = [f.local(V128, m[at] + m[at + 1]) for at in (1, 3)]
    differences = [f.local(V128, m[at] - m[at + 1]) for at in (1, 3)]
    return [
        m[0] + sums[0] + sums[1],
        plus(differences[0] * number(p), q, differences[1]),
        plus(sums[0] * number(p**2), q**2, sums[1]),
        plus(plus(m[5], p**3, differences[0]), q**3, differences[1]),
    ]
