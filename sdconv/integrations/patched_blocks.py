"""sdconv's blocks with the signatures of diffusers' blocks: the classes that ``apply_patch`` sets.

A patched block is diffusers' own object with one of these classes, so its parameters and their
order, its hooks, its LoRA layers and every reference to it stay. A call with arguments that
sdconv's block does not take runs diffusers' code, as before the patch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.models import attention_processor, downsampling, resnet, upsampling
from diffusers.models.autoencoders import vae as autoencoder
from torch import Tensor, is_grad_enabled, nn

from sdconv.models import blocks, vae


class ResnetBlock2D(blocks.ResnetBlock2D):
    """``(B, in_channels, H, W)`` to ``(B, out_channels, H, W)``; with a time projection, also takes
    the time embedding ``(B, T)``."""

    def forward(  # type: ignore[override]
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        # without a projection, diffusers adds the embedding unprojected
        if args or kwargs or (self.time_emb_proj is None and temb is not None):
            return _diffusers(resnet.ResnetBlock2D, self, input_tensor, temb, *args, **kwargs)
        return blocks.ResnetBlock2D.forward(self, input_tensor, temb)


class Downsample2D(blocks.Downsample2D):
    """``(B, C, H, W)`` to ``(B, C, ceil(H/2), ceil(W/2))``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if args or kwargs:
            return _diffusers(downsampling.Downsample2D, self, hidden_states, *args, **kwargs)
        return blocks.Downsample2D.forward(self, hidden_states)


class AsymmetricDownsample2D(blocks.AsymmetricDownsample2D):
    """``(B, C, H, W)`` to ``(B, C, floor(H/2), floor(W/2))``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if args or kwargs:
            return _diffusers(downsampling.Downsample2D, self, hidden_states, *args, **kwargs)
        return blocks.AsymmetricDownsample2D.forward(self, hidden_states)


class Upsample2D(blocks.Upsample2D):
    """``(B, C, H, W)`` to ``(B, C, 2H, 2W)`` or ``(B, C, *output_size)``."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or kwargs:
            return _diffusers(
                upsampling.Upsample2D, self, hidden_states, output_size, *args, **kwargs
            )
        return blocks.Upsample2D.forward(self, hidden_states, output_size)


class Attention(blocks.Attention, attention_processor.Attention):  # type: ignore[misc]
    """The VAE's attention, ``(B, C, H, W)`` to the same shape.

    It stays a subclass of diffusers' ``Attention``, so that diffusers still finds it to set a
    processor; with any processor but the default one, diffusers' code runs.
    """

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        more = kwargs or encoder_hidden_states is not None or attention_mask is not None
        default = type(self.processor) is attention_processor.AttnProcessor2_0
        if more or not default or hidden_states.ndim != 4:
            return _diffusers(
                attention_processor.Attention,
                self,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                temb=temb,
                **kwargs,
            )
        return blocks.Attention.forward(self, hidden_states)


class Encoder(vae.Encoder):
    """Images ``(B, in_channels, H, W)`` to the moments (mean and log-variance) of their latents."""

    def forward(self, sample: Tensor) -> Tensor:
        return vae.Encoder.forward(self, sample)

    def checkpoint_call(self, block: Callable[..., Any], *args: Any) -> Any:
        return _checkpointed(self, block, *args)


class Decoder(vae.Decoder):
    """Latents ``(B, latent_channels, h, w)`` to images."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is not None:
            return _diffusers(autoencoder.Decoder, self, sample, latent_embeds)
        return vae.Decoder.forward(self, sample)

    def checkpoint_call(self, block: Callable[..., Any], *args: Any) -> Any:
        return _checkpointed(self, block, *args)


def _diffusers(original: type[nn.Module], block: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The output of diffusers' ``forward`` on a patched block."""
    output: Tensor = original.forward(block, *args, **kwargs)
    return output


def _checkpointed(module: Any, part: Callable[..., Any], *args: Any) -> Any:
    """Calls a part, through the function given to diffusers' ``enable_gradient_checkpointing`` if
    that is on."""
    if module.gradient_checkpointing and is_grad_enabled():
        return module._gradient_checkpointing_func(part, *args)
    return part(*args)
