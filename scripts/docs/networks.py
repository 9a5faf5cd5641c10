"""Pictures of feature maps: the photo in the tiny VAE and the tiny U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import sdconv
from scripts.docs.drawing import (
    FAINT,
    KERNEL,
    arrow,
    box,
    distinct_channels,
    figure,
    label,
    panel,
    show,
)
from scripts.train.measure_tiny_unet import context, noisy
from sdconv.analysis.anatomy import dissect
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import AutoencoderKL

Features = Mapping[str, Tensor]
"""Feature maps ``(C, H, W)`` by hook point."""


def outputs(
    network: nn.Module, names: Iterable[str], run: Callable[..., object], *given: object
) -> Features:
    """The feature maps at these hook points during ``run(*given)``."""
    with sdconv.capture(network, names) as maps:
        run(*given)
    return {name: maps.series(name)[0].tensor[0] for name in maps}


def size_text(values: Tensor) -> str:
    """Height and width in words, such as ``256 x 256``."""
    return f"{values.shape[-2]} x {values.shape[-1]}"


def feature_maps(photo: Tensor, features: Tensor) -> Figure:
    """The photo and eleven channels of the VAE's first layer."""
    sheet = figure(9, 3.2)
    for index, shown in enumerate((photo, *_some(features, 11))):
        row, column = divmod(index, 6)
        show(panel(sheet, 0.05 + column * 1.49, 0.05 + row * 1.58, 1.42), shown)
    return sheet


def shifted(photo: Tensor, layer: nn.Module) -> Figure:
    """Two crops of the photo, 48 pixels apart, and one feature map of each."""
    channel = distinct_channels(layer(photo[None])[0], 3)[2]
    sheet = figure(9, 2.55)
    for half, start in enumerate((0, 48)):
        crop = photo[:, 0:192, start : start + 192]
        for column, shown in enumerate((crop, layer(crop[None])[0, channel])):
            axes = panel(sheet, 0.1 + half * 4.6 + column * 2.18, 0.4, 2.08)
            show(axes, shown)
            # the same content in both crops
            box(axes, 96 - start, 8, 64, 80, KERNEL)
        title = (
            "a crop and one of its feature maps" if start == 0 else "a crop 48 pixels further right"
        )
        label(sheet, 2.2 + half * 4.6, 0.08, title)
    return sheet


