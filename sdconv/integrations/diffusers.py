"""sdconv's U-Net with diffusers' transformers, and diffusers' loaders for adapters on it."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.hooks import apply_group_offloading as apply_group_offloading
from diffusers.loaders import PeftAdapterMixin, UNet2DConditionLoadersMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor as AttnProcessor
from diffusers.models.attention_processor import AttnProcessor2_0 as AttnProcessor2_0
from diffusers.models.attention_processor import FusedAttnProcessor2_0 as FusedAttnProcessor2_0
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils.peft_utils import apply_lora_scale
from torch import nn

from sdconv.config import UNet2DConditionConfig
from sdconv.models import unet
from sdconv.models.unet_blocks import TransformerSlot


def transformer(slot: TransformerSlot) -> nn.Module:
    """diffusers' ``Transformer2DModel`` for a slot."""
    module: nn.Module = Transformer2DModel(
        slot.heads,
        slot.channels // slot.heads,
        in_channels=slot.channels,
        num_layers=slot.depth,
        cross_attention_dim=slot.cross_attention_dim,
        norm_num_groups=slot.norm_num_groups,
        use_linear_projection=slot.use_linear_projection,
        only_cross_attention=slot.only_cross_attention,
        upcast_attention=slot.upcast_attention,
    )
    return module


class AdaptableConfig(UNet2DConditionConfig):
    """A U-Net's config on which diffusers' IP-Adapter loader can set ``encoder_hid_dim_type``,
    which is not written to ``config.json``."""

    def __getitem__(self, key: str) -> Any:
        return self.constant[key] if key in self.constant else super().__getitem__(key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UNet2DConditionConfig) and dict(self) == dict(other)

    def __hash__(self) -> int:
        return super().__hash__()


class _Adapters(AttentionMixin, UNet2DConditionLoadersMixin, PeftAdapterMixin):  # type: ignore[misc]
    """diffusers' methods for attention processors, LoRA and IP-Adapters."""


class UNet2DConditionModel(unet.UNet2DConditionModel, _Adapters):
    """sdconv's U-Net with diffusers' transformers in all slots, and with diffusers' methods for
    attention processors, LoRA and IP-Adapters.

    Args:
        config: read from a checkpoint by ``sdconv.infer``.
    """

    def __init__(self, config: UNet2DConditionConfig) -> None:
        fields = {name: config[name] for name in config.field_names()}
        own = AdaptableConfig(**fields).left_open(config.open_to)  # a doubt about it is kept
        super().__init__(own, transformer)

    # applies the LoRA scale in cross_attention_kwargs
    forward = apply_lora_scale("cross_attention_kwargs")(unet.UNet2DConditionModel.forward)
    set_attention_slice = diffusers.UNet2DConditionModel.set_attention_slice
    set_default_attn_processor = diffusers.UNet2DConditionModel.set_default_attn_processor
    # these reach the transformers; sdconv's own layers have nothing to set
    set_use_memory_efficient_attention_xformers = (
        ModelMixin.set_use_memory_efficient_attention_xformers
    )
    enable_xformers_memory_efficient_attention = (
        ModelMixin.enable_xformers_memory_efficient_attention
    )
    disable_xformers_memory_efficient_attention = (
        ModelMixin.disable_xformers_memory_efficient_attention
    )
    compile_repeated_blocks = ModelMixin.compile_repeated_blocks
    _repeated_blocks = ("BasicTransformerBlock",)
    _skip_layerwise_casting_patterns = ("norm",)
    fuse_qkv_projections = diffusers.UNet2DConditionModel.fuse_qkv_projections
    unfuse_qkv_projections = diffusers.UNet2DConditionModel.unfuse_qkv_projections
