"""How much a rewritten checkpoint differs from the one before, component by component."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # values that are in memory as float64 at a time


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same values, in any dtypes; NaN is the same as
    NaN."""
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in _chunks(one, other))


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Pieces of tensors of one shape, in float64."""
    for pieces in zip(*(torch.split(one.reshape(-1), _CHUNK) for one in tensors), strict=True):
        yield tuple(piece.double() for piece in pieces)


@dataclass(kw_only=True)
class Change:
    """What happened to a component.

    ``modules``: the number of modules whose tensors changed. ``tensors``: the number of those
    tensors. ``relative``: the largest change of a tensor, the norm of the difference over the norm
    of the tensor before. ``largest``: the name of that tensor.
    """

    modules: int = 0
    tensors: int = 0
    relative: float = 0.0
    largest: str = ""

    def to_json(self) -> dict[str, Any]:
        """What the commands print with ``--json``."""
        return dict(vars(self))


class Changes:
    """Counts the changes of the tensors that are written, while they are written."""

    def __init__(self) -> None:
        self._by_component: dict[str, Change] = {}
        self._modules: set[tuple[str, str]] = set()

    def add(self, component: str, name: str, before: Tensor, after: Tensor) -> None:
        """Compares a tensor with the one that is written in its place; equal ones do not count.

        Args:
            component: the one that it belongs to.
            name: the tensor's.
            before, after: of the same shape.
        """
        squares = [0.0, 0.0]
        for old, new in _chunks(before, after):
            same = (old == new) | (old.isnan() & new.isnan())
            squares[0] += float(torch.where(same, 0.0, new - old).square().sum())
            squares[1] += float(old.square().sum())
        distance, norm = map(math.sqrt, squares)
        if distance == 0:
            return
        change = self._by_component.setdefault(component, Change())
        relative = distance / norm if norm else math.inf
        module = (component, name.rpartition(".")[0])
        change.modules += module not in self._modules
        self._modules.add(module)
        change.tensors += 1
        if not relative <= change.relative:
            change.relative, change.largest = relative, name

    @property
    def by_component(self) -> dict[str, Change]:
        """The changes so far, of the components that have any."""
        return dict(sorted(self._by_component.items()))
