"""Lists all tensors of a checkpoint, under new names, to be written to one file or folder.

A checkpoint is a file with one network or with a whole model, or the folder of a pipeline, whose
subfolders are its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.find import main_network
from sdconv.checkpoint.identify.unet import family_of_width
from sdconv.checkpoint.io.files import read_json
from sdconv.checkpoint.io.folder import Folder, folder_at
from sdconv.checkpoint.io.source import open_files, open_folder
from sdconv.checkpoint.io.stream import OutputTensor
from sdconv.checkpoint.io.tensor_files import TensorsFile
from sdconv.checkpoint.keys.clip import POSITIONS, TRANSPOSED, long_name, open_clip_names
from sdconv.checkpoint.open import COMPONENTS, SourceView, Weights, network_folders
from sdconv.errors import CheckpointError, UnknownNetworkError


@dataclass(frozen=True, eq=False, kw_only=True)
class Part:
    """One source of a checkpoint; ``name`` is a pipeline's component, or empty."""

    name: str
    view: SourceView

    def entry(
        self,
        name: str,
        pieces: Sequence[str],
        shape: tuple[int, ...] | None = None,
        component: str | None = None,
    ) -> OutputTensor:
        """A tensor made of this part's tensors; its shape is the first one's if none is given."""
        return OutputTensor(
            name=name,
            shape=self.view.shapes[pieces[0]] if shape is None else shape,
            pieces=tuple(self.view.home(piece) for piece in pieces),
            component=component,
        )


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An open checkpoint; ``label`` names it in messages. ``folder``: the one that it is in, or
    None for a file and for tensors in memory."""

    label: str
    parts: tuple[Part, ...]
    folder: Path | None = None

    @property
    def is_pipeline(self) -> bool:
        """Whether its parts are the components of a pipeline."""
        return any(part.name for part in self.parts)

    def networks(self) -> Iterator[tuple[Part, DetectedNetwork]]:
        """The networks that sdconv knows, with the part that holds each; in a pipeline, only those
        in the folder of their component."""
        for part in self.parts:
            if part.name in ("", *COMPONENTS):
                for found in part.view.networks:
                    if part.name in ("", found.component):
                        yield part, found


Renamed = Mapping[str, tuple[str, tuple[int, ...]]]
"""diffusers' name of each tensor of a network -> its new name and shape."""

Renaming = Callable[[DetectedNetwork, SourceView], Renamed]


def opened(path: Weights, stack: ExitStack, component: str | None = None) -> Checkpoint:
    """Opens a checkpoint; ``stack`` closes it.

    Args:
        path: as for ``sdconv.load``, or the folder of a pipeline.
        component: the only component of a pipeline to open; None for all.

    Raises:
        CheckpointError: something cannot be read as weights.
        InputError: ``path`` is not a path.
    """
    folder = folder_at(path)
    if folder is None:
        source = stack.enter_context(open_files(path))
    elif folder.is_pipeline or network_folders(folder):
        there = _listed_components(folder)
        if not there:
            raise CheckpointError(
                "is a pipeline without weights",
                where=folder.path,
                expected="a folder with weights for each component in model_index.json",
                hint="download the folder again, with its weights",
            )
        if component not in (None, *there):
            raise UnknownNetworkError(
                f"there is no component {component!r}",
                where=folder.path,
                expected=repr(component),
                got=", ".join(there),
            )
        parts = tuple(
            Part(name=name, view=SourceView(stack.enter_context(open_folder(one))))
            for name, one in there.items()
            if component in (None, name)
        )
        return Checkpoint(label=str(folder.path), parts=parts, folder=folder.path)
    else:
        source = stack.enter_context(open_folder(folder))
    return Checkpoint(
        label=source.label,
        parts=(Part(name="", view=SourceView(source)),),
        folder=None if folder is None else folder.path,
    )


def _listed_components(folder: Folder) -> dict[str, Folder]:
    """The folders with weights, except those that the pipeline's index leaves out."""
    if not folder.is_pipeline:
        return folder.components
    listed = read_json(folder.path / "model_index.json")
    return {name: one for name, one in folder.components.items() if name in listed}


def entries(
    checkpoint: Checkpoint,
    networks: Iterable[tuple[Part, DetectedNetwork]],
    renaming: Renaming,
    *,
    placed: bool,
    family: str | None = None,
) -> list[OutputTensor]:
    """Every tensor of a checkpoint once: those of ``networks`` renamed, the others unchanged.

    The other tensors of a pipeline have their component's name as a prefix (``safety_checker.``).
    Scales that were multiplied into their weights are left out.

    Args:
        checkpoint: open.
        networks: those to rename.
        renaming: returns their new names and shapes.
        placed: whether text encoders get the names and the layout of original files.
        family: the U-Net's, which decides what those are; None to read it from its shapes.
    """
    networks = list(networks)
    places = _text_places(networks, checkpoint.parts, family) if placed else {}
    result: list[OutputTensor] = []
    for part in checkpoint.parts:
        taken: set[str] = set()
        for found in (found for home, found in networks if home is part):
            taken |= set(found.names.values())
            for canonical, (name, shape) in renaming(found, part.view).items():
                stored = found.names[canonical]
                result.append(part.entry(name, [stored], shape, found.component))
        text = _text(part, places[part.name]) if part.name in places else []
        prefix = f"{part.name}." if part.name else ""
        taken |= part.view.companions
        rest = [name for name in part.view.shapes if name not in taken]
        result += text or [part.entry(prefix + name, [name]) for name in rest]
    return result


