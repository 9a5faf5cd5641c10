"""Capture feature maps: ``with sdconv.capture(network, "decoder.*.conv2") as maps``."""

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
from sdconv.features.attention import Visit
from sdconv.features.hooks import attach, recomputing, uncompiled, untraced
from sdconv.features.maps import CapturedMap, Maps
from sdconv.features.memory import MemoryForecast, Sink
from sdconv.features.reduction import Keep, Reduction, Region, copies_later, reduction
from sdconv.features.selection import Patterns, Steps, match_points, select_calls
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
    grad: bool = False,
    stop_early: bool = False,
    max_memory: int | str | None = None,
    store: str | Path | None = None,
) -> Iterator[Maps]:
    """Capture the feature maps at the hook points whose names match, while the block lasts.

    Each feature map is copied at once: later in-place operations do not show in the copy, and
    writing to the copy does not change the network's results. Captures and edits run in the order
    in which their blocks were entered: a capture shows what the edits around it have changed, not
    what those inside it change. They belong to the network, so calls from any thread count. What
    gradient checkpointing recomputes is not captured twice; networks compiled by ``torch.compile``
    run uncompiled inside the block, because compiled code calls no hooks; and the fast backend
    leaves a layer with a hook to the reference, from which it differs by rounding.

    Args:
        target: a network, any module, or a diffusers pipeline, in which names begin with the
            component's, such as ``unet.`` and ``vae.``.
        patterns, exclude: names or globs, in which ``*`` also matches dots;
            ``sdconv.features(target)`` lists the names.
        steps: the calls to capture: numbers from 0, a slice of them, or a predicate of the
            ``Call``. In a pipeline this selects calls of the networks that take a timestep.
        region: ``(top, left, bottom, right)`` as fractions of the feature map's height and width, 0
            to 1.
        channels: indices of the channels to keep, or a slice.
        reduce: ``"mean"``, ``"std"``, ``"max"`` over space, ``"pool:8"`` for means over an 8x8
            grid, ``"channel_mean"`` and so on over channels, ``"pca:3"``, or a function of the
            feature map.
        dtype, device: of the copies; None for the feature map's own. A value that is too large for
            float16 becomes infinite there, with a warning.
        grad: keep the feature maps in autograd's graph, so that a loss on them has gradients with
            respect to the network's inputs and weights, and its outputs have gradients with respect
            to them. A feature map that depends on nothing that requires a gradient becomes a leaf
            that does. What is reduced, cropped or moved is a function of the feature map, on
            which the outputs do not depend.
        stop_early: end the network, and with it the block, as soon as the last of ``steps`` is
            captured (the first call if ``steps`` is None).
        max_memory: bytes that captured maps may take in memory, or text such as ``"2GiB"``. A run
            that needs more and has no store is refused, before its first operation where that can
            be known.
        store: a folder to create, to which each feature map is written at once as a zarr array;
            what is complete stays readable if the process is killed. With a store, only
            ``max_memory`` bytes (0 if not given) are kept in memory.

    Yields:
        The captured maps, readable inside the block and after it.

    Raises:
        InputError: a pattern matches no name, an option has an invalid value, or the device does
            not exist.
        SdconvError: no layer of a pattern was reached; the maps need more than ``max_memory``; the
            store exists or cannot be written; streaming or tiling is on in an autoencoder, whose
            layers then see parts of an image.
    """
    found = target_of(target)
    points = found.hook_points()
    by_pattern = match_points(tuple(points), patterns, exclude)
    wanted = {name for names in by_pattern.values() for name in names}
    found.check_whole(name for name in points if name in wanted)
    if grad:
        _check_gradients(found, store)
    keep = Keep(
        grad=grad,
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
        # the caller's own function is not run on tensors without values
        if sink.limit is not None and store is None and not callable(reduce):
            forecast = MemoryForecast(found, wanted, keep, recorder.selected, sink.limit)
            for handle in forecast.attach():
                stack.callback(handle.remove)
        # in the order of the hook points: several of them may be hooks on one module
        for name, point in points.items():
            if name in wanted:
                visit = recorder.visit(name, found.prefix_of(point))
                stack.callback(attach(point, visit).remove)
        try:
            yield recorder.maps
        except _Stop as stop:
            if stop.recorder is not recorder:
                raise
    _check_reached(by_pattern, recorder.maps)


def _check_gradients(target: Target, store: str | Path | None) -> None:
    if store is not None:
        raise InputError(
            "gradients do not reach feature maps on the disk",
            where="grad and store",
            hint="leave store= or grad=True out",
        )
    for prefix, network in target.networks.items():
        if any(getattr(one, "gradient_checkpointing", False) is True for one in network.modules()):
            raise InputError(
                "gradient checkpointing computes feature maps twice, and forgets the first",
                where="grad",
                expected="a network without gradient checkpointing",
                got=f"{prefix.rstrip('.') or type(network).__name__} with gradient checkpointing",
                hint="call its disable_gradient_checkpointing() before the block",
            )


def run_until(model: Any, patterns: Patterns, *args: Any, **kwargs: Any) -> Maps:
    """Call ``model(*args, **kwargs)`` without gradients, no further than the last layer that
    matches.

    Returns:
        The captured maps, as from ``sdconv.capture``.

    Raises:
        InputError, SdconvError: as ``sdconv.capture``.
    """
    with torch.no_grad(), capture(model, patterns, stop_early=True) as maps:
        model(*args, **kwargs)
    return maps


class _Stop(BaseException):
    """Ends a network early; not an ``Exception``, so that the network's own handlers miss it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__("everything that a capture asked for has been computed")
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
        self.selected, last = select_calls(steps)
        if stop_early and steps is not None and last is None:
            raise InputError(
                "the last one of these calls is not known",
                where="stop_early",
                expected="steps as numbers, or as a slice that ends",
                got=steps,
            )
        self._last = (last or 0) if stop_early else None
        self._missing = set(names)
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._found: dict[str, list[CapturedMap]] = {}
        self._pipeline = target.pipeline is not None
        self.maps = Maps(self._found, pipeline=self._pipeline)
        self.counters = target.counters()

    def visit(self, name: str, prefix: str) -> Visit:
        counter = self.counters[prefix]
        every = self._pipeline and not counter.timed

        def record(x: Tensor) -> Tensor | None:
            if recomputing():
                return None
            new = None
            with self._lock:
                call = counter.current(name)
                if every or self.selected(call):
                    own = _tracked(x, name) if self._keep.grad else x
                    # the network goes on with a copy, because it may write into it
                    new = None if own is x else own.clone()
                    kept = own if self._keep.grad and self._keep.whole else self._keep(own, name)
                    if kept.shape[:1] != x.shape[:1]:  # a function has reduced the batch
                        call = call.without_halves()
                    load = self._sink.put(name, call, kept, _wait_for(x, kept))
                    self._found.setdefault(name, []).append(CapturedMap(name, call, load))
                if self._last is not None and (every or call.index >= self._last):
                    self._missing.discard(name)
                    if not self._missing and threading.get_ident() == self._thread:
                        raise _Stop(self)
            return new

        return record


def _tracked(x: Tensor, name: str) -> Tensor:
    """A copy of a feature map in autograd's graph; the feature map itself if it has no gradient
    by its dtype."""
    if not torch.is_grad_enabled() or x.is_inference():
        raise SdconvError(
            "no gradients are recorded here",
            where=name,
            expected="a call of the network with gradients enabled",
            got="torch.inference_mode()" if x.is_inference() else "torch.no_grad()",
            hint="call the network under torch.enable_grad(); diffusers' pipelines disable it",
        )
    if not x.is_floating_point():
        return x
    own = x.clone()
    return own if own.requires_grad else own.requires_grad_()


def _wait_for(x: Tensor, kept: Tensor) -> Callable[[], object]:
    """A function that returns once the copy ``kept`` of ``x`` is complete."""
    if not copies_later(x, kept.device):
        return lambda: None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(x.device))
    return event.synchronize


def _check_reached(by_pattern: Mapping[str, Sequence[str]], maps: Mapping[str, object]) -> None:
    for pattern, names in by_pattern.items():
        if not any(name in maps for name in names):
            raise SdconvError(
                "no layer that this matches was reached in a selected call",
                where=repr(pattern),
                expected=f"a call of the network that passes {names[0]}",
                hint="call the network inside the block, and check steps=",
            )
