"""Averages checkpoints, tensor by tensor, without holding them in memory."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path

import torch
from torch import Tensor

from sdconv.checkpoint.changes import Change, Changes, same_values
from sdconv.checkpoint.components import (
    Component,
    components_of,
    dequantise_rest,
    text_encoders,
)
from sdconv.checkpoint.identify.other_names import is_constant, is_mark
from sdconv.checkpoint.io.computed import Computed, ComputedFile
from sdconv.checkpoint.io.narrow import Caster
from sdconv.checkpoint.io.stream import OnTensor, OutputTensor
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES
from sdconv.checkpoint.open import Weights
from sdconv.checkpoint.rewrite import check_form, rewrite
from sdconv.checkpoint.whole import Checkpoint, by_common_name, opened
from sdconv.errors import InputError, SdconvError, SdconvWarning, WeightsMismatchError

Shares = Sequence[float]
"""One number for each checkpoint, 1 in all."""

_AT_MOST = 4  # names in a message


@dataclass(frozen=True, kw_only=True)
class Averaged:
    """A summary of what ``average`` wrote.

    ``files``: with weights. ``shares``: of each checkpoint, by component. ``averaged``: the number
    of tensors, by component. ``changes``: compared with the first checkpoint. ``taken``: the names
    of tensors that differ and were taken from the first checkpoint: integers, and constants of the
    noise schedule. ``dequantised``: the number of scaled fp8 weights that are now float32.
    """

    files: tuple[Path, ...]
    shares: Mapping[str, tuple[float, ...]]
    averaged: Mapping[str, int]
    changes: Mapping[str, Change]
    taken: tuple[str, ...]
    dequantised: int


def average(
    checkpoints: Sequence[Weights],
    out: str | Path,
    shares: Shares | None = None,
    component_shares: Mapping[str, Shares] | None = None,
    *,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Averaged:
    """Writes the weighted average of checkpoints, in the form and with the names of the first.

    Each floating-point tensor becomes ``sum(share * tensor)``, summed in float32 (in float64 for
    float64 tensors) and rounded once to the first checkpoint's dtype; where all are equal, it keeps
    its bits. Integers (``position_ids``) and constants (noise schedules, ``edm_mean``) are those
    of the first. The others may have any layout and dtype, text encoders too, if they hold the
    same tensors.

    Args:
        checkpoints: two or more, each a file or folder of a network or of a whole model.
        out: one file if the name ends in ``.safetensors``; any other name is a folder, if the first
            checkpoint is one.
        shares: one number for each checkpoint, 1 in all; None for equal ones. They may be negative.
        component_shares: the same for single components: ``"unet"``, ``"vae"``,
            ``"text_encoder"``, ``"text_encoder_2"``, another part of the pipeline, or the first
            word of the names.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read or written, or a sum is too large for its dtype.
        WeightsMismatchError: the checkpoints do not hold the same tensors in the same shapes.
        InputError: an argument has a value that is not allowed.

    Warns:
        SdconvWarning: the VAEs' files say that their latents have different scales, or only some of
            the checkpoints have a mark such as ``v_pred``.
    """
    count = len(checkpoints)
    if isinstance(checkpoints, str | Path) or count < 2:
        raise InputError(
            "an average takes several checkpoints",
            where="checkpoints",
            expected="two or more",
            got=checkpoints if isinstance(checkpoints, str | Path) else count,
        )
    usual = _checked([1 / count] * count if shares is None else shares, count, "shares")
    own = {
        name: _checked(value, count, f"shares of {name}")
        for name, value in (component_shares or {}).items()
    }
    with ExitStack() as stack:
        opens = [opened(one, stack) for one in checkpoints]
        first = opens[0]
        path, _ = check_form(first, out)
        for one in opens:
            dequantise_rest(one)
        named = [by_common_name(one, placed=False) for one in opens]
        for other, theirs in zip(opens[1:], named[1:], strict=True):
            for encoder in text_encoders(first):
                _lay_out(encoder, named[0], other, theirs)
        _check_fit(opens, named)
        _warn_of_scales(opens)
        _warn_of_marks(opens, named)
        components = components_of(first)
        job = _Job(first, components, usual, own, Changes(), Caster(first.label), {}, [])
        job.plan([[one[name] for one in named if name in one] for name in named[0]])
        if unknown := set(own) - set(job.counts):
            raise InputError(
                "a share for a component that the checkpoint does not have",
                where=first.label,
                expected=", ".join(sorted(job.counts)),
                got=", ".join(sorted(unknown)),
            )
        files = rewrite(first, path, on_tensor)
        return Averaged(
            files=tuple(files),
            shares={one: own.get(one, usual) for one in job.counts},
            averaged=job.counts,
            changes=job.changes.by_component,
            taken=tuple(job.taken),
            dequantised=sum(len(part.view.dequantised) for part in first.parts),
        )


@dataclass(frozen=True)
class _Job:
    """An average: where the tensors are that go into it, and what was done so far."""

    first: Checkpoint
    components: Mapping[tuple[str, str], str]
    usual: tuple[float, ...]
    own: Mapping[str, tuple[float, ...]]
    changes: Changes
    caster: Caster
    counts: dict[str, int]
    taken: list[str]

    def plan(self, tensors: Sequence[Sequence[OutputTensor]]) -> None:
        """Puts averages in the place of the first checkpoint's tensors.

        Args:
            tensors: each as every checkpoint has it, the first one's first.
        """
        owners = {
            (id(file), own): (part, name)
            for part in self.first.parts
            for name in part.view.shapes
            for file, own in [part.view.home(name)]
        }
        planned: dict[str, dict[str, Computed]] = {}
        for several in tensors:
            ((file, own),) = several[0].pieces
            part, name = owners[id(file), own]
            if not _is_averaged(several[0]):
                if _differ(several):
                    self.taken.append(name)
                continue
            component = self.components[part.name, name]
            self.counts[component] = self.counts.get(component, 0) + 1
            shares = self.own.get(component, self.usual)
            shape = part.view.shapes[name]
            planned.setdefault(part.name, {})[name] = Computed(
                shape=shape,
                dtype=several[0].dtype,
                places=tuple(place for one in several for place in one.pieces),
                compute=partial(self._average, name, component, shares, tuple(several), shape),
            )
        for part in self.first.parts:
            made = ComputedFile(self.first.label, planned.get(part.name, {}))
            part.view.substitute({name: (made, name) for name in made.entries})

    def _average(
        self,
        name: str,
        component: str,
        shares: tuple[float, ...],
        several: Sequence[OutputTensor],
        shape: tuple[int, ...],
    ) -> Tensor:
        before, *others = (one.tensor() for one in several)
        if all(same_values(before, one) for one in others):
            return before.reshape(shape)
        wide = torch.float64 if before.dtype == torch.float64 else torch.float32
        pairs = [(s, t) for s, t in zip(shares, (before, *others), strict=True) if s != 0]
        total = sum(starmap(lambda share, tensor: tensor.to(wide) * share, pairs))
        assert isinstance(total, Tensor)
        result = self.caster.cast(total, before.dtype, name)
        self.changes.add(component, name, before, result)
        return result.reshape(shape)


def _checked(shares: Shares, count: int, where: str) -> tuple[float, ...]:
    try:
        values = tuple(float(one) for one in shares)
    except (TypeError, ValueError) as error:
        raise InputError("not numbers", where=where, expected=f"{count}", got=shares) from error
    if len(values) != count or not abs(math.fsum(values) - 1) <= 1e-6:
        raise InputError(
            "shares that are not one for each checkpoint, 1 in all",
            where=where,
            expected=f"{count} numbers whose sum is 1",
            got=", ".join(f"{one:g}" for one in values) + f"; their sum is {math.fsum(values):g}",
        )
    return values


def _is_averaged(one: OutputTensor) -> bool:
    dtype = TORCH_DTYPES.get(one.dtype)
    return dtype is not None and dtype.is_floating_point and not is_constant(one.name, one.shape)


def _counts(name: str, one: OutputTensor) -> bool:
    """Whether a tensor that only one checkpoint has is missed in the other; what contrastive
    training left in a text encoder, which no prompt embedding depends on, is not."""
    return _is_averaged(one) and not name.endswith((".logit_scale", ".attn_mask"))


def _lay_out(
    encoder: Component,
    ours: Mapping[str, OutputTensor],
    other: Checkpoint,
    theirs: dict[str, OutputTensor],
) -> None:
    """Gives a text encoder of another checkpoint the first one's names and layout.

    Args:
        encoder: the first checkpoint's.
        ours, theirs: every tensor of the first and of the other checkpoint by its common name; the
            latter is changed if its text encoder has another layout.
    """
    view = encoder.part.view
    names: dict[str, list[str]] = {}  # of what each stored tensor holds
    for name, stored in encoder.tensors.items():
        names.setdefault(stored.name, []).append(name)
    by_place = {one.pieces[0]: key for key, one in ours.items()}
    keys = {stored: by_place[view.home(stored)] for stored in names}
    twins = [one for one in text_encoders(other) if one.name == encoder.name]
    if len(twins) != 1 or set(keys.values()) <= set(theirs):
        return
    (twin,) = twins
    if twin.shapes != encoder.shapes:  # the error lists what differs
        return
    home = twin.part.view.home
    gone = {home(stored.name) for stored in twin.tensors.values()}
    for key in [key for key, one in theirs.items() if one.pieces[0] in gone]:
        del theirs[key]
    file = ComputedFile(
        other.label,
        {
            stored: Computed(
                shape=view.shapes[stored],
                dtype=twin.part.view.dtype(twin.tensors[own[0]].name),
                places=tuple(home(twin.tensors[name].name) for name in own),
                compute=partial(_laid_out, encoder, twin, own, view.shapes[stored]),
            )
            for stored, own in names.items()
        },
    )
    for place, key in keys.items():
        theirs[key] = replace(ours[key], pieces=((file, place),), component=twin.name)


def _laid_out(
    encoder: Component, twin: Component, names: Sequence[str], shape: tuple[int, ...]
) -> Tensor:
    """A tensor that holds what ``twin`` has of these names, as ``encoder`` stores it."""
    tensors = [twin.tensor(name) for name in names]
    result = torch.empty(shape, dtype=tensors[0].dtype)
    for name, tensor in zip(names, tensors, strict=True):
        encoder.slice(name, result).copy_(tensor)
    return result


def _warn_of_scales(opens: Sequence[Checkpoint]) -> None:
    """Warns of VAEs whose latents have different scales, as far as their files say so.

    Warns:
        SdconvWarning: there are some.
    """
    scales: dict[str, str] = {}
    for one in opens:
        for part in one.parts:
            if part.name not in ("", "vae"):
                continue
            with suppress(SdconvError):
                for known in part.view.identify(None, "vae"):
                    if not known.open_to and "scaling_factor" in known.config:
                        factors = (known.config["scaling_factor"], known.config.get("shift_factor"))
                        scales[one.label] = " with shift ".join(str(f) for f in factors if f)
    if len(set(scales.values())) > 1:
        said = ", ".join(f"{label}: {scale}" for label, scale in scales.items())
        what = f"these VAEs scale their latents differently ({said}); the first one's scale is kept"
        warnings.warn(SdconvWarning(what), stacklevel=3)


def _warn_of_marks(
    opens: Sequence[Checkpoint], named: Sequence[Mapping[str, OutputTensor]]
) -> None:
    """Warns of marks, such as that of v-prediction, that only some of the checkpoints have.

    Warns:
        SdconvWarning: there are some.
    """
    marks = {k for tensors in named for k in tensors if is_mark(k)}
    for mark in sorted(marks):
        if lacking := [o.label for o, has in zip(opens, named, strict=True) if mark not in has]:
            warnings.warn(
                SdconvWarning(
                    f"only some of these checkpoints are marked {mark}, which says how they are "
                    f"used; {', '.join(lacking)} is not. What the first says is kept"
                ),
                stacklevel=3,
            )


def _differ(several: Sequence[OutputTensor]) -> bool:
    """Whether the tensors have different values; those differ whose dtype torch lacks."""
    if len(several) < 2 or len({one.shape for one in several}) > 1:
        return len(several) > 1
    if not all(one.dtype in TORCH_DTYPES for one in several):
        return True
    first, *others = (_real(one.tensor()) for one in several)
    return not all(same_values(first, one) for one in others)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _check_fit(opens: Sequence[Checkpoint], named: Sequence[Mapping[str, OutputTensor]]) -> None:
    """Refuses checkpoints with other tensors than the first, or the same in other shapes."""
    first, *others = named
    for checkpoint, theirs in zip(opens[1:], others, strict=True):
        only_first = [k for k, v in first.items() if k not in theirs and _counts(k, v)]
        only_other = [k for k, v in theirs.items() if k not in first and _counts(k, v)]
        other_shape = [
            f"{k} {first[k].shape} and {theirs[k].shape}"
            for k in first
            if k in theirs and first[k].shape != theirs[k].shape and _is_averaged(first[k])
        ]
        found = {
            "only in the first": only_first,
            "only in the other": only_other,
            "of another shape": other_shape,
        }
        if any(found.values()):
            raise WeightsMismatchError(
                f"the checkpoints do not fit: {checkpoint.label} does not hold the same tensors",
                where=opens[0].label,
                expected="the same tensors in the same shapes",
                got="; ".join(
                    f"{len(names)} {what}: {', '.join(names[:_AT_MOST])}"
                    for what, names in found.items()
                    if names
                ),
                hint="`sdconv diff` lists everything; `sdconv convert --prune` leaves out what "
                "only training needs, such as running averages",
            )
