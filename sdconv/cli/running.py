"""Networks at work in the commands that take or make pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdconv.cli.common import Backend, Dtype, less_memory, one_or_all, say, working
from sdconv.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from sdconv.images import LoadedImage
    from sdconv.models.base import Autoencoder


@dataclass(frozen=True)
class Means:
    """What a command opens of a file, and what the network is to compute in and with.

    ``memory``, ``spill``: as ``enable_streaming`` takes them; without ``memory`` whole maps.
    """

    component: str | None
    family: str | None
    dtype: Dtype
    device: str
    backend: Backend = Backend.reference
    memory: str | None = None
    spill: Path | None = None


def opened(model: Sequence[Path], means: Means) -> Autoencoder:
    """The autoencoder of a command that makes pictures, in eval mode.

    Raises:
        SdconvError: as ``sdconv.load`` and ``enable_streaming``; or the network is no autoencoder,
            or none that streams.
    """
    from sdconv.loading import load
    from sdconv.models.base import Autoencoder

    network = load(
        one_or_all(model),
        means.component or "vae",
        dtype=means.dtype.in_torch(),
        device=means.device,
        family=means.family,
        backend=means.backend.value,
    )
    if not issubclass(type(network), Autoencoder):
        raise InputError(
            "pictures pass through an autoencoder only",
            where="--component",
            expected="vae",
            got=means.component,
        )
    _stream(network, means)
    return network  # type: ignore[return-value]


def _stream(network: Any, means: Means) -> None:
    if means.memory is None:
        if means.spill is not None:
            raise InputError(
                "whole maps are not spilled",
                where="--spill",
                hint="say how much memory there is: --memory 2GiB",
            )
        return
    if not hasattr(network, "enable_streaming"):
        raise InputError(
            "a tiny autoencoder computes whole maps only",
            where="--memory",
            hint="leave --memory out",
        )
    network.enable_streaming(means.memory, means.spill)


@contextmanager
def running(words: str, network: object = None) -> Iterator[None]:
    """A network at work, without gradients. One that streams has a bar of its own.

    Raises:
        InputError: torch's normalisation finds a single value in a group.
    """
    import torch

    streams = getattr(network, "streaming", None) is not None
    try:
        with nullcontext() if streams else working(words), torch.inference_mode():
            yield
    except ValueError as error:
        raise InputError(
            "too small for this network",
            where="picture or latents",
            expected="a map on which its normalisation has more than one value",
            got=error,
        ) from error


def prepared(
    image: Path,
    model: list[Path],
    size: int | None,
    means: Means,
    *,
    patches: bool = False,
) -> tuple[Autoencoder, LoadedImage, Tensor]:
    """The network, the picture cut to what it takes, and the picture as its input."""
    from sdconv.images import read_image, to_tensor

    picture = read_image(image)
    network = opened(model, means)
    if network.config["in_channels"] != 3:
        raise InputError(
            "this network takes no pictures in colour",
            where=network.config.class_name,
            expected="3 channels",
            got=network.config["in_channels"],
        )
    multiple = network.downscale
    if patches and "patch_size" in network.config:
        multiple *= max(network.config["patch_size"])
    picture = picture.fitted(multiple, size)
    for note in picture.notes:
        say(note, "note")
    if means.memory is None:
        has_room(network, picture.image.size[::-1], options=("memory", "size", "dtype"))
    return network, picture, to_tensor(picture.image).to(network.device, network.dtype)


def check_patches(network: Autoencoder, z: Tensor, scaled: bool) -> None:
    """Says of FLUX.2's latents in the other form what they are.

    Raises:
        InputError: patches without --scaled, or no patches with it.
    """
    channels = network.config["latent_channels"]
    if "patch_size" not in network.config or z.shape[1] == (4 * channels if scaled else channels):
        return
    if z.shape[1] in (channels, 4 * channels):
        raise InputError(
            "these latents are raw" if scaled else "these latents are normalised patches",
            where=network.config.class_name,
            expected=f"{4 * channels if scaled else channels} channels",
            got=tuple(z.shape),
            hint="leave --scaled out" if scaled else "pass --scaled",
        )


_SIDE = 512


def has_room(
    network: Autoencoder, size: tuple[int, ...], *, pictures: int = 1, options: Sequence[str]
) -> None:
    """Refuses pictures of which a single layer's maps take more memory than is free.

    Args:
        size: rows and columns of each. pictures: that go through at once.
        options: of the command, by which it can do with less memory.

    Raises:
        InputError: they do.
    """
    from sdconv.analysis.anatomy import dissect

    pixels = pictures * size[0] * size[1]
    if network.device.type == "cpu" and pixels > 1 << 20:
        # maps grow with the picture, so that any size tells what each pixel takes
        each = dissect(network.config, _SIDE).largest / _SIDE**2
        least = round(pixels * each * network.dtype.itemsize)
        several = "" if pictures == 1 else f"{pictures} of "
        streams = hasattr(network, "enable_streaming")
        helping = [option for option in options if streams or option != "memory"]
        fits(least, f"{several}{size[1]}x{size[0]}", helping)


def fits(least: int, where: str, options: Sequence[str]) -> None:
    """Refuses what needs more memory than is free: ``least`` bytes at once, for one layer's maps.

    Args:
        where: the picture's size. options: as for ``has_room``.

    Raises:
        InputError: it does.
    """
    free = _free_memory()
    if free is not None and least > free:
        raise InputError(
            "too large a picture for the memory that is free",
            where=where,
            expected=f"at most {free / 1e9:.1f} GB",
            got=f"{least / 1e9:.1f} GB for the maps of one layer alone",
            hint=less_memory(options),
        )


def _free_memory() -> int | None:
    """Bytes that can be had without swapping, as Linux estimates them; None where it cannot be
    told."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None
