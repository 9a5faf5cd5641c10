"""How the commands open an autoencoder, and run networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sdconv.analysis.memory import check_memory
from sdconv.cli.common import Backend, Dtype, one_or_all, say, working
from sdconv.cli.ranks import is_first_rank, join_ranks
from sdconv.errors import InputError, SdconvError

if TYPE_CHECKING:
    from torch import Tensor

    from sdconv.images import LoadedImage
    from sdconv.models.base import Autoencoder


@dataclass(frozen=True)
class RunOptions:
    """Which network of a file a command opens, and what it computes in and with.

    ``memory``, ``spill``: as ``enable_streaming`` takes them; None for whole feature maps.
    ``ranks``: whether the other processes that torchrun has started take part.
    """

    component: str | None
    family: str | None
    dtype: Dtype
    device: str
    backend: Backend = Backend.reference
    memory: str | None = None
    spill: Path | None = None
    ranks: bool = False


def open_autoencoder(model: Sequence[Path], options: RunOptions) -> Autoencoder:
    """The autoencoder of a command that reads or makes images, in eval mode.

    Raises:
        SdconvError: as ``sdconv.load`` and ``enable_streaming``; or the network is not an
            autoencoder, or cannot be streamed.
    """
    from sdconv.loading import load
    from sdconv.models.base import Autoencoder

    network = load(
        one_or_all(model),
        options.component or "vae",
        dtype=options.dtype.in_torch(),
        device=join_ranks(options.device) if options.ranks else options.device,
        family=options.family,
        backend=options.backend.value,
    )
    if not isinstance(network, Autoencoder):
        raise InputError(
            "images pass through an autoencoder only",
            where="--component",
            expected="vae",
            got=options.component,
        )
    _enable_streaming(network, options)
    return network


def _enable_streaming(network: Autoencoder, options: RunOptions) -> None:
    if options.ranks:
        if not hasattr(network, "enable_parallel"):
            raise InputError(
                "a tiny autoencoder is not computed over ranks",
                where="--ranks",
                hint="leave --ranks out",
            )
        network.enable_parallel(memory_limit=options.memory, spill=options.spill)
        return
    from sdconv.models.vae import AutoencoderKL

    if options.memory is None:
        if options.spill is not None:
            raise InputError(
                "whole feature maps are not spilled",
                where="--spill",
                hint="say how much memory there is: --memory 2GiB",
            )
        return
    if not isinstance(network, AutoencoderKL):
        raise InputError(
            "a tiny autoencoder computes whole feature maps only",
            where="--memory",
            hint="leave --memory out",
        )
    network.enable_streaming(options.memory, options.spill)


@contextmanager
def running(words: str, network: object = None) -> Iterator[None]:
    """Run a network in inference mode, with a spinner unless it streams and has a bar of its own.

    An error that all ranks raise alike ends the first one with its message and the others without.

    Raises:
        InputError: torch's normalisation finds a single value in a group.
    """
    import torch

    from sdconv.streaming.parallel.group import AgreedError

    streams = getattr(network, "streaming", None) is not None
    try:
        with nullcontext() if streams else working(words), torch.inference_mode():
            yield
    except AgreedError:
        if is_first_rank():
            raise
        raise typer.Exit(2) from None
    except SdconvError:
        raise  # some are ValueErrors too
    except ValueError as error:
        raise InputError(
            "too small for this network",
            where="image or latents",
            expected="feature maps on which its normalisation has more than one value",
            got=error,
        ) from error


def prepared(
    path: Path,
    model: Sequence[Path],
    size: int | tuple[int, int] | None,
    options: RunOptions,
    *,
    scaled: bool = False,
) -> tuple[Autoencoder, LoadedImage, Tensor]:
    """The network, the image cut to sides that it can take, and that image as its input.

    Args:
        path: the image. model: the network's files.
        size: as ``LoadedImage.fitted`` takes it.
        options: which network, and how it computes.
        scaled: whether the latents will be scaled, which FLUX.2 does in patches.
    """
    from sdconv.images import read_image, to_tensor
    from sdconv.latents import image_multiple

    image = read_image(path)
    network = open_autoencoder(model, options)
    if network.config["in_channels"] != 3:
        raise InputError(
            "this network does not take colour images",
            where=network.config.class_name,
            expected="3 channels",
            got=network.config["in_channels"],
        )
    image = image.fitted(image_multiple(network, scaled=scaled), size)
    if is_first_rank():
        for note in image.notes:
            say(note, "note")
    if options.memory is None and not options.ranks:
        check_memory(network, image.image.size[::-1], options=("memory", "size", "dtype"))
    return network, image, to_tensor(image.image).to(network.device, network.dtype)
