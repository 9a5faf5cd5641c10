"""The VAE: pictures to latents an eighth of their size along each side, and back.

Source: ``ldm/modules/diffusionmodules/model.py`` and ``ldm/models/autoencoder.py`` (Rombach et al.
2022, https://arxiv.org/abs/2112.10752), with diffusers' names.
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, Config
from sdconv.config.facts import VAE_NORM_EPS
from sdconv.fast import blocks as fast
from sdconv.models.base import Autoencoder, Recomputed, moved_by_hooks
from sdconv.models.blocks import (
    DownEncoderBlock2D,
    MidBlock2D,
    UpDecoderBlock2D,
    apart,
    last_convolution,
)
from sdconv.models.inputs import check_room
from sdconv.models.outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution
from sdconv.streaming import Streaming


class Encoder(Recomputed):
    """Pictures to the moments of latents: strided convolutions halve the map between levels.

    Args:
        in_channels: the picture's. latent_channels: half the output's (mean and log-variance).
        block_out_channels: of each level, the picture's size first.
        layers_per_block: ResNet blocks on each level.
        groups: normalisation groups. attention: whether the middle has it.

    Shape: ``(B, in_channels, H, W)`` to ``(B, 2 * latent_channels, H / 2^(n-1), W / 2^(n-1))``, n
    levels.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(
                before,
                channels,
                layers=layers_per_block,
                downsample=level < len(block_out_channels),
                groups=groups,
                eps=VAE_NORM_EPS,
            )
            for level, (before, channels) in enumerate(pairwise((first, *block_out_channels)), 1)
        )
        self.mid_block = MidBlock2D(last, attention=attention, groups=groups, eps=VAE_NORM_EPS)
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=VAE_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = fast.first(self.conv_in, x)
        for block in apart((*self.down_blocks, self.mid_block)):
            x = self.call(block, x)
        return last_convolution(self.conv_norm_out, self.conv_act, self.conv_out, x)


