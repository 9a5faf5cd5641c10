"""Opens weights by path and component, and lists the networks among their tensors."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.identify.find_tiny import is_bare_half, tiny_half
from sdconv.checkpoint.identify.infer import Identified, identify
from sdconv.checkpoint.identify.quantised import (
    ScaledWeights,
    Weighed,
    check_quantised,
    scaled_weights,
    without_formats,
)
from sdconv.checkpoint.identify.statistics import Statistics, statistics_in
from sdconv.checkpoint.io.dequantise import DequantisedFile
from sdconv.checkpoint.io.folder import Folder, folder_at
from sdconv.checkpoint.io.source import Source, open_files, open_folder
from sdconv.checkpoint.io.tensor_files import SourceFile
from sdconv.checkpoint.io.write import AVERAGING_FIELDS
from sdconv.checkpoint.keys.adapters import adapter_in
from sdconv.errors import SdconvWarning, UnknownNetworkError

Weights = str | Path | Sequence[str | Path] | Mapping[str, Tensor]
"""Anything that ``sdconv.load`` opens: a path, several files of one network, or a state dict."""

COMPONENTS = ("unet", "vae")
"""The components of a pipeline that are networks of sdconv's."""


class SourceView:
    """The tensors of a source under unique names, even if it has two files.

    Both halves of a tiny autoencoder number their layers from 0 in files of their own. Here their
    names begin with ``encoder.`` and ``decoder.``; the shapes show which is which.

    Scaled fp8 weights of the networks that were identified are float32 here, multiplied by their
    scales. ``dequantised``: their names. ``companions``: the names of their scales, which are then
    no tensors of their own.
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
        self.dequantised: frozenset[str] = frozenset()
        self.companions: frozenset[str] = frozenset()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by its name."""
        return {name: file.entries[own].shape for name, (file, own) in self._homes.items()}

    @cached_property
    def networks(self) -> list[DetectedNetwork]:
        """The networks among the tensors.

        Raises:
            UnknownNetworkError: as ``find_networks``; or the file is an adapter (a LoRA).
        """
        if (found := adapter_in(self.shapes)) is not None:
            raise _is_adapter(*found, self.source.label)
        return find_networks(self.shapes, self.source.label)

    def dtype(self, name: str) -> str:
        """A tensor's dtype, by safetensors' name for it."""
        file, own = self._homes[name]
        return file.entries[own].dtype

    def home(self, name: str) -> tuple[SourceFile, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        return self._homes[name]

    def substitute(self, homes: Mapping[str, tuple[SourceFile, str]]) -> None:
        """Takes other tensors in the place of some, under the same names.

        Args:
            homes: a tensor's name -> the file that has the other one, and its name there.
        """
        self._homes |= homes
        self.__dict__.pop("shapes", None)

    def leave_out(self, names: Collection[str]) -> None:
        """Takes tensors away, as if the source did not have them."""
        self._homes = {name: home for name, home in self._homes.items() if name not in names}
        self.__dict__.pop("shapes", None)

    def tensor(self, name: str) -> Tensor:
        """The tensor on the CPU, memory-mapped if the file allows it."""
        file, own = self._homes[name]
        return file.tensor(own)

    def identify(
        self, family: str | None, component: str | None = None, prefix: str | None = None
    ) -> list[Identified]:
        """The networks with their configs, or only the component that is asked for.

        Args:
            family, component, prefix: as for ``identify``.

        Raises:
            SdconvError: as ``identify``; or the weights are quantised in a way that is not undone.

        Warns:
            SdconvWarning: some fp8 weights have a scale, others do not.
        """
        wanted = f"{prefix.removesuffix('.')}." if prefix else prefix
        for found in self.networks:
            if component in (None, found.component) and wanted in (None, found.prefix):
                self.check_quantised(Weighed.of(found))
        config = self.source.config
        if config is not None:
            config = {k: v for k, v in config.items() if k not in AVERAGING_FIELDS}
        identified = identify(
            self.shapes,
            networks=self.networks,
            metadata=self.source.metadata,
            family=family,
            component=component,
            prefix=prefix,
            config=config,
            statistics=self._statistics(),
            where=self.source.label,
        )
        return [replace(one, found=self.dequantise(one.found)) for one in identified]

    def check_quantised(self, these: Weighed) -> None:
        """Refuses weights that were quantised in a way that sdconv does not undo.

        Raises:
            WeightsMismatchError: they were.
        """
        check_quantised(these, self.dtype, self.source.metadata, self.source.label)

    def dequantise(self, found: DetectedNetwork) -> DetectedNetwork:
        """The network without its scales, which ``home`` and ``tensor`` apply from here on.

        Raises:
            WeightsMismatchError: the scales do not fit, or the format is unknown.
        """
        these = Weighed.of(found)
        self.multiply(these)
        known = these.companions
        return replace(found, unexpected=tuple(n for n in found.unexpected if n not in known))

    def multiply(self, these: Weighed) -> None:
        """Takes scaled fp8 weights multiplied by their scales from here on.

        Raises:
            WeightsMismatchError: the scales do not fit, or the format is unknown.

        Warns:
            SdconvWarning: some fp8 weights have a scale, others do not.
        """
        if self.dequantised.intersection(these.weights):
            return
        where = self.source.label
        scaled: ScaledWeights = scaled_weights(these, self.shapes, self.dtype, self._bytes, where)
        if not scaled.scales:
            return
        file = DequantisedFile(
            where,
            {weight: self._homes[weight] for weight in scaled.scales},
            {weight: self._homes[scale] for weight, scale in scaled.scales.items()},
        )
        self._homes |= {weight: (file, weight) for weight in scaled.scales}
        self.dequantised |= set(scaled.scales)
        self.companions |= scaled.companions
        if scaled.unscaled:
            warnings.warn(
                f"{where}: {len(scaled.unscaled)} fp8 weights of the {these.what} have no "
                f"scale and are taken as they are, such as {scaled.unscaled[0]}; "
                f"{len(scaled.scales)} have one",
                SdconvWarning,
                stacklevel=5,
            )

    @property
    def metadata(self) -> dict[str, str]:
        """The source's metadata, without what is not true any more of weights that were
        multiplied."""
        return without_formats(self.source.metadata, self.dequantised)

    def _statistics(self) -> Statistics:
        """The values of the file's ``edm_mean`` and ``edm_std``; empty without them."""
        return statistics_in(self._homes, self.source.metadata, self.tensor)

    def _bytes(self, name: str) -> bytes:
        values = self.tensor(name).contiguous().reshape(-1).view(torch.uint8)
        return bytes(values.cpu().numpy())


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


def _is_adapter(kind: str, merges: bool, where: str) -> UnknownNetworkError:
    if merges:
        return UnknownNetworkError(
            f"this is a {kind} file; merge it with sdconv.merge_lora",
            where=where,
            expected="weights of a network",
            hint="load the network that it was trained on: sdconv.merge_lora(network, file)",
        )
    return UnknownNetworkError(
        f"this is not a network but an adapter of another kind: {kind}",
        where=where,
        expected="weights of a network",
        hint="sdconv.merge_lora does not merge this kind",
    )


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
