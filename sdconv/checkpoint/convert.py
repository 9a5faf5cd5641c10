"""Converts whole checkpoints from one layout to the other, without holding them in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdconv.checkpoint.assemble import shapes_in
from sdconv.checkpoint.identify.find import DetectedNetwork
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, warn_if_open
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.io.folder import DIFFUSERS_NAME
from sdconv.checkpoint.io.source import TORCH_DTYPES
from sdconv.checkpoint.io.stream import OnTensor, OutputTensor, stream
from sdconv.checkpoint.io.write import CONFIG_KEY, check_in_diffusers, output_path, write_config
from sdconv.checkpoint.open import COMPONENTS, SourceView, Weights
from sdconv.checkpoint.save import LAYOUTS, original_tensors
from sdconv.checkpoint.whole import (
    Checkpoint,
    Part,
    Renamed,
    Renaming,
    entries,
    left_over,
    opened,
)
from sdconv.config import Config
from sdconv.errors import CheckpointError, InputError, UnknownNetworkError

ORIGIN_KEY = "sdconv.original"
"""The metadata key for how the original of a file in diffusers' layout differed from the usual."""

PREFIXES: Mapping[str, Mapping[str, str]] = {
    "original": {"unet": "model.diffusion_model.", "vae": "first_stage_model."},
    "diffusers": {"unet": "unet.", "vae": "vae."},
}
"""The prefix of a component's names in a file of several components."""


Build = Callable[[Config], nn.Module]
"""Makes the network for a config, as ``sdconv.loading.build`` does."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A summary of what ``convert`` wrote.

    ``moved``: the number of tensors of each component that are now in the layout. ``dtypes``:
    torch's names of their dtypes. ``carried``: the number of other tensors that are in the file
    unchanged, by the first word of their names (empty for names of one word). ``left_out``: the
    same for those that are not part of any folder.
    """

    files: tuple[Path, ...]
    layout: str
    moved: Mapping[str, int]
    dtypes: tuple[str, ...]
    carried: Mapping[str, int]
    left_out: Mapping[str, int]


