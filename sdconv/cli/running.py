"""How the commands open an autoencoder, and run networks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sdconv.analysis.memory import check_memory
from sdconv.cli.common import (
    Backend,
    Dtype,
    one_or_all,
    say,
    sharing,
    shows_progress,
    working,
)
from sdconv.cli.ranks import is_first_rank, join_ranks
from sdconv.cli.verbosity import is_quiet
from sdconv.errors import InputError, SdconvError

if TYPE_CHECKING:
    from torch import Tensor

    from sdconv.images import LoadedImage
    from sdconv.models.base import Autoencoder


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Which network of a file a command opens, and what it computes in and with.

    ``component`` to ``backend``: as ``sdconv.load`` takes them. ``memory``, ``spill``: as
    ``enable_streaming`` takes them; None for whole feature maps.
    ``ranks``: whether the other processes that torchrun has started take part. ``timeout``: seconds
    for which one waits for another.
    """

    component: str | None
    family: str | None
    prefix: str | None
    key: str | None
    ema: bool
    dtype: Dtype
    clamp: bool
    device: str
    backend: Backend = Backend.reference
    memory: str | None = None
    spill: Path | None = None
    ranks: bool = False
    timeout: float = 60.0


def image_backend(given: Backend | None, device: str) -> Backend:
    """The backend of a command that runs an autoencoder on images: the given one, or else the fast
    one where it is faster. On a CPU without Numba it is not; a note then says how to get it."""
    if given is not None:
        return given
    from sdconv.fast.cpu.kernels import has_numba_kernels

    if device.startswith("cuda") or has_numba_kernels():
        return Backend.fast
    if is_first_rank():
        say(
            "without Numba, the reference backend computes this; the fast one takes about a third "
            "of the time: pip install 'sdconv[fast]'",
            "note",
        )
    return Backend.reference


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
        device=join_ranks(options.device, options.timeout) if options.ranks else options.device,
        family=options.family,
        prefix=options.prefix,
        key=options.key,
        ema=options.ema,
        clamp=options.clamp,
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
        network.enable_parallel(
            memory_limit=options.memory,
            spill=options.spill,
            progress=not is_quiet(),
            timeout=options.timeout,
        )
        return
    if options.memory is None:
        if options.spill is not None:
            raise InputError(
                "whole feature maps are not spilled",
                where="--spill",
                hint="say how much memory there is: --memory 2GiB",
            )
        return
    network.enable_streaming(options.memory, options.spill, progress=not is_quiet())


@contextmanager
def running(
    words: str,
    network: object = None,
    size: Sequence[int] = (),
    paths: Sequence[str] = (),
) -> Iterator[None]:
    """Run a network in inference mode; a bar on standard error shows how much is done.

    Args:
        words: what is done; "" if the caller shows it.
        network: what streams has a bar of its own; what does not gets one here.
        size: rows and columns of the image.
        paths: as :func:`sdconv.analysis.progress.following` takes them.

    An error that all ranks raise alike ends the first one with its message and the others without.

    Raises:
        InputError: torch's normalisation finds a single value in a group.
    """
    import torch

    from sdconv.streaming.parallel.group import AgreedError

    try:
        with _shown(words, network, size, paths), torch.inference_mode():
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


@contextmanager
def _shown(
    words: str, network: object, size: Sequence[int], paths: Sequence[str]
) -> Iterator[None]:
    from sdconv.models.base import Network

    if getattr(network, "streaming", None) is not None or not words:
        yield
    elif paths and isinstance(network, Network) and shows_progress():
        from sdconv.analysis.progress import following

        rows, columns = size
        with sharing(words) as advance, following(network, (rows, columns), paths, advance):
            yield
    else:
        with working(words):
            yield


def prepared(
    path: Path,
    model: Sequence[Path],
    size: int | tuple[int, int] | None,
    options: RunOptions,
    *,
    scaled: bool = False,
    crop: bool = False,
    alpha: bool = False,
) -> tuple[Autoencoder, LoadedImage, Tensor]:
    """The network, the image as it is kept, and what the network gets: that image, padded to sides
    that it can take.

    Args:
        path: the image. model: the network's files.
        size: as ``LoadedImage.resized`` takes it.
        options: which network, and how it computes.
        scaled: whether the latents will be scaled, which FLUX.2 does in patches.
        crop: whether the image is cropped to such sides, instead of padded.
        alpha: whether its alpha channel is kept.
    """
    from sdconv.images import LoadedImage, read_image, to_tensor
    from sdconv.latents import image_multiple

    image = read_image(path, alpha=alpha)
    network = open_autoencoder(model, options)
    if network.config["in_channels"] != 3:
        raise InputError(
            "this network does not take colour images",
            where=network.config.class_name,
            expected="3 channels",
            got=network.config["in_channels"],
        )
    multiple = image_multiple(network, scaled=scaled)
    image = image.fitted(multiple, size) if crop else image.resized(size)
    whole = image.padded(multiple)
    if is_first_rank():
        for note in whole.notes:
            say(note, "note")
    if options.memory is None and not options.ranks:
        check_memory(network, whole.image.size[::-1], options=("memory", "size", "dtype"))
    kept = LoadedImage(image=image.image, notes=whole.notes)
    return network, kept, to_tensor(whole.image).to(network.device, network.dtype)
