"""How much of a VAE's call is done, in multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sdconv.analysis.anatomy import dissect
from sdconv.backends import observing
from sdconv.models.vae import AutoencoderKL

Advance = Callable[[str, int, int], None]
"""Called with what runs now, the multiply-accumulates done so far, and all of them."""


@contextmanager
def following(
    network: AutoencoderKL, size: tuple[int, int], paths: Sequence[str], advance: Advance
) -> Iterator[None]:
    """Reports, with either backend, the work that is done whenever a block of the VAE begins.

    Args:
        network: the VAE that is called in the block.
        size: rows and columns of the image.
        paths: the methods that are called, in this order: ``"encode"``, ``"decode"``.
        advance: is called when a block begins, and at the end.
    """
    anatomy = dissect(network.config, size)
    before: dict[str, int] = {}
    total = 0
    for path in paths:
        for block in anatomy.blocks_of(path):
            before[block.name] = total
            total += block.macs
    names = {id(module): name for name, module in network.named_modules()}
    done = 0

    def begins(module: Any) -> None:
        nonlocal done
        name = names.get(id(module), "")
        if name in before:
            done = max(done, before[name])
            advance(name, done, total)

    advance("", 0, total)
    with observing(begins):
        yield
    advance("", total, total)
