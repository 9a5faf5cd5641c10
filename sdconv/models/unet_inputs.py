"""Checks the arguments of a U-Net's ``forward``, before any arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.config import UNet2DConditionConfig
from sdconv.errors import InputError
from sdconv.models.inputs import check_device, check_like, check_room, check_tensor

NAME = "UNet2DConditionModel"


def check_sample(
    config: UNet2DConditionConfig,
    part: nn.Module,
    sample: Any,
    timestep: Any,
    timestep_cond: Any,
    class_labels: Any,
) -> None:
    """Checks the latents, the timestep, and the conditions that are added to its embedding."""
    shape = f"(B, {config.in_channels}, H, W)"
    check_tensor(sample, "latents", NAME, shape)
    if sample.ndim != 4 or sample.shape[1] != config.in_channels or 0 in sample.shape:
        raise _wrong("latents have the wrong shape", shape, sample)
    check_like(sample, part, "latents", NAME)
    _check_smallest_feature_map(config, sample)
    _check_timestep(timestep, len(sample))
    _check_guidance(config, part, len(sample), timestep_cond)
    _check_labels(config, part, sample, class_labels)


def _check_smallest_feature_map(config: UNet2DConditionConfig, sample: Tensor) -> None:
    """Refuses latents that leave GroupNorm a single value in each group at some resolution."""
    channels = config.block_out_channels
    for level, pair in enumerate(zip((channels[0], *channels), channels, strict=False)):
        if min(pair) == config.norm_num_groups:
            height, width = (-(-side // 2**level) for side in sample.shape[2:])
            check_room(len(sample), height * width, min(pair), config.norm_num_groups, NAME)


def _check_timestep(timestep: Any, batch: int) -> None:
    expected = f"a number, or a tensor of shape (), (1,) or ({batch},)"
    if isinstance(timestep, Tensor):
        # While a graph for any size is traced these are symbols, which can only be compared.
        count = timestep.numel()
        if timestep.ndim > 1 or (count != 1 and count != batch):
            raise _wrong("timesteps have the wrong shape", expected, timestep)
        if timestep.is_complex() or timestep.dtype == torch.bool:
            raise _wrong("timesteps must be numbers", expected, timestep.dtype)
    elif not (torch.compiler.is_compiling() or isinstance(timestep, Real)):
        raise _wrong("timesteps must be numbers", expected, _kind(timestep))


def _check_guidance(
    config: UNet2DConditionConfig, part: nn.Module, batch: int, condition: Any
) -> None:
    """Checks a latent consistency model's ``timestep_cond``."""
    if condition is None:
        return
    width = config.time_cond_proj_dim
    expected = "None" if width is None else f"({batch}, {width})"
    if not isinstance(condition, Tensor) or width is None or condition.shape[-1:] != (width,):
        raise _wrong("timestep_cond does not fit this U-Net", expected, condition)
    check_like(condition, part, "timestep_cond", NAME)


def _check_labels(
    config: UNet2DConditionConfig, part: nn.Module, sample: Tensor, labels: Any
) -> None:
    shape: tuple[int | None, ...] | None = None
    if config.class_embed_type is not None:
        shape = (len(sample), config.projection_class_embeddings_input_dim)
    elif config.num_class_embeds is not None:
        shape = (len(sample),)
    given = tuple(labels.shape) if isinstance(labels, Tensor) else labels
    if shape is None:
        if labels is not None:
            raise _wrong("class_labels do not fit this U-Net", "None", labels)
        return
    if not isinstance(labels, Tensor) or given != shape:
        raise _wrong("class_labels do not fit this U-Net", shape, labels)
    if config.class_embed_type is not None:
        check_like(labels, part, "class_labels", NAME)
        return
    if labels.dtype not in (torch.int64, torch.int32):
        raise _wrong("class_labels must be whole numbers", "torch.int64", labels.dtype)
    check_device(labels, sample.device, part, "class_labels", NAME)


def check_text(config: UNet2DConditionConfig, part: nn.Module, batch: int, text: Any) -> None:
    """Checks the prompt embedding."""
    widths = sorted(set(config.context_dims))
    expected = f"({batch}, tokens, {' or '.join(map(str, widths))})"
    fits = isinstance(text, Tensor) and text.ndim == 3
    if not (fits and len(text) == batch and text.shape[2] in widths and text.shape[1]):
        raise _wrong("encoder_hidden_states have the wrong shape", expected, text)
    check_like(text, part, "encoder_hidden_states", NAME)


