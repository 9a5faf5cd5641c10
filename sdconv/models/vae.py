"""The VAE: images to latents with an eighth of their height and width, and back.

Source: ``ldm/modules/diffusionmodules/model.py`` and ``ldm/models/autoencoder.py`` (Rombach et al.
2022, https://arxiv.org/abs/2112.10752), with diffusers' names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from sdconv.backends import dispatched
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, Config
from sdconv.config.facts import VAE_NORM_EPS
from sdconv.models.base import Autoencoder, apply_forward_hook, check_room
from sdconv.models.blocks import Checkpointed, DownEncoderBlock2D, MidBlock2D, UpDecoderBlock2D
from sdconv.models.outputs import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from sdconv.models.image_inputs import Images, Latents


class Encoder(Checkpointed):
    """Images to the mean and log-variance of their latents.

    Args:
        in_channels: channels of the image.
        latent_channels: channels of the latents, half of the output's.
        block_out_channels: channels of each down block, from the image's resolution downwards.
        layers_per_block: ResNet blocks in each down block.
        groups: number of groups of GroupNorm.
        attention: whether the mid block has attention.

    Shape: ``(B, in_channels, H, W)`` to ``(B, 2 * latent_channels, H / 2^(n-1), W / 2^(n-1))`` with
    n down blocks.
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
                after,
                layers=layers_per_block,
                downsample=number < len(block_out_channels),
                groups=groups,
                eps=VAE_NORM_EPS,
            )
            for number, (before, after) in enumerate(pairwise((first, *block_out_channels)), 1)
        )
        self.mid_block = MidBlock2D(last, attention=attention, groups=groups, eps=VAE_NORM_EPS)
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=VAE_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, 2 * latent_channels, 3, padding=1)

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = self.checkpoint_call(block, x)
        x = self.checkpoint_call(self.mid_block, x)
        return cast(Tensor, self.conv_out(self.conv_act(self.conv_norm_out(x))))


