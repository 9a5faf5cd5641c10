"""How much the commands say on standard error: ``--quiet`` and ``--verbose``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, Any, get_type_hints

import typer

from sdconv.errors import InputError

_level: ContextVar[int] = ContextVar("verbosity", default=0)

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say nothing but warnings and errors: no progress.")
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Say how long each step takes, and show tracebacks."),
]


def is_quiet() -> bool:
    """Whether notes and progress are hidden."""
    return _level.get() < 0


def is_verbose() -> bool:
    """Whether each step's time is reported."""
    return _level.get() > 0


def reset() -> None:
    """Returns to saying neither less nor more, for a process that runs several commands."""
    _level.set(0)


def with_verbosity(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options ``--quiet`` and ``--verbose``, which hold while it runs."""

    @functools.wraps(command)
    def run(*args: Any, quiet: bool = False, verbose: bool = False, **kwargs: Any) -> None:
        if quiet and verbose:
            raise InputError("these exclude each other", where="--quiet and --verbose")
        _level.set(int(verbose) - int(quiet))
        command(*args, **kwargs)

    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    own = [one.replace(annotation=hints[one.name]) for one in signature.parameters.values()]
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose))
    ]
    vars(run)["__signature__"] = signature.replace(parameters=[*own, *added])
    run.__annotations__ = {**hints, "quiet": Quiet, "verbose": Verbose}
    return run
