"""The U-Net's config, and the facts that its shapes do not show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sdconv.config.base import Config, check_divisible, check_layers, check_positive
from sdconv.config.facts import NORM_NUM_GROUPS, UNET_NORM_EPS

CROSS_DOWN, DOWN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, UP = "CrossAttnUpBlock2D", "UpBlock2D"
CROSS_MID, MID = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"

# the depth of a level's transformers: one number, or one for each layer
Depths = int | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class UNet2DConditionConfig(Config):
    """The U-Net of Stable Diffusion 1, 2, XL, of the x4 upscaler, and of what was distilled from
    them.

    Level 0 has the sample's own size, the last level the smallest feature map. A tuple has an entry
    for each level; a single number applies to all levels. ``attention_head_dim``: the number of
    heads, despite diffusers' name. ``transformer_layers_per_block``: blocks in a transformer;
    ``reverse_transformer_layers_per_block``: the same for the up path, beginning with the smallest
    feature map, if it does not mirror the down path. ``only_cross_attention``: both attentions of a
    block read the prompt embedding. ``sample_size``: rows and columns of a pipeline's default
    latents.
    """

    class_name: ClassVar[str] = "UNet2DConditionModel"
    # defaults of diffusers.UNet2DConditionModel.__init__
    assumed: ClassVar[Mapping[str, Any]] = {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN),
        "mid_block_type": CROSS_MID,
        "up_block_types": (UP, CROSS_UP, CROSS_UP, CROSS_UP),
        "only_cross_attention": False,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "norm_num_groups": NORM_NUM_GROUPS,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "upcast_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "time_embedding_dim": None,
        "time_cond_proj_dim": None,
    }
    constant: ClassVar[Mapping[str, Any]] = {
        "act_fn": "silu",
        "attention_type": "default",
        "center_input_sample": False,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "downsample_padding": 1,
        "dropout": 0.0,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": UNET_NORM_EPS,
        "num_attention_heads": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "time_embedding_act_fn": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
    }
    # not used by networks with these types of blocks
    derived: ClassVar[frozenset[str]] = frozenset(
        {"addition_embed_type_num_heads", "mid_block_only_cross_attention"}
    )
    unused: ClassVar[frozenset[str]] = derived
    beyond_shapes: ClassVar[frozenset[str]] = frozenset(
        {"norm_num_groups", "sample_size", "attention_head_dim", "upcast_attention"}
    )

    sample_size: int | tuple[int, int] | None
    in_channels: int
    out_channels: int
    down_block_types: tuple[str, ...]
    mid_block_type: str | None
    up_block_types: tuple[str, ...]
    only_cross_attention: bool | tuple[bool, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int | tuple[int, ...]
    norm_num_groups: int
    cross_attention_dim: int | tuple[int, ...]
    transformer_layers_per_block: int | tuple[Depths, ...]
    reverse_transformer_layers_per_block: tuple[Depths, ...] | None
    attention_head_dim: int | tuple[int, ...]
    use_linear_projection: bool
    upcast_attention: bool | None
    class_embed_type: str | None
    num_class_embeds: int | None
    addition_embed_type: str | None
    addition_time_embed_dim: int | None
    projection_class_embeddings_input_dim: int | None
    time_embedding_dim: int | None
    time_cond_proj_dim: int | None

    def __post_init__(self) -> None:
        check_positive(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            block_out_channels=self.block_out_channels,
            layers_per_block=self.layers_per_block,
            norm_num_groups=self.norm_num_groups,
            cross_attention_dim=self.cross_attention_dim,
            attention_head_dim=self.attention_head_dim,
        )
        check_layers(layers_per_block=self.layers_per_block)
        check_divisible(self.block_out_channels, self.norm_num_groups)
        levels = len(self.block_out_channels)
        for name in (
            "down_block_types",
            "up_block_types",
            "only_cross_attention",
            "layers_per_block",
            "cross_attention_dim",
            "transformer_layers_per_block",
            "reverse_transformer_layers_per_block",
            "attention_head_dim",
        ):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} = {value!r} does not have {levels} levels")
        known = (
            ("down_block_types", self.down_block_types, {CROSS_DOWN, DOWN}),
            ("up_block_types", self.up_block_types, {CROSS_UP, UP}),
            ("mid_block_type", (self.mid_block_type,), {CROSS_MID, MID, None}),
            ("class_embed_type", (self.class_embed_type,), {"projection", None}),
            ("addition_embed_type", (self.addition_embed_type,), {"text_time", None}),
        )
        for name, values, choices in known:
            if strange := set(values) - choices:
                raise ValueError(f"{name} contains {strange}; sdconv builds {choices}")
        projects = self.class_embed_type is not None or self.addition_embed_type is not None
        if projects:
            check_positive(
                projection_class_embeddings_input_dim=self.projection_class_embeddings_input_dim
            )
        if self.addition_embed_type is not None:
            check_positive(addition_time_embed_dim=self.addition_time_embed_dim)
        depths = [d for level in (*self.down_depths, *self.up_depths) for d in level]
        check_layers(transformer_layers_per_block=tuple(depths))
        for heads, channels, attends in zip(
            self.heads, self.block_out_channels, self.attends, strict=True
        ):
            if attends and channels % heads:
                raise ValueError(f"{channels} channels cannot be split into {heads} heads")

    @property
    def addition_embed_type_num_heads(self) -> int:
        return 64

    @property
    def mid_block_only_cross_attention(self) -> None:
        return None

    @property
    def layers(self) -> tuple[int, ...]:
        """ResNet blocks of each level on the down path; the up path has one more."""
        return self._per_level(self.layers_per_block)

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self._per_level(self.attention_head_dim)

    @property
    def attends(self) -> tuple[bool, ...]:
        """For each level, whether it has transformers; the mid block counts as the last level."""
        types = zip(self.down_block_types, self.up_block_types[::-1], strict=True)
        *levels, last = (down == CROSS_DOWN or up == CROSS_UP for down, up in types)
        return (*levels, last or self.mid_block_type == CROSS_MID)

    @property
    def context_dims(self) -> tuple[int, ...]:
        """Width of the prompt embedding that each level reads."""
        return self._per_level(self.cross_attention_dim)

    @property
    def crosses_only(self) -> tuple[bool, ...]:
        """For each level, whether both attentions of a block read the prompt embedding."""
        return self._per_level(self.only_cross_attention)

    @property
    def down_depths(self) -> tuple[tuple[int, ...], ...]:
        """For each level, each layer's number of transformer blocks; empty without transformers."""
        depths = self._per_level(self.transformer_layers_per_block)
        return tuple(
            _each(depth, layers) if kind == CROSS_DOWN else ()
            for depth, layers, kind in zip(depths, self.layers, self.down_block_types, strict=True)
        )

    @property
    def mid_depth(self) -> int | None:
        """Transformer blocks in the mid block; None if it has no transformer."""
        if self.mid_block_type != CROSS_MID:
            return None
        return _each(self._per_level(self.transformer_layers_per_block)[-1], 1)[0]

    @property
    def up_depths(self) -> tuple[tuple[int, ...], ...]:
        """``down_depths`` for the up path, beginning with the smallest feature map."""
        depths = (
            self.reverse_transformer_layers_per_block
            or self._per_level(self.transformer_layers_per_block)[::-1]
        )
        return tuple(
            _each(depth, layers + 1) if kind == CROSS_UP else ()
            for depth, layers, kind in zip(
                depths, self.layers[::-1], self.up_block_types, strict=True
            )
        )

    def _per_level(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def _each(depth: Depths, layers: int) -> tuple[int, ...]:
    if isinstance(depth, int):
        return (depth,) * layers
    if len(depth) < layers:
        raise ValueError(f"transformer depths {depth} for {layers} layers")
    return depth[:layers]


@dataclass(frozen=True, kw_only=True)
class UNetFacts:
    """What a U-Net's shapes do not show.

    One of two is given: ``heads``, the number of heads on each level, or ``head_channels``, the
    number of channels in a head. ``source``: the model whose ``unet/config.json`` has these values.
    """

    heads: int | None
    head_channels: int | None
    sample_size: int
    upcast_attention: bool
    source: str


UNET_FACTS: Mapping[str, UNetFacts] = {
    "sd1": UNetFacts(
        heads=8,
        head_channels=None,
        sample_size=64,
        upcast_attention=False,
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "sd2": UNetFacts(
        heads=None,
        head_channels=64,
        sample_size=96,
        upcast_attention=True,
        source="stabilityai/stable-diffusion-2-1",
    ),
    "sdxl": UNetFacts(
        heads=None,
        head_channels=64,
        sample_size=128,
        upcast_attention=False,
        source="stabilityai/stable-diffusion-xl-base-1.0",
    ),
    "sdxl-refiner": UNetFacts(
        heads=None,
        head_channels=64,
        sample_size=128,
        upcast_attention=False,
        source="stabilityai/stable-diffusion-xl-refiner-1.0",
    ),
    "playground-v2.5": UNetFacts(
        heads=None,
        head_channels=64,
        sample_size=128,
        upcast_attention=False,
        source="playgroundai/playground-v2.5-1024px-aesthetic",
    ),
    "x4-upscaler": UNetFacts(
        heads=8,
        head_channels=None,
        sample_size=128,
        upcast_attention=False,
        source="stabilityai/stable-diffusion-x4-upscaler",
    ),
}