class Decoder(Recomputed):
    """Latents to pictures: nearest-neighbour doubling and a convolution between levels.

    Args:
        latent_channels: the input's. out_channels: the picture's.
        block_out_channels: of each level, the picture's size first (the encoder's order, walked
            backwards here).
        layers_per_block: as in the encoder; a level here has one ResNet block more.
        groups: normalisation groups. attention: whether the middle has it.

    Shape: ``(B, latent_channels, h, w)`` to ``(B, out_channels, h * 2^(n-1), w * 2^(n-1))``, n
    levels.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        groups: int,
        attention: bool,
    ) -> None:
        super().__init__()
        channels = block_out_channels[::-1]
        first, last = channels[0], channels[-1]
        self.conv_in = nn.Conv2d(latent_channels, first, 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(
                before,
                after,
                layers=layers_per_block + 1,
                upsample=level < len(channels),
                groups=groups,
                eps=VAE_NORM_EPS,
            )
            for level, (before, after) in enumerate(pairwise((first, *channels)), 1)
        )
        self.mid_block = MidBlock2D(first, attention=attention, groups=groups, eps=VAE_NORM_EPS)
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=VAE_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = fast.first(self.conv_in, z)
        for block in apart((self.mid_block, *self.up_blocks)):
            x = self.call(block, x)
        return last_convolution(self.conv_norm_out, self.conv_act, self.conv_out, x)


class AutoencoderKL(Autoencoder):
    """The VAE of Stable Diffusion 1, 2, XL, 3, of FLUX.1 and of the x4 upscaler.

    Takes and gives pictures in [-1, 1]; ``decode`` does not clamp. Latents are raw: what a
    diffusion model sees is ``(latents - config.shift_factor) * config.scaling_factor``.

    Args:
        config: which channels, levels and parts; read from a checkpoint by ``sdconv.infer``.
    """

    config_class: ClassVar[type[Config]] = AutoencoderKLConfig
    config: AutoencoderKLConfig | AutoencoderKLFlux2Config
    streaming: Streaming | None = None
    # whole halves, since `encode` and `decode` run without `forward`
    _group_offload_block_modules = ("quant_conv", "post_quant_conv", "encoder", "decoder")

    def __init__(self, config: AutoencoderKLConfig | AutoencoderKLFlux2Config) -> None:
        super().__init__(config)
        latent = config.latent_channels
        self.encoder = Encoder(
            in_channels=config.in_channels,
            latent_channels=latent,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            groups=config.norm_num_groups,
            attention=config.mid_block_add_attention,
        )
        self.decoder = Decoder(
            latent_channels=latent,
            out_channels=config.out_channels,
            block_out_channels=config.decoder_channels,
            layers_per_block=config.layers_per_block,
            groups=config.norm_num_groups,
            attention=config.mid_block_add_attention,
        )
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @property
    def downscale(self) -> int:
        """How many pixels, along each side, one latent stands for."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def enable_streaming(
        self,
        memory_limit: int | str | None = "2GiB",
        spill: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        """Encodes and decodes in strips of rows from now on, layer by layer, picture by picture,
        within a limit of memory.

        Normalisation and attention see the whole picture, so that the result differs from an
        ordinary run by rounding only. Without gradients: an input that wants them is refused, and
        weights that want them, as loaded ones do, get none.

        Args:
            memory_limit: for all that a call allocates, its result included, weights and input
                apart: ``"2GiB"`` or bytes; None for no limit. On CUDA, of the device's memory.
            spill: a folder on a disk, for maps that do not fit (``sdconv plan`` tells how large
                they get). None keeps all within the limit; on CUDA it lets them go to the host's
                memory.
            progress: show a bar, if standard error is a terminal.

        Raises:
            InputError: the limit is no size, or the folder cannot be written to. ``encode`` and
                ``decode`` then raise it for a limit that a picture cannot meet, and say what the
                least is.
        """
        self.streaming = Streaming.of(memory_limit, spill, progress)

    def disable_streaming(self) -> None:
        """Encodes and decodes whole maps again."""
        self.streaming = None

    def enable_tiling(self, use_tiling: object = True, *args: object, **kwargs: object) -> None:
        """What pipelines call to save memory: strips, as ``enable_streaming`` was told or else
        without a limit; or whole maps again for False. Tiles would change the picture; their
        sizes, if given, are not used."""
        if not use_tiling:
            self.disable_streaming()
        elif self.streaming is None:
            self.enable_streaming(None)

    def disable_tiling(self) -> None:
        """Encodes and decodes whole maps again."""
        self.disable_streaming()

    @moved_by_hooks
    def encode(
        self, x: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures to a distribution over latents.

        Args:
            x: ``(B, in_channels, H, W)`` in [-1, 1].
            return_dict: False for a plain tuple.

        Returns:
            ``.latent_dist``, over latents ``(B, latent_channels, H // downscale, W // downscale)``.

        Raises:
            InputError: no tensor, of another shape, dtype or device than the network takes, or too
            small.
        """
        posterior = self._posterior(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @moved_by_hooks
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pictures.

        Args:
            z: ``(B, latent_channels, h, w)``, raw.
            return_dict: False for a plain tuple.
            generator: taken because pipelines pass one; decoding draws no noise.

        Returns:
            ``.sample``: ``(B, out_channels, h * downscale, w * downscale)``, nominally in [-1, 1],
            not clamped.

        Raises:
            InputError: no tensor, of another shape, dtype or device than the network takes, or too
            small.
        """
        sample = self._sample(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """``decode(encode(sample))``, at the posterior's mode unless asked to sample from it."""
        posterior = self._posterior(sample)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _posterior(self, x: Tensor) -> DiagonalGaussianDistribution:
        x = self._checked(x, "pictures", self.config.in_channels, self.downscale, self.encoder)
        rows, columns = (side // self.downscale for side in x.shape[2:])
        self._check_room(x, rows * columns, self.config.block_out_channels[-2:])
        if self.streaming is not None:
            return DiagonalGaussianDistribution(self.streaming(self, "encode", x))
        return DiagonalGaussianDistribution(self._over_batch(self._moments, x))

    def _sample(self, z: Tensor) -> Tensor:
        first = self.decoder if self.post_quant_conv is None else self.post_quant_conv
        z = self._checked(z, "latents", self.config.latent_channels, 1, first)
        self._check_room(z, z.shape[2] * z.shape[3], self.config.decoder_channels[-1:])
        if self.streaming is not None:
            return self.streaming(self, "decode", z)
        return self._over_batch(self._pictures, z)

    def _check_room(self, x: Tensor, area: int, channels: tuple[int, ...]) -> None:
        """Looks at the smallest map, which has so many positions."""
        batch = 1 if self.use_slicing else len(x)
        groups = self.config.norm_num_groups
        check_room(batch, area, min(channels), groups, self.config.class_name)

    def _moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments if self.quant_conv is None else cast(Tensor, self.quant_conv(moments))

    def _pictures(self, z: Tensor) -> Tensor:
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))  # type: ignore[no-any-return]


class AutoencoderKLFlux2(AutoencoderKL):
    """The VAE of FLUX.2: the same network with 32 channels, and ``bn``, the statistics of its
    latents.

    ``encode`` and ``decode`` do not apply ``bn``: pipelines normalise 2x2 patches of latents with
    ``bn.running_mean`` and ``bn.running_var``.
    """

    config_class: ClassVar[type[Config]] = AutoencoderKLFlux2Config
    config: AutoencoderKLFlux2Config

    def __init__(self, config: AutoencoderKLFlux2Config) -> None:
        super().__init__(config)
        self.bn = nn.BatchNorm2d(
            math.prod(config.patch_size) * config.latent_channels,
            eps=config.batch_norm_eps,
            momentum=config.batch_norm_momentum,
            affine=False,
        )
