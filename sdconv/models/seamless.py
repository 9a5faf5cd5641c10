"""Seamless images: convolutions that wrap around at the edges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from sdconv.errors import InputError
from sdconv.models.base import Network
from sdconv.models.blocks import AsymmetricDownsample2D
from sdconv.models.padding import is_seamless, make_seamless

_ATTRIBUTES = ("_conv_forward", "seamless_axes")


@contextmanager
def seamless(network: Network, axes: str = "xy") -> Iterator[None]:
    """Lets a network make images whose opposite edges fit together, like the tiles of a texture.

    ::

        with sdconv.seamless(vae, "x"):
            panorama = vae.decode(latents).sample

    Along ``axes``, every convolution reads beyond an edge what lies at the opposite one (circular
    padding) instead of zeros. Everything else in these networks treats all positions alike, so
    shifting the input around shifts the output around: ``decode(roll(z, k)) == roll(decode(z),
    8 * k)``, up to rounding. For an image without seams from a prompt, both the U-Net and the VAE
    have to be seamless. Where a network halves odd numbers of rows or columns, the shift is not
    exact.

    Works on both backends (the fast one computes these convolutions like the reference) and under
    ``enable_streaming``. It changes the network until the context ends, in every thread.

    Args:
        network: one of sdconv's networks.
        axes: ``"x"`` for the left and right edges, ``"y"`` for top and bottom, ``"xy"`` for both.

    Raises:
        InputError: other axes, not a network of sdconv's, or one that has convolutions with a
            ``_conv_forward`` or ``forward`` of their own.
    """
    modules = _checked(network, axes)
    saved = [
        {name: vars(module)[name] for name in _ATTRIBUTES if name in vars(module)}
        for module in modules
    ]
    try:
        for module in modules:
            if isinstance(module, nn.Conv2d):
                make_seamless(module, axes)
            else:
                vars(module)["seamless_axes"] = axes
        yield
    finally:
        for module, before in zip(modules, saved, strict=True):
            for name in _ATTRIBUTES:
                vars(module).pop(name, None)
            vars(module).update(before)


def _checked(network: Any, axes: Any) -> list[nn.Module]:
    """The modules that pad."""
    if axes not in ("x", "y", "xy", "yx"):
        raise InputError("unknown axes", where="axes", expected="'x', 'y' or 'xy'", got=repr(axes))
    if not isinstance(network, Network):
        raise InputError(
            "not a network of sdconv's",
            where="seamless",
            expected="a VAE or a U-Net from sdconv.load",
            got=type(network).__name__,
            hint="put sdconv's network in the place of the pipeline's",
        )
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not is_seamless(module):
            own = [a for a in ("_conv_forward", "forward") if a in vars(module)]
            if own:
                raise InputError(
                    f"the convolution has a {own[0]} of its own, which may pad in another way",
                    where=name,
                    hint="restore the network first",
                )
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | AsymmetricDownsample2D)]
