"""Feature maps changed as they pass: ``with sdconv.edit(network, {"mid_block": function})``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import Call, Counter
from sdconv.features.hooks import attach, uncompiled, untraced
from sdconv.features.patterns import chosen
from sdconv.features.targets import target_of


@dataclass(frozen=True)
class Context:
    """Where an edited map is from. ``name``: of its place."""

    name: str
    of: Call

    @property
    def step(self) -> int:
        """Which call of the network it is, from 0, since the block was entered."""
        return self.of.index

    @property
    def timestep(self) -> float | tuple[float, ...] | None:
        """What a denoiser was told, one number for each picture if they differ; else None."""
        return self.of.timestep

    def conditional(self, batch: int) -> slice:
        """The rows of a batch that follow the prompt; raises SdconvError if that is not known."""
        return self.of.rows("conditional", batch)

    def unconditional(self, batch: int) -> slice:
        """The rows that follow the negative prompt; raises SdconvError if there are none or it is
        not known which."""
        return self.of.rows("unconditional", batch)


Change = Callable[[Tensor, Context], Tensor]


@untraced
@contextmanager
def edit(target: Any, changes: Mapping[str, Change]) -> Iterator[None]:
    """Puts what functions make of a network's maps in their place, as long as the block lasts.

    A function gets a map and its context and gives the new map, of the same shape, dtype and
    device. It may write into the one that it is given, a copy of its own, and give a tensor that it
    keeps: that is copied too, as networks write into their maps. Where several patterns match a
    place their functions follow one another in the mapping's order; blocks act in the order in
    which they were entered.

    Args:
        target: a network, any module, or a diffusers pipeline, as for ``sdconv.capture``.
        changes: functions by names or globs, in which ``*`` crosses dots.

    Raises:
        InputError: a pattern matches no name, or there are none.
        SdconvError: a function gave something else than such a map; a pattern's layers were never
            reached.
    """
    found = target_of(target)
    places = found.places()
    if not isinstance(changes, Mapping) or not all(map(callable, changes.values())):
        raise InputError(
            "these are no edits",
            where="changes",
            expected="functions of a map and its context, by the names of layers",
            got=repr(changes),
        )
    by_pattern = chosen(tuple(places), tuple(changes))
    counters = {
        prefix: Counter(network, found.pipeline, denoiser=prefix == "unet.")
        for prefix, network in found.networks.items()
    }
    reached: set[str] = set()

    def visit(name: str, counter: Counter, functions: list[Change]) -> Callable[[Tensor], Tensor]:
        def changed(x: Tensor) -> Tensor:
            reached.add(name)
            context = Context(name, counter.at(name))
            for function in functions:
                own = x.clone()
                new = _checked(x, function(own, context), name)
                x = new if new is own else new.clone()
            return x

        return changed

    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        for counter in counters.values():
            stack.callback(counter.attach().remove)
        for name in dict.fromkeys(name for names in by_pattern.values() for name in names):
            functions = [changes[pattern] for pattern, names in by_pattern.items() if name in names]
            counter = counters[found.network_of(places[name])]
            stack.callback(attach(places[name], visit(name, counter, functions)).remove)
        yield
    for pattern, names in by_pattern.items():
        if not reached.intersection(names):
            raise SdconvError(
                "no layer that this matches was reached",
                where=repr(pattern),
                expected=f"a call of the network that passes {names[0]}",
                hint="call the network inside the block",
            )


def _checked(old: Tensor, new: object, name: str) -> Tensor:
    if isinstance(new, Tensor):
        same = (new.shape, new.dtype, new.device) == (old.shape, old.dtype, old.device)
        if same:
            return new
    raise SdconvError(
        "an edit gave something else than a map like the one it was given",
        where=name,
        expected=_described(old),
        got=_described(new) if isinstance(new, Tensor) else type(new).__name__,
    )


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)}, {x.dtype}, {x.device}"
