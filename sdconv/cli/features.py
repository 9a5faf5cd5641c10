"""`sdconv features`: capture feature maps, and show them on a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdconv.cli.common import (
    LARGEST_SEED,
    Component,
    ComputeDtype,
    Device,
    Dtype,
    Family,
    Force,
    Json,
    Model,
    Resize,
    check_output,
    counting,
    one_or_all,
    parse_resize,
    print_json,
    say,
    show,
)
from sdconv.cli.running import running
from sdconv.errors import InputError
from sdconv.sizes import parse_size

if TYPE_CHECKING:
    from sdconv.features import Maps, Points
    from sdconv.features.drivers import Run
    from sdconv.report.features.write import Page

MAPS, PAGE = "maps.zarr", "report.html"
IN_MEMORY = 1 << 30
"""Bytes of feature maps that stay in memory, so that they need not be read from the disk again."""


def features(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The folder to write.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[IMAGE|LATENT]",
            help="An image, or a file of latents (.safetensors, .pt).",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the latents in their file.", show_default=False),
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Let a U-Net denoise random latents.")
    ] = False,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="GLOB",
            help="Names of layers; * also matches dots. Repeat it for more.  "
            "Default: the output of each block.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Names to exclude.", show_default=False),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of a U-Net's timesteps.")
    ] = 10,
    keep: Annotated[
        str,
        typer.Option(metavar="CALLS", help="The timesteps to keep, counted from 0: 0,4,9 or ::2."),
    ] = "::",
    size: Resize = None,
    vae: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="The autoencoder that encodes an image for a U-Net.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the noise.")] = 0,
    listed: Annotated[
        bool,
        typer.Option(
            "--list", help="Print the names of all layers with their facts, and compute nothing."
        ),
    ] = False,
    component: Component = None,
    family: Family = None,
    dtype: ComputeDtype = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Capture a network's feature maps, and write a page that shows them.

    DIR/report.html is one file that opens in a browser without a network connection: a drawing of
    the network, and for each block its channels, principal components, mean and standard
    deviation, histogram and timesteps. DIR/maps.zarr holds the feature maps in float16, for
    sdconv.open_maps.

    An autoencoder takes an image or latents. A U-Net takes noise, which it denoises with DDIM, or
    an image (with --vae) or its latents, to which the noise of each timestep is added.

    \b
    Examples:
      sdconv features --list --model vae.safetensors --layers 'decoder.*'
      sdconv features photo.jpg --model vae.safetensors --out maps
      sdconv features photo.jpg -m vae.safetensors -l 'decoder.*.resnets.*' -l '*:silu2' -o maps
      sdconv features --noise --model unet.safetensors --steps 20 --keep ::5 --out maps
      sdconv features photo.jpg --model unet.safetensors --vae vae.safetensors --out maps
    """
    if listed:
        points = _list(model, component, family, size, layers, exclude or ())
        if as_json:
            print_json({"points": points.to_json()})
        else:
            show(points.table())
        return
    if out is None:
        raise InputError(
            "no folder to write to",
            where="--out",
            hint="name one: --out DIR; or list the layers: --list",
        )
    if (source is None) != noise:
        raise InputError(
            "give either a file or --noise",
            where="IMAGE|LATENT and --noise",
            got="both" if noise else "neither",
            hint="name an image or a file of latents, or pass --noise",
        )
    kept = _calls(keep, steps)
    _check_folder(out, force)
    from sdconv.features.drivers import Request, prepare_run
    from sdconv.features.zarr_store import atomic_folder, zarr_package

    zarr_package(out)  # before anything is loaded or computed
    request = Request(
        source=source,
        key=key,
        model=one_or_all(model),
        vae=one_or_all(vae) if vae else None,
        component=component,
        family=family,
        dtype=dtype.in_torch(),
        device=device,
        size=parse_resize(size),
        steps=steps,
        seed=seed,
    )
    run = prepare_run(request)
    for note in run.notes:
        say(note, "note")
    weights = ", ".join(one.name or str(one) for one in model)
    with atomic_folder(out) as part:
        points, maps = _capture(run, layers, exclude or (), kept, part / MAPS)
        page = _write_page(run, points, maps, part / PAGE, weights, dtype)
        names = list(maps)
    if as_json:
        print_json(
            {
                "page": str(out / PAGE),
                "bytes": page.bytes,
                "maps": str(out / MAPS),
                "layers": names,
                "shown": page.snapshots,
                "thumbnail": page.thumbnail,
                "notes": run.notes,
            }
        )
        return
    if page.thumbnail is not None:
        say(f"thumbnails are as small as {page.thumbnail} pixels, to limit the page's size", "note")
    count = f"{page.snapshots} feature maps of {page.maps} layers"
    typer.echo(
        f"{out / PAGE}: {count}, {page.bytes / 1e6:.1f} MB; their values are in {out / MAPS}"
    )


