"""Pictures of the networks at work: the photo's way through the tiny VAE and the tiny U-Net."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    figure,
    panel,
    show,
    various,
    words,
)
from scripts.train.measure_tiny_unet import context, noisy
from sdconv.analysis.anatomy import dissect
from sdconv.models.unet import UNet2DConditionModel
from sdconv.models.vae import AutoencoderKL

Maps = Mapping[str, Tensor]
"""By a point's name, what passed there: ``(C, H, W)``."""


def outputs(
    network: nn.Module, names: Iterable[str], run: Callable[..., object], *given: object
) -> Maps:
    """What passes at the points of these names while ``run(*given)``."""
    with sdconv.capture(network, names) as maps:
        run(*given)
    return {name: maps.series(name)[0].tensor[0] for name in maps}


def sides(values: Tensor) -> str:
    """``256 x 256`` of a map."""
    return f"{values.shape[-2]} x {values.shape[-1]}"


def feature_maps(photo: Tensor, maps: Tensor) -> Figure:
    """The photo and eleven of the maps that the VAE's first layer makes of it."""
    sheet = figure(9, 3.2)
    for place, shown in enumerate((photo, *(maps[k] for k in various(maps, 11)))):
        row, column = divmod(place, 6)
        show(panel(sheet, 0.05 + column * 1.49, 0.05 + row * 1.58, 1.42), shown)
    return sheet


def shifted(photo: Tensor, layer: nn.Module) -> Figure:
    """Two cuts of the photo, 48 pixels apart, and one feature map of each."""
    channel = various(layer(photo[None])[0], 3)[2]
    sheet = figure(9, 2.55)
    for half, start in enumerate((0, 48)):
        cut = photo[:, 0:192, start : start + 192]
        found = layer(cut[None])[0, channel]
        for place, shown in enumerate((cut, found)):
            axes = panel(sheet, 0.1 + half * 4.6 + place * 2.18, 0.4, 2.08)
            show(axes, shown)
            # the same things in both: what was 48 pixels further right
            box(axes, 96 - start, 8, 64, 80, KERNEL)
        title = (
            "a cut of the photo, and a map of it" if start == 0 else "cut 48 pixels further right"
        )
        words(sheet, 2.2 + half * 4.6, 0.08, title)
    return sheet


