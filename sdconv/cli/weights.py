"""The commands about weights: inspect, check, fetch."""

from __future__ import annotations

from math import isnan
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    LARGEST_SEED,
    Clamp,
    Component,
    ComputeDtype,
    Device,
    Dtype,
    Ema,
    Family,
    Force,
    InputSize,
    Json,
    Key,
    Paths,
    Prefix,
    counting,
    one_or_all,
    print_json,
    reading,
    say,
    show,
)
from sdconv.cli.ending import fail
from sdconv.cli.verbosity import is_quiet
from sdconv.errors import InputError
from sdconv.sizes import parse_size


def inspect(
    paths: Paths,
    values: Annotated[
        bool,
        typer.Option(
            "--values", help="Read every tensor and look for NaN, infinity and all-zero tensors."
        ),
    ] = False,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show what weights contain, from their headers.

    The networks with their configs and families, and everything else in the file. Only headers are
    read, unless --values is given. The status is 1 if sdconv knows none of the networks, if a
    network lacks tensors, or if --values finds NaN or infinity.

    \b
    Examples:
      sdconv inspect v1-5-pruned-emaonly.safetensors
      sdconv inspect stable-diffusion-v1-5/ --json
      sdconv inspect vae.safetensors --values
    """
    from sdconv.analysis.inspection import check_values
    from sdconv.analysis.inspection import inspect as look
    from sdconv.checkpoint.io.pickles import weights_key

    where = one_or_all(paths)
    report = None
    with weights_key(key):
        found = look(where, family=family, prefix=prefix)
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
        names = ", ".join([*report.nan, *report.infinite][:4])
        fail(f"NaN or infinity among the values, first in {names}", status=1)


def check(
    paths: Paths,
    against: Annotated[
        str, typer.Option(metavar="NAME", help="What to compare with: diffusers.")
    ] = "diffusers",
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    device: Device = "cpu",
    size: InputSize = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="Seed of the random input.")
    ] = 0,
    every: Annotated[bool, typer.Option("--all", help="Show every module.")] = False,
    as_json: Json = False,
) -> None:
    """Compare with diffusers, module by module.

    Both networks are built from the same file and get the same random input: an image of --size,
    or for a U-Net latents of that size. On the CPU in float32 every output must be equal bit for
    bit; elsewhere a tolerance derived from float64 applies. The status is 1 beyond it. In a whole
    checkpoint the VAE is compared, unless --component says otherwise.

    \b
    Examples:
      sdconv check vae.safetensors
      sdconv check v1-5-pruned-emaonly.safetensors --component vae --size 256x256 --all
      sdconv check vae.safetensors --dtype float16 --device cuda --json
    """
    from sdconv.analysis.parity import check as compare
    from sdconv.analysis.parity import components
    from sdconv.checkpoint.io.pickles import weights_key

    where = one_or_all(paths)
    shape = None if size is None else parse_size(size)
    with weights_key(key):
        there = components(where) if component is None and prefix is None else ()
    if len(there) > 1:
        component = "vae"
        say(
            f"the weights hold {' and '.join(there)}; the vae is compared (see --component)", "note"
        )
    with counting("comparing with diffusers") as progress, weights_key(key):
        report = compare(
            where,
            component=component,
            against=against,
            family=family,
            prefix=prefix,
            ema=ema,
            clamp=clamp,
            dtype=dtype.in_torch(),
            device=device,
            size=shape,
            seed=seed,
            on_module=progress,
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
            found += f"; to look for NaN in the weights: sdconv inspect --values {files}"
        fail(found, status=1)


def fetch(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|OWNER/NAME[:PATH]",
            help="A name from --list, or a file or folder of a repository on the hub.",
            show_default=False,
        ),
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the known checkpoints.")] = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="FOLDER",
            help="Put it into FOLDER/NAME instead of the hub's own cache.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A branch, tag or commit of the repository.  Default: the main branch.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Download weights from the Hugging Face hub, and check them.

    No other command uses the network. Every byte is compared with the hash that the hub states. Of
    a folder, the safetensors weights that diffusers would open and config.json are downloaded. What
    was downloaded before is checked again and kept. The path is printed; commands also find the
    weights by the name that was fetched, unless --dir or --revision was given: then give the path.

    \b
    Examples:
      sdconv fetch --list
      sdconv fetch taesd
      sdconv fetch stabilityai/sd-vae-ft-mse
      sdconv fetch stabilityai/stable-diffusion-xl-base-1.0:vae --dir weights
      sdconv inspect $(sdconv fetch sdxl-vae)
    """
    from sdconv.hub.download import fetch as download
    from sdconv.hub.manifest import load_manifest

    if listed == (name is not None):
        raise InputError(
            "nothing to fetch, or too much",
            where="fetch",
            expected="a name, or --list",
            got="both" if listed else "neither",
        )
    if name is not None:
        path = download(
            name,
            directory=directory,
            overwrite=force,
            progress=not as_json and not is_quiet(),
            revision=revision,
        )
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
