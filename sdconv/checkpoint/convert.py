"""Whole checkpoints from one layout to the other, without holding them in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from sdconv.checkpoint.files import as_path, short
from sdconv.checkpoint.find import Found
from sdconv.checkpoint.infer import Identified, warn_if_open
from sdconv.checkpoint.load import BUILD, SourceView, Weights
from sdconv.checkpoint.save import LAYOUTS, original_tensors
from sdconv.checkpoint.stream import Entry, OnTensor, stream
from sdconv.checkpoint.whole import Checkpoint, Part, entries, left_over, opened
from sdconv.checkpoint.write import CONFIG_KEY, check_in_diffusers, write_config
from sdconv.errors import CheckpointError, InputError, UnknownNetworkError, WeightsMismatchError

ORIGIN_KEY = "sdconv.original"
"""Where a file in diffusers' layout keeps how its original differed from the usual one."""

PREFIXES: Mapping[str, Mapping[str, str]] = {
    "original": {"unet": "model.diffusion_model.", "vae": "first_stage_model."},
    "diffusers": {"unet": "unet.", "vae": "vae."},
}
"""What stands before a component's names in a file of several."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was written.

    ``moved``: tensors of each component that got the layout. ``dtypes``: theirs. ``carried``:
    tensors of anything else that are in the file as they were, by the first word of their names
    (empty for those of one word). ``left_out``: likewise, those that a folder has no place for.
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
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Converted:
    """Writes a whole checkpoint in another layout; tensors pass through one after another.

    VAE and U-Net get the layout's names and prefixes (``model.diffusion_model.`` and
    ``first_stage_model.``, or ``unet.`` and ``vae.``; a network without a prefix keeps none, and
    one that is alone in its file has none in diffusers' layout). What else a file holds keeps its
    names and its bytes. From original to diffusers' layout and back is the same file again: names,
    shapes, dtypes and values.

    A pipeline's folder becomes one file. In the original layout CLIP text encoders stand where
    original files of the U-Net's family have them, in OpenCLIP's layout where those have it;
    any other component is carried over with its name before its tensors' names.

    Args:
        path: as for ``sdconv.load``, or the folder of a pipeline.
        out: a name ending in ``.safetensors`` for one file. Any other is a folder, for diffusers'
            layout only: ``vae/`` and ``unet/`` in it, each with its ``config.json``; a checkpoint
            that is nothing but one network becomes one component's folder.
        layout: ``"original"`` or ``"diffusers"``.
        family: the family, where shapes leave it open; it decides the configs that are written.
        dtype: what the floating-point tensors of the components that move are stored in (a
            folder's text encoders among them); None, and the rest always: as they are.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read as weights or written.
        UnknownNetworkError: no network that sdconv knows, or two of one component.
        WeightsMismatchError: a network lacks tensors, or has them in a wrong shape.
        InputError: an argument has no such value.

    Warns:
        SdconvWarning: the family is open, and a config was written for one.
    """
    out = as_path(out)
    is_file = out.suffix == ".safetensors"
    if layout not in LAYOUTS:
        raise InputError(
            "no such layout", where="layout", expected=" or ".join(LAYOUTS), got=repr(layout)
        )
    if layout == "original" and not is_file:
        raise InputError(
            "the original layout is a single file",
            where=out,
            expected="a name that ends in .safetensors",
            got=out.name,
        )
    with ExitStack() as stack:
        checkpoint = opened(path, stack)
        known = _identified(checkpoint, family)
        for network in known:
            _check(network)
        write = _to_file if is_file else _to_folders
        return write(checkpoint, known, out, layout, family, dtype, on_tensor)


@dataclass(frozen=True)
class _Known:
    """A network, and the part of the checkpoint that it is in."""

    part: Part
    one: Identified

    @property
    def is_told(self) -> bool:
        """Whether its config was written beside it, not read from shapes."""
        source = self.part.view.source
        return source.config is not None or CONFIG_KEY in source.metadata


def _identified(checkpoint: Checkpoint, family: str | None) -> list[_Known]:
    if not checkpoint.is_pipeline:
        (part,) = checkpoint.parts
        return [_Known(part, one) for one in part.view.identify(family)]
    known = [
        _Known(part, one)
        for part in checkpoint.parts
        if part.name in PREFIXES["original"]
        for one in part.view.identify(family, part.name)
    ]
    if not known:
        raise UnknownNetworkError(
            "no network that sdconv knows",
            where=checkpoint.label,
            expected="a folder with vae/ or unet/ in it",
            got=", ".join(part.name for part in checkpoint.parts) or "no folder with weights",
        )
    return known


def _check(known: _Known) -> None:
    """Refuses a network that lacks tensors, or has them in another shape."""
    found = known.one.found
    with torch.device("meta"):
        blank = BUILD[found.kind](known.one.config).state_dict()
    have = found.shapes(known.part.view.shapes)
    missing = [k for k in blank if k not in have and not k.endswith("num_batches_tracked")]
    wrong = [k for k in blank if k in have and have[k] != tuple(blank[k].shape)]
    if missing or wrong:
        raise WeightsMismatchError(
            f"the {found.component} is not whole: {len(missing)} tensors missing, "
            f"{len(wrong)} of the wrong shape",
            where=known.part.view.source.label,
            expected=", ".join(f"{k} {tuple(blank[k].shape)}" for k in (wrong + missing)[:5]),
            got=", ".join(f"{found.names[k]} {have[k]}" for k in wrong[:5]) or "none of these",
            fix="check that the file is complete; `sdconv inspect` lists what it holds",
        )


def _to_file(
    checkpoint: Checkpoint,
    known: Sequence[_Known],
    out: Path,
    layout: str,
    family: str | None,
    dtype: torch.dtype | None,
    on_tensor: OnTensor,
) -> Converted:
    names = _FileNames(checkpoint, known, layout)
    networks = [(network.part, network.one.found) for network in known]
    everything = entries(checkpoint, networks, names, placed=layout == "original")
    metadata = {"format": "pt"}
    if not checkpoint.is_pipeline:
        metadata = checkpoint.parts[0].view.source.metadata
        if layout == "original":
            metadata.pop(ORIGIN_KEY, None)
    told = {n.one.component: n.one.config.to_json() for n in known if n.is_told or family}
    if told:
        alone = len(known) == 1
        metadata[CONFIG_KEY] = json.dumps(next(iter(told.values())) if alone else told)
    if names.origins:
        metadata[ORIGIN_KEY] = json.dumps(names.origins)
    stream(everything, out, metadata, dtype=dtype, on_tensor=on_tensor)
    return _summary((out,), layout, everything, dtype)


def _to_folders(
    checkpoint: Checkpoint,
    known: Sequence[_Known],
    out: Path,
    layout: str,
    family: str | None,
    dtype: torch.dtype | None,
    on_tensor: OnTensor,
) -> Converted:
    networks = [(network.part, network.one.found) for network in known]
    everything = entries(checkpoint, networks, _canonical, placed=False)
    left_out = left_over(everything)
    alone = len(known) == 1 and not left_out and not checkpoint.is_pipeline
    files: list[Path] = []
    moved: list[Entry] = []
    folders = {n.one.component: out if alone else out / n.one.component for n in known}
    for network in known:
        check_in_diffusers(network.one.config, folders[network.one.component])
    for network in known:
        warn_if_open(network.one)
        component = network.one.component
        own = [entry for entry in everything if entry.component == component]
        weights = folders[component] / "diffusion_pytorch_model.safetensors"
        stream(own, weights, {"format": "pt"}, dtype=dtype, on_tensor=on_tensor)
        files += [write_config(network.one.config, folders[component]), weights]
        moved += own
    return _summary(tuple(files), layout, moved, dtype, left_out)


def _summary(
    files: tuple[Path, ...],
    layout: str,
    written: Sequence[Entry],
    dtype: torch.dtype | None,
    left_out: Mapping[str, int] | None = None,
) -> Converted:
    moved = [entry for entry in written if entry.component is not None]
    return Converted(
        files=files,
        layout=layout,
        moved=dict(Counter(entry.component for entry in moved if entry.component)),
        dtypes=tuple(sorted({str(entry.written_as(dtype)) for entry in moved})),
        carried=left_over(written),
        left_out=left_out or {},
    )


def _canonical(found: Found, view: SourceView) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (name, shape) for name, shape in found.shapes(view.shapes).items()}


class _FileNames:
    """The names in a single file of one layout. ``origins``: what was unusual about the originals,
    by component."""

    def __init__(self, checkpoint: Checkpoint, known: Sequence[_Known], layout: str) -> None:
        self._configs = {network.one.component: network.one.config for network in known}
        self._layout = layout
        self._in_pipeline = checkpoint.is_pipeline
        taken = {name for network in known for name in network.one.found.names.values()}
        self._alone = len(known) == 1 and all(
            name in taken for part in checkpoint.parts for name in part.view.shapes
        )
        self.origins: dict[str, dict[str, Any]] = {}

    def __call__(self, found: Found, view: SourceView) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """As ``whole.Naming``."""
        if found.layout == self._layout and not self._in_pipeline:
            return {name: (place, view.shapes[place]) for name, place in found.names.items()}
        original = self._original(found, view)
        if self._layout == "original":
            return _remembered(found.component, view, original, self._prefix(found))
        self._remember(found, view, original)
        prefix = self._prefix(found)
        return {name: (prefix + name, shape) for name, shape in found.shapes(view.shapes).items()}

    def _prefix(self, found: Found) -> str:
        if not self._in_pipeline and (
            not found.prefix or (self._alone and self._layout == "diffusers")
        ):
            return ""
        return PREFIXES[self._layout][found.component]

    def _original(self, found: Found, view: SourceView) -> dict[str, tuple[str, tuple[int, ...]]]:
        """diffusers' name -> name and shape in the usual original layout, without prefix."""
        shapes = found.shapes(view.shapes)
        blank = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        made = original_tensors(blank, self._configs[found.component])
        pairs = zip(blank, made.items(), strict=True)
        return {name: (original, tuple(one.shape)) for name, (original, one) in pairs}

    def _remember(
        self, found: Found, view: SourceView, usual: Mapping[str, tuple[str, tuple[int, ...]]]
    ) -> None:
        if found.layout != "original":
            return
        own = {k: (v.removeprefix(found.prefix), view.shapes[v]) for k, v in found.names.items()}
        self.origins[found.component] = {
            "prefix": found.prefix,
            "unusual": {k: [v[0], list(v[1])] for k, v in own.items() if v != usual[k]},
        }


def _size(shape: tuple[int, ...]) -> int:
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("no shape")
    return prod(shape)


def _remembered(
    component: str,
    view: SourceView,
    usual: Mapping[str, tuple[str, tuple[int, ...]]],
    prefix: str,
) -> dict[str, tuple[str, tuple[int, ...]]]:
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
            fix="remove it from the file's metadata",
        ) from error
