"""Feature maps kept as they pass: ``with sdconv.capture(network, "decoder.*.conv2") as maps``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.devices import usable_device
from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import Counter, Steps, selection
from sdconv.features.forecast import Forecast
from sdconv.features.hooks import attach, recomputing, uncompiled, untraced
from sdconv.features.keeping import Sink
from sdconv.features.maps import Entry, Maps
from sdconv.features.patterns import Patterns, chosen
from sdconv.features.reduction import Keep, Reduction, Region, copies_later, reduction
from sdconv.features.targets import Target, target_of


@untraced
@contextmanager
def capture(
    target: Any,
    patterns: Patterns,
    *,
    exclude: Patterns = (),
    steps: Steps = None,
    reduce: str | Reduction | None = None,
    channels: slice | Sequence[int] | None = None,
    region: Region | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    stop_early: bool = False,
    max_memory: int | str | None = None,
    store: str | Path | None = None,
) -> Iterator[Maps]:
    """Keeps what a network computes at the places whose names match, as long as the block lasts.

    Each map is copied at once, so that nothing that is done to it later shows, and nothing that is
    done to the copy changes the network's results. Captures and edits act in the order in which
    their blocks were entered: a capture sees what the edits around it made of a map, not what those
    inside it will make. They belong to the network: calls from any thread count. What gradient
    checkpointing computes a second time is not kept again; what ``torch.compile`` made runs
    uncompiled inside the block, because compiled code calls no hooks; and the fast backend leaves
    a layer with a hook to the reference, from which it differs by rounding.

    Args:
        target: a network, any module, or a diffusers pipeline, whose names begin with the
            component's, such as ``unet.`` and ``vae.``.
        patterns, exclude: names or globs, in which ``*`` crosses dots; ``sdconv.features(target)``
            lists the names.
        steps: which calls: numbers from 0, a slice of them, or a function of the ``Call``. Of a
            pipeline's components only those that are told a timestep are meant.
        region: ``(top, left, bottom, right)``, parts of the map's height and width, 0 to 1.
        channels: numbers of the channels to keep, or a slice.
        reduce: ``"mean"``, ``"std"``, ``"max"`` over places, ``"pool:8"`` to means over a grid of
            8x8, ``"channel_mean"`` and so on over channels, ``"pca:3"``, or a function of the map.
        dtype, device: of what is kept; the map's own where None.
        stop_early: the network ends when everything has come, for the last of ``steps`` (the first
            call, where none are given): the rest of the block is skipped.
        max_memory: bytes that maps may take in memory, or words such as ``"2GiB"``. A run that
            needs more and has no store is refused, before its first operation if that can be known.
        store: a folder to be made, into which each map is written at once, as zarr arrays; what is
            complete stays readable if the run is killed. With it nothing is kept in memory beyond
            ``max_memory`` (0 if not given).

    Yields:
        The maps, readable inside the block and after it.

    Raises:
        InputError: a pattern matches no name, an option is no such option, or there is no such
            device here.
        SdconvError: a pattern's layers were never reached; the maps need more than ``max_memory``;
            the store exists or cannot be written.
    """
    found = target_of(target)
    places = found.places()
    by_pattern = chosen(tuple(places), patterns, exclude)
    wanted = {name for names in by_pattern.values() for name in names}
    keep = Keep(
        region=region,
        channels=channels,
        reduce=reduction(reduce),
        dtype=dtype,
        device=None if device is None else usable_device(device),
    )
    pipeline = found.pipeline is not None
    sink = Sink(max_memory, None if store is None else Path(store), pipeline=pipeline)
    recorder = _Recorder(found, wanted, keep, steps, stop_early, sink)
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for counter in recorder.counters.values():
            stack.callback(counter.attach().remove)
        # a function of the caller's is not run on maps without values
        if sink.limit is not None and store is None and not callable(reduce):
            forecast = Forecast(found, wanted, keep, recorder.selected, sink.limit)
            for handle in forecast.attach():
                stack.callback(handle.remove)
        # in the places' order, which is that of hooks on one module
        for name, place in places.items():
            if name in wanted:
                visit = recorder.visit(name, found.network_of(place))
                stack.callback(attach(place, visit).remove)
        try:
            yield recorder.maps
        except _Stop as stop:
            if stop.recorder is not recorder:
                raise
    _check_reached(by_pattern, recorder.maps)


def run_until(model: Any, patterns: Patterns, *args: Any, **kwargs: Any) -> Maps:
    """Calls ``model(*args, **kwargs)`` without gradients as far as the last layer that matches.

    Returns:
        The maps, as ``sdconv.capture`` gives them.

    Raises:
        InputError, SdconvError: as ``sdconv.capture``.
    """
    with torch.no_grad(), capture(model, patterns, stop_early=True) as maps:
        model(*args, **kwargs)
    return maps


class _Stop(BaseException):
    """Leaves a network whose rest nobody asked for; no handler of ordinary errors sees it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__("everything that a capture asked for has come")
        self.recorder = recorder


class _Recorder:
    def __init__(
        self,
        target: Target,
        names: set[str],
        keep: Keep,
        steps: Steps,
        stop_early: bool,
        sink: Sink,
    ) -> None:
        self._keep, self._sink = keep, sink
        self.selected, last = selection(steps)
        if stop_early and steps is not None and last is None:
            raise InputError(
                "it is not known which call is the last one to keep",
                where="stop_early",
                expected="steps as numbers or as a slice that ends",
                got=steps,
            )
        self._last = (last or 0) if stop_early else None
        self._missing = set(names)
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._entries: dict[str, list[Entry]] = {}
        self._pipeline = target.pipeline is not None
        self.maps = Maps(self._entries, pipeline=self._pipeline)
        self.counters = {
            prefix: Counter(network, target.pipeline, denoiser=prefix == "unet.")
            for prefix, network in target.networks.items()
        }

    def visit(self, name: str, prefix: str) -> Callable[[Tensor], None]:
        counter = self.counters[prefix]
        every = self._pipeline and not counter.timed

        def record(x: Tensor) -> None:
            if recomputing():
                return
            with self._lock:
                call = counter.at(name)
                if every or self.selected(call):
                    kept = self._keep(x)
                    if kept.shape[:1] != x.shape[:1]:  # what a function made of it
                        call = call.without_halves()
                    load = self._sink.put(name, call, kept, _ready(x, kept))
                    self._entries.setdefault(name, []).append(Entry(name, call, load))
                if self._last is not None and (every or call.index >= self._last):
                    self._missing.discard(name)
                    if not self._missing and threading.get_ident() == self._thread:
                        raise _Stop(self)

        return record


def _ready(x: Tensor, kept: Tensor) -> Callable[[], object]:
    """What waits until a map is copied."""
    if not copies_later(x, kept.device):
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(x.device))
    return event.synchronize


def _check_reached(by_pattern: Mapping[str, Sequence[str]], maps: Mapping[str, object]) -> None:
    for pattern, names in by_pattern.items():
        if not any(name in maps for name in names):
            raise SdconvError(
                "no layer that this matches was reached, in a call that was to be kept",
                where=repr(pattern),
                expected=f"a call of the network that passes {names[0]}",
                hint="call the network inside the block; look at steps=",
            )
