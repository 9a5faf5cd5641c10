"""The commands. They parse, call and print; the rest of the package computes."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

import sdconv
from sdconv.cli import (
    anatomy,
    bench,
    compare,
    convert,
    explain_page,
    features,
    images,
    plan,
    weights,
)
from sdconv.cli.ending import Commands

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    weights.inspect,
    weights.check,
    convert.convert,
    compare.diff,
    images.encode,
    images.decode,
    images.reconstruct,
    weights.fetch,
    anatomy.anatomy,
    plan.plan,
    bench.bench,
    features.features,
    explain_page.explain_page,
):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sdconv {sdconv.__version__}")
        raise typer.Exit


@app.callback()
def sdconv_(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """The convolutional networks of Stable Diffusion, opened from any checkpoint, offline.

    Every command takes --json (JSON on standard output and nothing else) and --help (with
    examples). Commands that write refuse to overwrite unless --force is given. Notes, warnings,
    errors and progress go to standard error.

    Exit status: 0 success, 1 the answer is no (a difference beyond the tolerance, NaN among the
    weights, missing tensors), 2 bad input, 130 interrupted.
    """


def main() -> None:
    """Entry point of the ``sdconv`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where a terminal lacks a character
    app(prog_name="sdconv")
