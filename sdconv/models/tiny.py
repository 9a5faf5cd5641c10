"""The tiny autoencoder: TAESD and its relatives, a distilled VAE made of plain convolutions.

Source: ``taesd.py`` of madebyollin/taesd. Images are in [0, 1] there and in [-1, 1] here, as in
diffusers. Layers are numbered as in diffusers; the original decoder counts its clamp as layer 0, so
its numbers are higher by one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from sdconv.backends import dispatched
from sdconv.config import AutoencoderTinyConfig, Config
from sdconv.errors import SdconvError
from sdconv.models.base import Autoencoder, apply_forward_hook
from sdconv.models.blocks import Checkpointed
from sdconv.models.outputs import AutoencoderTinyOutput, DecoderOutput

if TYPE_CHECKING:
    from sdconv.models.image_inputs import Images, Latents


class TinyBlock(nn.Module):
    """A residual block of three 3x3 convolutions: ``relu(convs(x) + x)``.

    Shape: ``(B, C, H, W)`` to the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.fuse = nn.ReLU()

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fuse(self.conv(x) + x))


class PooledTinyBlock(TinyBlock):
    """A tiny block that first adds a branch with GroupNorm: ``TinyBlock(x + pool(x))`` (TAEF2).

    GroupNorm's statistics carry information between distant parts of the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.pool = nn.Sequential(
            nn.Conv2d(channels, 4 * channels, 1, bias=False),
            nn.GroupNorm(4, 4 * channels),
            nn.ReLU(),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


class EncoderTiny(Checkpointed):
    """Images to latents: a stem, then stages, all but the first of which begin with a convolution
    with stride 2.

    Shape: ``(B, in_channels, H, W)`` in [-1, 1] to ``(B, latent_channels, H/f, W/f)``, f = 2^n
    after n convolutions with stride 2.
    """

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        channels, blocks = config.encoder_block_out_channels, config.num_encoder_blocks
        layers: list[nn.Module] = []
        if config.encoder_stem_channels:
            for before, after in pairwise((config.in_channels, *config.encoder_stem_channels)):
                layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        else:
            layers.append(nn.Conv2d(config.in_channels, channels[0], 3, padding=1))
        for stage, (before, width, count) in enumerate(
            zip((channels[0], *channels), channels, blocks, strict=False)
        ):
            if stage > 0:
                layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False))
            pooled = config.use_midblock_gn and stage == len(blocks) - 1
            layers += [_block(width, pooled) for _ in range(count)]
        layers.append(nn.Conv2d(channels[-1], config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    @dispatched
    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.checkpoint_call(self.layers, self.enter(x)))

    @staticmethod
    def enter(x: Tensor) -> Tensor:
        """Maps [-1, 1] to the [0, 1] of the original."""
        return x.add(1).div(2)

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Returns the layers' output as it is."""
        return x


