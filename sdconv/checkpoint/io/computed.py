"""Tensors that are computed when they are read, from the tensors of other files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch

from sdconv.checkpoint.io.header import DTYPE_BITS, TensorInfo
from sdconv.checkpoint.io.tensor_files import SourceFile

Place = tuple[SourceFile, str]
"""A file, and the name of a tensor in it."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A tensor that does not exist yet.

    ``compute``: makes it, with this shape and in this dtype (safetensors' name). ``places``: the
    tensors that it is made of, or files of which it is made in part (then without a name).
    """

    shape: tuple[int, ...]
    dtype: str
    places: tuple[Place, ...]
    compute: Callable[[], torch.Tensor]


class ComputedFile(SourceFile):
    """Tensors that are computed each time they are read, so that one is in memory at a time."""

    def __init__(self, label: str, tensors: Mapping[str, Computed]) -> None:
        self.label = label
        self.metadata: Mapping[str, str] = {}
        self.entries = {
            name: TensorInfo(
                name=name,
                shape=one.shape,
                dtype=one.dtype,
                start=0,
                end=prod(one.shape) * DTYPE_BITS[one.dtype] // 8,
            )
            for name, one in tensors.items()
        }
        self._tensors = tensors

    def check_unchanged(self) -> None:
        for file in _files(self._tensors.values()):
            file.check_unchanged()

    def _read(self, name: str) -> torch.Tensor:
        return self._tensors[name].compute()


def _files(tensors: Iterable[Computed]) -> list[SourceFile]:
    return list({id(file): file for one in tensors for file, _ in one.places}.values())