def _list(
    model: list[Path],
    component: str | None,
    family: str | None,
    size: str | None,
    layers: list[str] | None,
    exclude: list[str] | tuple[()],
) -> Points:
    """The points of a network of which only the headers are read."""
    import torch

    from sdconv.analysis.inspection import inspect
    from sdconv.features import Points
    from sdconv.features import features as points_of
    from sdconv.features.drivers import latent_sides
    from sdconv.features.selection import match_patterns
    from sdconv.loading import build
    from sdconv.models.unet import UNet2DConditionModel

    pixels = None if size is None else parse_size(size)
    config = inspect(one_or_all(model), family=family).network(component).config
    with torch.device("meta"):
        network = build(config)
    sides = latent_sides(network, pixels) if isinstance(network, UNet2DConditionModel) else pixels
    points = points_of(network, sides)
    kept = match_patterns(points.names, layers or "*", exclude)
    names = {name for some in kept.values() for name in some}
    return Points([point for point in points if point.name in names])


def _capture(
    run: Run,
    layers: list[str] | None,
    exclude: list[str] | tuple[()],
    kept: list[int],
    store: Path,
) -> tuple[Points, Maps]:
    """Run the network under capture, up to the last call that is kept."""
    import torch

    from sdconv.features import capture
    from sdconv.features import features as points_of
    from sdconv.report.features.drawing import block_outputs

    points = points_of(run.network, run.size)
    single = len(run.calls) == 1
    calls = run.calls if single else run.calls[: max(kept) + 1]
    with (
        counting("computing") as progress,
        capture(
            run.network,
            layers or _of_methods(block_outputs(points), run.methods),
            exclude=exclude,
            steps=None if single else kept,
            dtype=torch.float16,
            store=store,
            max_memory=IN_MEMORY,
        ) as maps,
        running(""),
    ):
        for at, call in enumerate(calls):
            progress("", at, len(calls))
            call()
        progress("", len(calls), len(calls))
    return points, maps


def _write_page(
    run: Run, points: Points, maps: Maps, path: Path, weights: str, dtype: Dtype
) -> Page:
    from sdconv.report.features.drawing import drawing_of
    from sdconv.report.features.feature_maps import feature_maps
    from sdconv.report.features.write import write_page

    drawing = drawing_of(points, maps)
    with counting("drawing") as progress:
        return write_page(
            path,
            feature_maps(maps, points, drawing),
            drawing,
            title=f"{run.network.config.class_name} \u00b7 {weights}",
            facts={**run.facts, "computed in": dtype.value},
            sizes={point.name: point.size for point in points if point.size is not None},
            image=run.image,
            progress=progress,
        )


def _of_methods(names: list[str], methods: tuple[str, ...]) -> list[str]:
    """The blocks that an autoencoder's methods run; all blocks of other networks."""
    inside = {"encode": ("encoder.", "quant_conv"), "decode": ("decoder.", "post_quant_conv")}
    if not methods:
        return names
    starts = tuple(start for name in methods for start in inside[name])
    return [name for name in names if name.startswith(starts)]


def _calls(text: str, count: int) -> list[int]:
    """``0,4,9`` or ``1:8:2`` as numbers of calls, of ``count`` calls in all.

    Raises:
        InputError: neither, or a number beyond the last call.
    """
    try:
        if ":" in text:
            bounds = [int(part) if part.strip() else None for part in text.split(":")]
            found = list(range(count))[slice(*bounds)]
        else:
            found = sorted({range(count)[int(part)] for part in text.split(",")})
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(
            "not a choice of calls",
            where="--keep",
            expected=f"numbers from 0 to {count - 1} such as 0,4, or a slice such as ::2",
            got=repr(text),
        ) from error
    if not found:
        raise InputError("this keeps no call", where="--keep", got=repr(text))
    return sorted(found)


def _check_folder(out: Path, force: bool) -> None:
    """Refuse what is not a folder, and without ``force`` one that is not empty.

    Raises:
        InputError: the output is refused.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError("is not a folder", where=out, hint="give --out another name")
    check_output(out, force)
