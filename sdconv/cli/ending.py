"""How a command ends: with a message and an exit status, never with a traceback."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from sdconv.cli.common import say
from sdconv.cli.verbosity import is_verbose, reset
from sdconv.errors import SdconvError, SdconvWarning

TRACEBACK = "SDCONV_TRACEBACK"
"""The environment variable that lets an internal error show its traceback."""

_NO_MEMORY = re.compile("out of memory|can't allocate|not enough memory", re.IGNORECASE)
# arguments of the Python API whose option has another name
_RENAMED = {
    "memory_limit": "memory",
    "generator": "sample",
    "overwrite": "force",
    "key": "model_key",
}


class Commands(TyperGroup):
    """The group of all commands. It turns every error into a message and an exit status, 2 for bad
    input and 130 for an interruption, and prints each warning on one line."""

    def invoke(self, ctx: Any) -> Any:
        def one_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            words = in_option_names(str(message), self._options(ctx))
            say(" ".join(words.split()), "warning")

        with warnings.catch_warnings():
            warnings.simplefilter("always", SdconvWarning)
            warnings.showwarning = one_line
            reset()
            try:
                return super().invoke(ctx)
            except SdconvError as error:
                fail(in_option_names(str(error), self._options(ctx)))
            except KeyboardInterrupt:
                fail("interrupted; nothing half-written was kept", status=130)
            except BrokenPipeError:
                raise  # the reader of the output is gone: typer exits silently
            except OSError as error:
                fail(f"{error.filename or 'the system'}: {error.strerror or error}")
            except Exception as error:
                if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
                    from sdconv.analysis.memory import memory_hint

                    fail(SdconvError("not enough memory", hint=memory_hint(self._options(ctx))))
                if _is_typers_own(error) or TRACEBACK in os.environ or is_verbose():
                    raise
                fail(
                    SdconvError(
                        "an internal error of sdconv",
                        got=f"{type(error).__name__}: {error}",
                        hint="please report it, with the traceback that --verbose shows, or "
                        f"{TRACEBACK}=1",
                    ),
                    status=1,
                )

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Lists the commands in their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command is not None and not command.hidden:
                panel = getattr(command, "rich_help_panel", None)
                title = panel if isinstance(panel, str) else "Commands"
                groups.setdefault(title, []).append((name, command.get_short_help_str(100)))
        for title, rows in groups.items():
            with formatter.section(title):
                formatter.write_dl(rows)

    def _options(self, ctx: Any) -> dict[str, str]:
        """The running command's options: the argument's name -> ``--name``."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        return {
            parameter.name: parameter.opts[0]
            for parameter in (command.params if command else ())
            if parameter.name and parameter.opts[0].startswith("--")
        }


def fail(message: object, status: int = 2) -> NoReturn:
    """End the command with an error message."""
    say(message, "error")
    raise typer.Exit(status)


def in_option_names(message: str, options: Mapping[str, str]) -> str:
    """A message of the Python API, with its arguments named as a command's options are.

    ``family: ...`` at its beginning becomes ``--family: ...``, and ``pass family='sd1'`` becomes
    ``pass --family sd1``.

    Args:
        message: an error or a warning.
        options: the command's: the argument's name -> the option's. Others are left as they are.
    """
    renamed = {name: options[own] for name, own in _RENAMED.items() if own in options}
    for name, option in {**options, **renamed}.items():
        message = re.sub(rf"\A{name}(?=: )", option, message)
        message = re.sub(rf"\b{name}='([^']*)'", rf"{option} \1", message)
        message = re.sub(rf"\b{name}=True\b", option, message)
        message = re.sub(rf"\b{name}=(?=\w)", f"{option} ", message)
        message = re.sub(rf"\b{name}=(?!\S)", option, message)
    return message


def _is_typers_own(error: Exception) -> bool:
    """Whether an exception is how typer ends a command or reports wrong usage."""
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")
