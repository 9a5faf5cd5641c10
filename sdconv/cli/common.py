"""What the commands share: their options, and what they print."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconv.cli.verbosity import is_quiet, is_verbose
from sdconv.errors import InputError
from sdconv.sizes import parse_size

if TYPE_CHECKING:
    import torch
    from rich.console import Console, RenderableType
    from rich.progress import ProgressColumn


class Dtype(StrEnum):
    """A floating-point dtype, by torch's name."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"

    def in_torch(self) -> torch.dtype:
        """torch's dtype of that name."""
        import torch

        dtype: torch.dtype = getattr(torch, self.value)
        return dtype


_SHORT_DTYPES = {
    "fp32": Dtype.float32,
    "fp16": Dtype.float16,
    "bf16": Dtype.bfloat16,
    "fp64": Dtype.float64,
}


def parse_dtype(text: str) -> Dtype:
    """A dtype by torch's name or the short one: ``float16`` or ``fp16``."""
    if text in _SHORT_DTYPES:
        return _SHORT_DTYPES[text]
    try:
        return Dtype(text)
    except ValueError:
        known = ", ".join([*Dtype, *_SHORT_DTYPES])
        raise typer.BadParameter(f"{text!r} is not one of {known}.") from None


class Backend(StrEnum):
    """The backend a network computes with; see `sdconv.backend`."""

    reference = "reference"
    fast = "fast"


class Layout(StrEnum):
    """A naming scheme for a checkpoint's tensors."""

    diffusers = "diffusers"
    original = "original"


_FILES = (
    "A file, a component's folder, a pipeline's folder, or several files of one network; or a "
    "name: tiny-vae, tiny-unet, or one that was fetched."
)
_DTYPES = "float32, float16, bfloat16 or float64; or fp32, fp16, bf16, fp64"

Paths = Annotated[list[Path], typer.Argument(metavar="PATH", help=_FILES, show_default=False)]
Model = Annotated[
    list[Path],
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="The weights: a file, a folder, or a name such as tiny-vae. Give it twice for two "
        "halves in two files.",
        show_default=False,
    ),
]
ModelOrSmall = Annotated[
    list[Path] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="PATH",
        help="The weights: a file, a folder, or a name; of two halves, twice.  Default: tiny-vae, "
        "the small VAE that ships.",
        show_default=False,
    ),
]
Component = Annotated[
    str | None,
    typer.Option(
        metavar="vae|unet", help="vae or unet, if the weights hold several.", show_default=False
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="The family, if the weights leave it open: sd1, sdxl, sd3, flux1, ...",
        show_default=False,
    ),
]
Prefix = Annotated[
    str | None,
    typer.Option(
        metavar="PREFIX",
        help="The beginning of the network's names, if a file has several copies of one: "
        "first_stage_model.",
        show_default=False,
    ),
]
_KEYS = "Which weights of a pickle that holds several: params_ema, model.state_dict, ..."
Key = Annotated[str | None, typer.Option("--key", metavar="NAME", help=_KEYS, show_default=False)]
# of the commands with --model; --key is the tensor's name in a file of latents there
ModelKey = Annotated[
    str | None, typer.Option("--model-key", metavar="NAME", help=_KEYS, show_default=False)
]
Ema = Annotated[
    bool,
    typer.Option(
        "--ema", help="Open the running averages of the weights that an original file may hold too."
    ),
]
Clamp = Annotated[
    bool,
    typer.Option(
        "--clamp",
        help="Let values beyond the range of --dtype become its largest finite one; they are an "
        "error otherwise.",
    ),
]
ComputeDtype = Annotated[
    Dtype,
    typer.Option(
        parser=parse_dtype, metavar="DTYPE", help=f"What the network computes in: {_DTYPES}."
    ),
]
StorageDtype = Annotated[
    Dtype | None,
    typer.Option(
        parser=parse_dtype,
        metavar="DTYPE",
        help="The dtype in which the converted networks are stored; their own if left out. "
        f"Tensors that are carried over keep theirs. {_DTYPES}.",
        show_default=False,
    ),
]
# of the commands that run autoencoders on images, and of `plan`, which plans for them
With = Annotated[
    Backend | None,
    typer.Option(
        help="The backend; reference gives the same bits as diffusers on a CPU. Default: fast, or "
        "reference on a CPU without Numba.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N.")]
ImageSize = Annotated[
    str,
    typer.Option(
        "--size", metavar="N|HxW", help="The image's rows and columns: 512x768, or 512 for both."
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="N|HxW",
        help="Rows and columns of the image or, for a U-Net, of the latents: 512x768, or 512 for "
        "both.",
        show_default=False,
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="N|HxW",
        help="Resize the image: 512 for the longer side, or 512x768 for rows and columns, cropped "
        "around the centre.",
        show_default=False,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw it: .png, .svg or .pdf (needs the extra: pip install 'sdconv[plot]').",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite an output that exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, nothing else.")]

