"""Images that are not tensors, as input of an autoencoder: Pillow's images and numpy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdconv.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    Images = Tensor | Image.Image | np.ndarray[Any, Any] | Sequence[Image.Image]
    Latents = Tensor | np.ndarray[Any, Any]

_ARRAY = "(H, W, 3) or (B, H, W, 3): uint8 from 0 to 255, or floating-point from 0 to 1"


def is_image(x: object) -> bool:
    """Whether ``x`` is an image of Pillow's or numpy's, or a list of them."""
    if isinstance(x, list | tuple):
        return bool(x) and all(is_image(one) for one in x)
    return _is_numpys(x) or _is_pillows(x)


def is_array(x: object) -> bool:
    """Whether ``x`` is an array of numpy's."""
    return _is_numpys(x)


def image_tensor(x: Any, where: str) -> Tensor:
    """Images as ``(B, 3, H, W)`` in [-1, 1], float32. They are neither resized nor cropped.

    Args:
        x: an image of Pillow's in mode RGB or L; an array ``(H, W, 3)`` or ``(B, H, W, 3)`` of
            numpy's, uint8 from 0 to 255 or floating-point from 0 to 1; or a list of these with one
            height and width.
        where: the network, for messages.

    Raises:
        InputError: another mode, shape, dtype or range, a masked array, or images of different
            sizes.
    """
    if isinstance(x, list | tuple):
        batches = [image_tensor(one, where) for one in x]
        sizes = sorted({f"{one.shape[3]}x{one.shape[2]}" for one in batches})
        if len(sizes) > 1:
            raise InputError(
                "the images of a batch have different sizes",
                where=where,
                expected="one size",
                got=", ".join(sizes),
                hint="encode them one by one, or resize them first",
            )
        return torch.cat(batches)
    return _of_array(x, where) if _is_numpys(x) else _of_pillow(x, where)


def latent_tensor(x: Any, where: str) -> Tensor:
    """Latents in an array ``(B, C, h, w)`` of numpy's as a tensor.

    Raises:
        InputError: the array is not floating-point, or masked.
    """
    if x.dtype.kind != "f":
        raise InputError(
            "latents must be floating-point", where=where, expected="float32", got=x.dtype
        )
    return torch.tensor(_readable(x, where))


def check_unmasked(array: Any, where: str) -> None:
    """Refuses numpy's masked arrays, which a tensor cannot be.

    Raises:
        InputError: the array is masked.
    """
    import numpy as np

    if isinstance(array, np.ma.MaskedArray):
        raise InputError(
            "a masked array would lose its mask",
            where=where,
            expected="an array whose values all count",
            got=f"{np.ma.getmaskarray(array).sum()} masked values",
            hint="fill them, as by array.filled(0); or leave the mask out: array.data",
        )


def _of_pillow(image: Any, where: str) -> Tensor:
    from sdconv.images import to_tensor

    if image.mode not in ("RGB", "L") or image.has_transparency_data:
        transparent = " with transparency" if image.has_transparency_data else ""
        raise InputError(
            "it is unclear how this image is to become RGB",
            where=where,
            expected="an image in mode RGB or L",
            got=f"mode {image.mode}{transparent}",
            hint='say how, as by image.convert("RGB"); sdconv.images.read_image blends '
            "transparency with white and scales 16 bits",
        )
    return to_tensor(image.convert("RGB"))


def _of_array(array: Any, where: str) -> Tensor:
    def wrong(what: str, got: object, hint: str) -> InputError:
        return InputError(what, where=where, expected=_ARRAY, got=got, hint=hint)

    if array.ndim not in (3, 4) or array.shape[-1] != 3 or 0 in array.shape:
        hint = "stack a grey image three times: np.stack([array] * 3, axis=-1)"
        if array.ndim in (3, 4) and array.shape[-3] == 3:
            hint = "move the channels to the end: np.moveaxis(array, -3, -1); or pass a tensor"
        elif array.ndim in (3, 4) and array.shape[-1] == 4:
            hint = "leave the transparency out: array[..., :3]"
        raise wrong("an array has the wrong shape for images", array.shape, hint)
    array = _readable(array, where)
    if array.dtype == "uint8":
        from sdconv.images import pixels_to_tensor

        images = [pixels_to_tensor(one) for one in array.reshape(-1, *array.shape[-3:])]
        return images[0] if len(images) == 1 else torch.cat(images)
    if array.dtype.kind != "f":
        hint = "scale the values to one of these ranges"
        raise wrong("an array has the wrong dtype for images", array.dtype, hint)
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN, too
        hint = "divide by 255"
        if low != low or high != high:
            hint = "look for NaN in the array"
        elif -1 <= low and high <= 1:
            hint = "map [-1, 1] to [0, 1] by (array + 1) / 2; or pass a tensor, which is in [-1, 1]"
        elif low < 0:
            hint = "scale the values to [0, 1]"
        raise wrong("an array has values out of range", f"{low:g} to {high:g}", hint)
    x = torch.tensor(array, dtype=torch.float32).reshape(-1, *array.shape[-3:])
    return x.permute(0, 3, 1, 2) * 2 - 1


def _readable(array: Any, where: str) -> Any:
    """The array as torch reads it: no axis reversed, and bytes in the machine's order.

    Raises:
        InputError: it is masked, which no tensor is.
    """
    import numpy as np

    check_unmasked(array, where)
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _is_numpys(x: object) -> bool:
    return _is_a(x, "numpy", "ndarray")


def _is_pillows(x: object) -> bool:
    return _is_a(x, "PIL.Image", "Image")


def _is_a(x: object, module: str, name: str) -> bool:
    """Whether ``x`` is of this class or a subclass, whose package need not be imported."""
    return any((kind.__module__, kind.__name__) == (module, name) for kind in type(x).__mro__)
