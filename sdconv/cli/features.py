"""`sdconv features`: capture feature maps, and show them on a page."""

from __future__ import annotations

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
    Json,
    Model,
    ModelKey,
    Prefix,
    Resize,
    check_output,
    one_or_all,
    parse_resize,
    print_json,
    say,
    show,
)
from sdconv.cli.features_run import (
    DETAILED,
    MAPS,
    PAGE,
    Shown,
    capture_run,
    list_points,
    other_runs,
    write_run_page,
)
from sdconv.errors import InputError
from sdconv.sizes import parse_bytes


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
        int, typer.Option(min=1, max=1000, metavar="N", help="Number of a U-Net's timesteps.")
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
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            help="A U-Net's prompt, for the text encoder in the pipeline's folder --model. "
            "Without a file, random latents are denoised.",
            show_default=False,
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            help="The negative prompt, which guidance leads away from.  Default: an empty one.",
            show_default=False,
        ),
    ] = None,
    embeds: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A U-Net's prompt as tensors in a file: prompt_embeds and, for SDXL, "
            "pooled_prompt_embeds; for guidance also negative_prompt_embeds and "
            "negative_pooled_prompt_embeds.",
            show_default=False,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="SCALE",
            help="Scale of classifier-free guidance; 1 is without. The feature maps are those of "
            "the half that follows the prompt.  Default: as in diffusers' pipelines, 7.5, for "
            "SDXL 5.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, metavar="N", help="Seed of the noise.")
    ] = 0,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="The output of another run, to compare with on the page. Repeat it for more.",
            show_default=False,
        ),
    ] = None,
    detail: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Channels of each feature map whose exact values are on the page, those with the "
            "largest variance.",
        ),
    ] = DETAILED,
    page_size: Annotated[
        str, typer.Option(metavar="SIZE", help="What the page may take on the disk, at most.")
    ] = "30MB",
    listed: Annotated[
        bool,
        typer.Option(
            "--list", help="Print the names of all layers with their facts, and compute nothing."
        ),
    ] = False,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    model_key: ModelKey = None,
    ema: Ema = False,
    dtype: ComputeDtype = Dtype.float32,
    clamp: Clamp = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Capture a network's feature maps, and write a page that shows them.

    DIR/report.html is one file that opens in a browser without a network connection: a drawing of
    the network, and for each block its channels, principal components, mean and standard
    deviation, histogram and timesteps. DIR/maps.zarr holds the feature maps for sdconv.open_maps,
    in float16, or as they were computed where values are too large for that.

    An autoencoder takes an image or latents. A U-Net takes noise, which it denoises with DDIM, or
    an image (with --vae) or its latents, to which the noise of each timestep is added. Of a
    pipeline's folder, the U-Net is run if there is a prompt or noise, with the pipeline's own text
    encoder, autoencoder and noise schedule.

    \b
    Examples:
      sdconv features --list --model vae.safetensors --layers 'decoder.*'
      sdconv features photo.jpg --model vae.safetensors --out maps
      sdconv features photo.jpg -m vae.safetensors -l 'decoder.*.resnets.*' -l '*:silu2' -o maps
      sdconv features --noise --model unet.safetensors --steps 20 --keep ::5 --out maps
      sdconv features photo.jpg --model unet.safetensors --vae vae.safetensors --out maps
      sdconv features --model stable-diffusion/ --prompt 'a cat' -l '*.attn2:probs' --out maps
      sdconv features -m stable-diffusion/ --prompt 'a cat' --guidance 3 --steps 30 --out maps
    """
    if listed:
        from sdconv.analysis.inspection import inspect
        from sdconv.checkpoint.io.pickles import weights_key

        with weights_key(model_key):
            inspection = inspect(one_or_all(model), family=family, prefix=prefix)
        config = inspection.network(component).config
        points = list_points(config, size, layers, exclude or ())
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
    noise = noise or (source is None and (prompt is not None or embeds is not None))
    if (source is None) != noise:
        raise InputError(
            "give either a file or --noise",
            where="IMAGE|LATENT and --noise",
            got="both" if noise else "neither",
            hint="name an image or a file of latents, or pass --noise",
        )
    kept = _calls(keep, steps)
    shown = Shown(detail, parse_bytes(page_size, "--page-size"), dtype)
    _check_folder(out, force)
    from sdconv.features.drivers import Request, prepare_run
    from sdconv.features.folders import atomic_folder
    from sdconv.features.zarr_store import zarr_package

    zarr_package(out)  # before anything is loaded or computed
    others = other_runs(compare or [])
    request = Request(
        source=source,
        key=key,
        model=one_or_all(model),
        vae=one_or_all(vae) if vae else None,
        component=component,
        family=family,
        prefix=prefix,
        model_key=model_key,
        ema=ema,
        dtype=dtype.in_torch(),
        clamp=clamp,
        device=device,
        size=parse_resize(size),
        steps=steps,
        seed=seed,
        prompt=prompt,
        embeds=embeds,
        negative=negative_prompt,
        guidance=guidance,
    )
    run = prepare_run(request)
    for note in run.notes:
        say(note, "note")
    weights = ", ".join(one.name or str(one) for one in model)
    with atomic_folder(out) as part:
        points, maps = capture_run(run, layers, exclude or (), kept, part / MAPS)
        page = write_run_page(run, points, maps, others, part / PAGE, weights, shown)
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
