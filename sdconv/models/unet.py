"""The U-Net: predicts the noise in latents from a timestep and a prompt embedding.

The convolutional skeleton is here; the transformers between its ResNet blocks are passed in.
Source: ``ldm/modules/diffusionmodules/openaimodel.py`` (Rombach et al. 2022,
https://arxiv.org/abs/2112.10752) and its successor in Stability-AI/generative-models, with
diffusers' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from sdconv.backends import dispatched, provided
from sdconv.config import Config, UNet2DConditionConfig
from sdconv.config.facts import UNET_NORM_EPS
from sdconv.errors import InputError
from sdconv.models.base import Network
from sdconv.models.blocks import Downsample2D, Upsample2D
from sdconv.models.outputs import Output, exportable
from sdconv.models.unet_blocks import (
    Conditions,
    DownBlock2D,
    StageBuilder,
    TimestepEmbedding,
    Timesteps,
    Transformers,
    UNetMidBlock2D,
    UpBlock2D,
)
from sdconv.models.unet_inputs import (
    check_added,
    check_attention,
    check_residuals,
    check_sample,
    check_text,
)

Added = Mapping[str, Any]


@exportable
@dataclass(frozen=True)
class UNet2DConditionOutput(Output):
    """``sample``: the prediction, ``(B, out_channels, H, W)``."""

    sample: Tensor


class UNet2DConditionModel(Network):
    """The U-Net of Stable Diffusion 1, 2 and XL, of the x4 upscaler, and of models distilled from
    them.

    ``sdconv.load`` builds it with diffusers' own ``Transformer2DModel`` in its slots, so that
    attention processors, LoRA and IP-Adapters work on it as on diffusers' class.

    Args:
        config: numbers of channels, blocks and layers; ``sdconv.infer`` reads it from a checkpoint.
        transformers: builds the module for each slot; None for a skeleton without transformers.
    """

    config_class: ClassVar[type[Config]] = UNet2DConditionConfig
    component: ClassVar[str] = "unet"
    config: UNet2DConditionConfig

    def __init__(self, config: UNet2DConditionConfig, transformers: Transformers | None) -> None:
        super().__init__(config)
        channels = config.block_out_channels
        first, last, levels = channels[0], channels[-1], len(channels)
        time, cross = config.time_embedding_dim or 4 * first, config.crosses_only
        build = StageBuilder(config, transformers, time)

        self.conv_in = nn.Conv2d(config.in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first)
        self.time_embedding = TimestepEmbedding(first, time, config.time_cond_proj_dim)
        # Set by an IP-Adapter: projects image embeddings for the transformers.
        self.encoder_hid_proj: nn.Module | None = None
        projected = config.projection_class_embeddings_input_dim or 0
        self.class_embedding: nn.Module | None = None
        if config.class_embed_type == "projection":
            self.class_embedding = TimestepEmbedding(projected, time)
        elif config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time)
        self.add_embedding: TimestepEmbedding | None = None
        if config.addition_embed_type is not None:
            self.add_time_proj = Timesteps(config.addition_time_embed_dim or 0)
            self.add_embedding = TimestepEmbedding(projected, time)

        # The mid block comes last: diffusers' order of parameters.
        self.down_blocks = nn.ModuleList(
            DownBlock2D(
                build.resnets((before, *(after,) * (layers - 1)), after),
                build.transformers(
                    f"down_blocks.{level}", level, config.down_depths[level], cross[level]
                ),
                Downsample2D(after) if level < levels - 1 else None,
            )
            for level, ((before, after), layers) in enumerate(
                zip(pairwise((first, *channels)), config.layers, strict=True)
            )
        )
        self.up_blocks = nn.ModuleList()
        before = last
        for block, level in enumerate(reversed(range(levels))):
            after, layers = channels[level], config.layers[level]
            # The last skip connection of an up block comes from the next higher resolution.
            skips = (*(after,) * layers, channels[max(level - 1, 0)])
            inputs = (before, *(after,) * layers)
            self.up_blocks.append(
                UpBlock2D(
                    build.resnets([a + b for a, b in zip(inputs, skips, strict=True)], after),
                    build.transformers(
                        f"up_blocks.{block}", level, config.up_depths[block], cross[level]
                    ),
                    Upsample2D(after) if level else None,
                    block,
                )
            )
            before = after
        self.mid_block: UNetMidBlock2D | None = None
        if config.mid_block_type is not None:
            depths = () if config.mid_depth is None else (config.mid_depth,)
            self.mid_block = UNetMidBlock2D(
                build.resnets((last,) * (1 + len(depths)), last),
                build.transformers("mid_block", levels - 1, depths, False),
            )

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=UNET_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(first, config.out_channels, 3, padding=1)
        self.reads_text = build.reads_text

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predicts the noise, or the velocity if the network was trained for that.

        Args:
            sample: ``(B, in_channels, H, W)``, of any size.
            timestep: one number, or a tensor of shape ``()``, ``(1,)`` or ``(B,)``.
            encoder_hidden_states: the prompt embedding, ``(B, tokens, cross_attention_dim)``; None
                without transformers.
            class_labels: ``(B,)`` whole numbers below ``num_class_embeds`` (the x4 upscaler's noise
                level), or ``(B, projection_class_embeddings_input_dim)``.
            timestep_cond: ``(B, time_cond_proj_dim)``, the embedded guidance scale of a latent
                consistency model.
            attention_mask, encoder_attention_mask: ``(B, tokens)``, 1 to keep and 0 to leave out,
                for the first and the second attention of each transformer block.
            cross_attention_kwargs: passed to the attention processors.
            added_cond_kwargs: SDXL's ``text_embeds`` ``(B, C)`` and ``time_ids`` ``(B, n)``; an
                IP-Adapter's ``image_embeds``.
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's, added to
                the skip connections and to the mid block's output.
            down_intrablock_additional_residuals: a T2I-Adapter's, added inside each down block
                and, if there is one more of its shape, to the mid block's output.
            return_dict: False returns a plain tuple.

        Returns:
            ``.sample``: ``(B, out_channels, H, W)``.

        Raises:
            InputError: an argument is missing, has the wrong shape, or does not belong to this
                network.
        """
        # All checks come before any arithmetic.
        added = {} if added_cond_kwargs is None else added_cond_kwargs
        down, mid = down_block_additional_residuals, mid_block_additional_residual
        masks = {"attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask}
        check_sample(self.config, self, sample, timestep, timestep_cond, class_labels)
        if self.reads_text:
            check_text(self.config, self, len(sample), encoder_hidden_states)
        check_added(self.config, self, sample, added, self.encoder_hid_proj is not None)
        check_residuals(self.config, sample, down, mid, down_intrablock_additional_residuals)
        check_attention(sample, encoder_hidden_states, masks, cross_attention_kwargs)
        adapter = list(down_intrablock_additional_residuals or ())

        temb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        if (class_embed := self.get_class_embed(sample, class_labels)) is not None:
            temb = temb + class_embed
        if (aug_embed := self.get_aug_embed(temb, encoder_hidden_states, added)) is not None:
            temb = temb + aug_embed
        context = self.process_encoder_hidden_states(encoder_hidden_states, added)
        conditions: dict[str, Any] = {"encoder_hidden_states": context}
        if attention_mask is not None:
            conditions["attention_mask"] = _score_bias(attention_mask, sample.dtype)
        if encoder_attention_mask is not None:
            conditions["encoder_attention_mask"] = _score_bias(encoder_attention_mask, sample.dtype)
        if cross_attention_kwargs is not None:
            conditions["cross_attention_kwargs"] = cross_attention_kwargs

        x = self.project_in(sample)
        x, skips = self._down(x, temb, conditions, adapter)
        if down is not None:
            skips = [skip + residual for skip, residual in zip(skips, down, strict=True)]
        if self.mid_block is not None:
            x = self.mid_block(x, temb, conditions)
            if adapter and adapter[0].shape == x.shape:  # a light adapter's has half the size
                x = _plus(x, adapter[0])
        if mid is not None:
            x = x + mid
        x = self._up(x, temb, conditions, skips)
        x = self.project_out(x)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Switches FreeU (Si et al. 2023) on, in the first two up blocks.

        As in diffusers, all up blocks get the factors as attributes, and a factor of 0 is off.

        Args:
            s1, s2: factors for the skip connections' low frequencies, in the first and the second
                up block.
            b1, b2: factors for half of the backbone's channels.
        """
        for block in self._up_stages:
            block.s1, block.s2, block.b1, block.b2 = s1, s2, b1, b2

    def disable_freeu(self) -> None:
        """Switches FreeU off."""
        for block in self._up_stages:
            block.s1 = block.s2 = block.b1 = block.b2 = None

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Returns the sinusoidal embedding of the timestep, ``(B, block_out_channels[0])``, in the
        dtype of ``sample``."""
        steps = torch.as_tensor(timestep, device=sample.device).reshape(-1).expand(len(sample))
        return cast(Tensor, self.time_proj(steps)).to(sample.dtype)

    def get_class_embed(self, sample: Tensor, class_labels: Tensor | None) -> Tensor | None:
        """Returns the class embedding ``(B, T)``, which is added to the time embedding; None in a
        network without classes.

        Raises:
            InputError: a label is out of range, which torch notices except on CUDA.
        """
        if self.class_embedding is None:
            return None
        try:
            return cast(Tensor, self.class_embedding(class_labels)).to(sample.dtype)
        except IndexError as error:
            raise InputError(
                "class_labels out of range",
                where=self.config.class_name,
                expected=f"0 to {(self.config.num_class_embeds or 0) - 1}",
                got=class_labels,
            ) from error

    def get_aug_embed(
        self, emb: Tensor, encoder_hidden_states: Tensor | None, added_cond_kwargs: Added
    ) -> Tensor | None:
        """Returns the embedding ``(B, T)`` of SDXL's pooled prompt and image sizes, which is added
        to the time embedding ``emb``; None in other families."""
        if self.add_embedding is None:
            return None
        text = added_cond_kwargs["text_embeds"]
        sizes = self.add_time_proj(added_cond_kwargs["time_ids"].flatten()).reshape(len(text), -1)
        return cast(Tensor, self.add_embedding(torch.cat([text, sizes], dim=-1).to(emb.dtype)))

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Tensor | None, added_cond_kwargs: Added
    ) -> Any:
        """Returns what the transformers attend to: the prompt embedding, and an IP-Adapter's image
        embeddings if there is one."""
        if self.encoder_hid_proj is None:
            return encoder_hidden_states
        return encoder_hidden_states, self.encoder_hid_proj(added_cond_kwargs["image_embeds"])

    @classmethod
    def _build(cls, config: UNet2DConditionConfig) -> Self:
        network: Self = provided("diffusers").UNet2DConditionModel(config)
        return network

    @property
    def _up_stages(self) -> Iterable[UpBlock2D]:
        return cast(Iterable[UpBlock2D], self.up_blocks)

    @dispatched
    def project_in(self, sample: Tensor) -> Tensor:
        """Runs the first convolution."""
        return cast(Tensor, self.conv_in(sample))

    def _down(
        self, x: Tensor, temb: Tensor, conditions: Conditions, adapter: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the down path, and returns its output and the skip connections; residuals that are
        added are removed from ``adapter``."""
        skips = [x]
        for block in cast(Iterable[DownBlock2D], self.down_blocks):
            residual = adapter.pop(0) if adapter else None
            inside = residual if block.has_transformers() else None
            x, new = block(x, temb, conditions, inside)
            if residual is not None and inside is None:
                x = _plus(x, residual)
                new = (*new[:-1], x)
            skips += new
        return x, skips

    def _up(self, x: Tensor, temb: Tensor, conditions: Conditions, skips: list[Tensor]) -> Tensor:
        """Runs the up path."""
        for block in self._up_stages:
            rest = len(skips) - len(block.resnets)
            skips, own = skips[:rest], skips[rest:]
            # At odd sizes the next skip connection is not exactly twice as large.
            size = tuple(skips[-1].shape[2:]) if skips else None
            x = block(x, temb, own, conditions, size)
        return x

    @dispatched
    def project_out(self, x: Tensor) -> Tensor:
        """Runs the last normalisation, SiLU and convolution."""
        return cast(Tensor, self.conv_out(self.conv_act(self.conv_norm_out(x))))


def _score_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to attention scores: 0 keeps a token, -10000 masks it."""
    return ((1 - mask.to(dtype)) * -10000.0).unsqueeze(1)


def _plus(x: Tensor, residual: Tensor) -> Tensor:
    """Returns ``x + residual`` in the dtype of ``x``."""
    return (x + residual).to(x.dtype)
