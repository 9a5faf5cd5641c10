"""Edit feature maps: ``with sdconv.edit(network, {"mid_block": function})``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import Call, CallCounter
from sdconv.features.hooks import attach, uncompiled, untraced
from sdconv.features.selection import match_points
from sdconv.features.targets import target_of


@dataclass(frozen=True)
class Context:
    """Where and when an edited feature map was computed.

    Attributes:
        name: of its hook point.
        network_call: the call of the network.
    """

    name: str
    network_call: Call

    @property
    def step(self) -> int:
        """The number of the network's call, from 0, since the block was entered."""
        return self.network_call.index

    @property
    def timestep(self) -> float | tuple[float, ...] | None:
        """The timestep of a denoiser's call; a tuple if the samples of the batch have different
        ones; None for other networks."""
        return self.network_call.timestep

    def conditional(self, batch: int) -> slice:
        """The rows of a batch that follow the prompt; raises SdconvError if they are not known."""
        return self.network_call.rows("conditional", batch)

    def unconditional(self, batch: int) -> slice:
        """The rows of a batch that follow the negative prompt; raises SdconvError if there are none
        or they are not known."""
        return self.network_call.rows("unconditional", batch)


Change = Callable[[Tensor, Context], Tensor]


@untraced
@contextmanager
def edit(target: Any, changes: Mapping[str, Change]) -> Iterator[None]:
    """Replace feature maps by what functions make of them, while the block lasts.

    A function takes a feature map and its context and returns the new feature map, with the same
    shape, dtype and device. Its argument is a copy that it may write to. The tensor that it returns
    is copied too, because networks write into their feature maps. If several patterns match a hook
    point, their functions run in the order of the mapping; blocks act in the order in which they
    were entered.

    Args:
        target: a network, any module, or a diffusers pipeline, as for ``sdconv.capture``.
        changes: functions by names or globs, in which ``*`` also matches dots.

    Raises:
        InputError: a pattern matches no name, or there are no patterns.
        SdconvError: a function returned something else; no layer of a pattern was reached;
            streaming or tiling is on in an autoencoder, whose layers then see parts of an image.
    """
    found = target_of(target)
    points = found.hook_points()
    if not isinstance(changes, Mapping) or not all(map(callable, changes.values())):
        raise InputError(
            "not a mapping of edits",
            where="changes",
            expected="functions of a feature map and its context, by the names of layers",
            got=repr(changes),
        )
    by_pattern = match_points(tuple(points), tuple(changes))
    found.check_whole(name for names in by_pattern.values() for name in names)
    counters = found.counters()
    reached: set[str] = set()

    def visit(
        name: str, counter: CallCounter, functions: list[Change]
    ) -> Callable[[Tensor], Tensor]:
        def changed(x: Tensor) -> Tensor:
            reached.add(name)
            context = Context(name, counter.current(name))
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
            counter = counters[found.prefix_of(points[name])]
            stack.callback(attach(points[name], visit(name, counter, functions)).remove)
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
        "an edit must return a feature map like the one that it was given",
        where=name,
        expected=_described(old),
        got=_described(new) if isinstance(new, Tensor) else type(new).__name__,
    )


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)}, {x.dtype}, {x.device}"