def receptive_fields(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """What one number in the middle of each level's map sees of the photo, through convolutions."""
    anatomy = dissect(vae.config, photo.shape[-1])
    levels: dict[str, tuple[int, tuple[int, int]]] = {}
    for block in anatomy.half("encode"):
        level = ".".join(block.name.split(".")[:3])
        if "down_blocks" in level and "downsamplers" not in block.name:
            levels[level] = block.last.receptive_field[0], block.out_size
    sheet = figure(9, 4.1)
    axes = panel(sheet, 0.1, 0.1, 3.9)
    show(axes, photo)
    middle, half = photo.shape[-1] / 2, photo.shape[-1] / 2
    colours = ("#ffe100", "#00d5ff", "#4dff4d", "#ff2fd0")
    words(sheet, 4.4, 0.45, "one number of the map after", ha="left", color=FAINT)
    for place, ((name, (side, size)), colour) in enumerate(
        zip(levels.items(), colours, strict=True)
    ):
        reach = min(side / 2, half - 1)
        box(axes, middle - reach, middle - reach, 2 * reach, 2 * reach, colour, linewidth=2.6)
        top = 0.95 + place * 0.72
        words(sheet, 4.4, top, "■", ha="left", color=colour, fontsize=15)
        words(
            sheet,
            4.75,
            top + 0.02,
            f"{name}, {size[0]} x {size[1]}:\nsees {side} x {side} pixels of the photo",
            ha="left",
        )
    return sheet


def _stack(sheet: Figure, left: float, middle: float, side: float, maps: Iterable[Tensor]) -> None:
    """Maps one before the other, the first in front."""
    pile = list(maps)
    for place in range(len(pile) - 1, -1, -1):
        off = 0.09 * place
        axes = panel(sheet, left + off, middle - side / 2 - off, side)
        show(axes, pile[place])
        high, wide = pile[place].shape[-2:]
        box(axes, -0.5, -0.5, wide, high, "white", linewidth=1.2, clip_on=False)


def _some(maps: Tensor, number: int = 3) -> list[Tensor]:
    return [maps[k] for k in various(maps, number)]


def levels(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """The way of the photo to latents and back: a few maps of each level."""
    down = [f"encoder.down_blocks.{i}.resnets.1" for i in range(4)]
    up = [f"decoder.up_blocks.{i}.resnets.2" for i in range(4)]
    latents = vae.encode(photo[None]).latent_dist.mode()
    seen = {
        **outputs(vae, down, vae.encode, photo[None]),
        **outputs(vae, up, vae.decode, latents),
    }
    sheet = figure(9, 4.75)
    picture = vae.decode(latents).sample[0]
    for row, names in enumerate((down, up)):
        ends = (photo, latents[0]) if row == 0 else (latents[0], picture)
        stages = [ends[0], *(seen[name] for name in names), ends[1]]
        change = "stride\n2" if row == 0 else "x 2"
        middle, left = 1.2 + row * 2.35, 0.12
        words(sheet, 0.12, 0.05 + row * 2.35, ("encoder", "decoder")[row], ha="left", weight="bold")
        before = None
        for values in stages:
            side = 1.2 * (values.shape[-1] / 256) ** (1 / 4)
            is_picture = len(values) == 3
            shown = [values] if is_picture else _some(values, 4 if len(values) == 4 else 3)
            if before is not None:
                gap = 0.42
                arrow(sheet, (left + 0.02, middle), (left + gap - 0.03, middle))
                if before.shape[-1] != values.shape[-1]:
                    words(
                        sheet,
                        left + gap / 2,
                        middle + 0.1,
                        change,
                        fontsize=8.5,
                        color=KERNEL,
                    )
                left += gap
            _stack(sheet, left, middle, side, shown)
            name = "picture" if is_picture else "latents" if len(values) == 4 else "maps"
            count = f"{len(values)} {'channels' if is_picture or len(values) == 4 else 'maps'}"
            label = f"{sides(values)}\n{count}" if name == "maps" else f"{name}\n{sides(values)}"
            words(sheet, left + side / 2, middle + side / 2 + 0.06, label, fontsize=9)
            left += side + 0.09 * (len(shown) - 1)
            before = values
    return sheet


def _window(sheet: Figure, left: float, values: Tensor, title: str) -> Axes:
    axes = panel(sheet, left, 0.4, 2.7)
    show(axes, values)
    words(sheet, left + 1.35, 0.08, title)
    return axes


def halving(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """A map before and after the VAE's first strided convolution."""
    name = "encoder.down_blocks.0.downsamplers.0"
    seen = outputs(vae, [f"{name}:input", name], vae.encode, photo[None])
    before, after = seen[f"{name}:input"], seen[name]
    top, left, size = 28, 20, 28
    k, q = various(before, 1)[0], various(after, 1)[0]
    sheet = figure(9, 3.15)
    axes = _window(sheet, 0.1, before[k, top : top + size, left : left + size], "one map, 28 x 28")
    row, column = 4, 9
    box(axes, 2 * column - 0.5, 2 * row - 0.5, 3, 3, KERNEL)
    box(axes, 2 * column + 1.5, 2 * row - 0.5, 3, 3, KERNEL, linestyle=":")
    words(sheet, 4.5, 0.9, "3 x 3 kernel\nover every map,\nstride 2", fontsize=11)
    arrow(sheet, (3.2, 1.75), (5.8, 1.75))
    words(sheet, 4.5, 1.9, "a step of two here\nis a step of one there", fontsize=10, color=FAINT)
    t, s, half = top // 2, left // 2, size // 2
    axes = _window(sheet, 6.2, after[q, t : t + half, s : s + half], "one new map, 14 x 14")
    box(axes, column - 0.5, row - 0.5, 1, 1, KERNEL)
    box(axes, column + 0.5, row - 0.5, 1, 1, KERNEL, linestyle=":")
    return sheet


def doubling(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """A map before, in the middle of and after one of the decoder's doublings."""
    name = "decoder.up_blocks.1.upsamplers.0"
    latents = vae.encode(photo[None]).latent_dist.mode()
    seen = outputs(vae, [f"{name}:input", name], vae.decode, latents)
    repeated = seen[f"{name}:input"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    k = various(seen[f"{name}:input"], 1)[0]
    q = various(seen[name], 1)[0]
    sheet = figure(9, 3.15)
    top, left, size, row, column = 14, 20, 12, 4, 5
    shown = (
        (seen[f"{name}:input"][k], 1, "one map"),
        (repeated[k], 2, "each number four times"),
        (seen[name][q], 2, "after the 3 x 3 convolution"),
    )
    for place, (values, factor, title) in enumerate(shown):
        t, s, side = (factor * number for number in (top, left, size))
        axes = _window(sheet, 0.1 + place * 3.05, values[t : t + side, s : s + side], title)
        for line in range(1, side):
            axes.axhline(line - 0.5, color="white", linewidth=0.4, alpha=0.6)
            axes.axvline(line - 0.5, color="white", linewidth=0.4, alpha=0.6)
        if place < 2:
            box(axes, column * factor - 0.5, row * factor - 0.5, factor, factor, KERNEL)
    return sheet


def residual(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """A ResNet block's input, what its two convolutions add, and the sum."""
    name = "encoder.down_blocks.1.resnets.1"
    names = [f"{name}:input", f"{name}.conv2", name]
    seen = outputs(vae, names, vae.encode, photo[None])
    # without the edges, where zeros of the padding make most of the difference
    before, added, after = (seen[one][..., 6:-6, 6:-6] for one in names)
    k = int((added.std((1, 2)) / (after.std((1, 2)) + before.std((1, 2)))).argmax())
    sheet = figure(9, 3.15)
    titles = ("what comes in", "what two convolutions add", "the sum goes on")
    for place, (values, title) in enumerate(zip((before, added, after), titles, strict=True)):
        _window(sheet, 0.1 + place * 3.05, values[k], title)
    for place, sign in enumerate("+="):
        words(sheet, 2.97 + place * 3.05, 1.75, sign, va="center", fontsize=16)
    return sheet


def latents_and_back(photo: Tensor, vae: AutoencoderKL) -> Figure:
    """The photo, its four latent channels, and the picture made of these."""
    latents = vae.encode(photo[None]).latent_dist.mode()
    sheet = figure(9, 2.5)
    side = 2.05
    show(panel(sheet, 0.05, 0.35, side), photo)
    words(sheet, 0.05 + side / 2, 0.06, f"photo, 3 x {sides(photo)}")
    for place, values in enumerate(latents[0]):
        row, column = divmod(place, 2)
        show(panel(sheet, 3.1 + column * 1.32, 0.35 + row * 1.04, 0.99), values)
    words(sheet, 4.3, 0.06, f"latents, 4 x {sides(latents)}")
    show(panel(sheet, 6.85, 0.35, side), vae.decode(latents).sample[0])
    words(sheet, 6.85 + side / 2, 0.06, "decoded again")
    arrow(sheet, (2.25, 1.38), (2.95, 1.38))
    arrow(sheet, (5.7, 1.38), (6.7, 1.38))
    return sheet


@torch.no_grad()
def the_u(photo: Tensor, vae: AutoencoderKL, unet: UNet2DConditionModel) -> Figure:
    """The U-Net drawn as a U, with a few maps of every level."""
    down = [f"down_blocks.{i}.resnets.0" for i in range(3)]
    up = [f"up_blocks.{i}.resnets.1" for i in range(3)]
    latents = vae.encode(photo[None]).latent_dist.mode() * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([250])
    given = noisy(latents, noise, timestep)
    names = [*down, "mid_block", *up, "conv_out"]
    seen = outputs(unet, names, unet, given, timestep, context(unet, 1))
    sheet = figure(9, 6.75)

    def stage(left: float, middle: float, side: float, values: Tensor, title: str) -> None:
        _stack(sheet, left, middle, side, _some(values))
        words(
            sheet,
            left + side / 2,
            middle + side / 2 + 0.05,
            f"{title}\n{len(values)} maps, {sides(values)}",
            fontsize=9,
        )

    rows, across = (0.85, 2.95, 4.9), (2.05, 2.3, 2.55)
    size = (1.15, 1.0, 0.85)
    stage(0.25, rows[0], size[0], given[0], "noisy latents")
    stage(9 - 0.45 - size[0], rows[0], size[0], seen["conv_out"], "predicted noise")
    for level, (top, left, side) in enumerate(zip(rows, across, size, strict=True)):
        right = 9 - left - side - 0.2
        stage(left, top, side, seen[down[level]], f"down_blocks.{level}")
        stage(right, top, side, seen[up[2 - level]], f"up_blocks.{2 - level}")
        arrow(sheet, (left + side + 0.3, top), (right - 0.1, top), color=KERNEL, linestyle="--")
        words(sheet, (left + side + right) / 2 + 0.1, top - 0.24, "skips", fontsize=9, color=KERNEL)
    for level in range(2):
        start = rows[level] + size[level] / 2 + 0.46
        end = rows[level + 1] - size[level + 1] / 2 - 0.22
        left = across[level + 1] + size[level + 1] / 2
        arrow(sheet, (left, start), (left, end))
        arrow(sheet, (9 - left - 0.1, end), (9 - left - 0.1, start))
        middle = (start + end) / 2
        words(sheet, left - 0.15, middle, "stride 2", ha="right", va="center", fontsize=9)
        words(sheet, 9 - left + 0.05, middle, "doubled", ha="left", va="center", fontsize=9)
    arrow(sheet, (0.25 + size[0] + 0.24, rows[0]), (across[0] - 0.08, rows[0]))
    arrow(sheet, (9 - across[0] + 0.02, rows[0]), (9 - 0.55 - size[0], rows[0]))
    stage(4.05, 5.85, 0.7, seen["mid_block"], "mid_block")
    arrow(sheet, (3.62, 5.2), (4.0, 5.65))
    arrow(sheet, (4.98, 5.65), (5.36, 5.2))
    return sheet
