"""diffusers' convolutional blocks computing with sdconv's code: what ``apply_patch`` makes of them.

A patched block is diffusers' own object under one of these classes, so all that hangs on it stays:
parameters and their order, hooks, LoRA layers, whoever else refers to it. They are called as
diffusers' are; a call with more than sdconv's block takes goes to diffusers' code, as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any

from diffusers.models import attention_processor, downsampling, resnet, upsampling
from diffusers.models.autoencoders import vae as autoencoder
from torch import Tensor, is_grad_enabled, nn

from sdconv.models import blocks, vae


class ResnetBlock2D(blocks.ResnetBlock2D):
    """``(B, in_channels, H, W)``, and ``(B, T)`` if it has a projection for it, to ``(B,
    out_channels, H, W)``."""

    def forward(  # type: ignore[override]
        self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        # an embedding that no projection waits for is added as it is
        if args or kwargs or (self.time_emb_proj is None and temb is not None):
            return resnet.ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
        return blocks.ResnetBlock2D.forward(self, input_tensor, temb)


class Downsample2D(blocks.Downsample2D):
    """``(B, C, H, W)`` to ``(B, C, ceil(H/2), ceil(W/2))``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if args or kwargs:
            return downsampling.Downsample2D.forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return blocks.Downsample2D.forward(self, hidden_states)


class AsymmetricDownsample2D(blocks.AsymmetricDownsample2D):
    """``(B, C, H, W)`` to ``(B, C, floor(H/2), floor(W/2))``."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if args or kwargs:
            return downsampling.Downsample2D.forward(self, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]
        return blocks.AsymmetricDownsample2D.forward(self, hidden_states)


class Upsample2D(blocks.Upsample2D):
    """``(B, C, H, W)`` to ``(B, C, 2H, 2W)`` or ``(B, C, *output_size)``."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if args or kwargs:
            return upsampling.Upsample2D.forward(self, hidden_states, output_size, *args, **kwargs)  # type: ignore[no-any-return]
        return blocks.Upsample2D.forward(self, hidden_states, output_size)


class Attention(blocks.Attention, attention_processor.Attention):  # type: ignore[misc]
    """The VAE's, ``(B, C, H, W)`` to the same; diffusers' own while another than the default
    processor is set, which is why it remains diffusers' class too."""

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
            return attention_processor.Attention.forward(  # type: ignore[no-any-return]
                self, hidden_states, encoder_hidden_states, attention_mask, temb=temb, **kwargs
            )
        return blocks.Attention.forward(self, hidden_states)


class Encoder(vae.Encoder):
    """``(B, in_channels, H, W)`` to the moments of latents."""

    def forward(self, sample: Tensor) -> Tensor:
        return vae.Encoder.forward(self, sample)

    def checkpoint_call(self, block: Callable[..., Any], *args: Any) -> Any:
        return _checkpointed(self, block, *args)


class Decoder(vae.Decoder):
    """``(B, latent_channels, h, w)`` to pictures."""

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        if latent_embeds is not None:
            return autoencoder.Decoder.forward(self, sample, latent_embeds)  # type: ignore[no-any-return]
        return vae.Decoder.forward(self, sample)

    def checkpoint_call(self, block: Callable[..., Any], *args: Any) -> Any:
        return _checkpointed(self, block, *args)


def _checkpointed(whole: Any, part: Callable[..., Any], *args: Any) -> Any:
    """Recomputes activations, where that is on, by the function that diffusers was given for it."""
    if whole.gradient_checkpointing and is_grad_enabled():
        return whole._gradient_checkpointing_func(part, *args)
    return part(*args)


@dataclass(frozen=True)
class Patch:
    """A class of diffusers' and the one to put in its place.

    ``covers``: for an object of that class, by attribute, whether it is one that sdconv's code
    computes the same with.
    """

    theirs: type[nn.Module]
    ours: type[nn.Module]
    covers: Callable[[Any], Mapping[str, bool]]

    def obstacle(self, block: nn.Module) -> str | None:
        """The first attribute that is not as it must be, if any."""
        try:
            covered = self.covers(block)
        except AttributeError as error:  # a part that someone exchanged
            return str(error)
        for name, fits in covered.items():
            if not fits:
                got = attrgetter(name)(block)
                plain = got is None or isinstance(got, bool | int | float | str)
                return f"{name} is {got if plain else type(got).__name__}"
        return None