LARGEST_SEED = 2**63 - 1
"""Of torch's generators."""


def parse_resize(text: str | None) -> int | tuple[int, int] | None:
    """``512`` as the longer side, ``512x768`` as (rows, columns), None for no resizing.

    Raises:
        InputError: another form.
    """
    if text is None:
        return None
    size = parse_size(text)
    return size if "x" in text.lower() else size[0]


def one_or_all(paths: Sequence[Path]) -> Path | list[Path]:
    """A single path, or the list of several files of one network."""
    return paths[0] if len(paths) == 1 else list(paths)


def check_output(out: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that is one of the inputs, or without ``force`` one that exists.

    An empty folder does not count as existing, since nothing in it can be overwritten.

    Args:
        out: the file or folder that will be written.
        force: whether the caller allows it to be overwritten.
        inputs: the files and folders that are read. They are never overwritten.

    Raises:
        InputError: the output is refused.
    """
    for one in inputs:
        within = out.is_dir() and out.resolve().is_relative_to(one.resolve())
        if within or (out.exists() and one.exists() and out.samefile(one)):
            raise InputError(
                "the output is one of the inputs, or a part of it",
                where=out,
                hint="give the output another name",
            )
    if force or not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    raise InputError(
        "exists already, and is not overwritten",
        where=out,
        hint="pass --force to overwrite it, or give the output another name",
    )


def printable(message: object) -> str:
    """A message with the characters a terminal would act upon written as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in str(message))


def say(message: object, kind: str) -> None:
    """Print one message on standard error: ``error: ...``, ``warning: ...``, ``note: ...``."""
    if kind != "note" or not is_quiet():
        typer.echo(f"{kind}: {printable(message)}", err=True)


def print_json(content: Mapping[str, Any]) -> None:
    """Print JSON on standard output; numbers that JSON lacks (infinity, NaN) become text."""
    typer.echo(json.dumps(_finite(content), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, tuple | list) else value


def show(report: RenderableType) -> None:
    """Print a table on standard output; lines are not wrapped unless that is a terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400
    console.print(report, soft_wrap=False)


def errors_console() -> Console:
    """A console on standard error, for progress."""
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def working(words: str) -> Iterator[None]:
    """A spinner on standard error while something takes long, if that is a terminal."""
    console = errors_console()
    with _timed(words):
        if shows_progress():
            with console.status(words):
                yield
        else:
            yield


@contextmanager
def _timed(words: str) -> Iterator[None]:
    """Say how long the block took, if asked to."""
    start = time.perf_counter()
    yield
    if is_verbose() and words:
        say(f"{words}: {time.perf_counter() - start:.2f} s", "note")


@contextmanager
def reading(words: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar in bytes on standard error, if that is a terminal.

    Yields:
        A function that advances it, called with a tensor's name, the bytes done so far and the
        bytes in all.
    """
    from rich.progress import DownloadColumn

    with _progress_bar(words, DownloadColumn()) as advance:
        yield advance


@contextmanager
def counting(words: str) -> Iterator[Callable[[str, float, float], None]]:
    """A progress bar in counted items on standard error, if that is a terminal.

    Yields:
        A function that advances it, called with a name, the number done so far and the number in
        all.
    """
    from rich.progress import MofNCompleteColumn

    with _progress_bar(words, MofNCompleteColumn()) as advance:
        yield advance


@contextmanager
def sharing(words: str) -> Iterator[Callable[[str, float, float], None]]:
    """A progress bar of a share of the work on standard error, if that is a terminal.

    Yields:
        A function that advances it, called with a name, the work done so far and all of it.
    """
    with _progress_bar(words) as advance:
        yield advance


def shows_progress() -> bool:
    """Whether progress is shown: on a terminal, unless that is not wanted."""
    return errors_console().is_terminal and not is_quiet()


@contextmanager
def _progress_bar(
    words: str, *done: ProgressColumn
) -> Iterator[Callable[[str, float, float], None]]:
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    if not shows_progress():
        with _timed(words):
            yield lambda name, done, total: None
        return
    console = errors_console()
    # how much is done, what share of all that is, and the time that is left
    columns = (TextColumn(words), BarColumn(), TaskProgressColumn(), *done, TimeRemainingColumn())
    with _timed(words), Progress(*columns, console=console) as progress:
        task = progress.add_task(words, total=None)
        yield lambda name, done, total: progress.update(task, completed=done, total=total)
