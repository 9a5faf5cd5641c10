"""What every command shares: options, where it prints, and how it ends."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from sdconv.errors import InputError, SdconvError, SdconvWarning

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType


class Dtype(StrEnum):
    """What a network computes in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"

    def in_torch(self) -> torch.dtype:
        """torch's dtype of that name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


class Backend(StrEnum):
    """Which arithmetic a network computes with; see `sdconv.backend`."""

    reference = "reference"
    fast = "fast"


FOR_PICTURES = Backend.fast
"""What the commands that make pictures compute with unless told, and what is planned for them."""


class Layout(StrEnum):
    """Whose names a file's tensors have."""

    diffusers = "diffusers"
    original = "original"


_FILES = "A file, a component's folder, a pipeline's folder, or several files of one network."

Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help=_FILES, show_default=False)]
Model = Annotated[
    list[Path],
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="The weights: a file or a folder. Give it twice for two halves in two files.",
        show_default=False,
    ),
]
Component = Annotated[
    str | None, typer.Option(help="vae or unet, where there are several.", show_default=False)
]
Family = Annotated[
    str | None,
    typer.Option(
        help="The family, where the weights leave it open: sd1, sdxl, sd3, flux1, ...",
        show_default=False,
    ),
]
With = Annotated[
    Backend,
    typer.Option(help="What it computes with; reference gives diffusers' numbers to the last bit."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, nothing else.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FILE", help="A file that is there is replaced.")
]


LARGEST_SEED = 2**63 - 1
"""Of torch's generators."""


def text_of(value: object) -> str:
    """What is printed of a message: characters that a terminal would act upon are written out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(value))


def say(words: object, kind: str) -> None:
    """One message on standard error: ``error: ...``, ``warning: ...``, ``note: ...``."""
    typer.echo(f"{kind}: {text_of(words)}", err=True)


def print_json(content: Mapping[str, Any]) -> None:
    """JSON on standard output; numbers that JSON has not (infinity, NaN) become text."""
    typer.echo(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, tuple | list) else value


def show(report: RenderableType) -> None:
    """A table on standard output; whole lines where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400
    console.print(report, soft_wrap=False)


def errors_console() -> Console:
    """Standard error, for progress."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def working(words: str) -> Iterator[None]:
    """A spinner on standard error while something takes long, if that is a terminal."""
    console = errors_console()
    if not console.is_terminal:
        yield
        return
    with console.status(words):
        yield


@contextmanager
def reading(words: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if that is a terminal; gives what to call with (name, done, all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = errors_console()
    columns = (TextColumn(words), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=None)
        yield lambda name, done, total: progress.update(task, completed=done, total=total)


def one_or_all(paths: Sequence[Path]) -> Path | list[Path]:
    """A single path, or the list of several files of one network."""
    return paths[0] if len(paths) == 1 else list(paths)


# by the option's name
_LESS = {
    "memory": "work in strips (--memory 2GiB, and --spill FOLDER for what does not fit)",
    "size": "name a smaller --size",
    "dtype": "compute in a narrower --dtype",
}


def less_memory(options: Iterable[str]) -> str | None:
    """How to go on with too little memory, by those of a command's options that help; None without
    any."""
    given = set(options)
    return ", or ".join(words for option, words in _LESS.items() if option in given) or None


def not_an_input(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses an output that is one of the inputs, or a folder that is there in one of them.

    Raises:
        InputError: it is.
    """
    for one in inputs:
        within = out.is_dir() and out.resolve().is_relative_to(one.resolve())
        if within or (out.exists() and one.exists() and out.samefile(one)):
            raise InputError(
                "the output is one of the inputs, or a part of it",
                where=out,
                hint="give the output another name",
            )


class Commands(TyperGroup):
    """Ends every command with a message and an exit status, never with a traceback for what the
    caller can mend: 2 for bad input, 130 for an interruption. Warnings become a line each."""

    def invoke(self, ctx: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("always", SdconvWarning)
            warnings.showwarning = _one_line
            try:
                return super().invoke(ctx)
            except SdconvError as error:
                fail(error)
            except KeyboardInterrupt:
                fail("interrupted; nothing half-written was kept", status=130)
            except BrokenPipeError:
                raise  # whoever read the output has gone: typer ends in silence
            except OSError as error:
                fail(f"{error.filename or 'the system'}: {error.strerror or error}")
            except (MemoryError, RuntimeError) as error:
                if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
                    raise
                command = self.get_command(ctx, ctx.invoked_subcommand)
                options = [option.name for option in command.params] if command else []
                fail(SdconvError("not enough memory", hint=less_memory(options)))


_NO_MEMORY = re.compile("out of memory|can't allocate|not enough memory", re.IGNORECASE)


def fail(words: object, status: int = 2) -> NoReturn:
    """Ends the command with a message on standard error."""
    say(words, "error")
    raise typer.Exit(status)


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(" ".join(str(message).split()), "warning")
