"""Checks the arguments of a U-Net's ``forward``, before any arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.config import UNet2DConditionConfig
from sdconv.config.unet import DOWN
from sdconv.errors import InputError
from sdconv.models.base import check_device, check_like, check_room, check_tensor

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
    for level, pair in enumerate(pairwise((channels[0], *channels))):
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
    fits = isinstance(condition, Tensor) and width is not None
    if not fits or condition.shape not in ((batch, width), (1, width), (width,)):
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


def check_residuals(
    config: UNet2DConditionConfig, sample: Tensor, down: Any, mid: Any, adapter: Any
) -> None:
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
    channels, skips = config.block_out_channels, _skip_shapes(config, sample)
    if down is not None and len(down) != len(skips):
        raise _wrong(
            "the ControlNet's residuals do not fit this U-Net", f"{len(skips)}", f"{len(down)}"
        )
    most = len(channels) + 1  # the mid block's, which does not have to fit
    if len(adapter or ()) > most:
        raise _wrong(
            "the T2I-Adapter's residuals do not fit this U-Net",
            f"at most {most}",
            f"{len(adapter)}",
        )
    if down is not None:
        _check_shapes("ControlNet's", (*down, mid), (*skips, skips[-1]), len(sample))
    _check_shapes("T2I-Adapter's", adapter or (), _adapter_shapes(config, sample), len(sample))


# channels, rows, columns
_Shape = tuple[int, int, int]


def _level_shapes(config: UNet2DConditionConfig, sample: Tensor) -> list[_Shape]:
    """The feature map of each level, before its downsampling."""
    height, width = sample.shape[2:]
    shapes = []
    for channels in config.block_out_channels:
        shapes.append((channels, height, width))
        height, width = (height + 1) // 2, (width + 1) // 2
    return shapes


def _skip_shapes(config: UNet2DConditionConfig, sample: Tensor) -> list[_Shape]:
    """Each skip connection, in the order of the down path."""
    levels = _level_shapes(config, sample)
    shapes = [levels[0]]
    for number, (level, layers) in enumerate(zip(levels, config.layers, strict=True)):
        shapes += [level] * layers
        if number < len(levels) - 1:  # after the downsampling, which the last stage lacks
            shapes.append((level[0], *levels[number + 1][1:]))
    return shapes


def _adapter_shapes(config: UNet2DConditionConfig, sample: Tensor) -> list[_Shape]:
    """What each residual of a T2I-Adapter is added to: in stages with transformers, before the
    downsampling; in others, after it."""
    levels = _level_shapes(config, sample)
    shapes = []
    for number, level in enumerate(levels):
        after = config.down_block_types[number] == DOWN
        size = levels[min(number + after, len(levels) - 1)][1:]
        shapes.append((level[0], *size))
    return shapes


def _check_shapes(
    whose: str, residuals: Sequence[Tensor], shapes: Sequence[_Shape], batch: int
) -> None:
    for number, (residual, shape) in enumerate(zip(residuals, shapes, strict=False)):
        given, wrong = tuple(residual.shape), None
        # a single image, channel, row or column is broadcast
        if len(given) != 4 or given[1] not in (shape[0], 1):
            wrong, expected = "the wrong channels", f"(B, {shape[0]}, H, W)"
        elif any(own not in (one, 1) for own, one in zip(given, (batch, *shape), strict=True)):
            wrong, expected = "the wrong shape", str((batch, *shape))
        if wrong is not None:
            what = f"the {whose} residuals do not fit: number {number} has {wrong}"
            raise _wrong(what, expected, residual)


def check_attention(
    sample: Tensor, text: Any, masks: Mapping[str, Any], kwargs: Mapping[str, Any] | None
) -> None:
    """Checks the attention masks, and that ``cross_attention_kwargs`` ask for nothing that is not
    built; the attention processors check the rest."""
    for name, mask in masks.items():
        if mask is None:
            continue
        check_tensor(mask, name, NAME, "(B, tokens)")
        tokens = text.shape[1] if name == "encoder_attention_mask" and text is not None else None
        batch = len(sample)
        fits = mask.ndim == 2 and (len(mask) == batch or len(mask) == 1)
        if not fits or (tokens is not None and mask.shape[1] != tokens):
            shape = f"({batch}, {'tokens' if tokens is None else tokens})"
            raise _wrong(f"{name} has the wrong shape", shape, mask)
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
