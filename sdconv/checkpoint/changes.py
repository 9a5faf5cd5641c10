"""How much a rewritten checkpoint differs from the one before, component by component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


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
        old, new = before.double(), after.double()
        distance = float((new - old).norm())
        if distance == 0:
            return
        change = self._by_component.setdefault(component, Change())
        norm = float(old.norm())
        relative = distance / norm if norm else float("inf")
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
