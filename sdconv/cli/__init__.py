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
    dataset,
    explain_page,
    export,
    features,
    images,
    merging,
    plan,
    weights,
)
from sdconv.cli.ending import Commands
from sdconv.cli.verbosity import with_verbosity

__all__ = ["app", "main"]

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = {
    "Weights": (
        weights.inspect,
        weights.check,
        convert.convert,
        export.export,
        merging.merge_lora,
        merging.extract_lora,
        merging.average,
        compare.diff,
        weights.fetch,
    ),
    "Images": (images.encode, images.decode, images.reconstruct),
    "Inside a network": (anatomy.anatomy, features.features, explain_page.explain_page),
    "Speed and memory": (plan.plan, bench.bench),
}
"""The commands, in the groups that ``sdconv --help`` shows."""

for group, commands in COMMANDS.items():
    for command in commands:
        app.command(rich_help_panel=group)(with_verbosity(command))
app.add_typer(dataset.app, name="dataset", rich_help_panel="Data sets")


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

    Every command takes --json (JSON on standard output and nothing else), --quiet (no notes, no
    progress), --verbose (the time of each step, and tracebacks) and --help (with examples).
    Commands that write refuse to overwrite unless --force is given. Notes, warnings,
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
