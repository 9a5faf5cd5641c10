"""Commands about weights: inspect, check, convert, fetch."""

from __future__ import annotations

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
    Layout,
    Paths,
    fail,
    not_an_input,
    one_or_all,
    parsed_size,
    print_json,
    reading,
    show,
    working,
)
from sdconv.errors import InputError

_UNWRITABLE = (".ckpt", ".pth", ".pt", ".bin", ".sft", ".gguf")


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
    from sdconv.inspection import check_values
    from sdconv.inspection import inspect as look

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
    is 1 beyond it.

    \b
    Examples:
      sdconv check vae.safetensors
      sdconv check v1-5-pruned-emaonly.safetensors --component vae --size 256x256 --all
      sdconv check vae.safetensors --dtype float16 --device cuda --json
    """
    from sdconv.parity import check as compare

    shape = None if size is None else parsed_size(size)
    with working("building both networks, and comparing them"):
        report = compare(
            one_or_all(paths),
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
        fail(f"{report.worst.name} differs beyond the tolerance", status=1)


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

    if out.suffix.lower() in _UNWRITABLE:
        raise InputError(
            "only safetensors files are written",
            where=out,
            expected="a name that ends in .safetensors, or a folder's",
            got=out.suffix,
        )
    not_an_input(out, paths)
    with reading("writing") as progress:
        result = write(
            one_or_all(paths),
            out,
            layout.value,
            component,
            family=family,
            dtype=None if dtype is None else dtype.in_torch(),
            on_tensor=progress,
        )
    names = [str(file) for file in result.files]
    for what, counts in (("carried over as they were", result.carried), _left_out(result)):
        if counts:
            listed = ", ".join(f"{name or 'no prefix'} ({n})" for name, n in counts.items())
            say(f"tensors {what}: {listed}", "note")
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


def _left_out(result: Converted) -> tuple[str, Mapping[str, int]]:
    return "left out, for which a folder has no place", result.left_out


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
