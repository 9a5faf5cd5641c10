"""Features of one run in another (Tumanyan et al. 2023, https://arxiv.org/abs/2211.12572)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.editing import Context, edit
from sdconv.features.maps import Entry, Maps
from sdconv.features.recipes.unets import unet_of

# the block and layer on the way up of Stable Diffusion 1 at which the paper begins
_FIRST = (1, 1)


def plug_and_play_places(target: Any) -> list[str]:
    """The paper's places, to be captured from the source run: what the second ResNet block of the
    second level on the way up gives, and queries and keys of the self-attentions from there on.

    Args:
        target: a U-Net, or a pipeline that has one.

    Raises:
        InputError: the target has no U-Net.
    """
    prefix, network = unet_of(target)
    level, layer = _FIRST
    found = [f"{prefix}up_blocks.{level}.resnets.{layer}"]
    for name, _ in network.named_modules():
        if name.startswith("up_blocks.") and name.endswith(("attn1.to_q", "attn1.to_k")):
            _, level_of, _, layer_of, *_ = name.split(".")
            if (int(level_of), int(layer_of)) >= _FIRST:
                found.append(prefix + name)
    return found


def plug_and_play(target: Any, source: Maps) -> AbstractContextManager[None]:
    """Puts the maps of a run that was captured in the place of another run's: everything that was
    captured, in the calls in which it was. Injecting a run into itself changes nothing.

    The source has to be captured from the same kind of target, so that names and calls are the
    same. Where its batch is half as large, as that of a run without guidance, both halves get it.

    Args:
        target: a network or a pipeline.
        source: what ``sdconv.capture`` brought back, of ``plug_and_play_places(target)`` or any
            others; ``steps=`` there says in which calls they will be injected.

    Raises:
        InputError: the target has no such places.
        SdconvError: within the block, a call has another timestep than the source's, or a map
            another shape.
    """
    entries = {name: {entry.call: entry for entry in source.series(name)} for name in source}

    def inject(x: Tensor, context: Context) -> Tensor:
        entry = entries[context.name].get(context.step)
        return x if entry is None else _in_place_of(x, entry, context)

    return edit(target, dict.fromkeys(entries, inject))


def _in_place_of(x: Tensor, entry: Entry, context: Context) -> Tensor:
    if entry.timestep != context.timestep:
        raise SdconvError(
            "the source run was at another timestep in this call",
            where=f"{entry.name}, call {entry.call}",
            expected=f"timestep {entry.timestep}",
            got=context.timestep,
            hint="run both with the same scheduler and number of steps",
        )
    kept = entry.tensor.to(x.device, x.dtype)
    halves = 2 if context.of.guided and 2 * len(kept) == len(x) else 1
    return kept.repeat(halves, *(1,) * (x.ndim - 1))
