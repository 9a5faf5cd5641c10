"""Weights in the form that fast arithmetic reads them in: made once, kept, and never stale.

What is kept belongs to one tensor object and goes when that does. Before each use the weight's
every bit is summed up and compared, because edits through ``.data`` (as PEFT merges), and all edits
of inference tensors, leave no other trace.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.fast.cpu import kernels as engines

Make = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Tensor]
    seen: tuple[object, ...]
    made: Tensor

    @property
    def memory(self) -> int:
        return self.made.numel() * self.made.element_size()


def _quarter_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, OSError, ValueError):
        return 4 << 30


class PreparedWeights:
    """Prepared weights by the tensor that they were made from and what made them.

    Args:
        limit: bytes that they may take together. What would pass it is not prepared: its layers
            compute directly, so that a network larger than the limit does not prepare every weight
            again in every pass.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[tuple[int, Make], _Entry] = {}
        self._lock = threading.RLock()

    @property
    def memory(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            return sum(entry.memory for entry in self._entries.values())

    def clear(self) -> None:
        """Gives all of it up; what is needed is made again."""
        with self._lock:
            self._entries.clear()

    def has_room(self, weight: Tensor, make: Make, size: int) -> bool:
        """Whether ``make(weight)``, of ``size`` bytes, is there or may be kept."""
        with self._lock:
            entry = self._entries.get((id(weight), make))
            there = entry is not None and entry.owner() is weight
            return there or self.memory + size <= self.limit

    def get(self, weight: Tensor, make: Make) -> Tensor:
        """``make(weight)``, kept or made now; what is made is kept if there is room for it."""
        key, seen = (id(weight), make), _seen(weight)
        kept = self._kept(weight, make, seen)
        if kept is not None:
            return kept
        made = _made(weight, make)
        # a weight that changes while it is prepared is prepared again by the next call
        entry = _Entry(weakref.ref(weight, lambda _: self._drop(key)), seen, made)
        with self._lock:
            self._entries.pop(key, None)
            if self.memory + entry.memory <= self.limit:
                self._entries[key] = entry
        return made

    def borrow(self, weight: Tensor, make: Make) -> Tensor:
        """The same without keeping what was not: for callers with little memory."""
        kept = self._kept(weight, make, _seen(weight))
        return _made(weight, make) if kept is None else kept

    def _kept(self, weight: Tensor, make: Make, seen: tuple[object, ...]) -> Tensor | None:
        with self._lock:
            entry = self._entries.get((id(weight), make))
        if entry is not None and entry.owner() is weight and entry.seen == seen:
            return entry.made
        return None

    def _drop(self, key: tuple[int, Make]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            # another tensor may have come to have this id
            if entry is not None and entry.owner() is None:
                del self._entries[key]


def _made(weight: Tensor, make: Make) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return make(weight.detach())


def _seen(weight: Tensor) -> tuple[object, ...]:
    """What tells a weight from what it was: every bit of it, and how it lies in memory."""
    bits = weight.detach()
    if not bits.is_contiguous() and not bits.is_contiguous(memory_format=torch.channels_last):
        bits = bits.contiguous()
    if bits.numel() * bits.element_size() % 4:
        bits = bits.float()
    stride, kind = bits.stride(), weight.dtype
    return weight.shape, stride, kind, engines.of(torch.float32).fingerprint(bits)


prepared = PreparedWeights(_quarter_of_memory())
