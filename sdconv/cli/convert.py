"""The command that writes weights in another layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Dtype,
    Family,
    Json,
    Layout,
    Paths,
    not_an_input,
    one_or_all,
    print_json,
    reading,
    say,
)


def convert(
    paths: Paths,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="A name ending in .safetensors for a file, any other for a folder as diffusers "
            "keeps a component, or several in folders of their own.",
            show_default=False,
        ),
    ],
    layout: Annotated[Layout, typer.Option(help="Whose names the tensors get.")],
    component: Annotated[
        str | None,
        typer.Option(help="vae or unet, to write that one alone.", show_default=False),
    ] = None,
    family: Family = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="What the weights of the components that move are stored in; as they are if not "
            "given. What is carried over stays as it is."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write weights in another layout or dtype.

    VAE and U-Net move between the layouts; what else a file holds (text encoders, noise schedules,
    EMA copies) is carried over untouched, and there and back again gives the same file. A
    pipeline's folder becomes one file, its CLIP text encoders in the original layout too. Tensors
    are copied one after another: no file is held in memory. What is at OUT is replaced, once the
    new one is complete.

    \b
    Examples:
      sdconv convert v1-5-pruned-emaonly.safetensors v1-5-diffusers.safetensors --layout diffusers
      sdconv convert stable-diffusion-v1-5/ v1-5.safetensors --layout original --dtype float16
      sdconv convert v1-5-pruned-emaonly.safetensors v1-5/ --layout diffusers
      sdconv convert v1-5-pruned-emaonly.safetensors vae/ --layout diffusers --component vae
    """
    from sdconv.checkpoint.convert import convert as write
    from sdconv.loading import build

    not_an_input(out, paths)
    with reading("writing") as progress:
        result = write(
            one_or_all(paths),
            out,
            layout.value,
            component,
            build=build,
            family=family,
            dtype=None if dtype is None else dtype.in_torch(),
            on_tensor=progress,
        )
    names = [str(file) for file in result.files]
    _note("carried over as they were", result.carried)
    _note("left out, for which these folders have no place", result.left_out)
    if as_json:
        print_json(
            {
                "files": names,
                "layout": result.layout,
                "dtype": ", ".join(result.dtypes),
                "moved": result.moved,
                "carried": result.carried,
                "left_out": result.left_out,
            }
        )
        return
    for name in names:
        typer.echo(name)


def _note(what: str, counts: Mapping[str, int]) -> None:
    if counts:
        listed = ", ".join(f"{name or 'no prefix'} ({n})" for name, n in counts.items())
        say(f"tensors {what}: {listed}", "note")
