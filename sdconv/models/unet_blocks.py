"""The U-Net's own parts: down, mid and up blocks, the time embedding, and the slots for its
transformers.

Shapes: ``B`` batch, ``C`` channels, ``H W`` rows and columns, ``T`` width of the time embedding.
Source: ``ldm/modules/diffusionmodules/openaimodel.py`` of CompVis/latent-diffusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdconv.backends import dispatched
from sdconv.config import UNet2DConditionConfig
from sdconv.config.facts import UNET_NORM_EPS
from sdconv.models.blocks import Checkpointed, ResnetBlock2D
from sdconv.models.freeu import amplified, low_frequencies_scaled

# The keyword arguments that all transformers get in one forward pass.
Conditions = Mapping[str, Any]

# The longest period of the time embedding, over 2 pi (Vaswani et al. 2017, section 3.5).
MAX_PERIOD = 10000


@dataclass(frozen=True, kw_only=True)
class TransformerSlot:
    """A slot for a transformer between the U-Net's convolutional blocks.

    Attributes:
        name: module path, such as ``"down_blocks.0.attentions.1"``.
        channels: of the feature map, input and output.
        heads: number of attention heads.
        depth: number of transformer blocks.
        cross_attention_dim: width of the prompt embedding.
        use_linear_projection: ``proj_in`` and ``proj_out`` are linear layers, not 1x1 convolutions.
        only_cross_attention: both attention layers of a block attend to the prompt embedding.
        upcast_attention: attention scores are computed in float32.
        norm_num_groups: number of groups of GroupNorm.
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


# Builds the module for a slot, or returns None to leave it empty. The module is called as
# `module(x, return_dict=False, encoder_hidden_states=..., **more)` with x (B, C, H, W), and returns
# a tuple whose first element has the shape of x.
Transformers = Callable[[TransformerSlot], nn.Module | None]


class NoTransformer(nn.Module):
    """Fills an empty slot: returns its input."""

    def forward(self, x: Tensor, **_: object) -> tuple[Tensor]:
        return (x,)


class Timesteps(nn.Module):
    """Sinusoidal embedding of timesteps: ``[cos(t w_0), ..., cos(t w_n), sin(t w_0), ..., sin(t
    w_n)]`` with ``w_i = 10000^(-i/n)``.

    Cosines first, as in ``timestep_embedding`` of ``ldm/modules/diffusionmodules/util.py``.

    Shape: ``(N,)``, of any dtype, to ``(N, width)`` in float32; ``width`` is even.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        exponents = -math.log(MAX_PERIOD) * torch.arange(
            half, dtype=torch.float32, device=timesteps.device
        )
        angles = torch.outer(timesteps.float(), torch.exp(exponents / half))
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class TimestepEmbedding(nn.Module):
    """Two linear layers with a SiLU between them: ``(B, in_channels)`` to ``(B, T)``.

    Args:
        in_channels: width of the input.
        time_channels: ``T``.
        condition_channels: width of a second input, which is projected and added to the first
            (latent consistency models embed the guidance scale), or None for a single input.
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
        return cast(Tensor, self.linear_2(self.act(self.linear_1(x))))


class UNetStage(Checkpointed):
    """ResNet blocks, each followed by a transformer if the stage has transformers."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        # diffusers' pipelines look for this attribute to learn whether a block has transformers.
        if attentions := list(attentions):
            self.attentions = nn.ModuleList(attentions)
        self.resnets = nn.ModuleList(resnets)

    def has_transformers(self) -> bool:
        return hasattr(self, "attentions")

    def attend(self, layer: int, x: Tensor, conditions: Conditions) -> Tensor:
        """Runs the transformer of a layer, if there is one."""
        if not self.has_transformers():
            return x
        out = self.checkpoint_call(run_transformer, self.attentions[layer], x, conditions)
        return cast(Tensor, out)


@dispatched
def run_transformer(transformer: nn.Module, x: Tensor, conditions: Conditions) -> Tensor:
    """Runs the module in a slot: ``(B, C, H, W)`` to the same shape."""
    return cast(Tensor, transformer(x, return_dict=False, **conditions)[0])


class DownBlock2D(UNetStage):
    """A U-Net's down block: its layers, then strided downsampling in all blocks but the last.

    Shape: ``(B, in, H, W)`` and ``(B, T)`` to ``(B, out, H, W)``, or half that height and width if
    it downsamples. It also returns the skip connections for the up path: the feature maps after
    each layer and after downsampling.
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
            x = self.attend(layer, self.checkpoint_call(resnet, x, temb), conditions)
            if residual is not None and layer == len(self.resnets) - 1:
                x = x + residual
            skips.append(x)
        for downsampler in self.downsamplers or ():
            x = downsampler(x)
            skips.append(x)
        return x, tuple(skips)


