"""Numbers as people write and read them: amounts of memory, sizes of images, padding, large
counts."""

from __future__ import annotations

import re

from sdconv.errors import InputError

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", 1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)


def parse_bytes(size: int | str, name: str = "memory_limit") -> int:
    """The number of bytes in ``"2GiB"``, ``"1.5 GB"`` or ``"512M"`` (which means MiB).

    Args:
        size: an amount with its unit, or a number of bytes.
        name: the argument's name, for the error message.

    Raises:
        InputError: it is neither, or not above 0.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        count = size
    else:
        match = _BYTES.fullmatch(size) if isinstance(size, str) else None
        unit = _UNITS.get(match[2].lower()) if match else None
        count = int(float(match[1]) * unit) if match and unit else 0
    if not 0 < count < 2**62:
        raise InputError(
            "not a memory size",
            where=name,
            expected='such as "2GiB" or "1500MB", or a number of bytes above 0',
            got=repr(size),
        )
    return count


def format_bytes(size: int) -> str:
    """Bytes as ``2.5 GiB`` or ``311.3 MiB``, rounded up: a limit set to the text is enough."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            tenths = -(-size * 10 // 1024**power)
            return f"{tenths // 10}.{tenths % 10}".removesuffix(".0") + f" {unit}"
    return f"{size} bytes"


def format_pair(pair: tuple[object, object], times: str = "x") -> str:
    """``2`` if rows and columns have the same, otherwise both, as ``2x1``.

    Args:
        pair: the values for rows and for columns.
        times: put between two different values.
    """
    rows, columns = pair
    return str(rows) if rows == columns else f"{rows}{times}{columns}"


def parse_size(text: str, name: str = "--size") -> tuple[int, int]:
    """``"512x768"`` as (rows, columns); ``"512"`` is a square.

    Args:
        text: one or two whole numbers.
        name: the option's name, for the error message.

    Raises:
        InputError: it is something else.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise InputError(
            "not a size", where=name, expected="HxW, such as 512x768, or one number", got=repr(text)
        )
    if max(map(len, parts)) > 9 or not all(int(part) for part in parts):
        raise InputError("not a size", where=name, expected="1 to 999999999", got=repr(text))
    return int(parts[0]), int(parts[-1])


def format_padding(padding: tuple[int, int, int, int]) -> str:
    """Zeros above, below, left and right as ``1`` if all are the same, as ``0,1`` (before, after)
    if rows and columns have the same, and else as ``0,1/1,1``."""
    top, bottom, left, right = padding
    if top == bottom == left == right:
        return str(top)
    return f"{top},{bottom}" if (top, bottom) == (left, right) else f"{top},{bottom}/{left},{right}"


def count(number: int) -> str:
    """``83653863`` as ``83.65 M``: up to four digits."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if number >= 10**power:
            return f"{number / 10**power:.4g} {letter}"
    return str(number)


def in_bytes(number: int) -> str:
    """``334643268`` as ``334.6 MB``."""
    return f"{count(number)}B" if number >= 1000 else f"{number} B"