def check_added(
    config: UNet2DConditionConfig, part: nn.Module, sample: Tensor, added: Any, images: bool
) -> None:
    """Checks ``added_cond_kwargs``: SDXL's, and an IP-Adapter's if ``images``."""
    sized = config.addition_embed_type is not None
    names = {"text_embeds", "time_ids"} if sized else set()
    names |= {"image_embeds"} if images else set()
    wanted = ", ".join(sorted(names)) or "none"
    if not isinstance(added, Mapping):
        raise _wrong("added_cond_kwargs must be a dictionary", wanted, _kind(added))
    if set(added) != names:
        raise _wrong(
            "added_cond_kwargs do not fit this U-Net",
            wanted,
            ", ".join(sorted(map(str, added))) or "none",
        )
    if not sized:
        return
    text, numbers = (
        check_tensor(added[name], f"added_cond_kwargs: {name}", NAME, shape)
        for name, shape in (("text_embeds", "(B, C)"), ("time_ids", "(B, n)"))
    )
    batch = len(sample)
    width, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim or 0
    if (
        text.ndim != 2
        or len(text) != batch
        or batch * text.shape[1] + each * numbers.numel() != batch * (width or 0)
    ):
        raise _wrong(
            "added_cond_kwargs have the wrong shapes",
            f"text_embeds ({batch}, C) and time_ids ({batch}, n) with C + {each} n = {width}",
            f"{tuple(text.shape)} and {tuple(numbers.shape)}",
        )
    for name in ("text_embeds", "time_ids"):
        check_device(added[name], sample.device, part, f"added_cond_kwargs: {name}", NAME)


def check_residuals(config: UNet2DConditionConfig, down: Any, mid: Any, adapter: Any) -> None:
    """Checks the residuals of a ControlNet, ``down`` and ``mid``, and those of a T2I-Adapter."""
    for given in (down, adapter):
        several = isinstance(given, list | tuple)
        if given is not None and not (several and all(isinstance(one, Tensor) for one in given)):
            raise _wrong("residuals must be a list of tensors", "a list or a tuple", _kind(given))
    if mid is not None:
        check_tensor(mid, "mid_block_additional_residual", NAME, "(B, C, H, W)")
    if (down is None) != (mid is None):
        # diffusers takes `down` alone for a T2I-Adapter's, with a warning of deprecation.
        raise _wrong(
            "a ControlNet's residuals must be passed together",
            "down_block_additional_residuals and mid_block_additional_residual",
            "one without the other",
            "pass a T2I-Adapter's as down_intrablock_additional_residuals",
        )
    channels, skips = config.block_out_channels, _skip_channels(config)
    if down is not None and len(down) != len(skips):
        raise _wrong(
            "the ControlNet's residuals do not fit this U-Net", f"{len(skips)}", f"{len(down)}"
        )
    most = len(channels) + (config.mid_block_type is not None)
    if len(adapter or ()) > most:
        raise _wrong(
            "the T2I-Adapter's residuals do not fit this U-Net",
            f"at most {most}",
            f"{len(adapter)}",
        )
    if down is not None:
        _check_channels("ControlNet's", (*down, mid), (*skips, channels[-1]))
    _check_channels("T2I-Adapter's", adapter or (), (*channels, channels[-1]))


def _skip_channels(config: UNet2DConditionConfig) -> list[int]:
    """Returns the channels of each skip connection, in the order of the down path."""
    channels = config.block_out_channels
    # one after each layer, and one after the downsampling that the last stage lacks
    levels = zip(channels, config.layers, strict=True)
    own = [count for count, layers in levels for _ in range(layers + 1)]
    return [channels[0], *own[:-1]]


def _check_channels(whose: str, residuals: Sequence[Tensor], channels: Sequence[int]) -> None:
    for number, (residual, count) in enumerate(zip(residuals, channels, strict=False)):
        # A single channel is broadcast.
        if residual.ndim != 4 or (residual.shape[1] != count and residual.shape[1] != 1):
            raise _wrong(
                f"the {whose} residuals do not fit: number {number} has the wrong channels",
                f"(B, {count}, H, W)",
                residual,
            )


def check_attention(masks: Mapping[str, Any], kwargs: Mapping[str, Any] | None) -> None:
    """Checks the attention masks, and refuses GLIGEN in ``cross_attention_kwargs``; the attention
    processors check the rest."""
    for name, mask in masks.items():
        if mask is not None:
            check_tensor(mask, name, NAME, "(B, tokens)")
    if kwargs and "gligen" in kwargs:
        raise _wrong("GLIGEN is not supported", "no such entry", "gligen")


def _wrong(what: str, expected: object, got: Any, hint: str | None = None) -> InputError:
    shown = got
    if isinstance(got, Tensor):
        shown = tuple(got.shape)
    elif not isinstance(got, str | torch.dtype):
        shown = _kind(got)
    return InputError(what, where=NAME, expected=str(expected), got=str(shown), hint=hint)


def _kind(given: object) -> str:
    return "None" if given is None else f"a {type(given).__name__}"