def receptive_fields(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """The receptive field on the photo of one number in the centre of each level."""
    anatomy = dissect(vae.config, photo.shape[-1])
    levels: dict[str, tuple[int, tuple[int, int]]] = {}
    for block in anatomy.blocks_of("encode"):
        level = ".".join(block.name.split(".")[:3])
        if "down_blocks" in level and "downsamplers" not in block.name:
            levels[level] = block.last.receptive_field[0], block.out_size
    sheet = figure(9, 4.1)
    axes = panel(sheet, 0.1, 0.1, 3.9)
    show(axes, photo)
    half = photo.shape[-1] / 2
    colours = ("#ffe100", "#00d5ff", "#4dff4d", "#ff2fd0")
    label(sheet, 4.4, 0.45, "receptive field of one number after", ha="left", color=FAINT)
    for row, ((name, (side, size)), colour) in enumerate(zip(levels.items(), colours, strict=True)):
        reach = min(side / 2, half - 1)
        box(axes, half - reach, half - reach, 2 * reach, 2 * reach, colour, linewidth=2.6)
        top = 0.95 + row * 0.72
        label(sheet, 4.4, top, "■", ha="left", color=colour, fontsize=15)
        label(
            sheet,
            4.75,
            top + 0.02,
            f"{name}, {size[0]} x {size[1]}:\n{side} x {side} pixels of the photo",
            ha="left",
        )
    return sheet


def _stack(
    sheet: Figure, left: float, middle: float, side: float, channels: Sequence[Tensor]
) -> None:
    """Channels one behind the other, the first in front."""
    for index, values in reversed([*enumerate(channels)]):
        offset = 0.09 * index
        axes = panel(sheet, left + offset, middle - side / 2 - offset, side)
        show(axes, values)
        high, wide = values.shape[-2:]
        box(axes, -0.5, -0.5, wide, high, "white", linewidth=1.2, clip_on=False)


def _some(features: Tensor, number: int = 3) -> list[Tensor]:
    return [features[k] for k in distinct_channels(features, number)]


def encoder_and_decoder(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """The photo in the VAE: a few channels of each level of encoder and decoder."""
    down = [f"encoder.down_blocks.{i}.resnets.1" for i in range(4)]
    up = [f"decoder.up_blocks.{i}.resnets.2" for i in range(4)]
    latents = vae.encode(photo[None]).latent_dist.mode()
    features = {
        **outputs(vae, down, vae.encode, photo[None]),
        **outputs(vae, up, vae.decode, latents),
    }
    sheet = figure(9, 4.75)
    image = vae.decode(latents).sample[0]
    for row, names in enumerate((down, up)):
        ends = (photo, latents[0]) if row == 0 else (latents[0], image)
        stages = [ends[0], *(features[name] for name in names), ends[1]]
        change = "stride\n2" if row == 0 else "up\nx 2"
        middle, left = 1.2 + row * 2.35, 0.12
        label(sheet, 0.12, 0.05 + row * 2.35, ("encoder", "decoder")[row], ha="left", weight="bold")
        before = None
        for values in stages:
            side = 1.2 * (values.shape[-1] / 256) ** (1 / 4)
            is_image = len(values) == 3
            shown = [values] if is_image else _some(values, 4 if len(values) == 4 else 3)
            if before is not None:
                gap = 0.42
                arrow(sheet, (left + 0.02, middle), (left + gap - 0.03, middle))
                if before.shape[-1] != values.shape[-1]:
                    label(
                        sheet,
                        left + gap / 2,
                        middle + 0.1,
                        change,
                        fontsize=8.5,
                        color=KERNEL,
                    )
                left += gap
            _stack(sheet, left, middle, side, shown)
            name = {3: "image", 4: "latents"}.get(len(values), f"{len(values)} channels")
            text = f"{name}\n{size_text(values)}"
            label(sheet, left + side / 2, middle + side / 2 + 0.06, text, fontsize=9)
            left += side + 0.09 * (len(shown) - 1)
            before = values
    return sheet


def _window(sheet: Figure, left: float, values: Tensor, title: str) -> Axes:
    axes = panel(sheet, left, 0.4, 2.7)
    show(axes, values)
    label(sheet, left + 1.35, 0.08, title)
    return axes


def downsampling(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """One channel before and after the VAE's first strided convolution."""
    name = "encoder.down_blocks.0.downsamplers.0"
    features = outputs(vae, [f"{name}:input", name], vae.encode, photo[None])
    before, after = features[f"{name}:input"], features[name]
    top, left, size = 28, 20, 28
    k, q = distinct_channels(before, 1)[0], distinct_channels(after, 1)[0]
    sheet = figure(9, 3.15)
    axes = _window(
        sheet, 0.1, before[k, top : top + size, left : left + size], "one channel, 28 x 28"
    )
    row, column = 4, 9
    box(axes, 2 * column - 0.5, 2 * row - 0.5, 3, 3, KERNEL)
    box(axes, 2 * column + 1.5, 2 * row - 0.5, 3, 3, KERNEL, linestyle=":")
    label(sheet, 4.5, 0.9, "3 x 3 kernel\nover all channels,\nstride 2", fontsize=11)
    arrow(sheet, (3.2, 1.75), (5.8, 1.75))
    label(sheet, 4.5, 1.9, "two pixels here\nare one pixel there", fontsize=10, color=FAINT)
    t, s, half = top // 2, left // 2, size // 2
    axes = _window(sheet, 6.2, after[q, t : t + half, s : s + half], "one new channel, 14 x 14")
    box(axes, column - 0.5, row - 0.5, 1, 1, KERNEL)
    box(axes, column + 0.5, row - 0.5, 1, 1, KERNEL, linestyle=":")
    return sheet


def upsampling(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """One channel before upsampling, after it, and after the convolution that follows."""
    name = "decoder.up_blocks.1.upsamplers.0"
    latents = vae.encode(photo[None]).latent_dist.mode()
    features = outputs(vae, [f"{name}:input", name], vae.decode, latents)
    repeated = features[f"{name}:input"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    k = distinct_channels(features[f"{name}:input"], 1)[0]
    q = distinct_channels(features[name], 1)[0]
    sheet = figure(9, 3.15)
    top, left, size, row, column = 14, 20, 12, 4, 5
    shown = (
        (features[f"{name}:input"][k], 1, "one channel"),
        (repeated[k], 2, "nearest upsampling"),
        (features[name][q], 2, "after the 3 x 3 convolution"),
    )
    for index, (values, factor, title) in enumerate(shown):
        t, s, side = (factor * number for number in (top, left, size))
        axes = _window(sheet, 0.1 + index * 3.05, values[t : t + side, s : s + side], title)
        for line in range(1, side):
            axes.axhline(line - 0.5, color="white", linewidth=0.4, alpha=0.6)
            axes.axvline(line - 0.5, color="white", linewidth=0.4, alpha=0.6)
        if index < 2:
            box(axes, column * factor - 0.5, row * factor - 0.5, factor, factor, KERNEL)
    return sheet


def residual(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """A ResNet block's input, the output of its two convolutions, and their sum."""
    name = "encoder.down_blocks.1.resnets.1"
    names = [f"{name}:input", f"{name}.conv2", name]
    features = outputs(vae, names, vae.encode, photo[None])
    # without the borders, where the padding dominates the difference
    before, added, after = (features[one][..., 6:-6, 6:-6] for one in names)
    k = int((added.std((1, 2)) / (after.std((1, 2)) + before.std((1, 2)))).argmax())
    sheet = figure(9, 3.15)
    titles = ("input", "output of the two convolutions", "sum")
    for index, (values, title) in enumerate(zip((before, added, after), titles, strict=True)):
        _window(sheet, 0.1 + index * 3.05, values[k], title)
    for index, sign in enumerate("+="):
        label(sheet, 2.97 + index * 3.05, 1.75, sign, va="center", fontsize=16)
    return sheet


def latents_and_back(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """The photo, its four latent channels, and the image decoded from them."""
    latents = vae.encode(photo[None]).latent_dist.mode()
    sheet = figure(9, 2.5)
    side = 2.05
    show(panel(sheet, 0.05, 0.35, side), photo)
    label(sheet, 0.05 + side / 2, 0.06, f"photo, 3 x {size_text(photo)}")
    for index, values in enumerate(latents[0]):
        row, column = divmod(index, 2)
        show(panel(sheet, 3.1 + column * 1.32, 0.35 + row * 1.04, 0.99), values)
    label(sheet, 4.3, 0.06, f"latents, 4 x {size_text(latents)}")
    show(panel(sheet, 6.85, 0.35, side), vae.decode(latents).sample[0])
    label(sheet, 6.85 + side / 2, 0.06, "decoded image")
    arrow(sheet, (2.25, 1.38), (2.95, 1.38))
    arrow(sheet, (5.7, 1.38), (6.7, 1.38))
    return sheet


@torch.no_grad()
def unet_levels(photo: Tensor, vae: AutoencoderKL, unet: UNet2DConditionModel) -> Figure:
    """The U-Net drawn as a U, with a few channels of every level."""
    down = [f"down_blocks.{i}.resnets.0" for i in range(3)]
    up = [f"up_blocks.{i}.resnets.1" for i in range(3)]
    latents = vae.encode(photo[None]).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([250])
    given = noisy(latents, noise, timestep)
    names = [*down, "mid_block", *up, "conv_out"]
    features = outputs(unet, names, unet, given, timestep, context(unet, 1))
    sheet = figure(9, 6.75)

    def stage(left: float, middle: float, side: float, values: Tensor, title: str) -> None:
        _stack(sheet, left, middle, side, _some(values))
        label(
            sheet,
            left + side / 2,
            middle + side / 2 + 0.05,
            f"{title}\n{len(values)} channels, {size_text(values)}",
            fontsize=9,
        )

    rows, across = (0.85, 2.95, 4.9), (2.05, 2.3, 2.55)
    size = (1.15, 1.0, 0.85)
    stage(0.25, rows[0], size[0], given[0], "noisy latents")
    stage(9 - 0.45 - size[0], rows[0], size[0], features["conv_out"], "predicted noise")
    for level, (top, left, side) in enumerate(zip(rows, across, size, strict=True)):
        right = 9 - left - side - 0.2
        stage(left, top, side, features[down[level]], f"down_blocks.{level}")
        stage(right, top, side, features[up[2 - level]], f"up_blocks.{2 - level}")
        arrow(sheet, (left + side + 0.3, top), (right - 0.1, top), color=KERNEL, linestyle="--")
        label(sheet, (left + side + right) / 2 + 0.1, top - 0.24, "skips", fontsize=9, color=KERNEL)
    for level in range(2):
        start = rows[level] + size[level] / 2 + 0.46
        end = rows[level + 1] - size[level + 1] / 2 - 0.22
        left = across[level + 1] + size[level + 1] / 2
        arrow(sheet, (left, start), (left, end))
        arrow(sheet, (9 - left - 0.1, end), (9 - left - 0.1, start))
        middle = (start + end) / 2
        label(sheet, left - 0.15, middle, "stride 2", ha="right", va="center", fontsize=9)
        label(sheet, 9 - left + 0.05, middle, "upsample", ha="left", va="center", fontsize=9)
    arrow(sheet, (0.25 + size[0] + 0.24, rows[0]), (across[0] - 0.08, rows[0]))
    arrow(sheet, (9 - across[0] + 0.02, rows[0]), (9 - 0.55 - size[0], rows[0]))
    stage(4.05, 5.85, 0.7, features["mid_block"], "mid_block")
    arrow(sheet, (3.62, 5.2), (4.0, 5.65))
    arrow(sheet, (4.98, 5.65), (5.36, 5.2))
    return sheet