class Decoder(Checkpointed):
    """Latents to images.

    Args:
        latent_channels: channels of the latents.
        out_channels: channels of the image.
        block_out_channels: channels of each up block in the encoder's order, from the image's
            resolution downwards; the decoder runs through them backwards.
        layers_per_block: as in the encoder; an up block has one ResNet block more.
        groups: number of groups of GroupNorm.
        attention: whether the mid block has attention.

    Shape: ``(B, latent_channels, h, w)`` to ``(B, out_channels, h * 2^(n-1), w * 2^(n-1))`` with n
    up blocks.
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
                upsample=number < len(channels),
                groups=groups,
                eps=VAE_NORM_EPS,
            )
            for number, (before, after) in enumerate(pairwise((first, *channels)), 1)
        )
        self.mid_block = MidBlock2D(first, attention=attention, groups=groups, eps=VAE_NORM_EPS)
        self.conv_norm_out = nn.GroupNorm(groups, last, eps=VAE_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(last, out_channels, 3, padding=1)

    @dispatched
    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        x = self.checkpoint_call(self.mid_block, x)
        for block in self.up_blocks:
            x = self.checkpoint_call(block, x)
        return cast(Tensor, self.conv_out(self.conv_act(self.conv_norm_out(x))))


class AutoencoderKL(Autoencoder):
    """The VAE of Stable Diffusion 1, 2, XL and 3, of FLUX.1 and of the x4 upscaler.

    Images are in [-1, 1]; ``decode`` does not clamp. Latents are raw: a diffusion model takes
    ``(latents - config.shift_factor) * config.scaling_factor``.

    Args:
        config: numbers of channels, blocks and layers; ``sdconv.infer`` reads it from a checkpoint.
    """

    config_class: ClassVar[type[Config]] = AutoencoderKLConfig
    config: AutoencoderKLConfig | AutoencoderKLFlux2Config
    # The whole encoder and decoder, since `encode` and `decode` do not call `forward`.
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
        """The factor by which an image is higher and wider than its latents."""
        return int(2 ** (len(self.config.block_out_channels) - 1))

    def enable_parallel(
        self,
        group: ProcessGroup | None = None,
        *,
        memory_limit: int | str | None = None,
        spill: str | Path | None = None,
        progress: bool = True,
        timeout: float = 60.0,
    ) -> None:
        """Makes ``encode`` and ``decode`` compute each image over the ranks of a process group.

        Each rank computes a band of rows of every feature map. Bands exchange the rows that
        convolutions need beyond their edges; normalisation and attention see the whole image. All
        ranks call this, ``encode`` and ``decode`` together, with the same input, and all get the
        whole result: the bits of ``enable_streaming`` with the same strips. A rank's feature maps
        take as much memory as its band is of the image.

        Messages go through gloo for a network on CPUs and through NCCL for one on GPUs; under
        torchrun, call ``torch.distributed.init_process_group()`` first.

        Args:
            group: the process group; None for all ranks, in a new group.
            memory_limit, spill: as for ``enable_streaming``, of each rank.
            progress: shows a progress bar on the first rank, if standard error is a terminal.
            timeout: seconds for which a rank waits for one that is slower, or has ended, in a new
                group; a group of yours has its own.

        Raises:
            SdconvError: ``torch.distributed`` is not initialised, this process is not in the group,
                the ranks' weights differ, or not all ranks call this in time. ``encode`` and
                ``decode`` raise it later on every rank if their inputs differ, and on the others if
                a rank ends.
        """
        before = self.streaming
        self.enable_streaming(memory_limit, spill, progress)
        streaming: Any = self.streaming
        self.streaming = before
        self.streaming = streaming.over_ranks(self, group, timeout)

    def disable_parallel(self) -> None:
        """Makes ``encode`` and ``decode`` compute in this process again. Ranks that still compute
        with this one get an error."""
        close: Callable[[], None] | None = getattr(self.streaming, "close", None)
        if close is not None:
            close()
            self.disable_streaming()

    @apply_forward_hook
    def encode(
        self, x: Images, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encodes images to a distribution over latents.

        Args:
            x: ``(B, in_channels, H, W)`` in [-1, 1]; or an image of Pillow's in mode RGB or L, an
                array ``(H, W, 3)`` or ``(B, H, W, 3)`` of numpy's, uint8 from 0 to 255 or
                floating-point from 0 to 1, or a list of these. Nothing is resized or cropped.
            return_dict: False returns a plain tuple.

        Returns:
            ``.latent_dist``, over latents ``(B, latent_channels, H // downscale, W // downscale)``.

        Raises:
            InputError: none of these, or of an unsuitable shape, size, range, dtype or device.
        """
        posterior = self._posterior(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Latents, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Decodes latents to images.

        Args:
            z: ``(B, latent_channels, h, w)``, raw; a tensor or an array of numpy's.
            return_dict: False returns a plain tuple.
            generator: ignored; pipelines pass one, but decoding is deterministic.

        Returns:
            ``.sample``: ``(B, out_channels, h * downscale, w * downscale)``, nominally in [-1, 1],
            not clamped; ``.to_pil()`` and ``.to_numpy()`` give images.

        Raises:
            InputError: not a tensor, or one of an unsuitable shape, size, dtype or device.
        """
        sample = self._sample(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Images,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encodes and decodes images.

        Args:
            sample: images, as ``encode`` takes them.
            sample_posterior: draws the latents from the posterior instead of taking its mode.
            return_dict: False returns a plain tuple.
            generator: for drawing the latents.
        """
        posterior = self._posterior(sample)
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def _posterior(self, x: Images) -> DiagonalGaussianDistribution:
        with self._sharing_errors():
            x = self._checked(x, "images", self.config.in_channels, self.downscale, self.encoder)
            rows, columns = (side // self.downscale for side in x.shape[2:])
            self._check_room(x, rows * columns, self.config.block_out_channels[-2:])
        if self.streaming is not None:
            return DiagonalGaussianDistribution(self.streaming(self, "encode", x))
        return DiagonalGaussianDistribution(self._over_batch(self._moments, x))

    def _sample(self, z: Latents) -> Tensor:
        first = self.decoder if self.post_quant_conv is None else self.post_quant_conv
        with self._sharing_errors():
            z = self._checked(z, "latents", self.config.latent_channels, 1, first)
            self._check_room(z, z.shape[2] * z.shape[3], (self.decoder.conv_in.out_channels,))
        if self.streaming is not None:
            return self.streaming(self, "decode", z)
        return self._over_batch(self._decoded, z)

    def _sharing_errors(self) -> AbstractContextManager[None]:
        """Raises a refused input on every rank that waits for it, if there are several."""
        sharing: Callable[[], AbstractContextManager[None]]
        sharing = getattr(self.streaming, "sharing_errors", nullcontext)
        return sharing()

    def _check_room(self, x: Tensor, area: int, channels: tuple[int, ...]) -> None:
        """Refuses an input whose smallest feature map, of ``area`` positions, is too small to
        normalise."""
        batch = 1 if self.use_slicing else x.shape[0]
        groups = self.config.norm_num_groups
        check_room(batch, area, min(channels), groups, self.config.class_name)

    def _moments(self, x: Tensor) -> Tensor:
        moments: Tensor = self.encoder(x)
        return moments if self.quant_conv is None else cast(Tensor, self.quant_conv(moments))

    def _decoded(self, z: Tensor) -> Tensor:
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return cast(Tensor, self.decoder(z))


class AutoencoderKLFlux2(AutoencoderKL):
    """The VAE of FLUX.2: the same network with 32 latent channels, and ``bn``, which holds the
    latents' statistics.

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
