"""How far apart the weights of two checkpoints are, block by block.

Layouts and dtypes do not matter: VAEs and U-Nets are compared by diffusers' names, text encoders by
their names in the original layout, and everything else by its own names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdconv.checkpoint.io.stream import OnTensor, OutputTensor
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES
from sdconv.checkpoint.open import Weights
from sdconv.checkpoint.whole import by_common_name, opened

_CHUNK = 1 << 22  # values that are in memory at a time, in float64


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor that is in both checkpoints.

    ``norm``: the Euclidean norm of the first's values. ``distance``: of the difference.
    ``max_abs``: the largest difference of two values. ``changed``: whether any two values differ
    (NaN equals NaN). ``dtypes``: safetensors' names.
    """

    name: str
    norm: float
    distance: float
    max_abs: float
    changed: bool
    dtypes: tuple[str, str]

    @property
    def relative(self) -> float:
        """The distance divided by the norm; infinite if all values were 0 before."""
        return _ratio(self.distance, self.norm)


@dataclass(frozen=True, kw_only=True)
class BlockDifference:
    """All tensors of one block that are in both checkpoints, taken together."""

    name: str
    tensors: tuple[TensorDifference, ...]

    @property
    def norm(self) -> float:
        """The norm of the first checkpoint's values."""
        return math.hypot(*(tensor.norm for tensor in self.tensors))

    @property
    def distance(self) -> float:
        """The norm of the difference."""
        return math.hypot(*(tensor.distance for tensor in self.tensors))

    @property
    def relative(self) -> float:
        """The distance divided by the norm; infinite if all values were 0 before."""
        return _ratio(self.distance, self.norm)

    @property
    def max_abs(self) -> float:
        """The largest difference of two values."""
        largest = [tensor.max_abs for tensor in self.tensors]
        return math.nan if any(map(math.isnan, largest)) else max(largest, default=0.0)

    @property
    def changed(self) -> int:
        """The number of its tensors that have changed."""
        return sum(tensor.changed for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The block as ``sdconv diff --json`` prints it."""
        return {
            "name": self.name,
            "tensors": len(self.tensors),
            "changed": self.changed,
            "share": self.changed / len(self.tensors) if self.tensors else 0.0,
            "norm": self.norm,
            "distance": self.distance,
            "relative": self.relative,
            "max_abs": self.max_abs,
        }


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs between two checkpoints, ``first`` and ``second``.

    ``blocks``: in the order in which data passes them. ``only_first``, ``only_second``: tensors
    that only one has. ``misshapen``: name -> the two shapes. ``unread``: name -> the two dtypes, if
    torch lacks one.
    """

    first: str
    second: str
    blocks: tuple[BlockDifference, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    misshapen: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    unread: Mapping[str, tuple[str, str]]

    @property
    def whole(self) -> BlockDifference:
        """All blocks taken together."""
        tensors = tuple(tensor for block in self.blocks for tensor in block.tensors)
        return BlockDifference(name="all", tensors=tensors)

    @property
    def equal(self) -> bool:
        """Whether both hold the same tensors with the same values, in any dtypes."""
        unpaired = self.only_first or self.only_second or self.misshapen or self.unread
        return not unpaired and not self.whole.changed

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv diff --json`` prints."""
        return {
            "first": self.first,
            "second": self.second,
            "equal": self.equal,
            "whole": self.whole.to_json(),
            "blocks": [block.to_json() for block in self.blocks],
            "only_first": self.only_first,
            "only_second": self.only_second,
            "misshapen": self.misshapen,
            "unread": self.unread,
        }


def compare(
    first: Weights,
    second: Weights,
    *,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Comparison:
    """Compare two checkpoints, one tensor at a time.

    Args:
        first: a file, a component's folder, a pipeline's folder, or a state dict.
        second: likewise, in any layout and dtype.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read as weights. InputError: an argument is not a path.
    """
    with ExitStack() as stack:
        checkpoints = [opened(one, stack) for one in (first, second)]
        ours, theirs = map(by_common_name, checkpoints)
        both = [name for name in ours if name in theirs]
        misshapen = {n: (ours[n].shape, theirs[n].shape) for n in both if not _fit(ours, theirs, n)}
        dtypes = {name: (ours[name].dtype, theirs[name].dtype) for name in both}
        unread = {n: pair for n, pair in dtypes.items() if not set(pair) <= set(TORCH_DTYPES)}
        common = [name for name in both if name not in misshapen and name not in unread]
        sizes = [_bytes(ours[name]) + _bytes(theirs[name]) for name in common]
        blocks: dict[str, list[TensorDifference]] = {}
        done = 0
        for name, size in zip(common, sizes, strict=True):
            on_tensor(name, done, sum(sizes))
            blocks.setdefault(block_of(name), []).append(
                _difference(name, ours[name], theirs[name])
            )
            done += size
        for checkpoint in checkpoints:
            for part in checkpoint.parts:
                part.view.source.check_unchanged()
        on_tensor("", done, done)
        return Comparison(
            first=checkpoints[0].label,
            second=checkpoints[1].label,
            blocks=tuple(
                BlockDifference(name=name, tensors=tuple(blocks[name]))
                for name in sorted(blocks, key=_order)
            ),
            only_first=_without(ours, theirs),
            only_second=_without(theirs, ours),
            misshapen=misshapen,
            unread=unread,
        )


_NO_PREFIX = "(no prefix)"
_BLOCKS = tuple(
    map(
        re.compile,
        (
            # a network's blocks, and everything else by the module that holds it
            r"((?:unet|vae)\.(?:(?:encoder|decoder)\.)?(?:(?:\w+_blocks|layers)\.\d+|\w+))\..+",
            # stacks of layers in anything else
            r"(.+?\.(?:layers|\w*blocks)\.\d+)\..+",
            r"([^.]+(?:\.\w+\.\d+)?)\..+",
        ),
    )
)


def block_of(name: str) -> str:
    """The block that a tensor belongs to, such as ``unet.down_blocks.0``."""
    matches = (pattern.fullmatch(name) for pattern in _BLOCKS)
    return next((match[1] for match in matches if match), _NO_PREFIX)


# words of names, in the order in which data passes the blocks
_ORDER = (
    *("unet", "vae", "encoder", "conv_in", "time_embedding", "class_embedding", "add_embedding"),
    *("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out"),
    *("quant_conv", "bn", "post_quant_conv", "decoder"),
)


def _order(block: str) -> list[tuple[int, int, str]]:
    return [
        (
            _ORDER.index(word) if word in _ORDER else len(_ORDER),
            int(word) if word.isdecimal() else -1,
            word,
        )
        for word in block.split(".")
    ]


def _fit(ours: Mapping[str, OutputTensor], theirs: Mapping[str, OutputTensor], name: str) -> bool:
    return ours[name].shape == theirs[name].shape


def _bytes(entry: OutputTensor) -> int:
    return sum(info.nbytes for info in entry.infos)


def _without(ours: Iterable[str], theirs: Mapping[str, OutputTensor]) -> tuple[str, ...]:
    return tuple(sorted((name for name in ours if name not in theirs), key=_order))


def _difference(name: str, ours: OutputTensor, theirs: OutputTensor) -> TensorDifference:
    squares, distances, largest, changed = 0.0, 0.0, [0.0], False
    flat = (torch.split(_flat(entry.tensor()), _CHUNK) for entry in (ours, theirs))
    for chunks in zip(*flat, strict=True):
        a, b = (chunk.double() for chunk in chunks)
        same = (a == b) | (a.isnan() & b.isnan())
        squares += float(a.square().sum())
        if not bool(same.all()):
            difference = torch.where(same, 0.0, a - b)
            changed = True
            distances += float(difference.square().sum())
            largest.append(float(difference.abs().max()))
    return TensorDifference(
        name=name,
        norm=math.sqrt(squares),
        distance=math.sqrt(distances),
        max_abs=math.nan if any(map(math.isnan, largest)) else max(largest),
        changed=changed,
        dtypes=(ours.dtype, theirs.dtype),
    )


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _ratio(distance: float, norm: float) -> float:
    if norm:
        return distance / norm
    return math.inf if distance else distance