class DecoderTiny(Checkpointed):
    """Latents to images: stages of blocks, with upsampling and a convolution between them.

    Shape: ``(B, latent_channels, h, w)`` to ``(B, out_channels, h*f, w*f)`` in [-1, 1], f =
    2^n after n upsamplings.
    """

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        channels, blocks = config.decoder_block_out_channels, config.num_decoder_blocks
        layers: list[nn.Module] = [
            nn.Conv2d(config.latent_channels, channels[0], 3, padding=1),
            nn.ReLU(),
        ]
        for stage, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            if stage > 0:
                before = channels[stage - 1]
                layers += [
                    nn.Upsample(scale_factor=2),
                    nn.Conv2d(before, width, 3, padding=1, bias=False),
                ]
            layers += [_block(width, config.use_midblock_gn and stage == 0) for _ in range(count)]
        layers.append(nn.Conv2d(channels[-1], config.out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    @dispatched
    def forward(self, z: Tensor) -> Tensor:
        return self.leave(self.checkpoint_call(self.layers, self.enter(z)))

    @staticmethod
    def enter(z: Tensor) -> Tensor:
        """Clamps softly to the range of the VAE's latents."""
        return torch.tanh(z / 3) * 3

    @staticmethod
    def leave(x: Tensor) -> Tensor:
        """Maps the [0, 1] of the original to [-1, 1]."""
        return x.mul(2).sub(1)


def _block(channels: int, pooled: bool) -> TinyBlock:
    return PooledTinyBlock(channels) if pooled else TinyBlock(channels)


class AutoencoderTiny(Autoencoder):
    """TAESD, TAESDXL, TAESD3, TAEF1, TAEF2 and TAESANA: encoder, decoder, or both.

    Images are in [-1, 1]; ``decode`` does not clamp. Latents are those that the diffusion model
    takes, so a pipeline's scaling factor is 1.

    Args:
        config: channels and numbers of blocks of each half; a half without blocks is absent.
    """

    config_class: ClassVar[type[Config]] = AutoencoderTinyConfig
    config: AutoencoderTinyConfig

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__(config)
        self.encoder = EncoderTiny(config) if config.num_encoder_blocks else None
        self.decoder = DecoderTiny(config) if config.num_decoder_blocks else None

    @property
    def downscale(self) -> int:
        """The factor by which an image is higher and wider than its latents."""
        if self.config.num_encoder_blocks:
            stem = len(self.config.encoder_stem_channels)
            return int(2 ** (len(self.config.num_encoder_blocks) - 1 + stem))
        return int(2 ** (len(self.config.num_decoder_blocks) - 1))

    @apply_forward_hook
    def encode(self, x: Images, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Encodes images to latents.

        Args:
            x: ``(B, in_channels, H, W)`` in [-1, 1]; or images of Pillow's or numpy's, as the VAE
                takes them.
            return_dict: False returns a plain tuple.

        Returns:
            ``.latents``: ``(B, latent_channels, H / downscale, W / downscale)``, raw.

        Raises:
            InputError: not a tensor, or one of an unsuitable shape, dtype or device.
            SdconvError: only the decoder was loaded.
        """
        latents = self._latents(x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, x: Latents, generator: torch.Generator | None = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Decodes latents to images.

        Args:
            x: ``(B, latent_channels, h, w)``, raw; a tensor or an array of numpy's.
            generator: ignored; pipelines pass one, but decoding is deterministic.
            return_dict: False returns a plain tuple.

        Returns:
            ``.sample``: ``(B, out_channels, h * downscale, w * downscale)``, nominally in [-1, 1],
            not clamped; ``.to_pil()`` and ``.to_numpy()`` give images.

        Raises:
            InputError: not a tensor, or one of an unsuitable shape, dtype or device.
            SdconvError: only the encoder was loaded.
        """
        decoder = self._half("decoder", self.decoder)
        x = self._checked(x, "latents", self.config.latent_channels, 1, decoder)
        if self.streaming is not None:
            sample = self.streaming(self, "decode", x)
        else:
            sample = self._over_batch(decoder, x)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Images, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encodes images, rounds the latents to bytes as TAESD's command does, and decodes them."""
        stored = self.scale_latents(self._latents(sample)).mul_(255).round_().byte()
        # Bytes divided by a float are float32.
        latents = self.unscale_latents((stored / 255.0).to(self.dtype))
        return self.decode(latents, return_dict=return_dict)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Maps raw latents to [0, 1], so that they can be stored as an image."""
        span = 2 * self.config.latent_magnitude
        return x.div(span).add(self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """Maps [0, 1] back to raw latents."""
        return x.sub(self.config.latent_shift).mul(2 * self.config.latent_magnitude)

    def _latents(self, x: Images) -> Tensor:
        encoder = self._half("encoder", self.encoder)
        x = self._checked(x, "images", self.config.in_channels, 1, encoder)
        if self.streaming is not None:
            return self.streaming(self, "encode", x)
        return self._over_batch(encoder, x)

    def _half(self, name: str, half: nn.Module | None) -> nn.Module:
        if half is None:
            verb = {"encoder": "encode", "decoder": "decode"}[name]
            raise SdconvError(
                f"the {name} is missing, so this network cannot {verb}",
                where="AutoencoderTiny",
                expected="weights of both halves",
                got=f"weights of the {'decoder' if name == 'encoder' else 'encoder'} only",
                hint="load both: sdconv.load([encoder_file, decoder_file])",
            )
        return half
