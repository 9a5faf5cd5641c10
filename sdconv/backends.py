"""Which arithmetic the networks compute with: the one switch.

``reference`` is torch's own operations in diffusers' order: on a CPU in float32 the same bits.
``fast`` computes the same function by other means, within a stated error, in less time and memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

from sdconv.errors import InputError

BACKENDS = ("reference", "fast")
_NAME = "backend"

_here: ContextVar[str | None] = ContextVar("sdconv_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within it, in this thread, every network computes with this backend, whatever its own is.

    ::

        with sdconv.backend("fast"):
            picture = vae.decode(latents).sample

    What torch.compile compiled keeps the backend that it was compiled in.

    Raises:
        InputError: no such backend.
    """
    token = _here.set(checked(name))
    try:
        yield
    finally:
        _here.reset(token)


def set_backend(module: nn.Module, name: str) -> None:
    """Makes a backend the module's own, and its parts'.

    Raises:
        InputError: no such backend.
    """
    checked(name)
    for part in module.modules():
        if name == BACKENDS[0]:
            vars(part).pop(_NAME, None)
        else:
            vars(part)[_NAME] = name


def is_fast(module: nn.Module) -> bool:
    """Whether the module is to compute fast, here and now."""
    return (_in_force() or vars(module).get(_NAME)) == "fast"


def _in_force() -> str | None:
    return _here.get()


# What torch.compiler.assume_constant_result does, less its import of all of torch.compile, which
# cannot look into a ContextVar.
vars(_in_force)["_dynamo_marked_constant"] = True


def checked(name: Any) -> str:
    """The name of a backend.

    Raises:
        InputError: no such backend.
    """
    if name not in BACKENDS:
        raise InputError(
            "no such backend",
            where="backend",
            expected=" or ".join(map(repr, BACKENDS)),
            got=repr(name),
        )
    return str(name)