class UNetMidBlock2D(UNetStage):
    """The U-Net's mid block: a ResNet block, in most networks followed by a transformer and another
    ResNet block.

    Shape: ``(B, C, H, W)`` and ``(B, T)`` to ``(B, C, H, W)``.
    """

    def forward(self, x: Tensor, temb: Tensor, conditions: Conditions) -> Tensor:
        first, *rest = self.resnets
        x = self.checkpoint_call(first, x, temb)
        for layer, resnet in enumerate(rest):
            x = self.checkpoint_call(resnet, self.attend(layer, x, conditions), temb)
        return x


class UpBlock2D(UNetStage):
    """A U-Net's up block: each layer takes a skip connection as additional channels; then
    upsampling, to the size of the next skip connection, in all blocks but the last.

    Shape: ``(B, in, H, W)``, ``(B, T)`` and one skip connection for each layer to ``(B, out, H,
    W)``, or ``(B, out, *size)`` if it upsamples.
    """

    # FreeU's factors, by which diffusers' programs switch it on: for the skip connections' low
    # frequencies and for the backbone, in the first and in the second up block.
    s1: float | None = None
    s2: float | None = None
    b1: float | None = None
    b2: float | None = None

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module],
        upsampler: nn.Module | None,
        resolution_idx: int,
    ) -> None:
        super().__init__(resnets, attentions)
        self.resolution_idx = resolution_idx
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
            if (factors := self._freeu()) is not None:
                skip_factor, backbone_factor = factors
                # Without a mid block both are the same tensor, which diffusers amplifies in place.
                shared, x = x is skip, amplified(x, backbone_factor)
                skip = low_frequencies_scaled(x if shared else skip, skip_factor)
            x = self.checkpoint_call(resnet, torch.cat([x, skip], dim=1), temb)
            x = self.attend(layer, x, conditions)
        for upsampler in self.upsamplers or ():
            x = upsampler(x, size)
        return x

    def _freeu(self) -> tuple[float, float] | None:
        """This block's factors for the skip connections and for the backbone, if FreeU is on."""
        s1, s2, b1, b2 = self.s1, self.s2, self.b1, self.b2
        if not (s1 and s2 and b1 and b2):  # diffusers takes a factor of 0 as off
            return None
        return {0: (s1, b1), 1: (s2, b2)}.get(self.resolution_idx)


class StageBuilder:
    """Builds the ResNet blocks of one U-Net's stages, and the modules in their slots."""

    def __init__(
        self, config: UNet2DConditionConfig, transformers: Transformers | None, time: int
    ) -> None:
        self._config, self._transformers, self._time = config, transformers, time
        self.reads_text = False

    def resnets(self, inputs: Sequence[int], channels: int) -> list[nn.Module]:
        return [
            ResnetBlock2D(
                in_channels,
                channels,
                temb_channels=self._time,
                groups=self._config.norm_num_groups,
                eps=UNET_NORM_EPS,
            )
            for in_channels in inputs
        ]

    def transformers(
        self, path: str, stage: int, depths: Sequence[int], only_cross: bool
    ) -> list[nn.Module]:
        config = self._config
        slots = [
            TransformerSlot(
                name=f"{path}.attentions.{layer}",
                channels=config.block_out_channels[stage],
                heads=config.heads[stage],
                depth=depth,
                cross_attention_dim=config.context_dims[stage],
                use_linear_projection=config.use_linear_projection,
                only_cross_attention=only_cross,
                upcast_attention=bool(config.upcast_attention),
                norm_num_groups=config.norm_num_groups,
            )
            for layer, depth in enumerate(depths)
        ]
        built = [self._transformers(slot) if self._transformers else None for slot in slots]
        self.reads_text |= any(module is not None for module in built)
        return [NoTransformer() if module is None else module for module in built]
