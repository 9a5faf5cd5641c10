"""Sources of weights: named tensors from files, a folder or memory, listed before they are read.

A source is one or more files (a state dict in memory counts as one). Each file keeps its own names,
because both halves of a tiny autoencoder number their layers from 0. The entries of a whole source
are those of one network, so a name in two files is an error.

    with open_source("vae/diffusion_pytorch_model.safetensors") as source:
        source.shapes                               # from the header alone
        source.tensor("decoder.conv_in.weight")     # memory-mapped, not copied
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch

from sdconv.checkpoint.io.files import os_errors, short, weights_path
from sdconv.checkpoint.io.folder import (
    Folder,
    FolderWeights,
    components_in,
    config_in,
    config_next_to,
    folder_at,
    weights_of_index,
)
from sdconv.checkpoint.io.header import TensorInfo, open_header
from sdconv.checkpoint.io.pickles import PICKLE_SUFFIXES, read_pickle
from sdconv.errors import CheckpointError, InputError

__all__ = [
    "DTYPE_NAMES",
    "TORCH_DTYPES",
    "Source",
    "SourceFile",
    "components_in",
    "open_files",
    "open_folder",
    "open_source",
]

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
    """A pickle's tensors, which may be mapped from it; ``status``: of the file when it was read."""

    def __init__(
        self, path: Path, tensors: Mapping[str, torch.Tensor], status: os.stat_result
    ) -> None:
        super().__init__(str(path), tensors)
        self._path, self._status = path, status

    def check_unchanged(self) -> None:
        try:
            now = self._path.stat()
        except OSError:
            return  # gone, and what is mapped stays as it was
        if now.st_ino != self._status.st_ino or now.st_dev != self._status.st_dev:
            return  # replaced: likewise
        if _fields(now) != _fields(self._status):
            raise _changed(self._path)


