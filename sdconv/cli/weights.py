"""Commands about weights: inspect, check, fetch."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    LARGEST_SEED,
    Component,
    Device,
    Dtype,
    Family,
    Json,
    Paths,
    fail,
    one_or_all,
    print_json,
    reading,
    say,
    show,
    working,
)
from sdconv.errors import InputError
from sdconv.sizes import parse_size


def inspect(
    paths: Paths,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read every tensor and look for NaN, infinity and tensors of zeros."
        ),
    ] = False,
    family: Family = None,
    as_json: Json = False,
) -> None:
    """Say what weights hold, from their headers.

    Networks with their configs and families, and whatever lies beside them. Only headers are read,
    unless --values asks for more. The status is 1 if there is nothing that sdconv knows, if a
    network lacks tensors, or if --values finds NaN or infinity.

    \b
    Examples:
      sdconv inspect v1-5-pruned-emaonly.safetensors
      sdconv inspect stable-diffusion-v1-5/ --json
      sdconv inspect vae.safetensors --values
    """
    from sdconv.analysis.inspection import check_values
    from sdconv.analysis.inspection import inspect as look

    where = one_or_all(paths)
    found = look(where, family=family)
    report = None
    if values:
        with reading("reading") as progress:
            report = check_values(where, on_tensor=progress)
    if as_json:
        content = found.to_json()
        print_json(content | {"values": None if report is None else report.to_json()})
    else:
        from sdconv.report.tables import inspection_report

        show(inspection_report(found, report))
    if found.complaint:
        fail(found.complaint, status=1)
    if report is not None and not report.sound:
        odd = ", ".join([*report.nan, *report.infinite][:4])
        fail(f"NaN or infinity among the values, first in {odd}", status=1)


def check(
    paths: Paths,
    against: Annotated[str, typer.Option(help="What to compare with: diffusers.")] = "diffusers",
    component: Component = None,
    family: Family = None,
    dtype: Annotated[Dtype, typer.Option(help="What both compute in.")] = Dtype.float32,
    device: Device = "cpu",
    size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Of the random picture they get.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of that picture.")] = 0,
    every: Annotated[bool, typer.Option("--all", help="Show every module.")] = False,
    as_json: Json = False,
) -> None:
    """Compare with diffusers, module by module.

    Both networks are built from the same file and get the same random input. On the CPU in float32
    nothing but equality passes, bit for bit; elsewhere a tolerance derived from float64. The status
    is 1 beyond it. Of a whole checkpoint the VAE is compared, unless --component says otherwise.

    \b
    Examples:
      sdconv check vae.safetensors
      sdconv check v1-5-pruned-emaonly.safetensors --component vae --size 256x256 --all
      sdconv check vae.safetensors --dtype float16 --device cuda --json
    """
    from sdconv.analysis.parity import check as compare
    from sdconv.analysis.parity import components

    where = one_or_all(paths)
    shape = None if size is None else parse_size(size)
    if component is None and len(there := components(where)) > 1:
        component = "vae"
        say(f"{' and '.join(there)} are there; --component chooses, the vae is taken", "note")
    with working("building both networks, and comparing them"):
        report = compare(
            where,
            component=component,
            against=against,
            family=family,
            dtype=dtype.in_torch(),
            device=device,
            size=shape,
            seed=seed,
        )
    if as_json:
        print_json(report.to_json())
    else:
        from sdconv.report.tables import parity_report

        show(parity_report(report, every=every))
    if not report.passed:
        found = f"{report.worst.name} {report.worst.verdict}"
        if isnan(report.worst.max_abs):
            files = " ".join(map(str, paths))
            found += f": sdconv inspect --values {files} finds what is not finite in the weights"
        fail(found, status=1)


def fetch(
    name: Annotated[
        str | None,
        typer.Argument(help="A name that --list shows.", show_default=False),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the known checkpoints.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="FOLDER",
            help="Where to put it, below FOLDER/NAME; else the hub's own cache.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a known checkpoint and check its bytes.

    From the Hugging Face hub. This is the only command that uses the network. A file that is there
    already is checked again and kept. The path is printed.

    \b
    Examples:
      sdconv fetch --list
      sdconv fetch taesd
      sdconv inspect $(sdconv fetch sdxl-vae)
    """
    from sdconv.fetch import fetch as download
    from sdconv.fetch import load_manifest

    if listed == (name is not None):
        raise InputError(
            "what is to be fetched?",
            where="fetch",
            expected="a name, or --list",
            got="both" if listed else "neither",
        )
    if name is not None:
        path = download(name, directory=directory, progress=not as_json)
        if as_json:
            print_json({"name": name, "path": str(path)})
        else:
            typer.echo(path)
        return
    known = load_manifest().values()
    if as_json:
        print_json({"checkpoints": [vars(one) for one in known]})
    else:
        from sdconv.report.tables import manifest_report

        show(manifest_report(known))
