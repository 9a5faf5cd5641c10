"""What is kept of a feature map: channels, a region, a summary, in a dtype and on a device."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdconv.errors import InputError, SdconvError, SdconvWarning
from sdconv.features.selection import integers

Reduction = Callable[[Tensor], Tensor]
Region = tuple[float, float, float, float]


def _space(x: Tensor) -> tuple[int, ...]:
    """The spatial axes of a feature map: rows and columns, or tokens."""
    return (2, 3) if x.ndim == 4 else tuple(range(1, x.ndim - 1))


def channel_axis(x: Tensor) -> int:
    """The channel axis of a feature map: the second of ``(B, C, H, W)``, otherwise the last."""
    return 1 if x.ndim == 4 else x.ndim - 1


def _over_space(pool: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Reduction:
    # a vector has no spatial axes: it is its own mean, and its deviation is 0
    return lambda x: pool(_real(x) if _space(x) else _real(x)[:, None], _space(x) or (1,))


def _over_channels(pool: Callable[[Tensor, int], Tensor]) -> Reduction:
    return lambda x: pool(_real(x), channel_axis(x))


def _real(x: Tensor) -> Tensor:
    # integers, such as token ids, have no mean
    return x if x.is_floating_point() else x.float()


REDUCTIONS: Mapping[str, Reduction] = {
    "mean": _over_space(lambda x, axes: x.mean(axes)),
    "std": _over_space(lambda x, axes: x.std(axes, correction=0)),
    "max": _over_space(lambda x, axes: x.amax(axes)),
    "channel_mean": _over_channels(lambda x, axis: x.mean(axis, keepdim=True)),
    "channel_std": _over_channels(lambda x, axis: x.std(axis, correction=0, keepdim=True)),
    "channel_max": _over_channels(lambda x, axis: x.amax(axis, keepdim=True)),
}
"""Over space, ``(B, C, H, W)`` to ``(B, C)``; over channels, to ``(B, 1, H, W)``."""


def pool(cells: int) -> Reduction:
    """Average pooling to a grid of ``cells`` rows and columns.

    ``(B, C, H, W)`` to ``(B, C, cells, cells)``, so that feature maps of several levels get one
    size; one with fewer rows or columns keeps the number that it has.

    Raises:
        InputError: ``cells`` is below 1. The returned function raises it for a feature map without
            rows and columns.
    """
    if cells < 1:
        raise InputError(
            "a grid needs at least one cell", where="reduce", expected="1 or more", got=cells
        )

    def reduce(x: Tensor) -> Tensor:
        rows, columns = _sides(x, "reduce")
        grid = (min(cells, rows), min(cells, columns))
        return torch.nn.functional.adaptive_avg_pool2d(_real(x), grid)

    return reduce


def pca(components: int) -> Reduction:
    """Principal components over the channels, of all pixels of the whole batch.

    ``(B, C, H, W)`` to ``(B, components, H, W)``, the largest variance first; the sign makes each
    component's largest weight positive. Components beyond the number of channels are 0.

    Raises:
        InputError: ``components`` is below 1.
    """
    if components < 1:
        raise InputError(
            "PCA needs at least one component", where="reduce", expected="1 or more", got=components
        )

    def reduce(x: Tensor) -> Tensor:
        axis = channel_axis(x)
        rows = x.movedim(axis, -1)
        flat = rows.reshape(-1, rows.shape[-1]).float()
        flat = flat - flat.mean(0)
        # ascending eigenvalues
        _, axes = torch.linalg.eigh(flat.mT @ flat)
        axes = axes[:, -components:].flip(-1)
        sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        found = flat @ (axes * sign)
        missing = components - found.shape[-1]
        found = torch.nn.functional.pad(found, (0, missing)) if missing > 0 else found
        return found.reshape(*rows.shape[:-1], components).movedim(-1, axis).to(x.dtype)

    return reduce


def reduction(reduce: str | Reduction | None) -> Reduction | None:
    """The function behind a name: one of ``REDUCTIONS``, ``"pool:8"`` or ``"pca:3"``.

    Raises:
        InputError: an unknown name.
    """
    if reduce is None or callable(reduce):
        return reduce
    if isinstance(reduce, str):
        if reduce in REDUCTIONS:
            return REDUCTIONS[reduce]
        if found := re.fullmatch(r"(pca|pool):(\d{1,4})", reduce):
            return {"pca": pca, "pool": pool}[found[1]](int(found[2]))
    raise InputError(
        "unknown reduction",
        where="reduce",
        expected=f"{', '.join(REDUCTIONS)}, pool:8, pca:3 or a function of a feature map",
        got=repr(reduce),
    )


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What is kept of each feature map, applied in this order.

    Args:
        region: top, left, bottom, right as fractions of the height and width, from 0 to 1; every
            pixel that it touches is kept.
        channels: indices of channels, or a slice.
        reduce: see ``reduction``.
        dtype, device: of the copy; None for the feature map's own.
        grad: what is kept is a function of the feature map for autograd; otherwise it has no
            gradient.

    Raises:
        InputError: an invalid value.
    """

    region: Region | None = None
    channels: slice | Sequence[int] | None = None
    reduce: Reduction | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    grad: bool = False

    @property
    def whole(self) -> bool:
        """Whether a feature map is kept as it is."""
        changes = (self.region, self.channels, self.reduce, self.dtype, self.device)
        return all(one is None for one in changes)

    def __post_init__(self) -> None:
        _check("region", self.region, _is_region, "(top, left, bottom, right) from 0 to 1")
        _check("channels", self.channels, _is_choice, "a slice or indices of channels")
        _check("dtype", self.dtype, lambda one: isinstance(one, torch.dtype), "a torch.dtype")

    def __call__(self, x: Tensor, name: str = "a feature map") -> Tensor:
        """A copy, which shares no memory with ``x``.

        Warns if values of ``x``, which is called ``name``, become infinite.

        Raises:
            InputError: the feature map has no such channels, or no rows and columns.
            SdconvError: the caller's reduction returned something else than a tensor.
        """
        if self.grad:
            return self._copy(x, name)
        # outside inference mode, so that the copy can be used anywhere
        with torch.inference_mode(False), torch.no_grad():
            return self._copy(x.detach(), name)

    def _copy(self, kept: Tensor, name: str) -> Tensor:
        if self.region is not None:
            kept = _crop(kept, self.region)
        if self.channels is not None:
            kept = _pick_channels(kept, self.channels)
        if self.reduce is not None:
            with _without_autocast(kept.device.type):
                kept = _tensor(self.reduce(kept))
        if self.dtype is torch.float16 and overflows(kept):
            warnings.warn(
                f"{name}: values beyond {torch.finfo(torch.float16).max:g} are infinite in the "
                "captured copy; leave dtype= out, or pass torch.bfloat16",
                SdconvWarning,
                stacklevel=2,
            )
        device = self.device or kept.device
        return kept.to(device, self.dtype, non_blocking=copies_later(kept, device), copy=True)


