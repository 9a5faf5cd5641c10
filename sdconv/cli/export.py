"""The command that writes half of an autoencoder for another runtime."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Clamp,
    Component,
    ComputeDtype,
    Dtype,
    Ema,
    Family,
    Force,
    ImageSize,
    Json,
    Key,
    Paths,
    Prefix,
    check_output,
    print_json,
    working,
)
from sdconv.cli.running import RunOptions, open_autoencoder
from sdconv.sizes import parse_size


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
    size: ImageSize = "512x512",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 1,
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

    The graph takes inputs of one shape: images of --size, or their latents. It is run once after it
    has been written, on random input, and the largest difference from torch is printed. The encoder
    gives mean and log-variance, stacked; a tiny autoencoder's gives latents. Needs the extra: pip
    install 'sdconv[export]'.

    \b
    Examples:
      sdconv export tiny-vae --half decoder --out decoder.onnx
      sdconv export vae.safetensors --half encoder --size 512x768 --out encoder.onnx
      sdconv export vae.safetensors --half decoder --out decoder.xml --json
    """
    from sdconv.integrations.export import check_export_path, export_half

    shape = parse_size(size)
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
    with working("exporting"):
        found = export_half(network, half.value, out, size=shape, batch=batch)
    if as_json:
        print_json(
            {
                "files": [str(file) for file in found.files],
                "half": half.value,
                "size": shape,
                "input": {"name": found.input[0], "shape": found.input[1]},
                "output": {"name": found.output[0], "shape": found.output[1]},
                "difference": found.difference,
            }
        )
        return
    takes, gives = (
        f"{name} {' x '.join(map(str, sides))}" for name, sides in (found.input, found.output)
    )
    checked = "not run: ONNX Runtime is missing"
    if found.difference is not None:
        checked = f"differs from torch by at most {found.difference:.1e} of the largest value"
    typer.echo(f"{out}: {takes} to {gives}; {checked}")
