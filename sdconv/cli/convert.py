"""The command that writes weights in another layout: convert."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Family,
    Force,
    Json,
    Key,
    Layout,
    Paths,
    Prefix,
    StorageDtype,
    check_output,
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
            help="A name that ends in .safetensors for a single file. Any other name is that of a "
            "folder in diffusers' layout, with a subfolder for each component if there are "
            "several.",
            show_default=False,
        ),
    ],
    layout: Annotated[Layout, typer.Option(help="Whose names the tensors get.")],
    component: Annotated[
        str | None,
        typer.Option(
            metavar="vae|unet", help="vae or unet, to write only that one.", show_default=False
        ),
    ] = None,
    family: Family = None,
    dtype: StorageDtype = None,
    clamp: Annotated[
        bool,
        typer.Option(
            "--clamp",
            help="Let values beyond the range of --dtype become its largest finite one; they are "
            "an error otherwise.",
        ),
    ] = False,
    prefix: Prefix = None,
    key: Key = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write weights in another layout or dtype.

    The VAE and the U-Net are converted. Everything else in a file (text encoders, noise schedules,
    EMA copies) is carried over unchanged, so that converting there and back gives the same file.
    Scaled fp8 weights are multiplied by their scales and stored in float32, or in --dtype. A
    pipeline's folder becomes one file, with its CLIP text encoders in the original layout too.
    Tensors are copied one at a time; no file is held in memory. An output that exists is replaced
    with --force, once the new one is complete.

    \b
    Examples:
      sdconv convert v1-5-pruned-emaonly.safetensors v1-5-diffusers.safetensors --layout diffusers
      sdconv convert stable-diffusion-v1-5/ v1-5.safetensors --layout original --dtype float16
      sdconv convert v1-5-pruned-emaonly.safetensors v1-5/ --layout diffusers
      sdconv convert v1-5-pruned-emaonly.safetensors vae/ --layout diffusers --component vae
    """
    from sdconv.checkpoint.convert import convert as write
    from sdconv.checkpoint.io.pickles import weights_key
    from sdconv.loading import build

    check_output(out, force, paths)
    with reading("writing") as progress, weights_key(key):
        result = write(
            one_or_all(paths),
            out,
            layout.value,
            component,
            build=build,
            family=family,
            dtype=None if dtype is None else dtype.in_torch(),
            clamp=clamp,
            prefix=prefix,
            on_tensor=progress,
        )
    names = [str(file) for file in result.files]
    if result.dequantised:
        say(f"{result.dequantised} scaled fp8 weights were multiplied by their scales", "note")
    _note("carried over unchanged", result.carried)
    _note("left out, because what was asked for has no place for them", result.left_out)
    if as_json:
        print_json(
            {
                "files": names,
                "layout": result.layout,
                "dtype": ", ".join(result.dtypes),
                "moved": result.moved,
                "carried": result.carried,
                "left_out": result.left_out,
                "dequantised": result.dequantised,
            }
        )
        return
    for name in names:
        typer.echo(name)


def _note(what: str, counts: Mapping[str, int]) -> None:
    if counts:
        listed = ", ".join(f"{name or 'no prefix'} ({n})" for name, n in counts.items())
        say(f"tensors {what}: {listed}", "note")
