"""The memory that captured feature maps take: forecast before a run, limited during it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.errors import SdconvError
from sdconv.features.calls import Call
from sdconv.features.hook_points import hook_points
from sdconv.features.hooks import Handle, attach, first_tensor
from sdconv.features.reduction import Keep
from sdconv.features.targets import Target
from sdconv.features.zarr_store import Load, ZarrStore, errors_about
from sdconv.models.meta_copy import meta_copy, to_meta
from sdconv.sizes import parse_bytes


class Sink:
    """Keeps captured maps in memory as far as that is allowed, and on the disk if there is a store.

    Args:
        limit: bytes that may be held in memory, or text such as ``"2GiB"``; None for no limit, or
            for 0 bytes if there is a store.
        path: the folder that each map is written to, or None.
        pipeline: the maps are a pipeline's.

    Raises:
        InputError: an invalid limit.
        SdconvError: the folder exists, or the zarr package is missing.
    """

    def __init__(self, limit: int | str | None, path: Path | None, *, pipeline: bool) -> None:
        self.limit = limit if limit is None or limit == 0 else parse_bytes(limit, "max_memory")
        self.store = None if path is None else ZarrStore(path, pipeline=pipeline)
        self._held = 0

    def put(self, name: str, call: Call, x: Tensor, wait: Callable[[], object]) -> Load:
        """Keep one captured map, and return a function that loads it.

        Args:
            name, call: hook point and call of the map.
            x: the map.
            wait: returns once ``x`` is complete.

        Raises:
            SdconvError: there is no room for it, in memory or on the disk.
        """

        written = None
        if self.store is not None:
            wait()
            hint = "make room; the maps that were complete can be opened"
            with errors_about(self.store.path, "cannot be written", hint=hint):
                written = self.store.append(name, call, x)
        limit = 0 if self.limit is None and written is not None else self.limit
        if limit is None or self._held + x.nbytes <= limit:
            self._held += x.nbytes
            return Held(x, wait)
        if written is None:
            raise _over_limit(self._held + x.nbytes, limit, "so far")
        return written


class Held:
    """Returns a feature map in memory, once its copy is complete."""

    def __init__(self, x: Tensor, wait: Callable[[], object] | None) -> None:
        self._x, self._wait = x, wait

    def __call__(self) -> Tensor:
        if self._wait is not None:
            self._wait()
            self._wait = None
        return self._x

    @property
    def shape(self) -> torch.Size:
        return self._x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    def __reduce__(self) -> tuple[Any, ...]:  # for pickle and copy
        return Held, (self().detach(), None)


class MemoryForecast:
    """Measures each network by a dry run when it is first called, and refuses a run over the limit.

    If a dry run is not possible, as with a network that reads values, there is no forecast, and
    ``Sink`` enforces the limit during the run.

    Args:
        target: what is captured from.
        names: of the captured hook points.
        keep: what is kept of each feature map.
        selected: whether a call is captured.
        limit: bytes.
    """

    def __init__(
        self,
        target: Target,
        names: Collection[str],
        keep: Keep,
        selected: Callable[[Call], bool],
        limit: int,
    ) -> None:
        self._target, self._keep = target, keep
        self._selected, self._limit = selected, limit
        self._pending = set(names)
        self._needed = 0

    def attach(self) -> list[Handle]:
        """Hook the networks, and the encoder and decoder of an autoencoder, which have entries of
        their own."""
        handles = []
        for prefix, network in self._target.networks.items():
            halves = ((half, getattr(network, half, None)) for half in ("encoder", "decoder"))
            entered = {prefix: network} | {f"{prefix}{half}.": one for half, one in halves}
            for name, module in entered.items():
                if isinstance(module, nn.Module):
                    handles.append(self._hook(name, module))
        return handles

    def _hook(self, prefix: str, module: nn.Module) -> Handle:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = {name for name in self._pending if name.startswith(prefix)}
            self._pending -= names
            # a dry run does not show which dtype autocast would choose
            if not names or _autocasts(first_tensor((args, kwargs))):
                return
            self._needed += self._calls(prefix) * self._bytes(prefix, module, names, args, kwargs)
            if self._needed > self._limit:
                raise _over_limit(self._needed, self._limit, "in all")

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _bytes(
        self,
        prefix: str,
        module: nn.Module,
        names: Collection[str],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> int:
        sizes: list[int] = []

        def measure(x: Tensor) -> None:
            sizes.append(self._keep(x).nbytes)

        try:
            copy = meta_copy(module)
            for name, point in hook_points(copy, prefix).items():
                if name in names:
                    attach(point, measure)
            with torch.no_grad():
                copy(*to_meta(args), **to_meta(dict(kwargs)))
        except Exception:
            return 0
        return sum(sizes)

    def _calls(self, prefix: str) -> int:
        """The number of calls to come that are captured."""
        pipeline = self._target.pipeline
        steps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        count = getattr(pipeline, "num_timesteps", None)
        if prefix != "unet." or not isinstance(steps, Tensor) or not count:
            return 1
        calls = enumerate(steps[-count:])
        return sum(self._selected(Call(index, timestep)) for index, timestep in calls)


def _autocasts(x: Tensor | None) -> bool:
    """Whether autocast is enabled for a tensor's device."""
    device = "meta" if x is None else x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _over_limit(needed: int, limit: int, when: str) -> SdconvError:
    return SdconvError(
        "the captured maps need more memory than max_memory allows",
        where="max_memory",
        expected=f"at most {limit:,} bytes",
        got=f"{needed:,} bytes {when}",
        hint="choose fewer layers or steps, reduce= them, or give a store= on the disk",
    )