def convert(
    path: Weights,
    out: str | Path,
    layout: str,
    component: str | None = None,
    *,
    build: Build,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Converted:
    """Writes a checkpoint in another layout, one tensor after another.

    VAE and U-Net get the layout's names and prefixes (``model.diffusion_model.`` and
    ``first_stage_model.``, or ``unet.`` and ``vae.``; a network without a prefix remains without,
    and one that is alone in its file has none in diffusers' layout). All other tensors keep their
    names and bytes. A file converted from the original to diffusers' layout and back is the same:
    names, shapes, dtypes and values.

    A pipeline's folder becomes one file. In the original layout, CLIP text encoders get the names
    that original files of the U-Net's family use, and OpenCLIP's layout if those use it. Tensors of
    any other component are carried over with the component's name as a prefix.

    Args:
        path: as for ``sdconv.load``, or the folder of a pipeline.
        out: one file if the name ends in ``.safetensors``. Any other name is a folder, for
            diffusers' layout only: it gets ``vae/`` and ``unet/``, each with its ``config.json``; a
            checkpoint of nothing but one network becomes that component's folder.
        layout: ``"original"`` or ``"diffusers"``.
        component: ``"vae"`` or ``"unet"`` for that one alone, without a prefix; None for
            everything.
        build: makes the network for a config, whose tensors are compared with the checkpoint's;
            it is called on the meta device.
        family: the family, if shapes leave it open; it decides the configs that are written.
        dtype: for the floating-point tensors of the converted components, which include a folder's
            text encoders; None keeps theirs. All other tensors always keep theirs.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read as weights, or cannot be written.
        UnknownNetworkError: there is no network that sdconv knows, or two of one component.
        WeightsMismatchError: tensors of a network are missing or of the wrong shape.
        InputError: an argument has a value that is not allowed.

    Warns:
        SdconvWarning: the family is open, and a config was written for one.
    """
    out, is_file = output_path(out)
    if layout not in LAYOUTS:
        raise InputError(
            "unknown layout", where="layout", expected=" or ".join(LAYOUTS), got=repr(layout)
        )
    if layout == "original" and not is_file:
        raise InputError(
            "the original layout is a single file",
            where=out,
            expected="a name that ends in .safetensors",
            got=out.name,
        )
    with ExitStack() as stack:
        checkpoint = opened(path, stack, component)
        known = _identified(checkpoint, component, family)
        for network in known:
            _check(network, build)
        job = _Job(checkpoint, known, component, layout, family, dtype, on_tensor)
        return job.to_file(out) if is_file else job.to_folders(out)


@dataclass(frozen=True)
class _Known:
    """A network, and the part of the checkpoint that it is in."""

    part: Part
    one: Identified

    @property
    def has_given_config(self) -> bool:
        """Whether the checkpoint contains its config, which is then not inferred from shapes."""
        source = self.part.view.source
        return source.config is not None or CONFIG_KEY in source.metadata


def _identified(checkpoint: Checkpoint, component: str | None, family: str | None) -> list[_Known]:
    if not checkpoint.is_pipeline:
        (part,) = checkpoint.parts
        return [_Known(part, one) for one in part.view.identify(family, component)]
    known = [
        _Known(part, one)
        for part in checkpoint.parts
        if part.name in COMPONENTS
        for one in part.view.identify(family, part.name)
    ]
    if not known:
        raise UnknownNetworkError(
            "no network that sdconv knows",
            where=checkpoint.label,
            expected="a folder that contains vae/ or unet/",
            got=", ".join(part.name for part in checkpoint.parts) or "no folder with weights",
        )
    return known


def _check(known: _Known, build: Build) -> None:
    """Refuses a network with tensors that are missing, of the wrong shape or integers; unexpected
    tensors are carried over."""
    with torch.device("meta"):
        wanted = shapes_in(build(known.one.config))
    view = known.part.view
    found = fit(known.one, view.shapes, view.dtype, wanted)
    replace(found, unexpected=()).check(known.one, view.source.label)


@dataclass(frozen=True)
class _Job:
    """A conversion: a checkpoint, and how it is to be written."""

    checkpoint: Checkpoint
    known: Sequence[_Known]
    component: str | None
    layout: str
    family: str | None
    dtype: torch.dtype | None
    on_tensor: OnTensor

    def to_file(self, out: Path) -> Converted:
        """Everything, or the one component, in one file."""
        names = _FileNames(self)
        everything = self._entries(names, placed=self.layout == "original")
        written = [one for one in everything if self.component in (None, one.component)]
        metadata = {"format": "pt"}
        if not self.checkpoint.is_pipeline:
            metadata = self.checkpoint.parts[0].view.source.metadata
            if self.layout == "original":
                metadata.pop(ORIGIN_KEY, None)
        # A single network gets its config, as in what sdconv.save writes. Of several networks,
        # those whose config or family was given get one.
        complete = self.family is not None or self.is_alone
        described = [known.one for known in self.known if complete or known.has_given_config]
        # by name, so that a file converted there and back has the same bytes
        described.sort(key=lambda one: one.component)
        configs = {one.component: one.config.to_json() for one in described}
        if configs:
            alone = len(self.known) == 1
            metadata[CONFIG_KEY] = json.dumps(next(iter(configs.values())) if alone else configs)
        if names.origins:
            metadata[ORIGIN_KEY] = json.dumps(names.origins)
        for one in described:
            warn_if_open(one)
        stream(written, out, metadata, dtype=self.dtype, on_tensor=self.on_tensor)
        return self._summary([out], written)

    def to_folders(self, out: Path) -> Converted:
        """Each component in a folder, with its config."""
        everything = self._entries(_canonical, placed=False)
        folders = {
            n.one.component: out if self.is_alone else out / n.one.component for n in self.known
        }
        for network in self.known:
            check_in_diffusers(network.one.config, folders[network.one.component])
        files: list[Path] = []
        for network in self.known:
            warn_if_open(network.one)
            folder = folders[network.one.component]
            own = [entry for entry in everything if entry.component == network.one.component]
            weights = folder / f"{DIFFUSERS_NAME}.safetensors"
            stream(own, weights, {"format": "pt"}, dtype=self.dtype, on_tensor=self.on_tensor)
            files += [write_config(network.one.config, folder), weights]
        moved = [entry for entry in everything if entry.component in folders]
        return self._summary(files, moved, left_over(everything))

    @cached_property
    def is_alone(self) -> bool:
        """Whether one network is all that is written."""
        if self.component is not None:
            return True
        taken = {name for network in self.known for name in network.one.found.names.values()}
        return len(self.known) == 1 and all(
            not part.name and name in taken
            for part in self.checkpoint.parts
            for name in part.view.shapes
        )

    def _entries(self, renaming: Renaming, *, placed: bool) -> list[OutputTensor]:
        networks = [(network.part, network.one.found) for network in self.known]
        return entries(self.checkpoint, networks, renaming, placed=placed)

    def _summary(
        self,
        files: list[Path],
        written: Sequence[OutputTensor],
        left_out: Mapping[str, int] | None = None,
    ) -> Converted:
        moved = [(entry, entry.component) for entry in written if entry.component is not None]
        return Converted(
            files=tuple(files),
            layout=self.layout,
            moved=dict(Counter(component for _, component in moved)),
            dtypes=tuple(sorted({_torch_name(entry.written_as(self.dtype)) for entry, _ in moved})),
            carried=left_over(written),
            left_out=left_out or {},
        )


def _torch_name(dtype: str) -> str:
    """``float16`` for ``F16``."""
    return str(TORCH_DTYPES.get(dtype, dtype)).removeprefix("torch.")


def _canonical(found: DetectedNetwork, view: SourceView) -> Renamed:
    return {name: (name, shape) for name, shape in found.shapes(view.shapes).items()}


class _FileNames:
    """Names tensors for a single file of one layout.

    ``origins``: by component, how the original's names and shapes differed from the usual ones.
    """

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._configs = {network.one.component: network.one.config for network in job.known}
        self.origins: dict[str, dict[str, Any]] = {}

    def __call__(self, found: DetectedNetwork, view: SourceView) -> Renamed:
        """The new names and shapes, as ``whole.Renaming`` asks for them."""
        prefix = self._prefix(found)
        if found.layout == self._job.layout and not self._job.checkpoint.is_pipeline:
            kept = found.prefix if self._job.component is None else ""
            return {
                name: (kept + stored.removeprefix(found.prefix), view.shapes[stored])
                for name, stored in found.names.items()
            }
        usual = self._original(found, view)
        if self._job.layout == "original":
            return _remembered(found.component, view, usual, prefix)
        if found.layout == "original":
            self._remember(found, view, usual)
        return {name: (prefix + name, shape) for name, shape in found.shapes(view.shapes).items()}

    def _prefix(self, found: DetectedNetwork) -> str:
        if self._job.component is not None or (
            not self._job.checkpoint.is_pipeline
            and (not found.prefix or (self._job.is_alone and self._job.layout == "diffusers"))
        ):
            return ""
        return PREFIXES[self._job.layout][found.component]

    def _original(self, found: DetectedNetwork, view: SourceView) -> Renamed:
        """diffusers' name -> name and shape in the usual original layout, without prefix."""
        shapes = found.shapes(view.shapes)
        on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        made = original_tensors(on_meta, self._configs[found.component])
        pairs = zip(on_meta, made.items(), strict=True)
        return {name: (original, tuple(one.shape)) for name, (original, one) in pairs}

    def _remember(self, found: DetectedNetwork, view: SourceView, usual: Renamed) -> None:
        own = {k: (v.removeprefix(found.prefix), view.shapes[v]) for k, v in found.names.items()}
        self.origins[found.component] = {
            "prefix": found.prefix if self._job.component is None else "",
            "unusual": {k: [v[0], list(v[1])] for k, v in own.items() if v != usual[k]},
        }


def _size(shape: tuple[int, ...]) -> int:
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("no shape")
    return prod(shape)


def _remembered(component: str, view: SourceView, usual: Renamed, prefix: str) -> Renamed:
    """Names and shapes in the original layout: the usual ones, or those that the file once had."""
    text = view.source.metadata.get(ORIGIN_KEY, "{}")
    try:
        origin = json.loads(text).get(component, {"prefix": prefix, "unusual": {}})
        unusual = {k: (str(name), tuple(shape)) for k, (name, shape) in origin["unusual"].items()}
        names = {k: unusual.get(k, v) for k, v in usual.items()}
        if any(_size(names[k][1]) != _size(usual[k][1]) for k in usual):
            raise ValueError("a shape of another size")
        return {k: (origin["prefix"] + name, shape) for k, (name, shape) in names.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"its metadata {ORIGIN_KEY} does not fit its tensors",
            where=view.source.label,
            got=short(text),
            hint="remove it from the file's metadata",
        ) from error
