"""The autoencoders' configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sdconv.config.base import Config, check_divisible, check_layers, check_positive
from sdconv.config.facts import NORM_NUM_GROUPS


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Config):
    """The VAE of Stable Diffusion 1, 2, XL, 3, of FLUX.1 and of the x4 upscaler.

    ``scaling_factor``, ``shift_factor``: a diffusion model's input is ``(latents - shift_factor) *
    scaling_factor``. ``sample_size``: side of the training images, in pixels. ``force_upcast``: it
    overflows in float16.
    """

    class_name: ClassVar[str] = "AutoencoderKL"
    # defaults of diffusers.AutoencoderKL.__init__, for fields that older files do not have
    assumed: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "norm_num_groups": NORM_NUM_GROUPS,
        "sample_size": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    }
    constant: ClassVar[Mapping[str, Any]] = {"act_fn": "silu"}
    derived: ClassVar[frozenset[str]] = frozenset({"down_block_types", "up_block_types"})
    beyond_shapes: ClassVar[frozenset[str]] = frozenset(
        {
            "norm_num_groups",
            "sample_size",
            "scaling_factor",
            "shift_factor",
            "latents_mean",
            "latents_std",
            "force_upcast",
        }
    )

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    sample_size: int
    scaling_factor: float
    shift_factor: float | None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
        )
        check_layers(layers_per_block=self.layers_per_block)
        check_divisible(self.block_out_channels, self.norm_num_groups)

    @property
    def down_block_types(self) -> tuple[str, ...]:
        return ("DownEncoderBlock2D",) * len(self.block_out_channels)

    @property
    def up_block_types(self) -> tuple[str, ...]:
        return ("UpDecoderBlock2D",) * len(self.block_out_channels)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """The decoder's channels, beginning with level 0 (the image's size)."""
        return self.block_out_channels


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config(Config):
    """The VAE of FLUX.2: 32 channels, and batch-norm statistics instead of a scaling factor.

    A diffusion model's input is 2x2 patches of latents, normalised by ``bn`` (``batch_norm_eps``,
    no affine part).
    """

    class_name: ClassVar[str] = "AutoencoderKLFlux2"
    # defaults of diffusers.AutoencoderKLFlux2.__init__
    assumed: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_block_out_channels": None,
        "layers_per_block": 2,
        "latent_channels": 32,
        "norm_num_groups": NORM_NUM_GROUPS,
        "sample_size": 1024,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "batch_norm_eps": 1e-4,
        "batch_norm_momentum": 0.1,
        "patch_size": (2, 2),
    }
    constant: ClassVar[Mapping[str, Any]] = {"act_fn": "silu"}
    derived: ClassVar[frozenset[str]] = frozenset({"down_block_types", "up_block_types"})
    beyond_shapes: ClassVar[frozenset[str]] = frozenset(
        {"norm_num_groups", "sample_size", "batch_norm_eps", "batch_norm_momentum"}
    )
    unused: ClassVar[frozenset[str]] = frozenset({"force_upcast"})

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...] | None
    layers_per_block: int
    latent_channels: int
    norm_num_groups: int
    sample_size: int
    use_quant_conv: bool
    use_post_quant_conv: bool
    mid_block_add_attention: bool
    batch_norm_eps: float
    batch_norm_momentum: float
    patch_size: tuple[int, int]

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            latent_channels=self.latent_channels,
            norm_num_groups=self.norm_num_groups,
            patch_size=self.patch_size,
        )
        check_layers(layers_per_block=self.layers_per_block)
        check_divisible(self.block_out_channels + self.decoder_channels, self.norm_num_groups)
        if len(self.decoder_channels) != len(self.block_out_channels):
            raise ValueError("encoder and decoder have different numbers of levels")

    @property
    def down_block_types(self) -> tuple[str, ...]:
        return ("DownEncoderBlock2D",) * len(self.block_out_channels)

    @property
    def up_block_types(self) -> tuple[str, ...]:
        return ("UpDecoderBlock2D",) * len(self.decoder_channels)

    @property
    def decoder_channels(self) -> tuple[int, ...]:
        """The decoder's channels, beginning with level 0 (the image's size)."""
        return self.decoder_block_out_channels or self.block_out_channels


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(Config):
    """TAESD and its relatives: a plain stack of convolutions and three-convolution residual blocks.

    ``num_encoder_blocks``, ``num_decoder_blocks``: residual blocks in each stage; ``()`` without
    that half. ``encoder_stem_channels``: channels of the strided convolutions before the first
    stage (TAESANA's ``(32, 64)``); ``()`` for the plain 3x3 stem. ``use_midblock_gn``: the stage
    next to the latents adds a pooled GroupNorm branch to each block (TAEF2). diffusers does not
    have the last two.
    """

    class_name: ClassVar[str] = "AutoencoderTiny"
    # defaults of diffusers.AutoencoderTiny.__init__
    assumed: ClassVar[Mapping[str, Any]] = {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "latent_channels": 4,
        "encoder_stem_channels": (),
        "use_midblock_gn": False,
        "latent_magnitude": 3.0,
        "latent_shift": 0.5,
        "force_upcast": False,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }
    constant: ClassVar[Mapping[str, Any]] = {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }
    derived: ClassVar[frozenset[str]] = frozenset({"block_out_channels"})
    beyond_shapes: ClassVar[frozenset[str]] = frozenset(
        {"latent_magnitude", "latent_shift", "force_upcast", "scaling_factor", "shift_factor"}
    )
    extensions: ClassVar[frozenset[str]] = frozenset({"encoder_stem_channels", "use_midblock_gn"})

    in_channels: int
    out_channels: int
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    num_encoder_blocks: tuple[int, ...]
    num_decoder_blocks: tuple[int, ...]
    latent_channels: int
    encoder_stem_channels: tuple[int, ...]
    use_midblock_gn: bool
    latent_magnitude: float
    latent_shift: float
    force_upcast: bool
    scaling_factor: float
    shift_factor: float

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            latent_channels=self.latent_channels,
        )
        halves = (
            ("encoder", self.encoder_block_out_channels, self.num_encoder_blocks),
            ("decoder", self.decoder_block_out_channels, self.num_decoder_blocks),
        )
        for half, channels, blocks in halves:
            check_layers(**{f"num_{half}_blocks": blocks})
            if len(channels) != len(blocks):
                raise ValueError(
                    f"{half}_block_out_channels and num_{half}_blocks differ in length"
                )
            if channels:
                check_positive(**{f"{half}_block_out_channels": channels})

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        # diffusers' pipelines derive the downscaling from this field's length
        return self.decoder_block_out_channels or self.encoder_block_out_channels

    @property
    def in_diffusers(self) -> bool:
        """Whether ``diffusers.AutoencoderTiny`` can build this network."""
        even = len({*self.encoder_block_out_channels, *self.decoder_block_out_channels}) == 1
        return (
            bool(self.num_encoder_blocks and self.num_decoder_blocks)
            and even
            and not self.encoder_stem_channels
            and not self.use_midblock_gn
        )
