"""Tensors of one file, or of one state dict in memory, by name.

``sdconv.checkpoint.io.source`` puts files together to the weights of a network.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sdconv.checkpoint.io.files import os_errors, short
from sdconv.checkpoint.io.header import TensorInfo, open_header
from sdconv.checkpoint.io.pickles import read_pickle
from sdconv.errors import CheckpointError

_TORCH_NAMES = {
    "BOOL": "bool",
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"F8_{kind}": f"float8_{kind.lower()}" for kind in ("E5M2", "E4M3FNUZ", "E5M2FNUZ")},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16",
    "C64": "complex64",
}

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, of) for name, of in _TORCH_NAMES.items() if hasattr(torch, of)}
)
"""safetensors' dtypes that this torch has: all but F4 (two in a byte) and F6."""

DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in TORCH_DTYPES.items()}
)
"""safetensors' name of each of torch's dtypes."""


_FIELDS = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
_PIECE = 1 << 22  # bytes that are in memory at a time


class SourceFile(ABC):
    """The tensors of one file, or of one state dict in memory.

    ``label``: its name in messages. ``entries``: its tensors by name. ``metadata``: the file's own.
    """

    label: str
    entries: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, in the file's dtype.

        Raises:
            CheckpointError: it does not exist or cannot be read, or torch does not have its dtype.
        """
        if name not in self.entries:
            raise CheckpointError(
                f"holds no tensor {short(name)}",
                where=self.label,
                expected=f"one of its {len(self.entries)} names, such as "
                f"{short(next(iter(self.entries), None))}",
            )
        return self._read(name)

    def close(self) -> None:  # noqa: B027 - most have nothing to close
        """Closes the file; tensors that were read remain valid."""

    def check_unchanged(self) -> None:  # noqa: B027 - memory does not change
        """Checks that the file is still what it was when it was opened.

        Raises:
            CheckpointError: something has written to it.
        """

    def stored_bytes(self, name: str) -> Iterator[bytes] | None:
        """A tensor's bytes in pieces, as they are in the file; None if they are not to be had
        without the tensor.

        Raises:
            CheckpointError: the file has changed.
        """
        return None

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor: ...


class SafetensorsFile(SourceFile):
    """A safetensors file: its tensors are views of one private mapping of the file.

    ``safe_open``'s own mapping would read a page of every tensor that it returns.

    The file is opened once, so that header and tensors are of one file also where another is put in
    its place meanwhile. A file that is written to meanwhile is an error.
    """

    def __init__(self, path: Path) -> None:
        header, descriptor = open_header(path)
        self.label = str(path)
        self.entries = header.tensors
        self.metadata = header.metadata
        self._mapping: Any = None  # an UntypedStorage of the whole file
        self._path = path
        self._hold(descriptor)
        self._state = _state(descriptor)

    def close(self) -> None:
        self._mapping = None  # the last tensor that was read from it unmaps it
        self._finalizer()

    def check_unchanged(self) -> None:
        if _state(self._open()) != self._state:
            raise self._changed("changed while it was read")

    def stored_bytes(self, name: str) -> Iterator[bytes]:
        info, descriptor = self.entries[name], self._open()
        place = info.start
        while place < info.end:
            with os_errors(self._path):
                piece = os.pread(descriptor, min(info.end - place, _PIECE), place)
            if not piece:
                raise self._changed("became shorter while it was read")
            place += len(piece)
            yield piece
        self.check_unchanged()

    def _hold(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # also where nobody closes the source
        self._finalizer = weakref.finalize(self, os.close, descriptor)

    def _open(self) -> int:
        """The descriptor; a file that was closed is opened again, if it is still the same."""
        if not self._finalizer.alive:
            with os_errors(self._path):
                self._hold(os.open(self._path, os.O_RDONLY))
            if _state(self._descriptor) != self._state:
                self._finalizer()
                raise self._changed("is not the file any more that was opened")
        return self._descriptor

    def _changed(self, what: str) -> CheckpointError:
        return CheckpointError(
            what,
            where=self.label,
            expected="the same file from its header to its last tensor",
            hint="check that nothing is writing to it, and try again",
        )

    def _read(self, name: str) -> torch.Tensor:
        info = self.entries[name]
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None:
            raise CheckpointError(
                f"tensor {short(name)} has a dtype that torch does not have",
                where=self.label,
                expected=f"one of {', '.join(TORCH_DTYPES)}",
                got=info.dtype,
                hint="convert the file to another dtype with the library that wrote it",
            )
        values: torch.UntypedStorage = self._mapped()[info.start : info.end]
        return torch.empty(0, dtype=dtype, device="cpu").set_(values).view(info.shape)

    def _mapped(self) -> Any:
        if self._mapping is None:
            size = max(info.end for info in self.entries.values())
            descriptor = self._open()
            # Linux opens the same file again by its descriptor, under whatever name it is now
            same = f"/proc/self/fd/{descriptor}"
            by_name = not Path(same).exists()
            try:
                self.check_unchanged()
                self._mapping = torch.UntypedStorage.from_file(
                    self.label if by_name else same, False, size
                )
                if by_name and not os.path.samestat(self._path.stat(), os.fstat(descriptor)):
                    raise self._changed("was replaced while it was read")
            except Exception as error:  # the file changed meanwhile, or memory cannot be had
                raise CheckpointError(
                    "cannot be mapped into memory",
                    where=self.label,
                    expected=f"a file of {size} bytes, as when its header was read",
                    got=error,
                    hint="check that nothing is writing to it, and try again",
                ) from error
        return self._mapping


def _state(descriptor: int) -> tuple[int, ...]:
    """What changes when a file is written to, or is another one."""
    return _fields(os.fstat(descriptor))


def _fields(status: os.stat_result) -> tuple[int, ...]:
    return tuple(getattr(status, field) for field in _FIELDS)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        "changed while it was read",
        where=path,
        expected="the same file from its header to its last tensor",
        hint="check that nothing is writing to it, and try again",
    )


class TensorsFile(SourceFile):
    """Tensors in memory: a pickle's, or a caller's state dict."""

    def __init__(self, label: str, tensors: Mapping[str, torch.Tensor]) -> None:
        self.label = label
        self.entries = {name: _entry(name, tensor) for name, tensor in tensors.items()}
        self.metadata: Mapping[str, str] = {}
        self._tensors = tensors

    def _read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name].detach()
        if tensor.is_meta:
            raise CheckpointError(
                f"tensor {short(name)} is on the meta device and has no values",
                where=self.label,
                expected="a tensor on the CPU or a GPU",
            )
        return tensor


class PickleFile(TensorsFile):
    """A torch checkpoint; its tensors may be mapped from it.

    Raises:
        CheckpointError: it cannot be read, or changed meanwhile.
    """

    def __init__(self, path: Path) -> None:
        with os_errors(path):
            before = path.stat()
        super().__init__(str(path), read_pickle(path))
        with os_errors(path):
            self._status = path.stat()
        if _fields(before) != _fields(self._status):
            raise _changed(path)
        self._path = path

    def check_unchanged(self) -> None:
        try:
            now = self._path.stat()
        except OSError:
            return  # gone, and what is mapped stays as it was
        if now.st_ino != self._status.st_ino or now.st_dev != self._status.st_dev:
            return  # replaced: likewise
        if _fields(now) != _fields(self._status):
            raise _changed(self._path)


def _entry(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(
        name=name,
        shape=tuple(tensor.shape),
        dtype=DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
        start=0,
        end=tensor.numel() * tensor.element_size(),
    )
