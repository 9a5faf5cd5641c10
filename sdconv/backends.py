"""The two backends, the switch between them, and providers of modules of higher floors.

``reference`` runs the plain torch code of :mod:`sdconv.models`, which uses diffusers' operations in
diffusers' order: on a CPU in float32 the results are equal bit for bit. ``fast`` runs other
implementations of the same functions, within a stated error, in less time and memory.

How a call becomes fast: a method in :mod:`sdconv.models` is marked ``@dispatched``, and
:mod:`sdconv.fast` registers an implementation for it with ``@implements``. While the fast backend
is in force, the implementation is called first; it declines by returning None (an unusual input, a
layer with hooks), and then the plain method runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from sdconv.errors import InputError

if TYPE_CHECKING:  # `import sdconv` imports this module, and must not import torch
    from torch import nn

BACKENDS = ("reference", "fast")
_ATTRIBUTE = "backend"

Method = TypeVar("Method", bound=Callable[..., Any])

_in_context: ContextVar[str | None] = ContextVar("sdconv_backend", default=None)
# Functions that import a module of a higher floor, by its name here.
_providers: dict[str, Callable[[], Any]] = {}
_fast_is_loaded = False
# is called with each module whose dispatched function begins
_observer: Callable[[Any], None] | None = None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs every network in this thread on one backend, regardless of which it was loaded with.

    ::

        with sdconv.backend("fast"):
            image = vae.decode(latents).sample

    A network that torch.compile has compiled keeps the backend that it was compiled with.

    Args:
        name: ``"reference"`` or ``"fast"``.

    Raises:
        InputError: unknown backend.
    """
    token = _in_context.set(_ready(name))
    try:
        yield
    finally:
        _in_context.reset(token)


def set_backend(module: nn.Module, name: str) -> None:
    """Sets the backend of a module and of all modules inside it.

    On CUDA, the weights of convolutions that are to run on the fast backend are converted to
    channels-last order in place, and back for the reference; their values stay.

    Raises:
        InputError: unknown backend.
    """
    _ready(name)
    for part in module.modules():
        if name == BACKENDS[0]:
            vars(part).pop(_ATTRIBUTE, None)
        else:
            vars(part)[_ATTRIBUTE] = name
    if _fast_is_loaded:
        provided("fast").arrange_weights(module, name == "fast")


def is_fast(module: nn.Module) -> bool:
    """Whether the fast backend is in force for a module: by the context, or by its own backend."""
    own = module.__dict__  # torch.compile traces no vars() before torch 2.7
    return (_from_context() or own.get(_ATTRIBUTE)) == "fast"


def own_backend(module: nn.Module) -> str:
    """A module's own backend, which counts outside ``with sdconv.backend(...)``."""
    return str(vars(module).get(_ATTRIBUTE, BACKENDS[0]))


def _from_context() -> str | None:
    return _in_context.get()


# torch.compile cannot trace a ContextVar. This is what torch.compiler.assume_constant_result sets,
# without importing all of torch.compile.
vars(_from_context)["_dynamo_marked_constant"] = True


def check_backend(name: Any) -> str:
    """Returns the name of a backend.

    Raises:
        InputError: unknown backend.
    """
    if name not in BACKENDS:
        raise InputError(
            "unknown backend",
            where="backend",
            expected=" or ".join(map(repr, BACKENDS)),
            got=repr(name),
        )
    return str(name)


def provide(name: str, provider: Callable[[], Any]) -> None:
    """Sets the function that imports ``"fast"`` or ``"diffusers"``, modules of higher floors.

    ``sdconv/__init__.py`` calls it, and is imported before any module of the package.
    """
    _providers[name] = provider


def provided(name: str) -> Any:
    """Imports a module of a higher floor: ``"fast"``, which registers its implementations, or
    ``"diffusers"``, :mod:`sdconv.integrations.diffusers`."""
    import torch

    with torch.device("cpu"):  # torch 2.6 cannot import its compiler with "meta" as the default
        return _providers[name]()


@contextmanager
def observing(observer: Callable[[Any], None]) -> Iterator[None]:
    """Calls ``observer`` with each module whose ``dispatched`` function begins, in this block and
    in every thread. Unlike a hook, it leaves the choice of the backend as it is."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


def begins(module: Any) -> None:
    """Reports that a module is about to be computed without its dispatched function."""
    if _observer is not None:
        _observer(module)


def dispatched(plain: Method) -> Method:
    """Marks a function whose first argument is a module, such as a ``forward``, as one that the
    fast backend may implement. The plain function stays available as ``.__wrapped__``."""
    fast: Callable[..., Any] | None = None

    @functools.wraps(plain)
    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        begins(module)
        if is_fast(module):
            if not _fast_is_loaded:  # the module was unpickled with its backend
                _load_fast()
            if fast is not None:
                out = fast(module, *args, **kwargs)
                if out is not None:
                    return out
        return plain(module, *args, **kwargs)

    def register(implementation: Callable[..., Any]) -> None:
        nonlocal fast
        fast = implementation

    vars(call)["register"] = register
    return call  # type: ignore[return-value]


def implements(function: Callable[..., Any]) -> Callable[[Method], Method]:
    """Registers the fast implementation of a ``dispatched`` function.

    The implementation takes the same arguments and returns None to decline, which it decides before
    it changes anything.
    """

    def register(implementation: Method) -> Method:
        vars(function)["register"](implementation)
        return implementation

    return register


def _ready(name: str) -> str:
    """Checks a backend's name and imports its implementations, which torch.compile cannot trace."""
    if check_backend(name) == "fast" and not _fast_is_loaded:
        _load_fast()
    return name


def _load_fast() -> None:
    global _fast_is_loaded
    provided("fast")
    _fast_is_loaded = True
