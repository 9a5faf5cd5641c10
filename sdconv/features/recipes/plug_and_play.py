"""Plug-and-play (Tumanyan et al. 2023, https://arxiv.org/abs/2211.12572): feature maps of one run
injected into another."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.editing import Context, edit
from sdconv.features.maps import CapturedMap, Maps
from sdconv.features.targets import unet_of

# block and layer of Stable Diffusion 1's up path at which the paper begins
_FIRST = (1, 1)


def plug_and_play_places(target: Any) -> list[str]:
    """The hook points of the paper, to be captured from the source run: the output of the second
    ResNet block of the second level of the up path, and queries and keys of the self-attentions
    from there on.

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
    """Replace feature maps by those captured from a source run: everything that was captured, in
    the same calls. Injecting a run into itself changes nothing.

    The source must be captured from the same kind of target, so that names and calls agree. If its
    batch is half as large, as in a run without guidance, both halves get it.

    Args:
        target: a network or a pipeline.
        source: captured by ``sdconv.capture`` at ``plug_and_play_places(target)`` or any other hook
            points; its ``steps=`` are the calls that are injected.

    Raises:
        InputError: the target does not have these hook points.
        SdconvError: inside the block, a call has another timestep than the source's, or a feature
            map has another shape.
    """
    captured = {name: {one.call: one for one in source.series(name)} for name in source}

    def inject(x: Tensor, context: Context) -> Tensor:
        one = captured[context.name].get(context.step)
        return x if one is None else _replacement(x, one, context)

    return edit(target, dict.fromkeys(captured, inject))


def _replacement(x: Tensor, captured: CapturedMap, context: Context) -> Tensor:
    if captured.timestep != context.timestep:
        raise SdconvError(
            "the source run was at another timestep in this call",
            where=f"{captured.name}, call {captured.call}",
            expected=f"timestep {captured.timestep}",
            got=context.timestep,
            hint="run both with the same scheduler and number of steps",
        )
    kept = captured.tensor.to(x.device, x.dtype)
    halves = 2 if context.network_call.guided and 2 * len(kept) == len(x) else 1
    return kept.repeat(halves, *(1,) * (x.ndim - 1))
