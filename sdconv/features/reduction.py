"""What is kept of a map: channels, a region, a summary, a dtype, a device."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sdconv.errors import InputError

Reduction = Callable[[Tensor], Tensor]
Region = tuple[float, float, float, float]


def _places(x: Tensor) -> tuple[int, ...]:
    """The axes along which a map's places lie: rows and columns, or tokens."""
    return (2, 3) if x.ndim == 4 else tuple(range(1, x.ndim - 1))


def channel_axis(x: Tensor) -> int:
    """Where a map's channels are: second of ``(B, C, H, W)``, else last."""
    return 1 if x.ndim == 4 else x.ndim - 1


def _over_places(pool: Callable[[Tensor, tuple[int, ...]], Tensor]) -> Reduction:
    # a vector has no places: it is its own mean, its spread is 0
    return lambda x: pool(x if _places(x) else x[:, None], _places(x) or (1,))


def _over_channels(pool: Callable[[Tensor, int], Tensor]) -> Reduction:
    return lambda x: pool(x, channel_axis(x))


REDUCTIONS: Mapping[str, Reduction] = {
    "mean": _over_places(lambda x, axes: x.mean(axes)),
    "std": _over_places(lambda x, axes: x.std(axes, correction=0)),
    "max": _over_places(lambda x, axes: x.amax(axes)),
    "channel_mean": _over_channels(lambda x, axis: x.mean(axis, keepdim=True)),
    "channel_std": _over_channels(lambda x, axis: x.std(axis, correction=0, keepdim=True)),
    "channel_max": _over_channels(lambda x, axis: x.amax(axis, keepdim=True)),
}
"""Over a map's places, ``(B, C, H, W)`` to ``(B, C)``; over its channels, to ``(B, 1, H, W)``."""


def pca(components: int) -> Reduction:
    """Principal components of a map's channels, over all its places and the whole batch.

    ``(B, C, H, W)`` to ``(B, components, H, W)``, the one of largest variance first; in each the
    weight of largest size is positive. Where there are fewer channels, the rest is 0.

    Raises:
        InputError: fewer than one component.
    """
    if components < 1:
        raise InputError("PCA gives at least one component", where="reduce", got=components)

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
    """The function that a name stands for: one of ``REDUCTIONS``, or ``"pca:3"``.

    Raises:
        InputError: there is none of that name.
    """
    if reduce is None or callable(reduce):
        return reduce
    if isinstance(reduce, str):
        if reduce in REDUCTIONS:
            return REDUCTIONS[reduce]
        if found := re.fullmatch(r"pca:(\d{1,4})", reduce):
            return pca(int(found[1]))
    raise InputError(
        "no such reduction",
        where="reduce",
        expected=f"{', '.join(REDUCTIONS)}, pca:3 or a function of a map",
        got=repr(reduce),
    )


@dataclass(frozen=True, kw_only=True)
class Keep:
    """What of each map is kept, in this order.

    ``region``: top, left, bottom, right as parts of the map's height and width, from 0 to 1.
    ``channels``: numbers of channels, or a slice. ``reduce``: see ``reduction``. ``dtype``,
    ``device``: of what is kept, None for the map's.
    """

    region: Region | None = None
    channels: slice | Sequence[int] | None = None
    reduce: Reduction | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """A tensor of its own, which shares no memory with ``x`` and knows no gradient.

        Raises:
            InputError: the map has no such channels or no rows and columns.
        """
        # outside of inference mode, so that what is kept can be used anywhere
        with torch.inference_mode(False), torch.no_grad(), _exactly(x.device.type):
            kept = x.detach() if not x.is_inference() else x
            if self.region is not None:
                kept = _cut(kept, self.region)
            if self.channels is not None:
                kept = _picked(kept, self.channels)
            if self.reduce is not None:
                kept = self.reduce(kept.clone() if kept.is_inference() else kept)
            device = self.device or kept.device
            later = kept.is_cuda and device.type == "cpu"
            return kept.to(device, self.dtype, non_blocking=later, copy=True)


def _exactly(device: str) -> AbstractContextManager[object]:
    """Without autocast, where a device has it."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _cut(x: Tensor, region: Region) -> Tensor:
    if x.ndim != 4:
        raise InputError("a region of a map without rows and columns", got=tuple(x.shape))
    top, left, bottom, right = region
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise InputError(
            "no such region",
            where="region",
            expected="(top, left, bottom, right) from 0 to 1",
            got=region,
        )
    rows, columns = x.shape[2:]
    # every cell that the region touches
    return x[
        :,
        :,
        int(top * rows) : -int(-bottom * rows // 1),
        int(left * columns) : -int(-right * columns // 1),
    ]


def _picked(x: Tensor, channels: slice | Sequence[int]) -> Tensor:
    axis = channel_axis(x)
    numbers = (
        list(range(x.shape[axis])[channels]) if isinstance(channels, slice) else list(channels)
    )
    if not numbers or not all(-x.shape[axis] <= number < x.shape[axis] for number in numbers):
        raise InputError(
            "the map has no such channels",
            where="channels",
            expected=f"numbers below {x.shape[axis]}",
            got=channels,
        )
    index = torch.tensor(numbers, device=x.device) % x.shape[axis]
    return x.index_select(axis, index)
