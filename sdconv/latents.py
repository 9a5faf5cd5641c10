"""Raw latents, and latents as diffusion models use them: scaled, or normalised in patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from sdconv.checkpoint.io.files import as_path
from sdconv.checkpoint.io.source import open_source
from sdconv.checkpoint.io.write import write_tensors
from sdconv.errors import InputError
from sdconv.models.base import Autoencoder
from sdconv.models.inputs import check_tensor
from sdconv.models.vae import AutoencoderKLFlux2

KEY = "latents"
"""The tensor's name in files that `write_latents` writes."""

SCALED_KEY = "sdconv.latents"
"""The metadata key in such files whose value is ``scaled`` or ``raw``."""

_TO_PATCHES = "b c (h p) (w q) -> b (c p q) h w"


def encode(
    network: Autoencoder, images: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Raw latents of images: the mode of the posterior, or with ``generator`` a sample from it.

    Args:
        network: with an encoder.
        images: ``(B, in_channels, H, W)`` in [-1, 1].
        generator: draws the sample.

    Returns:
        ``(B, C, h, w)``.

    Raises:
        InputError: as ``network.encode``; or a sample from a tiny autoencoder, which has no
            posterior.
    """
    output = cast(Any, network).encode(images)
    if hasattr(output, "latent_dist"):
        posterior = output.latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
    elif generator is None:
        latents = output.latents
    else:
        raise InputError(
            "a tiny autoencoder has no posterior to sample from",
            where="generator",
            hint="leave generator= out",
        )
    return cast(Tensor, latents)


def image_multiple(network: Autoencoder, *, scaled: bool = False) -> int:
    """The number of pixels of which an image's sides must be multiples, to be encoded.

    That is what one latent stands for, or with ``scaled`` what one of FLUX.2's patches does.
    """
    patch = max(network.config["patch_size"]) if scaled and _has_patches(network) else 1
    return network.downscale * patch


def check_scaled(network: Autoencoder, latents: Tensor, scaled: bool) -> None:
    """Refuses FLUX.2's raw latents where ``scaled`` says patches, and the other way round.

    Raises:
        InputError: they are the other kind.
    """
    channels = network.config["latent_channels"]
    if not _has_patches(network) or latents.shape[1] == (4 * channels if scaled else channels):
        return
    if latents.shape[1] in (channels, 4 * channels):
        raise InputError(
            "these latents are raw" if scaled else "these latents are normalised patches",
            where=network.config.class_name,
            expected=f"{4 * channels if scaled else channels} channels",
            got=tuple(latents.shape),
            hint="leave --scaled out" if scaled else "pass --scaled",
        )


def _has_patches(network: Autoencoder) -> bool:
    return "patch_size" in network.config


def scale(network: Autoencoder, latents: Tensor) -> Tensor:
    """Converts raw latents to the form that the diffusion model uses.

    For most families this is ``(latents - shift_factor) * scaling_factor``, or with
    ``latents_mean`` and ``latents_std`` ``(latents - mean) * scaling_factor / std``. A tiny
    autoencoder's latents already have this form. For FLUX.2, patches of 2x2 latents are stacked
    along the channels and normalised with ``bn``'s statistics, without an affine part:
    ``(patches - running_mean) / sqrt(running_var + eps)`` (``Flux2Pipeline`` in diffusers).

    Args:
        network: the autoencoder that the latents come from.
        latents: ``(B, C, h, w)``, raw.

    Returns:
        ``(B, C, h, w)``; for FLUX.2 ``(B, 4C, h/2, w/2)``.

    Raises:
        InputError: not a floating-point tensor, or not of this shape; for FLUX.2 also an odd number
            of rows or columns.
    """
    _check(network, latents, network.config["latent_channels"])
    if not isinstance(network, AutoencoderKLFlux2):
        shift, factor = _affine(network, latents)
        return (latents - shift) * factor
    p, q = network.config.patch_size
    if latents.shape[2] % p or latents.shape[3] % q:
        raise InputError(
            "latents that cannot be cut into patches",
            where=network.config.class_name,
            expected=f"rows and columns in multiples of {p} and {q}",
            got=tuple(latents.shape),
            hint="use an image whose sides are multiples of "
            f"{p * network.downscale} and {q * network.downscale} pixels",
        )
    mean, std = _statistics(network, latents)
    return (rearrange(latents, _TO_PATCHES, p=p, q=q) - mean) / std


def unscale(network: Autoencoder, latents: Tensor) -> Tensor:
    """Converts latents of the diffusion model to raw ones: the inverse of ``scale``.

    Args:
        network: the autoencoder that the latents belong to.
        latents: ``(B, C, h, w)``; for FLUX.2 patches, ``(B, 4C, h/2, w/2)``.

    Returns:
        ``(B, C, h, w)``, raw.

    Raises:
        InputError: not a floating-point tensor, or not of this shape.
    """
    if not isinstance(network, AutoencoderKLFlux2):
        _check(network, latents, network.config["latent_channels"])
        shift, factor = _affine(network, latents)
        return latents / factor + shift
    p, q = network.config.patch_size
    _check(network, latents, p * q * network.config.latent_channels)
    mean, std = _statistics(network, latents)
    backwards = " -> ".join(reversed(_TO_PATCHES.split(" -> ")))
    return rearrange(latents * std + mean, backwards, p=p, q=q)


def read_latents(path: str | Path, key: str | None = None) -> tuple[Tensor, bool | None]:
    """Reads latents, and whether they are scaled, from a file.

    Args:
        path: a safetensors file, or a pickle of tensors.
        key: the tensor's name; None for the only tensor, or the one named ``KEY`` if there are
            several.

    Returns:
        The latents, ``(B, C, h, w)`` (a single ``(C, h, w)`` gets a batch axis), and True if they
        are scaled, False if they are raw, None if the file does not say.

    Raises:
        CheckpointError: the file cannot be read.
        InputError: there is no such tensor, or it is not clear which one; or it is not of floating
            point, not of this shape or not finite.
    """
    with open_source(path) as source:
        names = list(source.entries)
        if key is None:
            key = names[0] if len(names) == 1 else KEY
        if key not in names:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise InputError(
                "which tensor holds the latents?",
                where=path,
                expected=f"one tensor, or one named {key!r}",
                got=f"{len(names)} tensors: {shown}",
                hint="name it: --key NAME",
            )
        latents = source.tensor(key)
        form = source.metadata.get(SCALED_KEY)
    latents = latents[None] if latents.ndim == 3 else latents
    if latents.ndim != 4 or not latents.is_floating_point() or not latents.numel():
        raise InputError(
            "not latents",
            where=f"{path}: {key}",
            expected="floating-point numbers of shape (B, C, h, w) or (C, h, w)",
            got=f"{str(latents.dtype).removeprefix('torch.')} {tuple(latents.shape)}",
            hint="name another tensor: --key NAME" if len(names) > 1 else None,
        )
    latents = latents.float()
    if not torch.isfinite(latents).all():
        raise InputError("the latents hold NaN or infinity", where=f"{path}: {key}")
    return latents, None if form is None else form == "scaled"


def write_latents(latents: Tensor, path: str | Path, *, scaled: bool) -> None:
    """Writes a safetensors file with one tensor, ``KEY``, completely or not at all.

    Raises:
        InputError: ``path`` is not a path.
        CheckpointError: the file cannot be written.
    """
    metadata = {"format": "pt", SCALED_KEY: "scaled" if scaled else "raw"}
    write_tensors({KEY: latents.cpu()}, as_path(path), metadata)


def _check(network: Autoencoder, latents: Tensor, channels: int) -> None:
    where, shape = network.config.class_name, f"(B, {channels}, h, w)"
    check_tensor(latents, "latents", where, shape)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InputError(
            "latents of the wrong shape", where=where, expected=shape, got=tuple(latents.shape)
        )
    if not latents.is_floating_point():
        raise InputError(
            "latents must be floating-point numbers",
            where=where,
            expected="float32, or another floating-point dtype",
            got=latents.dtype,
        )


def _affine(network: Autoencoder, like: Tensor) -> tuple[Tensor, Tensor]:
    """``shift`` and ``factor`` in ``(latents - shift) * factor``, the scaled latents."""
    config = network.config
    factor, shift = like.new_tensor(config["scaling_factor"]), config.get("shift_factor") or 0.0
    if (mean := config.get("latents_mean")) and (std := config.get("latents_std")):
        per_channel = (1, -1, 1, 1)
        shift_tensor = like.new_tensor(mean).view(per_channel)
        return shift_tensor, factor / like.new_tensor(std).view(per_channel)
    return like.new_tensor(shift), factor


def _statistics(network: AutoencoderKLFlux2, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the patches, ``(1, 4C, 1, 1)``."""
    mean, variance = network.bn.running_mean, network.bn.running_var
    assert mean is not None and variance is not None
    mean, variance = (t.to(like).view(1, -1, 1, 1) for t in (mean, variance))
    return mean, torch.sqrt(variance + network.config.batch_norm_eps)
