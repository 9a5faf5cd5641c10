"""A small assembler for WebAssembly: functions of integers and vectors, as bytes.

Expressions are Python expressions on `Value`; statements are methods of `Function`. Only what
:mod:`sdconv.report.explainer.kernels` needs is here. Encoding: the WebAssembly core specification,
release 2.0 with fixed-width SIMD, and ``f32x4.relaxed_madd`` of the relaxed SIMD proposal.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

I32, V128, F64X2 = 0x7F, 0x7B, 0x17B
"""Kinds of values: an integer, four floats, two doubles. The low byte is WebAssembly's type."""
_GET, _SET, _END, _BLOCK, _LOOP, _BR, _BR_IF, _IF = 0x20, 0x21, 0x0B, 0x02, 0x03, 0x0C, 0x0D, 0x04
_I32 = {"add": b"\x6a", "sub": b"\x6b", "mul": b"\x6c"}
# "min" and "max" are pmin and pmax: one instruction each, which the others are not
_V128 = {"add": 0xE4, "sub": 0xE5, "mul": 0xE6, "div": 0xE7, "min": 0xEA, "max": 0xEB}
_F64X2 = {"add": 0xF0, "sub": 0xF1, "mul": 0xF2}

ROUNDING = 1.5 * 2**23
"""Added to a smaller float, it leaves no bits for a fraction: the sum is rounded."""


def leb(number: int) -> bytes:
    """An unsigned number in LEB128."""
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def signed_leb(number: int) -> bytes:
    """A signed number in LEB128."""
    out = bytearray()
    while True:
        low, number = number & 0x7F, number >> 7
        done = (number == 0 and not low & 0x40) or (number == -1 and bool(low & 0x40))
        out.append(low | (0 if done else 0x80))
        if done:
            return bytes(out)


def _simd(opcode: int) -> bytes:
    return b"\xfd" + leb(opcode)


@dataclass(frozen=True)
class Value:
    """An expression: its type, and the code that leaves it on the stack."""

    kind: int
    code: bytes

    def _with(self, other: Value | int, name: str) -> Value:
        right = constant(other) if isinstance(other, int) else other
        vector = _F64X2 if self.kind == F64X2 else _V128
        operation = _I32[name] if self.kind == I32 else _simd(vector[name])
        return Value(self.kind, self.code + right.code + operation)

    def __add__(self, other: Value | int) -> Value:
        return self._with(other, "add")

    def __sub__(self, other: Value | int) -> Value:
        return self._with(other, "sub")

    def __mul__(self, other: Value | int) -> Value:
        return self._with(other, "mul")

    def __truediv__(self, other: Value | int) -> Value:
        return self._with(other, "div")

    def at_least(self, other: Value) -> Value:
        """The lane-wise maximum."""
        return self._with(other, "max")

    def at_most(self, other: Value) -> Value:
        """The lane-wise minimum."""
        return self._with(other, "min")

    def halves(self) -> tuple[Value, Value]:
        """The first two and the last two floats, as doubles."""
        high = self.code * 2 + _simd(0x0D) + bytes([*range(8, 16), *range(24, 32)])
        return Value(F64X2, self.code + _simd(0x5F)), Value(F64X2, high + _simd(0x5F))

    def power_of_two(self) -> Value:
        """``2 ** n`` for lanes that hold ``ROUNDING + n``: the number's last bits become the
        exponent's."""
        bias = b"\x41" + signed_leb(127) + _simd(0x11)
        shift = b"\x41" + signed_leb(23) + _simd(0xAB)
        return Value(V128, self.code + bias + _simd(0xAE) + shift)


def constant(number: int) -> Value:
    """A constant integer."""
    return Value(I32, b"\x41" + signed_leb(number))


def zero() -> Value:
    """A vector of zeros: one instruction."""
    return Value(V128, _simd(0x0C) + bytes(16))


class Constants:
    """Floats in all four lanes, kept in memory from address 0 on.

    A load is one instruction. Where ``v128.const`` stands in a loop, V8 builds the vector anew, in
    three instructions, each time.
    """

    def __init__(self) -> None:
        self._numbers: list[float] = []

    def __call__(self, number: float) -> Value:
        """The vector of ``number``."""
        if number not in self._numbers:
            self._numbers.append(number)
        return load(constant(16 * self._numbers.index(number)))

    def data(self) -> bytes:
        """What memory begins with."""
        return b"".join(struct.pack("<4f", *[number] * 4) for number in self._numbers)


