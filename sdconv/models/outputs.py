"""The networks' output classes, which are read by attribute, key or position as diffusers' are."""

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
    ``**out`` work. It is not a ``Mapping``, because accelerate's hooks rebuild a mapping by calling
    its class with a dictionary.
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the fields."""
        return tuple(field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def values(self) -> tuple[Any, ...]:
        """Returns the values in order."""
        return tuple(getattr(self, name) for name in self.keys())

    def items(self) -> tuple[tuple[str, Any], ...]:
        """Returns names and values in order."""
        return tuple(zip(self.keys(), self.values(), strict=True))

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values in order, as diffusers' results do."""
        return self.values()


Result = TypeVar("Result")


def exportable(kind: type[Result]) -> type[Result]:
    """Registers a dataclass with torch's pytrees, so that ``torch.export`` can return it."""
    torch.export.register_dataclass(
        kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}"
    )
    return kind


class DiagonalGaussianDistribution:
    """The posterior that a VAE's encoder predicts: independent normal distributions.

    Source: ``ldm/modules/distributions/distributions.py``.

    Args:
        parameters: ``(B, 2C, H, W)``, mean and log-variance stacked along the channels.

    Attributes:
        parameters: the argument.
        mean, std, var, logvar: ``(B, C, H, W)``; the log-variance is clamped to [-30, 20].
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
            generator: one generator, or one for each sample of the batch. The noise is drawn on the
                generator's device and then moved, so that a CPU generator gives the same latents on
                every device.
        """
        return self.mean + self.std * _randn_like(self.mean, generator)

    def mode(self) -> Tensor:
        """Returns the most probable latents, which are the mean, ``(B, C, H, W)``."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Returns the Kullback-Leibler divergence from ``other``, by default the standard normal:
        ``(B,)``, in nats."""
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
        """Returns the negative log-likelihood of ``sample`` ``(B, C, H, W)`` in nats, summed over
        ``dims``."""
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
                "expected one generator, or one for each sample",
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
    """``sample``: images ``(B, out_channels, H, W)``, nominally in [-1, 1], not clamped."""

    sample: Tensor
