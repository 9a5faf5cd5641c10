"""Reuse modules' outputs instead of computing them: ``with sdconv.features.reuse(unet, "mid_block",
steps=[1, 3])``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.errors import SdconvError
from sdconv.features.calls import Call, CallCounter
from sdconv.features.forwards import ReplacedForward
from sdconv.features.hooks import first_tensor, map_tensors, recomputing, uncompiled, untraced
from sdconv.features.selection import Patterns, Steps, match_patterns, select_calls
from sdconv.features.targets import target_of


@untraced
@contextmanager
def reuse(
    target: Any, patterns: Patterns, *, exclude: Patterns = (), steps: Steps
) -> Iterator[None]:
    """Return modules' last computed outputs again in some calls of a network, instead of computing.

    In all other calls the modules compute, and their outputs are copied. They also compute if there
    is no output yet, or if their first tensor argument has another shape, dtype or device than when
    they last computed. Captures and edits of a module's output act on a reused output as on a
    computed one; hook points inside the module are not reached. Reused outputs carry no gradient.

    Args:
        target: a network, any module, or a diffusers pipeline, as for ``sdconv.capture``.
        patterns, exclude: names or globs of modules, in which ``*`` also matches dots; of nested
            modules only the outermost counts.
        steps: the calls in which outputs are reused: numbers from 0, a slice of them, or a
            predicate of the ``Call``, which is evaluated once for each call of a denoiser; None for
            all but the first.

    Raises:
        InputError: a pattern matches no module, or ``steps`` is invalid.
        SdconvError: no module of a pattern was called; streaming or tiling is on in an
            autoencoder.
    """
    found = target_of(target)
    modules = {
        name: point
        for name, point in found.hook_points().items()
        if not point.before and ":" not in name
    }
    by_pattern = match_patterns(tuple(modules), patterns, exclude)
    named = {name for names in by_pattern.values() for name in names}
    found.check_whole(name for name in modules if name in named)
    outermost = {name for name in named if not any(map(named.__contains__, _around(name)))}
    selected = {prefix: _Selected(counter, steps) for prefix, counter in found.counters().items()}
    reached: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for one in selected.values():
            stack.callback(one.counter.attach().remove)
        for name in outermost:
            one = selected[found.prefix_of(modules[name])]
            cached = CachedForward(modules[name].module, _is_reused(one, name, reached))
            stack.callback(cached.remove)
        yield
    for pattern, names in by_pattern.items():
        if not any({name, *_around(name)} & reached for name in names):
            raise SdconvError(
                "no module that this matches was called",
                where=repr(pattern),
                expected=f"a call of the network that passes {names[0]}",
                hint="call the network inside the block",
            )


class CachedForward(ReplacedForward):
    """Can return a module's last output again.

    Args:
        module: its ``forward`` is replaced at once.
        reused: asked at each call whether to return the last output.
    """

    def __init__(self, module: nn.Module, reused: Callable[[], bool]) -> None:
        super().__init__(module)
        self._reused = reused
        self._kept: tuple[object, Any] | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if recomputing():
            return self.original(*args, **kwargs)
        signature = _signature(first_tensor((args, kwargs)))
        if self._reused() and self._kept is not None and self._kept[0] == signature:
            return _copied(self._kept[1])
        output = self.original(*args, **kwargs)
        # a copy, because diffusers changes some outputs in place
        self._kept = (signature, _copied(output))
        return output

    def remove(self) -> None:
        super().remove()
        self._kept = None


class _Selected:
    """Whether the current call is selected, evaluated once for each call."""

    def __init__(self, counter: CallCounter, steps: Steps) -> None:
        self.counter = counter
        self._selected, _ = select_calls(steps)
        self._latest: tuple[Call, bool] | None = None

    def now(self, name: str) -> bool:
        call = self.counter.current(name)
        if self._latest is None or self._latest[0] is not call:
            self._latest = call, self._selected(call)
        return self._latest[1]


def _is_reused(selected: _Selected, name: str, reached: set[str]) -> Callable[[], bool]:
    def reused() -> bool:
        reached.add(name)
        return selected.now(name)

    return reused


def _around(name: str) -> Iterator[str]:
    """The names of the modules around a module."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _signature(x: Tensor | None) -> object:
    """What must be the same for an output to be reused: the input's shape, dtype and device."""
    return None if x is None else (x.shape, x.dtype, x.device)


def _copied(value: Any) -> Any:
    """A deep copy in which a tensor that occurs twice is copied once."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone(memory_format=torch.preserve_format)
        return copies[id(x)]

    return map_tensors(value, copied)
