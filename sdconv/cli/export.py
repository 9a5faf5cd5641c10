"""The command that writes half of an autoencoder for another runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdconv.cli.common import (
    Clamp,
    Component,
    ComputeDtype,
    Dtype,
    Ema,
    Family,
    Force,
    Json,
    Key,
    Paths,
    Prefix,
    check_output,
    print_json,
    sharing,
    shows_progress,
    working,
)
from sdconv.cli.running import RunOptions, open_autoencoder
from sdconv.errors import InputError
from sdconv.sizes import parse_size

if TYPE_CHECKING:
    from sdconv.models.base import Autoencoder


class Half(StrEnum):
    """A half of an autoencoder."""

    encoder = "encoder"
    decoder = "decoder"


def export(
    paths: Paths,
    half: Annotated[Half, typer.Option(help="Which half.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="The file to write: .onnx, or .xml for OpenVINO (with a .bin next to it).",
            show_default=False,
        ),
    ],
    size: Annotated[
        str,
        typer.Option(
            metavar="N|HxW|any",
            help="The image's rows and columns: 512x768, or 512 for both; or any, and any number.",
        ),
    ] = "512x512",
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Number of images of that size; 1 without.", show_default=False
        ),
    ] = None,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write half of an autoencoder for ONNX Runtime or OpenVINO.

    The graph takes inputs of one shape, images of --size or their latents; with --size any, any
    number of them of any size that is a multiple of the downscale factor. It is run after it has
    been written, on random input (for any size, at two), and the largest difference from torch is
    printed. The encoder gives mean and log-variance, stacked; a tiny autoencoder's gives latents.
    Needs the extra: pip install 'sdconv[export]'.

    \b
    Examples:
      sdconv export tiny-vae --half decoder --out decoder.onnx
      sdconv export vae.safetensors --half encoder --size 512x768 --out encoder.onnx
      sdconv export vae.safetensors --half decoder --size any --out decoder.xml
    """
    from sdconv.integrations.export import check_export_path, export_half

    sides = None if size == "any" else parse_size(size)
    if sides is None and batch is not None:
        raise InputError(
            "a graph for any size takes any number of images",
            where="--batch",
            hint="leave --batch out, or give a --size like 512x768",
        )
    suffix = check_export_path(out)
    for file in [out] if suffix == ".onnx" else [out, out.with_suffix(".bin")]:
        check_output(file, force, paths)
    options = RunOptions(
        component=component,
        family=family,
        prefix=prefix,
        key=key,
        ema=ema,
        dtype=dtype,
        clamp=clamp,
        device="cpu",
    )
    network = open_autoencoder(paths, options)
    with _stages(network, half, sides) as begin:
        found = export_half(network, half.value, out, size=sides, batch=batch or 1, on_stage=begin)
    if as_json:
        print_json(
            {
                "files": [str(file) for file in found.files],
                "half": half.value,
                "size": sides,
                "input": {"name": found.input[0], "shape": found.input[1]},
                "output": {"name": found.output[0], "shape": found.output[1]},
                "difference": found.difference,
            }
        )
        return
    takes, gives = (
        f"{name} {' x '.join('any' if side is None else str(side) for side in shape)}"
        for name, shape in (found.input, found.output)
    )
    checked = "not run: ONNX Runtime is missing"
    if found.difference is not None:
        checked = f"differs from torch by at most {found.difference:.1e} of the largest value"
    typer.echo(f"{out}: {takes} to {gives}; {checked}")


@contextmanager
def _stages(
    network: Autoencoder, half: Half, sides: tuple[int, int] | None
) -> Iterator[Callable[[str], None]]:
    """A progress bar; yields a function to call with the name of each stage that begins."""
    if not shows_progress():
        with working("exporting"):
            yield lambda name: None
        return
    from sdconv.analysis.progress import Stages, following
    from sdconv.integrations.export import STAGES

    side = 8 * network.downscale  # which shares of the work hardly depend on
    path = half.value.removesuffix("r")
    with sharing("exporting") as advance, Stages(advance, len(STAGES)) as stages:

        def computing(block: str, done: float, total: float) -> None:
            if stages.name == STAGES[0]:  # a graph is traced block by block, too
                stages.within(done, total)

        with following(network, sides or (side, side), [path], computing):
            yield stages.begin