def overflows(x: Tensor) -> bool:
    """Whether finite values become infinite in float16."""
    if x.is_meta or x.is_complex() or x.dtype in (torch.float16, torch.bool):
        return False
    return bool((x.half().isinf() & ~x.isinf()).any())


def float16_where_it_fits(x: Tensor) -> Tensor:
    """In float16; unchanged if finite values would become infinite."""
    return x if overflows(x) else x.half()


def copies_later(x: Tensor, device: torch.device) -> bool:
    """Whether copying to a device is asynchronous, so that the copy must be waited for."""
    return x.is_cuda and device.type == "cpu"


def _check(where: str, value: Any, fits: Callable[[Any], bool], expected: str) -> None:
    if value is not None and not fits(value):
        raise InputError(f"not a valid {where}", where=where, expected=expected, got=repr(value))


def _is_region(value: Any) -> bool:
    try:
        top, left, bottom, right = value
        return bool(0 <= top < bottom <= 1 and 0 <= left < right <= 1)
    except (TypeError, ValueError):
        return False


def _is_choice(value: Any) -> bool:
    return isinstance(value, slice) or (isinstance(value, Sized) and bool(integers(value)))


def _without_autocast(device: str) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _tensor(reduced: object) -> Tensor:
    if not isinstance(reduced, Tensor):
        raise SdconvError(
            "a reduction must return a tensor", where="reduce", got=type(reduced).__name__
        )
    return reduced


def _sides(x: Tensor, where: str) -> tuple[int, int]:
    if x.ndim != 4:
        raise InputError(
            "this feature map has no rows and columns",
            where=where,
            expected="(B, C, H, W)",
            got=tuple(x.shape),
        )
    return x.shape[2], x.shape[3]


def _crop(x: Tensor, region: Region) -> Tensor:
    rows, columns = _sides(x, "region")
    top, left, bottom, right = region
    # slightly inwards: 0.7 of 10 rows are 7, even if the product is rounded up
    return x[
        :,
        :,
        math.floor(top * rows + 1e-9) : math.ceil(bottom * rows - 1e-9),
        math.floor(left * columns + 1e-9) : math.ceil(right * columns - 1e-9),
    ]


def _pick_channels(x: Tensor, channels: slice | Sequence[int]) -> Tensor:
    axis = channel_axis(x)
    count = x.shape[axis]
    numbers = list(range(count)[channels]) if isinstance(channels, slice) else integers(channels)
    if not numbers or not all(0 <= number < count for number in numbers):
        raise InputError(
            "the feature map has no such channels",
            where="channels",
            expected=f"numbers from 0 to {count - 1}",
            got=channels,
        )
    return x.index_select(axis, torch.tensor(numbers, device=x.device))