class Source:
    """Named tensors from one or more files; a context manager that closes them.

    ``label``: its name in messages. ``files``: its parts. ``config``: the content of the component
    folder's ``config.json``, or None.
    """

    def __init__(
        self, label: str, files: Sequence[SourceFile], config: Mapping[str, Any] | None = None
    ) -> None:
        self.label = label
        self.files = tuple(files)
        self.config = config

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; tensors that were read remain valid."""
        for file in self.files:
            file.close()

    def check_unchanged(self) -> None:
        """Checks that no file was written to since it was opened.

        Raises:
            CheckpointError: one was.
        """
        for file in self.files:
            file.check_unchanged()

    @cached_property
    def entries(self) -> Mapping[str, TensorInfo]:
        """Every tensor of every file by its name, as the parts of one network.

        Raises:
            CheckpointError: two files hold a tensor of the same name.
        """
        return {name: file.entries[name] for name, file in self._owners.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name. Raises: as ``entries``."""
        return {name: info.shape for name, info in self.entries.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The files' metadata; where they differ, the first file's."""
        merged: dict[str, str] = {}
        for file in reversed(self.files):
            merged.update(file.metadata)
        return merged

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for file in self.files for info in file.entries.values())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor in the file's dtype (fp8 as ``torch.float8_*``).

        From a file it is on the CPU and memory-mapped, not copied, except for pickles that are
        compressed or in torch's oldest format, which are read when opened. From a state dict it is
        the caller's own tensor. Writing to a tensor does not change the file.

        Raises:
            CheckpointError: it does not exist or cannot be read, torch does not have its dtype, or
                two files have the name.
        """
        owner = self._owners.get(name)
        if owner is None:
            raise CheckpointError(
                f"holds no tensor {short(name)}",
                where=self.label,
                expected=f"one of its {len(self._owners)} names",
            )
        return owner.tensor(name)

    @cached_property
    def _owners(self) -> dict[str, SourceFile]:
        owners: dict[str, SourceFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in owners:
                    raise CheckpointError(
                        f"tensor {short(name)} is in two files of one network",
                        where=self.label,
                        expected="every name in one file",
                        got=f"{owners[name].label} and {file.label}",
                        hint="pass only the files that belong together",
                    )
                owners[name] = file
        return owners


def open_source(
    path_or_paths: str | Path | Sequence[str | Path] | Mapping[str, torch.Tensor],
) -> Source:
    """Opens weights: a file, a component's folder, a list of files, or a state dict in memory.

    Headers are read, tensors are not. Nothing is fetched, and no other file is opened except those
    that belong to the weights: a component folder's ``config.json``, also if its weights are named
    one by one, and the shards of an index. A file whose name ends in ``PICKLE_SUFFIXES`` is read
    as a torch checkpoint by ``read_pickle``, any other file as safetensors.

    Raises:
        CheckpointError: something cannot be read or is not weights, a folder's index and its
            shards disagree, or a folder is a whole pipeline (see ``components_in``).
        InputError: the argument is none of these four.
    """
    folder = folder_at(path_or_paths)
    return open_files(path_or_paths) if folder is None else open_folder(folder)


def open_files(
    path_or_paths: str | Path | Sequence[str | Path] | Mapping[str, torch.Tensor],
) -> Source:
    """``open_source`` for anything but a folder."""
    match path_or_paths:
        case str() | Path():
            path = weights_path(path_or_paths)
            if (weights := weights_of_index(path)) is not None:
                return _open_weights(path, weights, config_in(path.parent))
            return Source(str(path), [_open_file(path)], config_next_to([path]))
        case Mapping():
            return Source("state dict in memory", [_in_memory(path_or_paths)])
        case Sequence() if path_or_paths and not isinstance(path_or_paths, bytes | bytearray):
            paths = [weights_path(path) for path in path_or_paths]
            opened = [_open_file(path) for path in paths]
            return Source(", ".join(map(str, paths)), opened, config_next_to(paths))
    raise InputError(
        "not weights",
        expected="a path, a list of one or more paths, or a dict of tensors by name",
        got=short(path_or_paths),
    )


def open_folder(folder: Folder) -> Source:
    """``open_source`` for a folder."""
    if folder.is_pipeline:
        raise _is_pipeline(folder)
    try:
        weights = folder.weights()
    except CheckpointError:
        if folder.components:
            raise _is_pipeline(folder) from None
        raise
    return _open_weights(folder.path, weights, config_in(folder.path))


def _open_file(path: Path) -> SourceFile:
    if path.suffix.lower() == ".json":
        raise CheckpointError(
            "is a JSON file, not weights",
            where=path,
            expected="weights: a folder, a file of them, or a file that ends in .index.json",
            hint="name the folder that it is in",
        )
    if path.suffix.lower() in PICKLE_SUFFIXES:
        with os_errors(path):
            before = path.stat()
        tensors = read_pickle(path)
        with os_errors(path):
            after = path.stat()
        if _fields(before) != _fields(after):
            raise _changed(path)
        return PickleFile(path, tensors, after)
    return SafetensorsFile(path)


def _open_weights(named: Path, weights: FolderWeights, config: Mapping[str, Any] | None) -> Source:
    files = {path: _open_file(path) for path in weights.files}
    weights.check({path: file.entries for path, file in files.items()}, named)
    return Source(str(named), list(files.values()), config)


def _is_pipeline(folder: Folder) -> CheckpointError:
    return CheckpointError(
        "is a whole pipeline, not one component",
        where=folder.path,
        expected="the folder of one component",
        got=f"subfolders with weights: {', '.join(folder.components) or 'none'}",
        hint="name the subfolder, or the component=",
    )


def _in_memory(tensors: Mapping[Any, Any]) -> TensorsFile:
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                "a state dict holds something other than tensors by name",
                where="state dict in memory",
                expected="torch.Tensor values by str names",
                got=f"{short(name)}: {type(value).__name__}",
                hint="pass the inner dict, such as checkpoint['state_dict']",
            )
    if not tensors:
        raise InputError("an empty state dict", expected="tensors by name", got="no name")
    return TensorsFile("state dict in memory", tensors)


def _entry(name: str, tensor: torch.Tensor) -> TensorInfo:
    return TensorInfo(
        name=name,
        shape=tuple(tensor.shape),
        dtype=DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")),
        start=0,
        end=tensor.numel() * tensor.element_size(),
    )
