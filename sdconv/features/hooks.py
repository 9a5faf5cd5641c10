"""Hooks at hook points: a function that is called with each feature map, and may replace it."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sdconv.errors import SdconvError
from sdconv.features.attention import ProbabilityHandle, Visit
from sdconv.features.hook_points import HookPoint

Function = TypeVar("Function", bound=Callable[..., object])


class Handle(Protocol):
    """Removes a hook."""

    def remove(self) -> None: ...


def attach(point: HookPoint, visit: Visit) -> Handle:
    """Call ``visit`` with the feature map whenever a call passes a hook point; if it returns a
    tensor, that replaces the feature map."""
    if point.kind == "probs":
        return ProbabilityHandle(point.module, point.name, visit)
    if point.before:

        def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
            return _visited((args, kwargs), point.channels, visit)

        return point.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, __: Any, output: Any) -> Any:
        # of the VAE's attention
        channels_first = isinstance(module, nn.GroupNorm) and output.ndim == 3
        seen = _as_tokens(visit) if channels_first else visit
        return _visited(output, point.channels, seen)

    return point.module.register_forward_hook(after)


def _as_tokens(visit: Visit) -> Visit:
    """A function of ``(B, C, N)`` that visits the tokens ``(B, N, C)``."""

    def transposed(x: Tensor) -> Tensor | None:
        tokens = x.transpose(1, 2)
        new = visit(tokens)
        return None if new is None or new is tokens else new.transpose(1, 2)

    return transposed


def _visited(value: Any, channels: slice | None, visit: Visit) -> Any:
    """``value`` with its first tensor replaced by ``visit``; None if it stays the same."""
    whole = first_tensor(value)
    if whole is None:
        return None
    part = whole if channels is None else whole[:, channels]
    new = visit(part)
    if new is None or new is part:
        return None
    if channels is not None:
        rest = (whole[:, : channels.start], whole[:, channels.stop :])
        new = torch.cat([rest[0], new] if channels.stop is None else [new, rest[1]], dim=1)
    return _with_first(value, new)[0]


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in a tensor, tuple, list, dictionary or dataclass, depth first."""
    if isinstance(value, Tensor):
        return value
    return next((found for one in _items(value) if (found := first_tensor(one)) is not None), None)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``function`` applied to each tensor in tuples, lists, dictionaries and
    dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    items = [map_tensors(item, function) for item in _items(value)]
    return _rebuilt(value, items) if items else value


def _with_first(value: Any, new: Tensor) -> tuple[Any, bool]:
    """``value`` with its first tensor replaced by ``new``, and whether it has one."""
    if isinstance(value, Tensor):
        return new, True
    items: list[Any] = []
    done = False
    for item in _items(value):
        if not done:
            item, done = _with_first(item, new)
        items.append(item)
    return (_rebuilt(value, items), True) if done else (value, False)


def _items(value: Any) -> Iterator[Any]:
    # outputs of diffusers and transformers are both dataclasses and dictionaries
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in dataclasses.fields(value))
    elif isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, tuple | list):
        yield from value


def _rebuilt(value: Any, items: list[Any]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(value, **dict(zip(names, items, strict=True)))
    if isinstance(value, Mapping):
        return dict(zip(value, items, strict=True))
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def recomputing() -> bool:
    """Whether gradient checkpointing is recomputing a part of the network in the backward pass."""
    return torch._C._current_graph_task_id() != -1


OUTSIDE = "put its block around the call of the compiled function"
"""The hint for a capture or an edit inside compiled code."""


def untraced(function: Function) -> Function:
    """Exclude a function from ``torch.compile``, with the message ``OUTSIDE`` under ``fullgraph``.

    The same as ``torch.compiler.disable``, which would import the compiler.
    """
    vars(function).update(_torchdynamo_disable=True, _torchdynamo_disable_msg=OUTSIDE)
    return function


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled functions as plain Python inside the block: compiled code calls no hooks.

    Raises:
        SdconvError: the block is entered in code that is being compiled.
    """
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    with _EAGER.lock:
        if _EAGER.users == 0:
            try:
                _EAGER.stance = torch.compiler.set_stance("force_eager")
            except RuntimeError as error:  # set_stance is not allowed in compiled code
                raise SdconvError(
                    "a capture or an edit cannot begin in code that torch.compile compiles",
                    hint=OUTSIDE,
                ) from error
        _EAGER.users += 1
    try:
        yield
    finally:
        with _EAGER.lock:
            _EAGER.users -= 1
            if _EAGER.users == 0:
                _EAGER.stance.__exit__(None, None, None)


class _Eager:
    """The number of open blocks that need the stance; they may close in any order."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.stance: Any = None


_EAGER = _Eager()
