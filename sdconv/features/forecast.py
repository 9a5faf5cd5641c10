"""How much memory the maps of a run will need, known before its first operation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconv.features.calls import Call
from sdconv.features.hooks import attach, first_tensor
from sdconv.features.keeping import too_wide
from sdconv.features.places import places
from sdconv.features.reduction import Keep
from sdconv.features.targets import Target
from sdconv.models.meta_copy import double, without_values


class Forecast:
    """Lets each network run dry when it is called first, and refuses what will not fit.

    Where a dry run is not possible, as with a network that asks for values, nothing is said: the
    limit is then met when the maps are there.

    Args:
        target: what is captured from. names: of the places. keep: what of each map is kept.
        selected: whether a call is among those asked for. limit: bytes.
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
        self._open = set(names)
        self._needed = 0

    def attach(self) -> list[RemovableHandle]:
        """Begins to look at calls: of the networks, and of the halves by which an autoencoder is
        entered."""
        handles = []
        for prefix, network in self._target.networks.items():
            halves = ((half, getattr(network, half, None)) for half in ("encoder", "decoder"))
            entered = {prefix: network} | {f"{prefix}{half}.": one for half, one in halves}
            for place, module in entered.items():
                if isinstance(module, nn.Module):
                    handles.append(self._look(place, module))
        return handles

    def _look(self, prefix: str, module: nn.Module) -> RemovableHandle:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            names = {name for name in self._open if name.startswith(prefix)}
            self._open -= names
            # what autocast will make of a dtype is not seen without values
            if not names or _casts(first_tensor((args, kwargs))):
                return
            self._needed += self._calls(prefix) * self._bytes(prefix, module, names, args, kwargs)
            if self._needed > self._limit:
                raise too_wide(self._needed, self._limit, "in all")

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

        def note(x: Tensor) -> None:
            sizes.append(self._keep(x).nbytes)

        try:
            copy = double(module)
            for name, place in places(copy, prefix).items():
                if name in names:
                    attach(place, note)
            with torch.no_grad():
                copy(*without_values(args), **without_values(dict(kwargs)))
        except Exception:
            return 0
        return sum(sizes)

    def _calls(self, prefix: str) -> int:
        """How many of the calls that are to come are asked for."""
        pipeline = self._target.pipeline
        steps = getattr(getattr(pipeline, "scheduler", None), "timesteps", None)
        count = getattr(pipeline, "num_timesteps", None)
        if prefix != "unet." or not isinstance(steps, Tensor) or not count:
            return 1
        calls = enumerate(steps[-count:])
        return sum(self._selected(Call(index, timestep)) for index, timestep in calls)


def _casts(x: Tensor | None) -> bool:
    """Whether autocast is on where a tensor is."""
    device = "meta" if x is None else x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
