"""Which variant of an operation runs on CUDA: one table, by operation and class of shapes.

What ships was fastest on an H200, operation by operation, except for "norm", whose classes are a
guess. For another device, `write` a table to a JSON file, and name the file in the environment
variable ``SDCONV_CUDA_CHOICES`` or `load` it. `using` sets choices
for the length of a ``with`` block, which is how variants are compared.

A key is an operation, ``"upsample"``, or an operation and a class of shapes, ``"upsample 512ch
64px"``, which has precedence: at most 512 channels, and at most as many pixels as 64x64.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdconv.errors import InputError, MissingFileError

ENVIRONMENT = "SDCONV_CUDA_CHOICES"


@dataclass(frozen=True)
class Tiling:
    """How the Triton kernels divide a feature map.

    Args:
        values: values that a program holds at a time; a power of two.
        warps: warps of 32 threads in a program.
        channels: channels among the values, at most; a power of two.
        programs: programs, about, that share one sample's statistics.
        merged: values of parts that are merged at a time; a power of two.
    """

    values: int
    warps: int
    channels: int = 128
    programs: int = 2048
    merged: int = 4096


TILINGS: Mapping[str, Tiling] = {
    "1024 values, 4 warps": Tiling(1024, 4),
    "2048 values, 4 warps": Tiling(2048, 4),
    "4096 values, 4 warps": Tiling(4096, 4),
    "4096 values, 8 warps": Tiling(4096, 8),
    "8192 values, 8 warps": Tiling(8192, 8),
}

VARIANTS: Mapping[str, tuple[str, ...]] = {
    # GroupNorm's kernels, see `Tiling`
    "tiling": tuple(TILINGS),
    # GroupNorm without known statistics: many programs for each sample, or one for each group.
    "norm": ("in parts", "by group"),
    # Who adds a convolution's bias.
    "bias": ("epilogue", "convolution"),
    # Four 2x2 convolutions, one transposed 4x4 convolution, or an upsampled feature map.
    "upsample": ("subpixel", "transposed", "direct"),
    # The VAE's attention: one projection for value and output, or two.
    "attention": ("folded", "plain"),
    # Its softmax: between two matrix products, or in torch's fused attention.
    "scores": ("products", "fused"),
}
"""The variants of each operation."""

_CHANNELS = (128, 256, 512, 1024)
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)

SHIPPED: Mapping[str, str] = {
    "tiling": "2048 values, 4 warps",
    "norm": "in parts",
    # up to 64x64 pixels, what counts is the number of kernels
    **{
        f"norm {most}ch {side}px": "by group" for most in (*_CHANNELS, ">1024") for side in (32, 64)
    },
    "bias": "epilogue",
    "upsample": "subpixel",
    "attention": "folded",
    "scores": "products",
}

_table: dict[str, str] = dict(SHIPPED)
# what has been looked up in it
_chosen: dict[tuple[str, int, int], str] = {}


def shape_class(channels: int, pixels: int) -> str:
    """The class of a feature map with these channels and pixels (height times width), such as
    ``"512ch 64px"`` or ``">1024ch >2048px"``."""
    most = next((str(one) for one in _CHANNELS if channels <= one), f">{_CHANNELS[-1]}")
    side = next((str(one) for one in _SIDES if pixels <= one * one), f">{_SIDES[-1]}")
    return f"{most}ch {side}px"


def choose(operation: str, channels: int, pixels: int) -> str:
    """The variant of an operation for a feature map with these channels and pixels."""
    key = operation, channels, pixels
    if key not in _chosen:
        operation_and_class = f"{operation} {shape_class(channels, pixels)}"
        _chosen[key] = _table.get(operation_and_class, _table[operation])
    return _chosen[key]


def tiling(channels: int, pixels: int) -> Tiling:
    """The tiling of a feature map with these channels and pixels."""
    return TILINGS[choose("tiling", channels, pixels)]


@contextmanager
def using(choices: Mapping[str, str]) -> Iterator[None]:
    """Sets choices, in all threads, for the length of a ``with`` block; others stay.

    Raises:
        InputError: unknown operation, class of shapes or variant.
    """
    before = dict(_table)
    _set(before | _checked(choices, "choices"))
    try:
        yield
    finally:
        _set(before)


def load(path: str | os.PathLike[str]) -> None:
    """Sets the choices that `write` has written to a file; operations that it does not name keep
    theirs.

    Raises:
        MissingFileError: there is no such file.
        InputError: not a JSON object of choices, or an unknown operation, class or variant.
    """
    if not Path(path).is_file():
        raise MissingFileError("no such file", where=path, hint=f"see {ENVIRONMENT}")
    try:
        choices = json.loads(Path(path).read_text("utf-8"))
    except ValueError as problem:
        raise InputError("not a JSON file", where=path, got=problem) from None
    _set(_table | _checked(choices, path))


def write(path: str | os.PathLike[str], choices: Mapping[str, str]) -> None:
    """Writes choices as JSON.

    Raises:
        InputError: unknown operation, class of shapes or variant.
    """
    text = json.dumps(_checked(choices, "choices"), indent=2, sort_keys=True)
    Path(path).write_text(text + "\n", "utf-8")


def current() -> dict[str, str]:
    """The choices that are in force."""
    return dict(_table)


def _set(choices: Mapping[str, str]) -> None:
    _table.clear()
    _table.update(choices)
    _chosen.clear()


def _checked(choices: object, where: object) -> dict[str, str]:
    if not isinstance(choices, Mapping):
        raise InputError(
            "not a table of choices", where=where, expected="a JSON object", got=type(choices)
        )
    classes = {shape_class(c, s * s) for c in (*_CHANNELS, 9999) for s in (*_SIDES, 9999)}
    for key, variant in choices.items():
        operation, _, shapes = str(key).partition(" ")
        if operation not in VARIANTS:
            raise InputError(
                "unknown operation", where=where, expected=", ".join(VARIANTS), got=repr(key)
            )
        if shapes and shapes not in classes:
            raise InputError(
                "unknown class of shapes",
                where=where,
                expected='an operation alone, or with a class such as "512ch 64px"',
                got=repr(key),
            )
        if variant not in VARIANTS[operation]:
            raise InputError(
                "unknown variant",
                where=f"{where}, {key}",
                expected=", ".join(map(repr, VARIANTS[operation])),
                got=repr(variant),
            )
    return dict(choices)


if os.environ.get(ENVIRONMENT):
    load(os.environ[ENVIRONMENT])
