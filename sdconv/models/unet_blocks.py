"""What the U-Net is made of beside ResNet blocks: its levels, its time embedding, and the slots
between its convolutions where transformers stand.

Shapes: ``B`` batch, ``C`` channels, ``H W`` rows and columns, ``T`` width of the time embedding.
Source: ``ldm/modules/diffusionmodules/openaimodel.py`` of CompVis/latent-diffusion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import UNET_NORM_EPS
from sdconv.fast.transformers import products
from sdconv.models.base import Recomputed
from sdconv.models.blocks import ResnetBlock2D
from sdconv.models.freeu import amplified, low_frequencies_scaled
from sdconv.models.timesteps import sinusoid

# what every transformer of one forward pass is given beside the map
Conditions = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TransformerSlot:
    """A place between the skeleton's blocks, and what is to stand there.

    ``name``: the place, such as ``"down_blocks.0.attentions.1"``. ``channels``: of the map that
    goes in and comes out. ``heads``: into which the channels are split. ``depth``: transformer
    blocks. ``cross_attention_dim``: width of the text. ``use_linear_projection``: ``proj_in`` and
    ``proj_out`` are linear, not 1x1 convolutions. ``only_cross_attention``: both attentions of a
    block look at the text.
    """

    name: str
    channels: int
    heads: int
    depth: int
    cross_attention_dim: int
    use_linear_projection: bool
    only_cross_attention: bool
    upcast_attention: bool
    norm_num_groups: int


# Makes what stands in a slot: a module that is called as `module(x, return_dict=False,
# encoder_hidden_states=..., **more)` with x (B, C, H, W), and gives a tuple that begins with a map
# of x's shape; or None for nothing.
Transformers = Callable[[TransformerSlot], nn.Module | None]


class NoTransformer(nn.Module):
    """An empty slot: the map goes through as it is."""

    def forward(self, x: Tensor, **_: object) -> tuple[Tensor]:
        return (x,)


class Timesteps(nn.Module):
    """Numbers ``(N,)`` to float32 vectors ``(N, width)``; see ``sdconv.models.timesteps``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        return sinusoid(timesteps, self.width)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: ``(B, in_channels)`` to ``(B, T)``.

    Args:
        in_channels: width of what comes in. time_channels: ``T``.
        condition_channels: width of a second input that is projected and added to the first
            (latent consistency models put the guidance scale there), or None for no such input.
    """

    def __init__(
        self, in_channels: int, time_channels: int, condition_channels: int | None = None
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_channels)
        self.cond_proj = (
            None
            if condition_channels is None
            else nn.Linear(condition_channels, in_channels, bias=False)
        )
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        if self.cond_proj is not None and condition is not None:
            x = x + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(x)))  # type: ignore[no-any-return]


class Level(Recomputed):
    """ResNet blocks, each followed by a transformer where the level has any."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        # diffusers' pipelines ask by this attribute's presence whether a level has transformers
        if attentions := list(attentions):
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def has_transformers(self) -> bool:
        return hasattr(self, "attentions")

    def attend(self, layer: int, x: Tensor, conditions: Conditions) -> Tensor:
        """``x`` through the layer's transformer, if there is one."""
        if not self.has_transformers():
            return x
        return self.call(_attend, self.attentions[layer], x, conditions)  # type: ignore[no-any-return]


def _attend(transformer: nn.Module, x: Tensor, conditions: Conditions) -> Any:
    with products(transformer, x):
        return transformer(x, return_dict=False, **conditions)[0]


class DownBlock2D(Level):
    """A level on the way down: its layers, then a halving on every level but the last.

    Shape: ``(B, in, H, W)`` and ``(B, T)`` to ``(B, out, H, W)``, halved if it downsamples; and the
    map after each layer and after the halving, for the way up.
    """

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module],
        downsampler: nn.Module | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

    def forward(
        self, x: Tensor, temb: Tensor, conditions: Conditions, residual: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        skips: list[Tensor] = []
        for layer, resnet in enumerate(self.resnets):
            x = self.attend(layer, self.call(resnet, x, temb), conditions)
            if residual is not None and layer == len(self.resnets) - 1:
                x = x + residual
            skips.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class UNetMidBlock2D(Level):
    """The middle: a ResNet block, and a transformer and another ResNet block where it has them.

    Shape: ``(B, C, H, W)`` and ``(B, T)`` to ``(B, C, H, W)``.
    """

    def forward(self, x: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        first, *rest = self.resnets
        x = self.call(first, x, temb)
        for layer, resnet in enumerate(rest):
            x = self.call(resnet, self.attend(layer, x, conditions), temb)
        return x


class UpBlock2D(Level):
    """A level on the way up: each layer takes the skip of its counterpart beside the map; then a
    doubling, or what the next skip's size asks for, on every level but the last.

    Shape: ``(B, in, H, W)``, ``(B, T)`` and as many skips as layers to ``(B, out, H, W)`` or ``(B,
    out, *size)``.
    """

    # FreeU's factors for the skips' low frequencies and for the map, while it is on
    freeu: tuple[float, float] | None = None

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module],
        upsampler: nn.Module | None,
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(
        self,
        x: Tensor,
        temb: Tensor,
        skips: Sequence[Tensor],
        conditions: Conditions,
        size: tuple[int, int] | None,
    ) -> Tensor:
        for layer, (resnet, skip) in enumerate(zip(self.resnets, reversed(skips), strict=True)):
            if self.freeu is not None:
                of_skip, of_map = self.freeu
                # without a middle they are one tensor, which diffusers amplifies in place
                shared, x = x is skip, amplified(x, of_map)
                skip = low_frequencies_scaled(x if shared else skip, of_skip)
            x = self.call(resnet, torch.cat([x, skip], dim=1), temb)
            x = self.attend(layer, x, conditions)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, size)
        return x


class SlotMaker:
    """Makes what one U-Net's levels are made of: ResNet blocks, and what stands in their slots."""

    def __init__(
        self, config: UNet2DConditionConfig, transformers: Transformers | None, time: int
    ) -> None:
        self._config, self._transformers, self._time = config, transformers, time
        self.reads_text = False

    def resnets(self, inputs: Sequence[int], channels: int) -> list[nn.Module]:
        return [
            ResnetBlock2D(
                given,
                channels,
                temb_channels=self._time,
                groups=self._config.norm_num_groups,
                eps=UNET_NORM_EPS,
            )
            for given in inputs
        ]

    def transformers(
        self, place: str, level: int, depths: Sequence[int], only_cross: bool
    ) -> list[nn.Module]:
        config = self._config
        slots = [
            TransformerSlot(
                name=f"{place}.attentions.{layer}",
                channels=config.block_out_channels[level],
                heads=config.heads[level],
                depth=depth,
                cross_attention_dim=config.context_dims[level],
                use_linear_projection=config.use_linear_projection,
                only_cross_attention=only_cross,
                upcast_attention=bool(config.upcast_attention),
                norm_num_groups=config.norm_num_groups,
            )
            for layer, depth in enumerate(depths)
        ]
        made = [self._transformers(slot) if self._transformers else None for slot in slots]
        self.reads_text |= any(module is not None for module in made)
        return [NoTransformer() if module is None else module for module in made]
