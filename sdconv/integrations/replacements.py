"""Which of diffusers' blocks sdconv can replace, and the change of a block's class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MethodType
from typing import Any

from diffusers.models import attention_processor, downsampling, resnet, upsampling
from diffusers.models.autoencoders import vae as autoencoder
from torch import nn

from sdconv.integrations import patched_blocks


@dataclass(frozen=True)
class Replacement:
    """A class of diffusers' and the class that replaces it.

    ``supported``: for a block of that class, by attribute, whether sdconv's code computes the same
    with the attribute's value.
    """

    original: type[nn.Module]
    patched: type[nn.Module]
    supported: Callable[[Any], Mapping[str, bool]]

    def unsupported(self, block: nn.Module) -> str | None:
        """The first attribute with an unsupported value, in words; None if there is none."""
        try:
            supported = self.supported(block)
        except AttributeError as error:  # a part of the block was exchanged
            return str(error)
        for name, is_supported in supported.items():
            if not is_supported:
                value = attrgetter(name)(block)
                printable = value is None or isinstance(value, bool | int | float | str)
                return f"{name} is {value if printable else type(value).__name__}"
        return None


def _downsample(padding: int) -> Callable[[Any], Mapping[str, bool]]:
    return lambda block: {
        "use_conv": block.use_conv,
        "norm": block.norm is None,
        "padding": block.padding == padding,
    }


REPLACEMENTS = (
    Replacement(
        resnet.ResnetBlock2D,
        patched_blocks.ResnetBlock2D,
        lambda block: {
            "up": not block.up,
            "down": not block.down,
            # "group" is the value in the VAE's decoder, whose blocks have no time embedding
            "time_embedding_norm": block.time_embedding_norm in ("default", "group"),
            "skip_time_act": not block.skip_time_act,
            "output_scale_factor": block.output_scale_factor == 1,
            "dropout.p": block.dropout.p == 0,
        },
    ),
    Replacement(downsampling.Downsample2D, patched_blocks.Downsample2D, _downsample(1)),
    Replacement(downsampling.Downsample2D, patched_blocks.AsymmetricDownsample2D, _downsample(0)),
    Replacement(
        upsampling.Upsample2D,
        patched_blocks.Upsample2D,
        lambda block: {
            "use_conv": block.use_conv,
            "use_conv_transpose": not block.use_conv_transpose,
            "interpolate": block.interpolate,
            "norm": block.norm is None,
            "name": block.name == "conv",
        },
    ),
    Replacement(
        attention_processor.Attention,
        patched_blocks.Attention,
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
    Replacement(autoencoder.Encoder, patched_blocks.Encoder, lambda block: {}),
    Replacement(
        autoencoder.Decoder,
        patched_blocks.Decoder,
        lambda block: {"conv_norm_out": type(block.conv_norm_out) is nn.GroupNorm},
    ),
)
_ORIGINALS = {replacement.patched: replacement.original for replacement in REPLACEMENTS}

# diffusers' other blocks that resample or have a time embedding, and what sdconv lacks for them
_NOT_IN_SDCONV = {
    "ResnetBlockCondNorm2D": "time_embedding_norm is {0.time_embedding_norm}",
    "FirDownsample2D": "FIR kernel",
    "FirUpsample2D": "FIR kernel",
    "KDownsample2D": "fixed kernel",
    "KUpsample2D": "fixed kernel",
}


def replacement_for(block: nn.Module) -> type[nn.Module] | str | None:
    """The class that makes a block compute with sdconv's code.

    Returns:
        The class; or the reason why the block cannot be replaced; or None if the module is patched
        already or is not one of diffusers' convolutional blocks.
    """
    kind = type(block)
    if is_patched(block):
        return None
    if isinstance(block, attention_processor.Attention) and not _attends_to_pixels(block):
        return None
    candidates = [one for one in REPLACEMENTS if one.original is kind]
    if not candidates:
        if kind.__module__ in (resnet.__name__, downsampling.__name__, upsampling.__name__):
            return _NOT_IN_SDCONV.get(kind.__name__, "sdconv has no such block").format(block)
        bases = [one.original.__name__ for one in REPLACEMENTS if isinstance(block, one.original)]
        return f"a subclass of {bases[0]}" if bases else None
    if "forward" in vars(block) and not list(_bound_forwards(block)):
        return "its forward is overridden"
    obstacles = [candidate.unsupported(block) for candidate in candidates]
    if None in obstacles:
        return candidates[obstacles.index(None)].patched
    return obstacles[0]


def is_patched(block: nn.Module) -> bool:
    """Whether a block of diffusers' computes with sdconv's code."""
    return type(block) in _ORIGINALS


def set_class(block: nn.Module, kind: type[nn.Module]) -> None:
    """Changes a block's class, and the ``forward`` that hooks on the block have kept."""
    for holder, name in list(_bound_forwards(block)):
        holder[name] = MethodType(kind.forward, block)
    block.__class__ = kind


def restore_class(block: nn.Module) -> None:
    """Gives a patched block its original class back."""
    set_class(block, _ORIGINALS[type(block)])


def _bound_forwards(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """The attributes that hold the ``forward`` of a block's class as a bound method: accelerate's
    hooks keep it in ``_old_forward``, and in ``forward`` once removed; diffusers' hooks in a
    registry."""
    registry = vars(block).get("_diffusers_hook")
    for holder in (block, *getattr(registry, "_fn_refs", ())):
        for name in ("forward", "_old_forward", "original_forward"):
            method = vars(holder).get(name)
            if isinstance(method, MethodType) and method.__func__ is type(block).forward:
                yield vars(holder), name


def _attends_to_pixels(attention: Any) -> bool:
    """Whether an attention is a VAE's, which unlike a transformer's normalises its feature map."""
    return attention.group_norm is not None or attention.spatial_norm is not None
