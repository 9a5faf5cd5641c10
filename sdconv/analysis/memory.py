"""Whether the memory that is free suffices for a network's largest feature maps."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sdconv.errors import InputError

if TYPE_CHECKING:
    from sdconv.models.base import Autoencoder

# below this many pixels nothing is checked: any machine has room for them
_SMALL = 1 << 20
_SIDE = 512
# what helps, by the option that does it
_REMEDIES = {
    "memory": "work in strips (--memory 2GiB, and --spill FOLDER for what does not fit)",
    "size": "name a smaller --size",
    "dtype": "compute in a narrower --dtype",
}


def memory_hint(options: Iterable[str]) -> str | None:
    """Advice on which of a command's options save memory; None if none does."""
    given = set(options)
    return ", or ".join(words for option, words in _REMEDIES.items() if option in given) or None


def check_memory(
    network: Autoencoder, size: tuple[int, ...], *, images: int = 1, options: Iterable[str]
) -> None:
    """Refuse images for which the feature maps of a single layer exceed the free memory.

    Only networks on the CPU are checked.

    Args:
        network: the autoencoder that the images pass through.
        size: rows and columns of each image.
        images: how many pass through at once.
        options: the caller's options that can save memory, of ``memory``, ``size`` and ``dtype``.

    Raises:
        InputError: the feature maps exceed the free memory.
    """
    from sdconv.analysis.anatomy import dissect

    pixels = images * size[0] * size[1]
    if network.device.type == "cpu" and pixels > _SMALL:
        # feature maps grow with the image, so that one size shows what each pixel takes
        values_per_pixel = dissect(network.config, _SIDE).peak_values / _SIDE**2
        least = round(pixels * values_per_pixel * network.dtype.itemsize)
        several = "" if images == 1 else f"{images} of "
        check_free_memory(least, f"{several}{size[1]}x{size[0]}", options)


def check_free_memory(least: int, where: str, options: Iterable[str]) -> None:
    """Refuse what needs more memory than is free.

    Args:
        least: bytes that one layer's feature maps take at once.
        where: the image's size, for the message.
        options: as for ``check_memory``.

    Raises:
        InputError: ``least`` exceeds the free memory.
    """
    free = _free_memory()
    if free is not None and least > free:
        raise InputError(
            "the image is too large for the free memory",
            where=where,
            expected=f"at most {free / 1e9:.1f} GB",
            got=f"{least / 1e9:.1f} GB for the feature maps of one layer alone",
            hint=memory_hint(options),
        )


def _free_memory() -> int | None:
    """Bytes available without swapping, as Linux estimates them; None on other systems."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    kibibytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kibibytes[0]) * 1024 if kibibytes else None
