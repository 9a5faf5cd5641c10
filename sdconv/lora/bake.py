"""Baking LoRAs into a whole checkpoint: the file or folder again, with merged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdconv.checkpoint.changes import Change, Changes
from sdconv.checkpoint.components import Component, components_in
from sdconv.checkpoint.io.computed import Computed, ComputedFile, Place
from sdconv.checkpoint.io.source import Source
from sdconv.checkpoint.io.stream import OnTensor
from sdconv.checkpoint.open import Weights
from sdconv.checkpoint.rewrite import check_form, rewrite
from sdconv.checkpoint.whole import Checkpoint, opened
from sdconv.errors import InputError, WeightsMismatchError
from sdconv.lora.merge import checked_scale
from sdconv.lora.updates import Update, merged
from sdconv.lora.whole import read_whole_lora

Scaled = tuple[Update, float]
"""An update of a parameter, and the scale it is merged with."""


@dataclass(frozen=True, kw_only=True)
class Baked:
    """A summary of what ``bake_lora`` wrote.

    ``files``: with weights. ``changes``: by component, compared with the checkpoint. ``skipped``:
    by LoRA, the keys that were not used: of components that the checkpoint does not have, of
    embeddings, and such as repeat others. ``averages``: the number of running averages in the file,
    which are as they were. ``dequantised``: the number of scaled fp8 weights that are now float32.
    """

    files: tuple[Path, ...]
    changes: Mapping[str, Change]
    skipped: Mapping[str, tuple[str, ...]]
    averages: int = 0
    dequantised: int = 0


def bake_lora(
    checkpoint: Weights,
    loras: Weights | Sequence[Weights],
    out: str | Path,
    scales: float | Sequence[float] = 1.0,
    text_encoder_scales: float | Sequence[float] | None = None,
    *,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Baked:
    """Writes a checkpoint with LoRAs merged into its weights, one tensor after another.

    U-Net, VAE and CLIP text encoders get what the files have for them, as ``merge_lora`` merges it:
    ``weight + scale * alpha / rank * (up @ down)`` or the like of the other kinds, summed in
    float32 (in float64 for float64 weights) and rounded once to the dtype that the tensor has in
    the file.
    Every other tensor, every name and the metadata stay as they are. Nothing is written if anything
    does not fit.

    Args:
        checkpoint: a file or folder of a network, of a text encoder, or of a whole model, in either
            layout.
        loras: a file, the folder of a PEFT adapter, or a state dict; or a list of them, whose
            updates are summed.
        out: one file if the name ends in ``.safetensors``; any other name is a folder, if the
            checkpoint is one.
        scales: the strength of all, or a list with that of each; negative to subtract.
        text_encoder_scales: the same for text encoders; None for ``scales``.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read or written, or is not a LoRA.
        UnknownNetworkError: the checkpoint has no network that sdconv knows and no text encoder.
        WeightsMismatchError: a LoRA is for another network, or has nothing for this one.
        InputError: an argument has a value that is not allowed, or a merged weight overflows.

    Warns:
        SdconvWarning: a LoRA's alpha is unknown.
    """
    several = _several(loras)
    strengths = _strengths(scales, len(several), "scales")
    for_text = (
        strengths
        if text_encoder_scales is None
        else _strengths(text_encoder_scales, len(several), "text_encoder_scales")
    )
    with ExitStack() as stack:
        source = opened(checkpoint, stack)
        path, _ = check_form(source, out)
        components = {one.name: one for one in components_in(source)}
        shapes = {name: one.shapes for name, one in components.items()}
        planned: dict[tuple[str, str], list[Scaled]] = {}
        skipped: dict[str, tuple[str, ...]] = {}
        sources = []
        for lora, scale, text_scale in zip(several, strengths, for_text, strict=True):
            read = read_whole_lora(lora, shapes)
            if not read.updates:
                raise WeightsMismatchError(
                    "the LoRA has nothing for this checkpoint",
                    where=read.label,
                    expected=f"updates of {', '.join(components)}",
                    got=f"{len(read.skipped)} keys of other components",
                )
            skipped[read.label] = read.skipped
            sources.append(read.source)
            for key, update in read.updates.items():
                own = scale if components[key[0]].is_network else text_scale
                if own:  # 0 leaves even -0.0
                    planned.setdefault(key, []).append((update, own))
        changes = Changes()
        for name, component in components.items():
            updates = {k: v for (part, k), v in planned.items() if part == name}
            _substitute(source, component, updates, changes, sources)
        files = rewrite(source, path, on_tensor)
        return Baked(
            files=tuple(files),
            changes=changes.by_component,
            skipped={label: names for label, names in skipped.items() if names},
            averages=sum(len(found.ema) for _, found in source.networks()),
            dequantised=sum(len(part.view.dequantised) for part in source.parts),
        )


def _several(loras: Weights | Sequence[Weights]) -> list[Weights]:
    if isinstance(loras, str | Path | Mapping):
        return [loras]
    if not isinstance(loras, Sequence) or not loras:
        raise InputError("not LoRAs", where="loras", expected="one or more files", got=loras)
    return list(loras)


def _strengths(scales: float | Sequence[float], count: int, where: str) -> list[float]:
    if not isinstance(scales, Sequence):
        return [checked_scale(scales)] * count
    if len(scales) == 1:
        scales = list(scales) * count
    if len(scales) != count:
        raise InputError(
            "scales that are not one for each LoRA",
            where=where,
            expected=f"one for all, or {count}",
            got=f"{len(scales)}: {', '.join(map(str, scales))}",
        )
    return [checked_scale(one) for one in scales]


def _substitute(
    source: Checkpoint,
    component: Component,
    updates: Mapping[str, Sequence[Scaled]],
    changes: Changes,
    loras: Sequence[Source],
) -> None:
    """Puts merged tensors in the place of a component's; the LoRAs must not change meanwhile."""
    view = component.part.view
    by_stored: dict[str, dict[str, Sequence[Scaled]]] = {}
    for name, scaled in updates.items():
        by_stored.setdefault(component.tensors[name].name, {})[name] = scaled
    read_too = [(file, "") for lora in loras for file in lora.files]
    file = ComputedFile(
        source.label,
        {
            stored: Computed(
                shape=view.shapes[stored],
                dtype=view.dtype(stored),
                places=(view.home(stored), *read_too),
                compute=partial(_merged, component, view.home(stored), own, changes),
            )
            for stored, own in by_stored.items()
        },
    )
    view.substitute({stored: (file, stored) for stored in by_stored})


def _merged(
    component: Component,
    home: Place,
    updates: Mapping[str, Sequence[Scaled]],
    changes: Changes,
) -> Tensor:
    """A stored tensor with merged parts."""
    file, own = home
    before = file.tensor(own)
    result = before.clone(memory_format=torch.contiguous_format)
    for name, scaled in updates.items():
        part = component.slice(name, before)
        new = merged(name, part, scaled)
        changes.add(component.name, name, part, new)
        component.slice(name, result).copy_(new)
    return result
