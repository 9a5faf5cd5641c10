"""The networks' output classes, which are read by attribute, key or position as diffusers' are."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.export
from torch import Tensor

from sdconv.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Output(Mapping[str, Any]):
    """A result that can be read as ``out.sample``, ``out["sample"]`` or ``out[0]``.

    Like diffusers' results, it is a mapping from names to values, and may be made from one:
    accelerate converts a mapping's tensors, or moves them, and calls its class with a dictionary.
    """

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # which cannot trace what follows
            return
        first, *others = self._names()
        given = getattr(self, first)
        if isinstance(given, Mapping) and set(given) == {first, *others}:
            for name, value in given.items():
                object.__setattr__(self, name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self._names():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values in order, as diffusers' results do."""
        return tuple(getattr(self, name) for name in self._names())

    def _names(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(self))  # type: ignore[arg-type]


Result = TypeVar("Result")


def exportable(kind: type[Result]) -> type[Result]:
    """Registers a dataclass with torch's pytrees, so that ``torch.export`` can return it."""
    with warnings.catch_warnings():
        # torch 2.6 calls a function of its own that it has deprecated
        warnings.filterwarnings("ignore", ".*_register_pytree_node", FutureWarning)
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

    def to_pil(self) -> list[Image.Image]:
        """Returns the images as Pillow's, RGB; values outside [-1, 1] are clamped.

        Raises:
            InputError: they have not three channels, or hold NaN or infinity.
        """
        from sdconv.images import to_image

        return [to_image(image) for image in self.sample.detach()]

    def to_numpy(self) -> np.ndarray[Any, Any]:
        """Returns the images as ``(B, H, W, C)``, float32 from 0 to 1; values outside are
        clamped."""
        images = self.sample.detach().float().cpu().clamp(-1, 1)
        array: np.ndarray[Any, Any] = ((images + 1) / 2).permute(0, 2, 3, 1).contiguous().numpy()
        return array