def by_common_name(checkpoint: Checkpoint, *, placed: bool = True) -> dict[str, OutputTensor]:
    """Every tensor by a name that does not depend on the layout: ``unet.`` or ``vae.`` and
    diffusers' name for the networks, their own for others. Scaled fp8 weights are multiplied.

    Args:
        checkpoint: open.
        placed: whether a pipeline's text encoders go by the names of original files.

    Raises:
        CheckpointError: two tensors have the same name.
    """
    single = []
    for kind in COMPONENTS:
        several = [(part, one) for part, one in checkpoint.networks() if one.component == kind]
        # where it is not clear which one is the checkpoint's own, all keep their own names
        own = main_network([one for _, one in several]) if len(several) > 1 else None
        single += [
            (part, part.view.dequantise(one))
            for part, one in several
            if one is own or len(several) == 1
        ]
    named: dict[str, OutputTensor] = {}
    for entry in entries(checkpoint, single, _by_component, placed=placed):
        if entry.name in named:
            raise CheckpointError(
                f"two tensors would be compared as {entry.name}",
                where=checkpoint.label,
                got=" and ".join(one.pieces[0][1] for one in (named[entry.name], entry)),
            )
        named[entry.name] = entry
    return named


def _by_component(found: DetectedNetwork, view: SourceView) -> Renamed:
    shapes = found.shapes(view.shapes)
    return {name: (f"{found.component}.{name}", shape) for name, shape in shapes.items()}


def left_over(found: Iterable[OutputTensor]) -> dict[str, int]:
    """The number of tensors that belong to no known component, by the first word of their names;
    names of a single word are counted under the empty string."""
    counts: dict[str, int] = {}
    for entry in found:
        if entry.component is None:
            first, _, more = entry.name.partition(".")
            counts[first if more else ""] = counts.get(first if more else "", 0) + 1
    return counts


@dataclass(frozen=True)
class _TextPlace:
    """Where an original file has a text encoder: its prefix, and whether in OpenCLIP's layout."""

    prefix: str
    is_open_clip: bool


_TEXT_PLACES: Mapping[str, Mapping[str, _TextPlace]] = {
    "sd1": {"text_encoder": _TextPlace("cond_stage_model.transformer.", False)},
    "sd2": {"text_encoder": _TextPlace("cond_stage_model.model.", True)},
    "sdxl": {
        "text_encoder": _TextPlace("conditioner.embedders.0.transformer.", False),
        "text_encoder_2": _TextPlace("conditioner.embedders.1.model.", True),
    },
    "sdxl-refiner": {"text_encoder_2": _TextPlace("conditioner.embedders.0.model.", True)},
}


# families whose text encoder is another one's, in the same place
_SAME_TEXT: Mapping[str, str] = {"x4-upscaler": "sd2"}


def _text_places(
    networks: Sequence[tuple[Part, DetectedNetwork]], parts: Sequence[Part], family: str | None
) -> Mapping[str, _TextPlace]:
    """The place of each text encoder in an original file; the pipeline's U-Net decides it."""
    for part, found in networks:
        if found.component == "unet" and part.name:
            if "add_embedding.linear_1.weight" in found.names:
                both = any(one.name == "text_encoder" for one in parts)
                return _TEXT_PLACES["sdxl" if both else "sdxl-refiner"]
            if family not in _TEXT_PLACES and family not in _SAME_TEXT:
                family = _read_family(found.shapes(part.view.shapes))
            return _TEXT_PLACES[_SAME_TEXT.get(family or "", family or "sd1")]
    return {}


def _read_family(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The family of a U-Net by diffusers' names of its tensors."""
    linear = any(len(v) == 2 for k, v in shapes.items() if k.endswith(".proj_in.weight"))
    widths = [v[-1] for k, v in shapes.items() if k.endswith(".attn2.to_k.weight") and v]
    return family_of_width(widths[0] if widths else None, linear)


def _text(part: Part, place: _TextPlace) -> list[OutputTensor]:
    """A CLIP text encoder's tensors as an original file has them; empty if it is not such an
    encoder."""
    made = open_clip_names(part.view.shapes)
    if made is None:
        return []
    if not place.is_open_clip:
        pairs = ((place.prefix + long_name(name), name) for name in part.view.shapes)
        written = (
            _positions(part, new, old)
            if old.endswith(POSITIONS)
            else part.entry(new, [old], component=part.name)
            for new, old in pairs
        )
        return [entry for entry in written if entry is not None]
    result = []
    for name, pieces in made.items():
        transposed = name == TRANSPOSED
        shape = _joined([part.view.shapes[piece] for piece in pieces])
        if shape is None or (transposed and len(shape) != 2):
            return []
        entry = part.entry(place.prefix + name, pieces, shape, part.name)
        result.append(replace(entry, shape=shape[::-1], transposed=True) if transposed else entry)
    return result


def _positions(part: Part, new: str, old: str) -> OutputTensor | None:
    """The numbers of the positions, as integers also where merging has made them floats
    (40.9999); None if they are not 0, 1, 2, ..., which every reader assumes anyway."""
    if not part.view.dtype(old).startswith(("F", "BF")):
        return part.entry(new, [old], component=part.name)
    rounded = part.view.tensor(old).double().round().to(torch.int64)
    if not torch.equal(rounded.flatten(), torch.arange(rounded.numel())):
        return None
    file = TensorsFile(part.view.source.label, {old: rounded})
    return OutputTensor(
        name=new, shape=tuple(rounded.shape), pieces=((file, old),), component=part.name
    )


def _joined(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of tensors concatenated along their rows; None if they do not fit."""
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        return None
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])
