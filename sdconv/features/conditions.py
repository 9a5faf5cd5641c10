"""What a U-Net takes in addition to noisy latents, to capture its feature maps: the prompt, SDXL's
sizes, classifier-free guidance, the size of the latents and a pipeline's noise schedule."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from sdconv.config.facts import PIXELS_PER_LATENT
from sdconv.errors import InputError
from sdconv.features.prompts import AESTHETIC_SCORE, PromptEmbeds
from sdconv.models.dummy_inputs import Noise, inputs_for
from sdconv.models.unet import UNet2DConditionModel

# prompt embeddings of at most this width come from no text encoder: the tiny U-Net's are unit
# vectors
_UNIT_VECTORS = 16
# original size, crop, aesthetic score; SDXL's base has the target size in place of the latter
_REFINER_TIME_IDS = 5


def latent_sides(unet: UNet2DConditionModel, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Rows and columns of the latents of an image of this size; None for the U-Net's default
    size."""
    if size is not None:
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return max(rows // PIXELS_PER_LATENT, 1), max(columns // PIXELS_PER_LATENT, 1)
    default = unet.config.sample_size or 64
    return (default, default) if isinstance(default, int) else default


def conditions(
    unet: UNet2DConditionModel,
    size: tuple[int, int],
    seed: int,
    prompt: PromptEmbeds | None = None,
) -> tuple[list[Any], str]:
    """A U-Net's arguments by position, with a neutral prompt embedding unless there is a prompt,
    and a note about them."""
    noise = Noise(1, seed, unet.dtype, unet.device)
    arguments = list(cast(Iterable[Any], inputs_for(unet, size, noise)["forward"]))
    prompt_embeds = arguments[2]
    width = prompt_embeds.shape[2]
    words = "the prompt embedding is zeros"
    if not unet.reads_text:
        arguments[2], words = None, "the network takes no prompt embedding"
    elif prompt is not None:
        arguments[2] = prompt.tokens
        words = f"the prompt is {prompt.words}"
    elif width <= _UNIT_VECTORS:
        arguments[2] = torch.eye(width, dtype=prompt_embeds.dtype, device=unet.device)[None]
        words = f"the prompt embedding is {width} unit vectors"
    else:
        arguments[2] = torch.zeros_like(prompt_embeds)
    if added := arguments[7] if len(arguments) > 7 else None:
        if prompt is None or prompt.pooled is None:
            added["text_embeds"].zero_()
            words += "" if prompt is None else ", its pooled embedding is zeros"
        elif prompt.pooled.shape != added["text_embeds"].shape:
            raise InputError(
                "the pooled prompt embedding is not one of this U-Net",
                where=prompt.words,
                expected=tuple(added["text_embeds"].shape),
                got=tuple(prompt.pooled.shape),
            )
        else:
            added["text_embeds"] = prompt.pooled
        rows, columns = (side * PIXELS_PER_LATENT for side in size)
        numbers: list[float] = [rows, columns, 0, 0, rows, columns]
        if (count := added["time_ids"].shape[1]) == _REFINER_TIME_IDS:
            score = AESTHETIC_SCORE if prompt is None else prompt.aesthetic_score
            numbers = [rows, columns, 0, 0, score]
        numbers = numbers[:count]
        added["time_ids"] = added["time_ids"].new_tensor([numbers])
    more = unet.config.in_channels - unet.config.out_channels
    return arguments, words + (f", and {more} further channels are noise" if more > 0 else "")


def guided_conditions(
    unet: UNet2DConditionModel,
    size: tuple[int, int],
    seed: int,
    prompt: PromptEmbeds | None,
) -> tuple[list[Any], str]:
    """As ``conditions``, for a batch of two: the negative prompt, then the prompt, as diffusers'
    pipelines have them."""
    assert prompt is not None and prompt.negative is not None
    without, _ = conditions(unet, size, seed, prompt.negative)
    of_prompt, words = conditions(unet, size, seed, prompt)
    return [_stacked(*pair) for pair in zip(without, of_prompt, strict=True)], words


def conditional_half(x: Tensor) -> Tensor:
    """The half of a guided batch that follows the prompt."""
    return x[len(x) // 2 :]


def _stacked(first: Any, second: Any) -> Any:
    if isinstance(first, dict):
        return {name: _stacked(value, second[name]) for name, value in first.items()}
    return torch.cat([first, second]) if isinstance(first, Tensor) else first


def scheduler_file(model: Path | list[Path]) -> Path | None:
    """The scheduler's config in a pipeline's folder; None if there is none."""
    folder = model if isinstance(model, Path) else model[0]
    found = folder / "scheduler" / "scheduler_config.json"
    return found if found.is_file() else None
