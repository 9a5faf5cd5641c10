"""Whether a U-Net can take what it is called with: every complaint comes before any arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sdconv.config import UNet2DConditionConfig
from sdconv.errors import InputError


def check_sample(
    config: UNet2DConditionConfig,
    sample: Tensor,
    timestep: Tensor | float,
    timestep_cond: Tensor | None,
    class_labels: Tensor | None,
) -> None:
    """The latents and what is added to the timestep."""
    if sample.ndim != 4 or sample.shape[1] != config.in_channels or 0 in sample.shape:
        raise _wrong("latents of the wrong shape", f"(B, {config.in_channels}, H, W)", sample)
    batch = len(sample)
    if isinstance(timestep, Tensor) and tuple(timestep.shape) not in ((), (1,), (batch,)):
        raise _wrong("timesteps of the wrong shape", f"(), (1,) or ({batch},)", timestep)
    width = config.time_cond_proj_dim
    if timestep_cond is not None and (width is None or timestep_cond.shape[-1] != width):
        raise _wrong(
            "this U-Net does not take such a timestep_cond",
            "None" if width is None else f"(B, {width})",
            timestep_cond,
        )
    shape: tuple[int | None, ...] | None = None
    if config.class_embed_type is not None:
        shape = (batch, config.projection_class_embeddings_input_dim)
    elif config.num_class_embeds is not None:
        shape = (batch,)
    if (None if class_labels is None else tuple(class_labels.shape)) != shape:
        raise _wrong("class_labels that this U-Net does not take", shape, class_labels)
    if class_labels is not None and len(shape or ()) == 1 and class_labels.is_floating_point():
        raise _wrong("class_labels must be whole numbers", "torch.int64", class_labels.dtype)


def check_text(config: UNet2DConditionConfig, batch: int, text: object) -> None:
    """What the transformers read."""
    widths = sorted(set(config.context_dims))
    expected = f"({batch}, tokens, {' or '.join(map(str, widths))})"
    fits = isinstance(text, Tensor) and text.ndim == 3
    if not (fits and isinstance(text, Tensor) and len(text) == batch and text.shape[2] in widths):
        raise _wrong("encoder_hidden_states of the wrong shape", expected, text)


def check_added(
    config: UNet2DConditionConfig, batch: int, added: Mapping[str, Any], pictures: bool
) -> None:
    """``added_cond_kwargs``: SDXL's, and an IP-Adapter's where ``pictures``."""
    sized = config.addition_embed_type is not None
    names = {"text_embeds", "time_ids"} if sized else set()
    names |= {"image_embeds"} if pictures else set()
    if set(added) != names:
        raise _wrong(
            "added_cond_kwargs that do not fit this U-Net",
            ", ".join(sorted(names)) or "none",
            ", ".join(sorted(added)) or "none",
        )
    if not sized:
        return
    text, numbers = added["text_embeds"], added["time_ids"]
    width, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim or 0
    if (
        text.ndim != 2
        or len(text) != batch
        or text.shape[1] + each * numbers.numel() // batch != width
    ):
        raise _wrong(
            "added_cond_kwargs of the wrong shapes",
            f"text_embeds ({batch}, C) and time_ids ({batch}, n) with C + {each} n = {width}",
            f"{tuple(text.shape)} and {tuple(numbers.shape)}",
        )


def check_residuals(
    config: UNet2DConditionConfig,
    down: Sequence[Tensor] | None,
    mid: Tensor | None,
    adapter: Sequence[Tensor],
) -> None:
    """A ControlNet's, ``down`` and ``mid``, and a T2I-Adapter's."""
    if (down is None) != (mid is None):
        raise _wrong(
            "a ControlNet's residuals come together",
            "down_block_additional_residuals and mid_block_additional_residual",
            "one without the other",
            "pass a T2I-Adapter's as down_intrablock_additional_residuals",
        )
    skips = sum(config.layers) + len(config.layers)
    if down is not None and len(down) != skips:
        raise _wrong("a ControlNet's residuals for another U-Net", f"{skips}", f"{len(down)}")
    most = len(config.layers) + (config.mid_block_type is not None)
    if len(adapter) > most:
        raise _wrong(
            "a T2I-Adapter's residuals for another U-Net", f"at most {most}", f"{len(adapter)}"
        )


def check_attention(kwargs: Mapping[str, Any] | None) -> None:
    """``cross_attention_kwargs``: for the attention processors, which judge the rest."""
    if kwargs and "gligen" in kwargs:
        raise _wrong("GLIGEN's layers are not built", "no such entry", "gligen")


def _wrong(what: str, expected: object, got: object, fix: str | None = None) -> InputError:
    shown = tuple(got.shape) if isinstance(got, Tensor) else got
    return InputError(
        what, where="UNet2DConditionModel", expected=str(expected), got=str(shown), fix=fix
    )
