"""The command that writes weights in another layout: convert."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Clamp,
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


class Averages(StrEnum):
    """What to do with running averages."""

    only = "only"
    drop = "drop"
    keep = "keep"


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
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Whose names the tensors get; as it is if only --dtype, --ema or --prune is "
            "given.",
            show_default=False,
        ),
    ] = None,
    component: Annotated[
        str | None,
        typer.Option(
            metavar="vae|unet", help="vae or unet, to write only that one.", show_default=False
        ),
    ] = None,
    family: Family = None,
    dtype: StorageDtype = None,
    clamp: Clamp = False,
    prefix: Prefix = None,
    key: Key = None,
    ema: Annotated[
        Averages | None,
        typer.Option(
            help="What becomes of running averages of the weights (model_ema.*): keep carries them "
            "over, drop leaves them out, only writes them in the place of the weights.  Default: "
            "keep, or drop with --prune.",
            show_default=False,
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Leave out what only training needs: running averages, losses, optimizer states.",
        ),
    ] = False,
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
      sdconv convert training.ckpt small.safetensors --prune --ema only --dtype float16
    """
    from sdconv.checkpoint.convert import convert as write
    from sdconv.checkpoint.io.pickles import weights_key
    from sdconv.loading import build

    if layout is None and dtype is None and ema is None and not prune:
        raise typer.BadParameter(
            "Missing option '--layout', or another one that says what to change."
        )
    check_output(out, force, paths)
    with reading("writing") as progress, weights_key(key):
        result = write(
            one_or_all(paths),
            out,
            None if layout is None else layout.value,
            component,
            build=build,
            family=family,
            dtype=None if dtype is None else dtype.in_torch(),
            clamp=clamp,
            prefix=prefix,
            ema=None if ema is None else ema.value,
            prune=prune,
            on_tensor=progress,
        )
    names = [str(file) for file in result.files]
    if result.dequantised:
        say(f"{result.dequantised} scaled fp8 weights were multiplied by their scales", "note")
    if result.averaged:
        kept = [name for name in result.moved if name not in result.averaged]
        rest = f"; without averages: {', '.join(kept)}" if kept else ""
        say(f"the weights are the running averages: {', '.join(result.averaged)}{rest}", "note")
    if result.rounded:
        short = ", ".join(result.dtypes)
        say(f"the values of {result.rounded} tensors were rounded to {short}", "note")
    if component is not None:
        say(f"only the {component} was written", "note")
    _note("left out on request", result.pruned)
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
                "pruned": result.pruned,
                "averaged": result.averaged,
                "rounded": result.rounded,
            }
        )
        return
    for name in names:
        typer.echo(name)


def _note(what: str, counts: Mapping[str, int]) -> None:
    if counts:
        listed = ", ".join(f"{name or 'no prefix'} ({n})" for name, n in counts.items())
        say(f"tensors {what}: {listed}", "note")
