"""What modules gave, given again in place of computing it: ``with sdconv.features.reuse(unet,
"mid_block", steps=[1, 3])``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdconv.errors import SdconvError
from sdconv.features.calls import Call, Counter, Steps, selection
from sdconv.features.hooks import first_tensor, map_tensors, recomputing, uncompiled, untraced
from sdconv.features.patterns import Patterns, chosen
from sdconv.features.targets import target_of


@untraced
@contextmanager
def reuse(
    target: Any, patterns: Patterns, *, exclude: Patterns = (), steps: Steps
) -> Iterator[None]:
    """Lets modules give, in some calls of a network, what they gave when they last computed.

    In all other calls they compute as ever, and what they give is copied. They also compute where
    there is nothing to give yet, and where the first tensor that they are given has another shape,
    dtype or device than when they last computed. Captures and edits of a module's output act on
    what is given again as on what is computed; those of places inside it are not reached. What is
    given again carries no gradient.

    Args:
        target: a network, any module, or a diffusers pipeline, as for ``sdconv.capture``.
        patterns, exclude: names or globs of modules, in which ``*`` crosses dots; of a module that
            lies inside another one only the outer counts.
        steps: the calls in which nothing is computed: numbers from 0, a slice of them, or a
            function of the ``Call``, which is asked once for each call of a denoiser; None for all
            but the first.

    Raises:
        InputError: a pattern matches no module, or ``steps`` are none.
        SdconvError: a pattern's modules were never called.
    """
    found = target_of(target)
    modules = {
        name: place
        for name, place in found.places().items()
        if not place.before and ":" not in name
    }
    by_pattern = chosen(tuple(modules), patterns, exclude)
    named = {name for names in by_pattern.values() for name in names}
    outermost = {name for name in named if not any(map(named.__contains__, _around(name)))}
    counters = {
        prefix: _Steps(Counter(network, found.pipeline, denoiser=prefix == "unet."), steps)
        for prefix, network in found.networks.items()
    }
    reached: set[str] = set()
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for counter in counters.values():
            stack.callback(counter.counter.attach().remove)
        for name in outermost:
            counter = counters[found.network_of(modules[name])]
            put = Remembering(modules[name].module, _asked(counter, name, reached))
            stack.callback(put.remove)
        yield
    for pattern, names in by_pattern.items():
        if not any({name, *_around(name)} & reached for name in names):
            raise SdconvError(
                "no module that this matches was called",
                where=repr(pattern),
                expected=f"a call of the network that passes {names[0]}",
                hint="call the network inside the block",
            )


class Remembering:
    """Stands in front of a module's ``forward``, and gives again what it gave.

    Args:
        module: whose ``forward`` is taken over at once.
        again: asked at each call whether what is kept shall be given.
    """

    def __init__(self, module: nn.Module, again: Callable[[], bool]) -> None:
        self._module, self._again = module, again
        # offloading keeps a forward of its own there
        self._own: Callable[..., Any] | None = vars(module).get("forward")
        self._kept: tuple[object, Any] | None = None
        self._removed = False
        vars(module)["forward"] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed or recomputing():
            return self._forward(*args, **kwargs)
        given = _kind(first_tensor((args, kwargs)))
        if self._again() and self._kept is not None and self._kept[0] == given:
            return _copied(self._kept[1])
        output = self._forward(*args, **kwargs)
        # diffusers changes some outputs in place, of which the copy must not know
        self._kept = (given, _copied(output))
        return output

    def remove(self) -> None:
        """Leaves the module as it was, or as others have made it since."""
        self._removed, self._kept = True, None
        above = vars(self._module).get("forward")
        if above is self:
            del vars(self._module)["forward"]
            if self._own is not None:
                vars(self._module)["forward"] = self._own
        # blocks may end in any order; behind somebody else's, this one only passes calls on
        while isinstance(above, Remembering) and above._own is not self:
            above = above._own
        if isinstance(above, Remembering):
            above._own = self._own

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._own is not None:
            return self._own(*args, **kwargs)
        # looked up now: the patch changes a module's class
        return type(self._module).forward(self._module, *args, **kwargs)


class _Steps:
    """Whether a call is among those chosen, asked once for each call."""

    def __init__(self, counter: Counter, steps: Steps) -> None:
        self.counter = counter
        self._selected, _ = selection(steps)
        self._latest: tuple[Call, bool] | None = None

    def at(self, name: str) -> bool:
        call = self.counter.at(name)
        if self._latest is None or self._latest[0] is not call:
            self._latest = call, self._selected(call)
        return self._latest[1]


def _asked(steps: _Steps, name: str, reached: set[str]) -> Callable[[], bool]:
    def again() -> bool:
        reached.add(name)
        return steps.at(name)

    return again


def _around(name: str) -> Iterator[str]:
    """The names of the modules that a module may lie in."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _kind(x: Tensor | None) -> object:
    return None if x is None else (x.shape, x.dtype, x.device)


def _copied(value: Any) -> Any:
    """A copy in which tensors that were one still are one."""
    copies: dict[int, Tensor] = {}

    def copied(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone(memory_format=torch.preserve_format)
        return copies[id(x)]

    return map_tensors(value, copied)
