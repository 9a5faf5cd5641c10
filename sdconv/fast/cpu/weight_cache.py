"""Caches of what is made of weights: packed ones, the form that the fast kernels read, and keys and
values of a prompt. Their entries are never stale.

An entry belongs to one tensor object and is dropped with it. Before each use all bits of what it
was made of are hashed and compared, because edits through ``.data`` (as PEFT merges) and any edits
of inference tensors leave no other trace.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.fast.cpu.kernels import kernels_for

# A module-level function: with the weight, it is the key of an entry.
Pack = Callable[..., Tensor]


@dataclass(frozen=True)
class _Entry:
    owner: weakref.ref[Tensor]
    state: tuple[object, ...]
    packed: Tensor

    @property
    def memory(self) -> int:
        return self.packed.numel() * self.packed.element_size()


def _quarter_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
    except (AttributeError, OSError, ValueError):
        return 4 << 30


class WeightCache:
    """Keeps packed weights by the weight and the function that packed it.

    Args:
        limit: bytes of all that is kept. A weight that would exceed it is not kept: its layer
            computes by another method, so that a network larger than the limit does not pack every
            weight again in every forward pass. Keys and values that would are computed each time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[tuple[int, Pack], _Entry] = {}
        self._lock = threading.RLock()

    @property
    def memory(self) -> int:
        """Bytes of all that is kept."""
        with self._lock:
            return sum(entry.memory for entry in self._entries.values())

    def clear(self) -> None:
        """Drops all that is kept; a later call makes what it needs again."""
        with self._lock:
            self._entries.clear()

    def has_room(self, weight: Tensor, pack: Pack, size: int) -> bool:
        """Whether ``pack(weight)``, of ``size`` bytes, is already kept or fits within the limit."""
        with self._lock:
            entry = self._entries.get((id(weight), pack))
            kept = entry is not None and entry.owner() is weight
            return kept or self.memory + size <= self.limit

    def get(self, weight: Tensor, pack: Pack, *inputs: Tensor) -> Tensor:
        """``pack(weight, *inputs)``, which is kept from then on if there is room for it, until
        there are other inputs."""
        key, state = (id(weight), pack), tuple(map(_state, (weight, *inputs)))
        kept = self._kept(weight, pack, state)
        if kept is not None:
            return kept
        packed = _packed(weight, pack, *inputs)
        # a weight that changes while it is packed is packed again by the next call
        entry = _Entry(weakref.ref(weight, lambda _: self._drop(key)), state, packed)
        with self._lock:
            self._entries.pop(key, None)
            if self.memory + entry.memory <= self.limit:
                self._entries[key] = entry
        return packed

    def borrow(self, weight: Tensor, pack: Pack) -> Tensor:
        """``pack(weight)``, which is not kept if it is new: for callers with little memory."""
        kept = self._kept(weight, pack, (_state(weight),))
        return _packed(weight, pack) if kept is None else kept

    def _kept(self, weight: Tensor, pack: Pack, state: tuple[object, ...]) -> Tensor | None:
        with self._lock:
            entry = self._entries.get((id(weight), pack))
        if entry is not None and entry.owner() is weight and entry.state == state:
            return entry.packed
        return None

    def _drop(self, key: tuple[int, Pack]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            # another tensor may have the same id by now
            if entry is not None and entry.owner() is None:
                del self._entries[key]


def _packed(weight: Tensor, pack: Pack, *inputs: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return pack(weight.detach(), *(one.detach() for one in inputs))


def _state(tensor: Tensor) -> tuple[object, ...]:
    """A value that is equal as long as a tensor's bits and memory layout stay the same."""
    bits = tensor.detach()
    if not bits.is_contiguous() and not bits.is_contiguous(memory_format=torch.channels_last):
        bits = bits.contiguous()
    if bits.numel() * bits.element_size() % 4:
        bits = bits.float()
    stride, dtype = bits.stride(), tensor.dtype
    return tensor.shape, stride, dtype, kernels_for(torch.float32).fingerprint(bits)


weight_cache = WeightCache(_quarter_of_memory())
"""Packed weights."""
prompt_cache = WeightCache(_quarter_of_memory() // 16)
"""Keys and values of prompts, which cross-attention layers make of them."""
