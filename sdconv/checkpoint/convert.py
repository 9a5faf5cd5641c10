"""Converts whole checkpoints from one layout to the other, without holding them in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from sdconv.checkpoint.assemble import shapes_in
from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified, warn_if_open
from sdconv.checkpoint.identify.other_names import is_extra
from sdconv.checkpoint.io.folder import DIFFUSERS_NAME
from sdconv.checkpoint.io.narrow import Caster
from sdconv.checkpoint.io.stream import OnTensor, OutputTensor, stream
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES, TensorsFile
from sdconv.checkpoint.io.write import CONFIG_KEY, check_in_diffusers, output_path, write_config
from sdconv.checkpoint.naming import ORIGIN_KEY, FileNames
from sdconv.checkpoint.open import COMPONENTS, SourceView, Weights
from sdconv.checkpoint.prune import leave_out, take_averages
from sdconv.checkpoint.save import LAYOUTS, edm_tensors
from sdconv.checkpoint.whole import (
    Checkpoint,
    Part,
    Renamed,
    Renaming,
    entries,
    left_over,
    opened,
)
from sdconv.config import AutoencoderKLConfig, Config
from sdconv.config.facts import EDM_STATISTICS
from sdconv.devices import on_meta
from sdconv.errors import InputError, UnknownNetworkError, WeightsMismatchError

Build = Callable[[Config], nn.Module]
"""Makes the network for a config, as ``sdconv.loading.build`` does."""


EMA = ("keep", "drop", "only")
"""What ``convert`` can do with running averages."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A summary of what ``convert`` wrote.

    ``moved``: the number of tensors of each component that are now in the layout. ``dtypes``:
    torch's names of their dtypes. ``carried``: the number of other tensors that are in the file
    unchanged, by the first word of their names (empty for names of one word). ``left_out``: the
    same for those that are not part of any folder. ``dequantised``: the number of scaled fp8
    weights that are now float32, or the dtype asked for. ``pruned``: the number of averages,
    losses and optimizer states that were left out on request, by the first word of their names.
    ``averaged``: the components whose weights are now their running averages. ``rounded``: the
    number of tensors whose values the dtype that was asked for does not hold exactly.
    """

    files: tuple[Path, ...]
    layout: str
    moved: Mapping[str, int]
    dtypes: tuple[str, ...]
    carried: Mapping[str, int]
    left_out: Mapping[str, int]
    dequantised: int = 0
    pruned: Mapping[str, int] = field(default_factory=dict)
    averaged: tuple[str, ...] = ()
    rounded: int = 0


def convert(
    path: Weights,
    out: str | Path,
    layout: str | None = None,
    component: str | None = None,
    *,
    build: Build,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    clamp: bool = False,
    prefix: str | None = None,
    ema: str | None = None,
    prune: bool = False,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Converted:
    """Writes a checkpoint in another layout, one tensor after another.

    VAE and U-Net get the layout's names and prefixes (``model.diffusion_model.`` and
    ``first_stage_model.``, or ``unet.`` and ``vae.``; a network without a prefix remains without,
    and one that is alone in its file has none in diffusers' layout). All other tensors keep their
    names and bytes. A file converted from the original to diffusers' layout and back is the same:
    names, shapes, dtypes and values. Only scaled fp8 weights are not: they are multiplied by their
    scales, and written in float32 unless ``dtype`` says otherwise.

    A pipeline's folder becomes one file. In the original layout, CLIP text encoders get the names
    that original files of the U-Net's family use, and OpenCLIP's layout if those use it. Tensors of
    any other component are carried over with the component's name as a prefix.

    Args:
        path: as for ``sdconv.load``, or the folder of a pipeline.
        out: one file if the name ends in ``.safetensors``. Any other name is a folder, for
            diffusers' layout only: it gets ``vae/`` and ``unet/``, each with its ``config.json``; a
            checkpoint of nothing but one network becomes that component's folder.
        layout: ``"original"`` or ``"diffusers"``; None for the one that its networks have.
        component: ``"vae"`` or ``"unet"`` for that one alone, without a prefix; None for
            everything.
        build: makes the network for a config, whose tensors are compared with the checkpoint's;
            it is called on the meta device.
        family: the family, if shapes leave it open; it decides the configs that are written.
        dtype: for the floating-point tensors of the converted components, which include a folder's
            text encoders; None keeps theirs. All other tensors always keep theirs.
        clamp: whether values beyond the range of ``dtype`` become its largest finite one; they are
            an error otherwise, which names the tensor and the value.
        prefix: as for ``sdconv.load``; only the network under it is then converted.
        ema: what becomes of running averages (``model_ema.*``): ``"keep"`` carries them over,
            ``"drop"`` leaves them out, ``"only"`` writes them in the place of the weights. A
            network without averages keeps its weights. None: as ``prune`` says.
        prune: leave out what only training needs: running averages, losses (``loss.*``) and
            optimizer states. Nothing else of a file is ever dropped.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read as weights or written; or a value is too
            large for ``dtype``.
        UnknownNetworkError: there is no network that sdconv knows, or two of one component.
        WeightsMismatchError: tensors of a network are missing or of the wrong shape, or quantised
            in a way that is not undone; or a folder or a single component has no place for tensors
            under the network's prefix, which are never dropped.
        InputError: an argument has a value that is not allowed.

    Warns:
        SdconvWarning: the family is open, and a config was written for one; or values were
            clamped.
    """
    out, is_file = output_path(out)
    if layout is not None and layout not in LAYOUTS:
        raise InputError(
            "unknown layout", where="layout", expected=" or ".join(LAYOUTS), got=repr(layout)
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            "weights are not written in this dtype",
            where="dtype",
            expected="a floating-point dtype, such as torch.float16",
            got=dtype,
        )
    ema = _checked_ema(ema, prune)
    with ExitStack() as stack:
        checkpoint = opened(path, stack, component)
        known = _identified(checkpoint, component, family, prefix)
        layout = layout or _own_layout(known, checkpoint.label)
        if layout == "original" and not is_file:
            raise InputError(
                "the original layout is a single file",
                where=out,
                expected="a name that ends in .safetensors",
                got=out.name,
            )
        pairs = [(network.part.view, network.one) for network in known]
        chosen = take_averages(pairs, checkpoint.label) if ema == "only" else ()
        pruned: Counter[str] = Counter()
        for part in checkpoint.parts:
            networks = [network.one.found for network in known if network.part is part]
            pruned += leave_out(part.view, networks, averages=ema != "keep", training=prune)
        for network in known:
            _check(network, build)
        if component is not None or not is_file:
            _refuse_unexpected(known)
        job = _Job(checkpoint, known, component, layout, family, dtype, on_tensor, pruned, chosen)
        caster = Caster(checkpoint.label, clamp=clamp, count=True)
        result = job.to_file(out, caster) if is_file else job.to_folders(out, caster)
        caster.warn()
        return replace(result, rounded=len(caster.rounded))


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


def _checked_ema(ema: str | None, prune: bool) -> str:
    """What to do with running averages, as one of ``EMA``."""
    if ema is not None and ema not in EMA:
        raise InputError("unknown choice", where="ema", expected=", ".join(EMA), got=repr(ema))
    if prune and ema == "keep":
        raise InputError(
            "pruning leaves out the running averages",
            where="ema",
            expected="'drop' or 'only'",
            got="'keep', with prune",
        )
    return ema or ("drop" if prune else "keep")


def _own_layout(known: Sequence[_Known], where: str) -> str:
    """The layout of all networks, if they have the same."""
    layouts = {one.one.found.layout for one in known}
    if len(layouts) == 1:
        return layouts.pop()
    raise InputError(
        "the networks have different layouts, so that one must be chosen",
        where="layout",
        expected=" or ".join(LAYOUTS),
        got=", ".join(f"{one.one.component}: {one.one.found.layout}" for one in known),
    )


def _identified(
    checkpoint: Checkpoint, component: str | None, family: str | None, prefix: str | None
) -> list[_Known]:
    if not checkpoint.is_pipeline:
        (part,) = checkpoint.parts
        return [_Known(part, one) for one in part.view.identify(family, component, prefix)]
    known = [
        _Known(part, one)
        for part in checkpoint.parts
        if part.name in COMPONENTS
        for one in part.view.identify(family, part.name, prefix)
    ]
    if not known:
        raise UnknownNetworkError(
            "no network that sdconv knows",
            where=checkpoint.label,
            expected="a folder that contains vae/ or unet/",
            got=", ".join(part.name for part in checkpoint.parts) or "no folder with weights",
        )
    return known


def _refuse_unexpected(known: Sequence[_Known]) -> None:
    """Refuses tensors under a network's prefix that would be left out.

    Raises:
        WeightsMismatchError: there are some.
    """
    for one in known:
        if names := one.one.found.unexpected:
            raise WeightsMismatchError(
                f"tensors under the {one.one.component}'s prefix are not the network's, and would "
                "be lost",
                where=one.part.view.source.label,
                expected="nothing more than the network's own tensors",
                got=f"{len(names)}: {', '.join(names[:4])}",
                hint="convert the whole file to a single file, which carries them over, or remove "
                "them first",
            )


def _check(known: _Known, build: Build) -> None:
    """Refuses a network with tensors that are missing, of the wrong shape or integers; unexpected
    tensors are carried over."""
    with on_meta():
        wanted = shapes_in(build(known.one.config))
    view = known.part.view
    found = fit(known.one, view.shapes, view.dtype, wanted)
    replace(found, unexpected=()).check(known.one, view.source.label)


@contextmanager
def _all_or_none(files: Sequence[Path], folders: Sequence[Path]) -> Iterator[None]:
    """Removes the files again if the work fails, and those of the folders that were not there."""
    new = [folder for folder in folders if not folder.exists()]
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):  # not there, or something else is in it
                folder.rmdir()
        raise


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
    pruned: Mapping[str, int]
    averaged: tuple[str, ...]

    def to_file(self, out: Path, caster: Caster) -> Converted:
        """Everything, or the one component, in one file."""
        names = FileNames(
            layout=self.layout,
            configs={known.one.component: known.one.config for known in self.known},
            component=self.component,
            is_pipeline=self.checkpoint.is_pipeline,
            is_alone=self.is_alone,
        )
        everything = self._entries(names, placed=self.layout == "original")
        written = [one for one in everything if self.component in (None, one.component)]
        if self.layout == "original":
            written += self._statistics({one.name for one in written})
        metadata = {"format": "pt"}
        if not self.checkpoint.is_pipeline:
            metadata = self.checkpoint.parts[0].view.metadata
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
        stream(written, out, metadata, dtype=self.dtype, caster=caster, on_tensor=self.on_tensor)
        return self._summary([out], written, self._lost(everything, written))

    def to_folders(self, out: Path, caster: Caster) -> Converted:
        """Each component in a folder, with its config."""
        everything = self._entries(_canonical, placed=False)
        folders = {
            n.one.component: out if self.is_alone else out / n.one.component for n in self.known
        }
        for network in self.known:
            check_in_diffusers(network.one.config, folders[network.one.component])
        files: list[Path] = []
        with _all_or_none(files, [*folders.values(), out]):
            for network in self.known:
                warn_if_open(network.one)
                folder = folders[network.one.component]
                own = [entry for entry in everything if entry.component == network.one.component]
                weights = folder / f"{DIFFUSERS_NAME}.safetensors"
                stream(
                    own,
                    weights,
                    {"format": "pt"},
                    dtype=self.dtype,
                    caster=caster,
                    on_tensor=self.on_tensor,
                )
                files.append(weights)
                files.insert(-1, write_config(network.one.config, folder))
        moved = [entry for entry in everything if entry.component in folders]
        in_config = any(n.one.config.get("latents_mean") is not None for n in self.known)
        rest = [e for e in everything if not (in_config and e.name in EDM_STATISTICS)]
        return self._summary(files, moved, left_over(rest))

    def _lost(
        self, everything: Sequence[OutputTensor], written: Sequence[OutputTensor]
    ) -> Mapping[str, int]:
        """Tensors under the prefix of a single component that are not written: losses and averages,
        which are not weights of the network."""
        names = {entry.pieces[0][1] for entry in written if entry.pieces}
        dropped = {name for known in self.known for name in known.one.found.dropped} - names
        return left_over(
            entry for entry in everything if self.component and entry.pieces[0][1] in dropped
        )

    def _statistics(self, written: Collection[str]) -> list[OutputTensor]:
        """The statistics of the latents as tensors, where single files of the family have them and
        the source has them in the VAE's config."""
        for known in self.known:
            config = known.one.config
            if not isinstance(config, AutoencoderKLConfig) or config.latents_mean is None:
                continue
            tensors = {k: v for k, v in edm_tensors(config).items() if k not in written}
            file = TensorsFile(known.part.view.source.label, tensors)
            return [
                OutputTensor(name=name, shape=tuple(tensor.shape), pieces=((file, name),))
                for name, tensor in tensors.items()
            ]
        return []

    @cached_property
    def is_alone(self) -> bool:
        """Whether one network is all that is written."""
        if self.component is not None:
            return True
        taken = {name for network in self.known for name in network.one.found.names.values()}
        return len(self.known) == 1 and all(
            not part.name and (name in taken or is_extra(name, part.view.shapes[name]))
            for part in self.checkpoint.parts
            for name in part.view.shapes
        )

    def _entries(self, renaming: Renaming, *, placed: bool) -> list[OutputTensor]:
        networks = [(network.part, network.one.found) for network in self.known]
        family = next((n.one.family for n in self.known if n.one.component == "unet"), None)
        return entries(self.checkpoint, networks, renaming, placed=placed, family=family)

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
            dequantised=sum(len(part.view.dequantised) for part in self.checkpoint.parts),
            pruned=dict(self.pruned),
            averaged=self.averaged,
        )


def _torch_name(dtype: str) -> str:
    """``float16`` for ``F16``."""
    return str(TORCH_DTYPES.get(dtype, dtype)).removeprefix("torch.")


def _canonical(found: DetectedNetwork, view: SourceView) -> Renamed:
    return {name: (name, shape) for name, shape in found.shapes(view.shapes).items()}
