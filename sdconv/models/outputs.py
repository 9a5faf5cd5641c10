"""What the networks return: small named results, read by name, by key or by position as diffusers'
are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.export
from torch import Tensor

from sdconv.errors import InputError


class Output:
    """A result that can be read as ``out.sample``, ``out["sample"]`` or ``out[0]``.

    Like diffusers' results, which are dictionaries, it iterates over names: ``dict(out)`` and
    ``**out`` work. It is no ``Mapping``: what rebuilds those of a batch (accelerate's hooks) calls
    their class with a dictionary.
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def values(self) -> tuple[Any, ...]:
        """The fields in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Names and fields in order."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in order, as diffusers' results give them."""
        return self.values()


Result = TypeVar("Result")


def exportable(kind: type[Result]) -> type[Result]:
    """A dataclass that ``torch.export``, and whatever else of torch walks through results, looks
    into."""
    torch.export.register_dataclass(
        kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}"
    )
    return kind


class DiagonalGaussianDistribution:
    """The posterior that a VAE's encoder predicts: one independent normal for each latent value.

    Source: ``ldm/modules/distributions/distributions.py``.

    Args:
        parameters: ``(B, 2C, H, W)``, mean and log-variance stacked along the channels.

    Attributes:
        parameters: as given. mean, std, var, logvar: ``(B, C, H, W)``; the log-variance is clamped
            to [-30, 20].
    """

    def __init__(self, parameters: Tensor) -> None:
        self.parameters = parameters
        self.mean, logvar = torch.chunk(parameters, 2, dim=1)
        self.logvar = torch.clamp(logvar, -30.0, 20.0)
        self.std = torch.exp(0.5 * self.logvar)
        self.var = torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """Draws ``mean + std * noise``, ``(B, C, H, W)``.

        Args:
            generator: one generator, or one for each picture of the batch; noise is drawn on the
                generator's own device and then moved, so that a CPU seed gives the same latents on
                every device.
        """
        return self.mean + self.std * _randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        """The most probable latents: the mean, ``(B, C, H, W)``."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence from ``other`` (the standard normal if None), ``(B,)``, in
        nats."""
        if other is None:
            terms = torch.pow(self.mean, 2) + self.var - 1.0 - self.logvar
        else:
            terms = (
                torch.pow(self.mean - other.mean, 2) / other.var
                + self.var / other.var
                - 1.0
                - self.logvar
                + other.logvar
            )
        return 0.5 * torch.sum(terms, dim=[1, 2, 3])

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of ``sample`` ``(B, C, H, W)``, summed over ``dims``, in nats."""
        log_two_pi = 1.8378770664093453
        terms = log_two_pi + self.logvar + torch.pow(sample - self.mean, 2) / self.var
        return 0.5 * torch.sum(terms, dim=list(dims))


def _randn_like(
    like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    if isinstance(generator, Sequence) and len(generator) == 1:
        (generator,) = generator
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise InputError(
                "as many generators as pictures are needed, or one for all",
                where="sample(generator=...)",
                expected=f"{len(like)} generators",
                got=len(generator),
            )
        pairs = zip(torch.split(like, 1), generator, strict=True)
        return torch.cat([_randn_like(one, source) for one, source in pairs])
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


@exportable
@dataclass(frozen=True)
class AutoencoderKLOutput(Output):
    """``latent_dist``: the posterior over latents of shape ``(B, latent_channels, H/f, W/f)``."""

    latent_dist: DiagonalGaussianDistribution


@exportable
@dataclass(frozen=True)
class AutoencoderTinyOutput(Output):
    """``latents``: ``(B, latent_channels, H/f, W/f)``, raw."""

    latents: Tensor


@exportable
@dataclass(frozen=True)
class DecoderOutput(Output):
    """``sample``: pictures ``(B, out_channels, H, W)``, nominally in [-1, 1], not clamped."""

    sample: Tensor
