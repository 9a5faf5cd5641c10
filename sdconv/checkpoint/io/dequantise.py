"""Scaled fp8: one-byte weights, multiplied by their scales as they are read.

``W = fp8.float() * scale``, in every writer's files. ComfyUI's have ``X.scale_weight`` or
``X.weight_scale`` next to ``X.weight`` (``scaled_fp8_ops`` in ``comfy/ops.py``). DeepSeek's have
one scale for a block of rows and columns, ``X.weight_scale_inv``, which is a factor despite its
name (``weight_dequant`` in their ``inference/kernel.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import torch

from sdconv.checkpoint.io.header import TensorInfo
from sdconv.checkpoint.io.tensor_files import SourceFile
from sdconv.errors import WeightsMismatchError

BLOCK = 128
"""Rows and columns that share a scale where a writer uses blocks, if the shapes allow it."""


class DequantisedFile(SourceFile):
    """Scaled fp8 weights of a file as float32 tensors, each computed when it is read.

    Args:
        scales: a weight's name -> the file with its scale, and the scale's name in it.
        weights: a weight's name -> the file that it is in, and its name in it.
    """

    def __init__(
        self,
        label: str,
        weights: Mapping[str, tuple[SourceFile, str]],
        scales: Mapping[str, tuple[SourceFile, str]],
    ) -> None:
        self.label = label
        self.metadata: Mapping[str, str] = {}
        self.entries = {
            name: _as_float(name, file.entries[own]) for name, (file, own) in weights.items()
        }
        self._weights, self._scales = weights, scales

    def check_unchanged(self) -> None:
        for file, _ in (*self._weights.values(), *self._scales.values()):
            file.check_unchanged()

    def _read(self, name: str) -> torch.Tensor:
        (file, own), (scale_file, scale_name) = self._weights[name], self._scales[name]
        weight, scale = file.tensor(own).float(), scale_file.tensor(scale_name).float()
        if not bool(scale.isfinite().all()):
            raise WeightsMismatchError(
                f"the scale of a scaled fp8 weight is not finite: {name}",
                where=self.label,
                expected="numbers",
                got=scale_name,
            )
        spread = spread_scale(scale, tuple(weight.shape))
        if spread is None:
            raise misfit(name, tuple(weight.shape), scale_name, tuple(scale.shape), self.label)
        product = weight * spread.to(weight.device)
        if not bool((product.isfinite() == weight.isfinite()).all()):
            raise WeightsMismatchError(
                f"a scaled fp8 weight times its scale is infinite in float32: {name}",
                where=self.label,
                expected="products up to 3.40282e+38",
                got=f"{scale_name} up to {float(scale.abs().max()):g}",
            )
        return product


def misfit(
    name: str, shape: tuple[int, ...], scale: str, scale_shape: tuple[int, ...], where: object
) -> WeightsMismatchError:
    """The error for a scale whose shape does not fit its weight."""
    return WeightsMismatchError(
        f"a scaled fp8 weight has a scale that does not fit it: {name}",
        where=where,
        expected=f"one number, one for each of the {shape[0] if shape else 1} rows, or one for "
        f"each block of {BLOCK}x{BLOCK}",
        got=f"{scale} {scale_shape} for a weight of {shape}",
        hint="get the weights in float16 or bfloat16, or convert them with the software that "
        "wrote them",
    )


def spread_scale(scale: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A scale that can be multiplied with a weight of ``shape``; None if it does not fit.

    One number, one for each row, or one for each block of every axis that the scale has: the block
    is 128 if that gives this number of blocks, else the only power of two that does, else the
    length divided by the number. Further axes of length 1 do not count (musubi-tuner's scales are
    ``(rows, blocks, 1)``).
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if not shape:
        return None
    if scale.ndim == 1 and scale.shape != shape[:1]:
        return None  # of columns, or of blocks of an axis that is not said
    if scale.ndim == 1 or prod(scale.shape) == scale.shape[0]:
        # one number for each row, or for each block of rows
        scale = scale.reshape(-1, *(1,) * (len(shape) - 1))
    while scale.ndim > len(shape) and scale.shape[-1] == 1:
        scale = scale.squeeze(-1)
    if scale.ndim > len(shape):
        return None
    scale = scale.reshape(*scale.shape, *(1,) * (len(shape) - scale.ndim))
    for axis, length in enumerate(shape):
        count = scale.shape[axis]
        if count in (1, length):
            continue
        size = block_size(length, count)
        if size is None:
            return None
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, length)
    return scale


def block_size(length: int, count: int) -> int | None:
    """The length of ``count`` blocks that cover an axis; None if there is none that is known."""
    if not 1 < count <= length:
        return None
    powers = [1 << power for power in range(length.bit_length())]
    fitting = [size for size in (BLOCK, *powers) if -(-length // size) == count]
    if fitting:
        return fitting[0]
    return length // count if length % count == 0 else None


def _as_float(name: str, info: TensorInfo) -> TensorInfo:
    return replace(info, name=name, dtype="F32", start=0, end=4 * prod(info.shape))
