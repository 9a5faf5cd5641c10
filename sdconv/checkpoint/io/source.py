"""Sources of weights: named tensors from files, a folder or memory, listed before they are read.

A source is one or more files (a state dict in memory counts as one). Each file keeps its own names,
because both halves of a tiny autoencoder number their layers from 0. The entries of a whole source
are those of one network, so a name in two files is an error.

    with open_source("vae/diffusion_pytorch_model.safetensors") as source:
        source.shapes                               # from the header alone
        source.tensor("decoder.conv_in.weight")     # memory-mapped, not copied
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from sdconv.checkpoint.io.files import short, weights_path
from sdconv.checkpoint.io.folder import (
    Folder,
    FolderWeights,
    components_in,
    config_in,
    config_next_to,
    folder_at,
    weights_of_index,
)
from sdconv.checkpoint.io.header import TensorInfo
from sdconv.checkpoint.io.pickles import PICKLE_SUFFIXES
from sdconv.checkpoint.io.tensor_files import PickleFile, SafetensorsFile, SourceFile, TensorsFile
from sdconv.errors import CheckpointError, InputError

__all__ = [
    "Source",
    "components_in",
    "open_files",
    "open_folder",
    "open_source",
]


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
        return PickleFile(path)
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
