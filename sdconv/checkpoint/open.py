"""Opens weights by path and component, and lists the networks among their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from sdconv.checkpoint.identify.find import (
    DetectedNetwork,
    find_networks,
    is_bare_half,
    tiny_half,
)
from sdconv.checkpoint.identify.infer import Identified, identify
from sdconv.checkpoint.io.folder import Folder, folder_at
from sdconv.checkpoint.io.source import Source, SourceFile, open_files, open_folder
from sdconv.errors import UnknownNetworkError

Weights = str | Path | Sequence[str | Path] | Mapping[str, Tensor]
"""Anything that ``sdconv.load`` opens: a path, several files of one network, or a state dict."""

COMPONENTS = ("unet", "vae")
"""The components of a pipeline that are networks of sdconv's."""


class SourceView:
    """The tensors of a source under unique names, even if it has two files.

    Both halves of a tiny autoencoder number their layers from 0 in files of their own. Here their
    names begin with ``encoder.`` and ``decoder.``; the shapes show which is which.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        files = source.files
        if len(files) > 1 and all(is_bare_half(_shapes(file)) for file in files):
            self._homes = _named_halves(source)
        else:
            # `entries` of a whole source refuses a name that is in two files
            names = list(source.entries)
            owners = {name: file for file in files for name in file.entries}
            self._homes = {name: (owners[name], name) for name in names}

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {name: file.entries[own].shape for name, (file, own) in self._homes.items()}

    @cached_property
    def networks(self) -> list[DetectedNetwork]:
        """The networks among the tensors.

        Raises:
            UnknownNetworkError: as ``find_networks``.
        """
        return find_networks(self.shapes, self.source.label)

    def dtype(self, name: str) -> str:
        """A tensor's dtype, by safetensors' name for it."""
        file, own = self._homes[name]
        return file.entries[own].dtype

    def home(self, name: str) -> tuple[SourceFile, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        return self._homes[name]

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, memory-mapped if the file allows it."""
        file, own = self._homes[name]
        return file.tensor(own)

    def identify(self, family: str | None, component: str | None = None) -> list[Identified]:
        """The networks with their configs, or only the component that is asked for.

        Raises:
            SdconvError: as ``identify``.
        """
        return identify(
            self.shapes,
            networks=self.networks,
            metadata=self.source.metadata,
            family=family,
            component=component,
            config=self.source.config,
            where=self.source.label,
        )


def open_component(path: Weights, component: str | None) -> Source:
    """Opens weights like ``open_source``, and of a pipeline's folder the component's own.

    Raises:
        CheckpointError: it cannot be read as weights.
        UnknownNetworkError: the pipeline does not have the component, or has several and none is
            named.
    """
    folder = folder_at(path)
    if folder is None:
        return open_files(path)
    if parts := network_folders(folder):
        return open_folder(parts[one_of(parts, component, path)])
    return open_folder(folder)


def network_folders(folder: Folder) -> dict[str, Folder]:
    """The folders of a pipeline's networks by component; empty if it is not a pipeline's folder."""
    return {name: part for name, part in folder.components.items() if name in COMPONENTS}


def pipeline_parts(path: Weights) -> dict[str, Path]:
    """The folders of a pipeline's networks by component; empty if ``path`` is not such a folder.

    Raises:
        CheckpointError: the folder cannot be listed.
    """
    folder = folder_at(path)
    return {} if folder is None else {k: v.path for k, v in network_folders(folder).items()}


def one_of(known: Mapping[str, object], component: str | None, where: object) -> str:
    """The component to open: the one asked for, or else the only one.

    Raises:
        UnknownNetworkError: it does not exist, or there are several and none is named.
    """
    names = ", ".join(sorted(known)) or "none that sdconv knows"
    if component is None and len(known) == 1:
        return next(iter(known))
    if component is None:
        raise UnknownNetworkError(
            "one component must be chosen" if known else "no network that sdconv knows",
            where=where,
            expected="one component",
            got=names,
            hint="pass component=" + (" or component=".join(f"{name!r}" for name in sorted(known))),
        )
    if component not in known:
        raise UnknownNetworkError(
            f"there is no component {component!r}", where=where, expected=repr(component), got=names
        )
    return component


def _named_halves(source: Source) -> dict[str, tuple[SourceFile, str]]:
    halves = [tiny_half(_shapes(file), file.label) for file in source.files]
    if sorted(halves) != ["decoder", "encoder"]:
        pairs = zip(source.files, halves, strict=True)
        raise UnknownNetworkError(
            "these files are not the two halves of a tiny autoencoder",
            where=source.label,
            expected="one encoder and one decoder",
            got=" and ".join(f"{file.label}: {half}" for file, half in pairs),
        )
    return {
        f"{half}.{name}": (file, name)
        for half, file in zip(halves, source.files, strict=True)
        for name in file.entries
    }


def _shapes(file: SourceFile) -> dict[str, tuple[int, ...]]:
    return {name: entry.shape for name, entry in file.entries.items()}
