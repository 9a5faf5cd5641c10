"""The command that shows feature maps."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    errors_console,
    parse_resize,
    print_json,
    say,
)
from sdconv.cli.running import running
from sdconv.errors import InputError, SdconvError
from sdconv.features.drivers import Given, Passage, passage

if TYPE_CHECKING:
    from sdconv.features import Maps, Points
    from sdconv.report.features.write import Page

MAPS, PAGE = "maps.zarr", "report.html"
IN_MEMORY = 1 << 30
"""Bytes of maps that are held beside those on the disk, so that they need not be read again."""


def features(
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="The folder to write.",
            show_default=False,
        ),
    ],
    model: Model,
    force: Force = False,
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[IMAGE|LATENT]",
            help="A picture, or a file of latents (.safetensors, .pt).",
            show_default=False,
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The latents' name in their file.", show_default=False),
    ] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Let a U-Net make a picture out of noise.")
    ] = False,
    layers: Annotated[
        list[str] | None,
        typer.Option(
            "--layers",
            "-l",
            metavar="GLOB",
            help="Names of layers; * also crosses dots. Give it again for more.  "
            "Default: what comes out of each block.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Names to leave out.", show_default=False),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=1, max=1000, help="Timesteps of a U-Net's run, from noise on.")
    ] = 10,
    keep: Annotated[
        str,
        typer.Option(
            metavar="CALLS", help="Of these the ones to keep: 0,4,9 or ::2, counted from 0."
        ),
    ] = "::",
    size: Resize = None,
    vae: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="The autoencoder that makes a U-Net's latents of a picture.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise.")] = 0,
    component: Component = None,
    family: Family = None,
    dtype: ComputeDtype = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """See a network's feature maps: writes them, and a page that shows them.

    DIR/report.html is one file that opens in a browser, from the disk and without a network
    connection: the network drawn as the U that it is, and of each block its channels, principal
    components, mean and deviation, histogram and timesteps. DIR/maps.zarr holds the maps in
    float16, for sdconv.open_maps.

    An autoencoder is given a picture, or latents. A U-Net is given noise, which it denoises with
    DDIM, or a picture (with --vae) or its latents, to which the noise of each timestep is added.

    \b
    Examples:
      sdconv features photo.jpg --model vae.safetensors --out maps
      sdconv features photo.jpg -m vae.safetensors -l 'decoder.*.resnets.*' -l '*:silu2' -o maps
      sdconv features --noise --model unet.safetensors --steps 20 --keep ::5 --out maps
      sdconv features photo.jpg --model unet.safetensors --vae vae.safetensors --out maps
    """
    if (source is None) != noise:
        raise InputError(
            "give a picture, latents or noise, one of them",
            where="IMAGE|LATENT and --noise",
            got="both" if noise else "neither",
            hint="name a file, or say --noise",
        )
    chosen = _calls(keep, steps)
    _check_folder(out, force)
    given = Given(
        source=source,
        key=key,
        model=model,
        vae=vae or (),
        component=component,
        family=family,
        dtype=dtype,
        device=device,
        size=parse_resize(size),
        steps=steps,
        seed=seed,
    )
    passing = passage(given)
    for note in passing.notes:
        say(note, "note")
    with _made_whole(out) as part:
        page, names = _written(passing, given, layers, exclude or (), chosen, part)
    if as_json:
        print_json(
            {
                "page": str(out / PAGE),
                "bytes": page.bytes,
                "maps": str(out / MAPS),
                "layers": names,
                "shown": page.shots,
                "thumbnail": page.thumbnail,
                "notes": passing.notes,
            }
        )
        return
    if page.thumbnail is not None:
        say(f"thumbnails go down to {page.thumbnail} pixels, to keep the page small", "note")
    count = f"{page.shots} maps of {page.maps} layers"
    typer.echo(f"{out / PAGE}: {count}, {page.bytes / 1e6:.1f} MB; the values are in {out / MAPS}")


def _written(
    passing: Passage,
    given: Given,
    layers: list[str] | None,
    exclude: list[str] | tuple[()],
    chosen: list[int],
    folder: Path,
) -> tuple[Page, list[str]]:
    """Runs the network, and writes maps and page into a folder; the layers' names too."""
    import torch

    from sdconv.features import capture
    from sdconv.features import features as points_of
    from sdconv.report.features.connect import block_outputs

    points = points_of(passing.network, passing.size)
    patterns = layers or _passed(block_outputs(points), passing.halves)
    store = folder / MAPS
    single = len(passing.calls) == 1
    steps = None if single else chosen
    with (
        _counting("computing") as progress,
        capture(
            passing.network,
            patterns,
            exclude=exclude,
            steps=steps,
            dtype=torch.float16,
            store=store,
            max_memory=IN_MEMORY,
        ) as maps,
        running(""),
    ):
        # what comes after the last call that is kept is not needed
        calls = passing.calls if single else passing.calls[: max(chosen) + 1]
        for at, call in enumerate(calls):
            progress("", at, len(calls))
            call()
        progress("", len(calls), len(calls))
    return _paged(passing, given, points, maps, folder / PAGE), list(maps)


def _paged(passing: Passage, given: Given, points: Points, maps: Maps, path: Path) -> Page:
    from sdconv.report.features.connect import drawing_of, feature_maps, sizes_of
    from sdconv.report.features.write import write_page

    drawing = drawing_of(points, maps)
    weights = ", ".join(one.name or str(one) for one in given.model)
    with _counting("drawing") as progress:
        return write_page(
            path,
            feature_maps(maps, points, drawing),
            drawing,
            title=f"{passing.network.config.class_name} \u00b7 {weights}",
            facts={**passing.facts, "computed in": given.dtype.value},
            sizes=sizes_of(points),
            picture=passing.picture,
            progress=progress,
        )


def _passed(names: list[str], halves: tuple[str, ...]) -> list[str]:
    """Of a network's blocks those that are run."""
    inside = {"encode": ("encoder.", "quant_conv"), "decode": ("decoder.", "post_quant_conv")}
    if not halves:
        return names
    starts = tuple(start for half in halves for start in inside[half])
    return [name for name in names if name.startswith(starts)]


def _calls(text: str, count: int) -> list[int]:
    """``0,4,9`` or ``1:8:2`` as numbers of calls.

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


@contextmanager
def _made_whole(out: Path) -> Iterator[Path]:
    """A folder that gets its name once it is complete, and is gone if it never is.

    Raises:
        SdconvError: what went wrong in it, by the name that it was to get.
    """
    from sdconv.features.writing import remove

    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out.absolute().parent, prefix=f".{out.name}.", suffix=".part"))
    try:
        yield part
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o777 & ~umask)
        _put_in_place(part, out)
    except SdconvError as error:
        if str(part) not in str(error):
            raise
        raise SdconvError(
            "cannot be written, and nothing is left of it",
            where=out,
            got=error.__cause__ or error,
            hint="make room, or give --out a place on another disk",
        ) from error
    finally:
        remove(part)


def _put_in_place(part: Path, out: Path) -> None:
    """Give a complete folder its name, or move its contents into a folder that is not empty."""
    if not out.is_dir() or not any(out.iterdir()):
        part.rename(out)
        return
    for new in list(part.iterdir()):
        if (old := out / new.name).is_dir():
            shutil.rmtree(old)
        new.replace(old)
    part.rmdir()


@contextmanager
def _counting(words: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error, if that is a terminal; gives what to call with (name, done, all)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = errors_console()
    columns = (TextColumn(words), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(words, total=None)
        yield lambda name, done, total: progress.update(task, completed=done, total=total)
