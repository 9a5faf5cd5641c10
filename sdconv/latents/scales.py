"""Raw latents, and latents as diffusion models use them: scaled, or normalised in patches.

A VAE's own latents are raw. A tiny autoencoder's are scaled already: it was trained on what the
diffusion model sees. So the raw latents of a VAE and a tiny autoencoder's are related by that VAE's
scale, which files carry along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

from sdconv.errors import InputError
from sdconv.models.base import Autoencoder, check_tensor
from sdconv.models.tiny import AutoencoderTiny
from sdconv.models.vae import AutoencoderKLFlux2

_TO_PATCHES = "b c (h p) (w q) -> b (c p q) h w"


@dataclass(frozen=True)
class LatentScale:
    """How a VAE's raw latents become scaled: ``(raw - shift) * factor``, or with ``mean`` and
    ``std``, one number for each channel, ``(raw - mean) * factor / std``."""

    factor: float
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def of(cls, network: Autoencoder) -> LatentScale | None:
        """The scale of a VAE; None for a tiny autoencoder, and for FLUX.2, which normalises
        patches."""
        config = network.config
        if isinstance(network, AutoencoderTiny | AutoencoderKLFlux2):
            return None
        mean, std = config.get("latents_mean"), config.get("latents_std")
        factor = float(config["scaling_factor"])
        if mean and std:
            return cls(factor, mean=tuple(map(float, mean)), std=tuple(map(float, std)))
        return cls(factor, float(config.get("shift_factor") or 0.0))

    def scale(self, raw: Tensor) -> Tensor:
        """Raw latents ``(B, C, h, w)`` as the diffusion model sees them."""
        shift, factor = self._affine(raw)
        return (raw - shift) * factor

    def unscale(self, scaled: Tensor) -> Tensor:
        """The inverse of ``scale``."""
        shift, factor = self._affine(scaled)
        return scaled / factor + shift

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        factor = like.new_tensor(self.factor)
        if self.mean is None or self.std is None:
            return like.new_tensor(self.shift), factor
        per_channel = (1, -1, 1, 1)
        std = like.new_tensor(self.std).view(per_channel)
        return like.new_tensor(self.mean).view(per_channel), factor / std

    def __str__(self) -> str:
        if self.mean is not None:
            return f"factor {self.factor:g}, with a mean and a deviation of each channel"
        return f"factor {self.factor:g}" + (f", shift {self.shift:g}" if self.shift else "")


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
        return _scale_of(network).scale(latents)
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


def scale_log_variance(network: Autoencoder, logvar: Tensor) -> Tensor:
    """The log-variance of ``scale(network, latents)``, from that of the raw latents.

    Args:
        network: the VAE that the latents come from.
        logvar: ``(B, C, h, w)``, raw.

    Returns:
        ``(B, C, h, w)``; for FLUX.2 ``(B, 4C, h/2, w/2)``.

    Raises:
        InputError: as ``scale``.
    """
    _check(network, logvar, network.config["latent_channels"])
    if not isinstance(network, AutoencoderKLFlux2):
        _, factor = _scale_of(network)._affine(logvar)
        return logvar + 2 * factor.abs().log()
    p, q = network.config.patch_size
    _, std = _statistics(network, logvar)
    return rearrange(logvar, _TO_PATCHES, p=p, q=q) - 2 * std.log()


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
        return _scale_of(network).unscale(latents)
    p, q = network.config.patch_size
    _check(network, latents, p * q * network.config.latent_channels)
    mean, std = _statistics(network, latents)
    backwards = " -> ".join(reversed(_TO_PATCHES.split(" -> ")))
    return rearrange(latents * std + mean, backwards, p=p, q=q)


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


def _scale_of(network: Autoencoder) -> LatentScale:
    """A VAE's scale, or a tiny autoencoder's own, which its config may give."""
    config = network.config
    own = LatentScale(float(config["scaling_factor"]), float(config.get("shift_factor") or 0.0))
    return LatentScale.of(network) or own


def _statistics(network: AutoencoderKLFlux2, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of the patches, ``(1, 4C, 1, 1)``."""
    mean, variance = network.bn.running_mean, network.bn.running_var
    assert mean is not None and variance is not None
    mean, variance = (t.to(like).view(1, -1, 1, 1) for t in (mean, variance))
    return mean, torch.sqrt(variance + network.config.batch_norm_eps)