def load(address: Value, offset: int = 0, kind: int = V128) -> Value:
    """A vector from memory."""
    return Value(kind, address.code + _simd(0x00) + b"\x02" + leb(offset))


def splat(address: Value, offset: int = 0) -> Value:
    """One float from memory, in all four lanes."""
    return Value(V128, address.code + _simd(0x09) + b"\x02" + leb(offset))


def multiply_add(a: Value, b: Value, c: Value, fused: bool) -> Value:
    """``a * b + c``, in one operation where ``fused``."""
    return Value(V128, a.code + b.code + c.code + _simd(0x105)) if fused else c + a * b


class Function:
    """A function under construction; its parameters are integers."""

    def __init__(self, name: str, parameters: Sequence[str]) -> None:
        self.name, self.parameters = name, tuple(parameters)
        self._locals: list[int] = []
        self._code = bytearray()

    def arguments(self) -> list[Value]:
        """The parameters as values."""
        return [Value(I32, bytes([_GET]) + leb(at)) for at in range(len(self.parameters))]

    def local(self, kind: int, value: Value | None = None) -> Value:
        """A new variable."""
        self._locals.append(kind)
        number = len(self.parameters) + len(self._locals) - 1
        variable = Value(kind, bytes([_GET]) + leb(number))
        if value is not None:
            self.set(variable, value)
        return variable

    def set(self, variable: Value, value: Value) -> None:
        """Assigns ``value`` to a variable or parameter."""
        self._code += value.code + bytes([_SET]) + variable.code[1:]

    def store(self, address: Value, value: Value, offset: int = 0) -> None:
        """A vector into memory."""
        self._code += address.code + value.code + _simd(0x0B) + b"\x02" + leb(offset)

    @contextmanager
    def loop(self, counter: Value, step: int) -> Iterator[None]:
        """Repeats its body while ``counter >= step``, and takes ``step`` from it each time."""
        self._code += bytes([_BLOCK, 0x40, _LOOP, 0x40])
        self._code += counter.code + constant(step).code + b"\x48" + bytes([_BR_IF]) + leb(1)
        yield
        self.set(counter, counter - step)
        self._code += bytes([_BR]) + leb(0) + bytes([_END, _END])

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Runs its body where ``condition`` is not 0."""
        self._code += condition.code + bytes([_IF, 0x40])
        yield
        self._code += bytes([_END])

    def body(self) -> bytes:
        """The function's entry in the code section."""
        kinds = b"".join(leb(1) + bytes([kind & 0xFF]) for kind in self._locals)
        inner = leb(len(self._locals)) + kinds + bytes(self._code) + bytes([_END])
        return leb(len(inner)) + inner


def module(functions: Sequence[Function], data: bytes) -> bytes:
    """A module that imports ``env.memory``, writes ``data`` to its beginning, and exports every
    function by its name."""

    def vector(items: Sequence[bytes]) -> bytes:
        return leb(len(items)) + b"".join(items)

    def name(text: str) -> bytes:
        return leb(len(text)) + text.encode()

    def section(number: int, content: bytes) -> bytes:
        return bytes([number]) + leb(len(content)) + content

    types = [b"\x60" + vector([bytes([I32])] * len(f.parameters)) + vector([]) for f in functions]
    memory = name("env") + name("memory") + b"\x02\x00" + leb(1)
    numbers = range(len(functions))
    exports = [name(f.name) + b"\x00" + leb(at) for at, f in zip(numbers, functions, strict=True)]
    return b"\x00asm\x01\x00\x00\x00" + b"".join(
        (
            section(1, vector(types)),
            section(2, vector([memory])),
            section(3, vector([leb(at) for at in numbers])),
            section(7, vector(exports)),
            section(10, vector([f.body() for f in functions])),
            section(
                11, vector([b"\x00" + constant(0).code + bytes([_END]) + leb(len(data)) + data])
            ),
        )
    )