PATCHES = (
    Patch(
        resnet.ResnetBlock2D,
        ResnetBlock2D,
        lambda block: {
            "up": not block.up,
            "down": not block.down,
            # "group" is what the VAE's decoder says, whose blocks know no time
            "time_embedding_norm": block.time_embedding_norm in ("default", "group"),
            "skip_time_act": not block.skip_time_act,
            "output_scale_factor": block.output_scale_factor == 1,
            "dropout.p": block.dropout.p == 0,
        },
    ),
    *(
        Patch(
            downsampling.Downsample2D,
            ours,
            lambda block, padding=padding: {  # type: ignore[misc]
                "use_conv": block.use_conv,
                "norm": block.norm is None,
                "padding": block.padding == padding,
            },
        )
        for ours, padding in ((Downsample2D, 1), (AsymmetricDownsample2D, 0))
    ),
    Patch(
        upsampling.Upsample2D,
        Upsample2D,
        lambda block: {
            "use_conv": block.use_conv,
            "use_conv_transpose": not block.use_conv_transpose,
            "interpolate": block.interpolate,
            "norm": block.norm is None,
            "name": block.name == "conv",
        },
    ),
    Patch(
        attention_processor.Attention,
        Attention,
        lambda block: {
            "processor": type(block.processor) is attention_processor.AttnProcessor2_0,
            "heads": block.heads == 1,
            "inner_dim": block.inner_dim == block.query_dim,
            "is_cross_attention": not block.is_cross_attention,
            "added_kv_proj_dim": block.added_kv_proj_dim is None,
            "spatial_norm": block.spatial_norm is None,
            "norm_q": block.norm_q is None,
            "norm_k": block.norm_k is None,
            "residual_connection": block.residual_connection,
            "rescale_output_factor": block.rescale_output_factor == 1,
            "dropout": block.dropout == 0,
        },
    ),
    Patch(autoencoder.Encoder, Encoder, lambda block: {}),
    Patch(
        autoencoder.Decoder,
        Decoder,
        lambda block: {"conv_norm_out": type(block.conv_norm_out) is nn.GroupNorm},
    ),
)
_THEIRS = {patch.ours: patch.theirs for patch in PATCHES}

# what of diffusers' other blocks sdconv does not have
_UNKNOWN = {
    "ResnetBlockCondNorm2D": "time_embedding_norm is {0.time_embedding_norm}",
    "FirDownsample2D": "FIR kernel",
    "FirUpsample2D": "FIR kernel",
    "KDownsample2D": "fixed kernel",
    "KUpsample2D": "fixed kernel",
}


def plan(block: nn.Module) -> type[nn.Module] | str | None:
    """The class under which a block computes with sdconv's code.

    Args:
        block: any module.

    Returns:
        The class, or why the block is left as it is, or None for what is no convolutional block of
        diffusers' (or is patched already).
    """
    kind = type(block)
    if is_patched(block):
        return None
    if isinstance(block, attention_processor.Attention) and not _reads_maps(block):
        return None
    fitting = [patch for patch in PATCHES if patch.theirs is kind]
    if not fitting:
        if kind.__module__ in (resnet.__name__, downsampling.__name__, upsampling.__name__):
            return _UNKNOWN.get(kind.__name__, "sdconv has no such block").format(block)
        above = [patch.theirs.__name__ for patch in PATCHES if isinstance(block, patch.theirs)]
        return f"a class of its own, derived from {above[0]}" if above else None
    if "forward" in vars(block) and not list(_bound(block)):
        return "its forward is overridden"
    obstacles = [patch.obstacle(block) for patch in fitting]
    if None in obstacles:
        return fitting[obstacles.index(None)].ours
    return obstacles[0]


def is_patched(block: nn.Module) -> bool:
    """Whether a block computes with sdconv's code in diffusers' place."""
    return type(block) in _THEIRS


def put(block: nn.Module, kind: type[nn.Module]) -> None:
    """Gives a block another class, and the hooks on it that class's ``forward``."""
    for holder, name in list(_bound(block)):
        holder[name] = MethodType(kind.forward, block)
    block.__class__ = kind


def put_back(block: nn.Module) -> None:
    """Gives a patched block the class that it had."""
    put(block, _THEIRS[type(block)])


def _bound(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a block's class's own ``forward`` is kept: accelerate's hooks put theirs in front of
    ``_old_forward`` and leave it as ``forward`` when they go, diffusers' refer to it from a
    registry."""
    registry = vars(block).get("_diffusers_hook")
    for holder in (block, *getattr(registry, "_fn_refs", ())):
        for name in ("forward", "_old_forward", "original_forward"):
            method = vars(holder).get(name)
            if isinstance(method, MethodType) and method.__func__ is type(block).forward:
                yield vars(holder), name


def _reads_maps(attention: Any) -> bool:
    """Told from a transformer's attention by its norm over the channels of a map."""
    return attention.group_norm is not None or attention.spatial_norm is not None
