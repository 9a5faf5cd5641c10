"""NaN, infinities and all-zero tensors among the values of weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from sdconv.analysis.inspection.contents import Paths, open_all
from sdconv.checkpoint.io.header import DTYPE_BITS
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES


@dataclass(kw_only=True)
class ValueReport:
    """How many tensors were read, and the names of those with unusual values.

    ``nan``, ``infinite``: name -> how many. ``zero``: floating-point tensors that are all 0.
    ``unread``: name -> dtype, if torch lacks that dtype.
    """

    tensors: int = 0
    nan: dict[str, int] = field(default_factory=dict)
    infinite: dict[str, int] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        """Whether every value that was read is a finite number."""
        return not (self.nan or self.infinite)

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv inspect --values --json`` adds."""
        return {**vars(self), "sound": self.sound}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor to the report."""
        self.tensors += 1
        values = tensor.float() if tensor.element_size() == 1 else tensor  # fp8 is for storage only
        if not (tensor.is_floating_point() and tensor.numel()):
            return
        if not bool(torch.isfinite(values).all()):
            for found, test in ((self.nan, torch.isnan), (self.infinite, torch.isinf)):
                if count := int(test(values).sum()):
                    found[name] = count
        elif not bool(values.any()):
            self.zero.append(name)


def check_values(
    paths: Paths, *, on_tensor: Callable[[str, int, int], None] = lambda name, done, total: None
) -> ValueReport:
    """Read every tensor, one at a time, and look for NaN, infinities and all-zero tensors.

    Args:
        paths: as for ``inspect``.
        on_tensor: called before each tensor with its name, the bytes read so far and all bytes.

    Raises:
        CheckpointError: something cannot be read as weights.
    """
    done, report = 0, ValueReport()
    with ExitStack() as stack:
        sources = open_all(paths, stack)
        total = sum(source.nbytes for _, source in sources)
        tensors = [
            (name if len(sources) == 1 else f"{part}: {name}", file, info)
            for part, source in sources
            for file in source.files
            for name, info in file.entries.items()
        ]
        for label, file, info in tensors:
            on_tensor(label, done, total)
            done += info.nbytes
            if info.dtype in _NO_TORCH_DTYPE:
                report.unread[label] = info.dtype
            else:
                report.add(label, file.tensor(info.name))
    return report


_NO_TORCH_DTYPE = frozenset(DTYPE_BITS) - frozenset(TORCH_DTYPES)
