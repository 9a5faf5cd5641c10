"""`sdconv dataset`: the latents and features of many images, as shards."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconv.cli.common import (
    IMAGE_BACKEND,
    LARGEST_SEED,
    Component,
    ComputeDtype,
    Device,
    Dtype,
    Family,
    Json,
    Model,
    With,
    errors_console,
    one_or_all,
    parse_dtype,
    print_json,
    say,
)
from sdconv.cli.ending import Commands
from sdconv.errors import InputError
from sdconv.sizes import in_bytes

if TYPE_CHECKING:
    from sdconv.dataset import FeatureExtractor, Summary

app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)

Progress = Callable[[str, int, int], object]

EVERY = 60.0
"""Seconds between two lines of progress where standard error is not a terminal."""


class Kind(StrEnum):
    """What the latents of a data set are."""

    moments = "moments"
    mean = "mean"
    sample = "sample"


class Layout(StrEnum):
    """How a data set lies on the disk."""

    webdataset = "webdataset"
    kohya = "kohya"
    parquet = "parquet"


class FeatureLayout(StrEnum):
    """How a data set of features lies on the disk."""

    webdataset = "webdataset"
    zarr = "zarr"


class Engine(StrEnum):
    """What runs the work on shards."""

    processes = "processes"
    ray = "ray"


class OnError(StrEnum):
    """What happens to an image that cannot be encoded."""

    quarantine = "quarantine"
    fail = "fail"


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A folder (searched recursively), webdataset tars ('{000..099}.tar', or a folder of "
        "them), or a .jsonl or .parquet list of paths.",
    ),
]
OutFolder = Annotated[
    Path,
    typer.Option("--out", "-o", metavar="DIR", help="The folder to write.", show_default=False),
]
Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A folder that `sdconv dataset` wrote.")
]
SizeText = Annotated[
    str,
    typer.Option(
        "--size",
        metavar="SIZE",
        help="512 or 512x768 (rows first): resized and centre-cropped; buckets:1024: SDXL's aspect "
        "buckets; buckets:1024:256:2048: sd-scripts', with its smallest and largest side; native: "
        "kept, and padded to what the network takes.",
    ),
]
ShardSize = Annotated[int, typer.Option(min=1, metavar="N", help="The most images of a shard.")]
Draft = Annotated[
    bool,
    typer.Option(
        "--draft/--no-draft",
        help="Decode a JPEG that is at least 4 times as large as needed at a fraction of its size.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Processes with a network each.  Default: one for each core, or each GPU.",
        show_default=False,
    ),
]
Decoders = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        help="Processes of each worker that decode images ahead of its network.  Default: 1, on a "
        "GPU 4.",
        show_default=False,
    ),
]
Threads = Annotated[
    int,
    typer.Option(min=1, metavar="N", help="Threads of each worker's network, on a CPU."),
]
WithEngine = Annotated[
    Engine,
    typer.Option(help="Processes of this machine, or Ray Data (pip install 'sdconv[ray]')."),
]
Rank = Annotated[
    str | None,
    typer.Option(
        metavar="R/N",
        help="Make every Nth shard, from the Rth on: 0/4.  Default: RANK and WORLD_SIZE, or those "
        "of a SLURM array.",
        show_default=False,
    ),
]
OnErrors = Annotated[
    OnError,
    typer.Option(help="Leave images out that cannot be read, or stop at the first."),
]
ForceAnew = Annotated[
    bool, typer.Option("--force", "-f", help="Remove the data set that is there, and start anew.")
]
Rehash = Annotated[
    bool,
    typer.Option(
        "--rehash", help="Find changed images by content, not by length and date of the file."
    ),
]
Prune = Annotated[
    bool, typer.Option("--prune", help="Drop the samples of images that are no longer there.")
]


@app.callback()
def dataset() -> None:
    """Latents and features of many images, as shards that can be resumed, extended and checked."""


@app.command()
def encode(
    source: Source,
    model: Model,
    out: OutFolder,
    force: ForceAnew = False,
    size: SizeText = "512",
    latents: Annotated[
        Kind,
        typer.Option(help="Mean and log-variance, the mean alone, or a sample (see --seed)."),
    ] = Kind.moments,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of samples; the key decides the rest.")
    ] = 0,
    scaled: Annotated[
        bool,
        typer.Option("--scaled", help="Write them as a diffusion model reads them, not raw."),
    ] = False,
    flip: Annotated[
        bool, typer.Option("--flip", help="Encode the mirror image of each image too.")
    ] = False,
    store: Annotated[
        Dtype,
        typer.Option(
            parser=parse_dtype,
            metavar="DTYPE",
            help="The dtype in which they are stored: float32, float16 or bfloat16.",
        ),
    ] = Dtype.float32,
    layout: Annotated[
        Layout,
        typer.Option(help="Tars, .npz files for sd-scripts, or parquet files."),
    ] = Layout.webdataset,
    shard_size: ShardSize = 1000,
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Images that are encoded at once. More than 1 differ by rounding.",
        ),
    ] = 1,
    draft: Draft = True,
    workers: Workers = None,
    decoders: Decoders = None,
    threads: Threads = 1,
    engine: WithEngine = Engine.processes,
    rank: Rank = None,
    on_error: OnErrors = OnError.quarantine,
    rehash: Rehash = False,
    prune: Prune = False,
    component: Component = None,
    family: Family = None,
    dtype: ComputeDtype = Dtype.float32,
    device: Device = "cpu",
    backend: With = IMAGE_BACKEND,
    as_json: Json = False,
) -> None:
    """Encode the images of a data set.

    DIR gets a plan, shards, and for each shard a record that says it is complete. Killed at any
    moment and started again, the command goes on, and the folder ends up byte for byte the same.
    Later runs encode new and changed images only. Another model or other options are refused.
    Images that cannot be read go to DIR/quarantine.jsonl, with the reason.

    \b
    Examples:
      sdconv dataset encode photos --model vae.safetensors --out latents
      sdconv dataset encode '{000..099}.tar' -m vae.safetensors -o latents --size buckets:1024
      sdconv dataset encode photos -m vae.safetensors -o photos --layout kohya --latents sample
      sdconv dataset encode photos -m vae.safetensors -o latents --device cuda --batch 8
    """
    from sdconv.dataset import Encoder, Options, Settings
    from sdconv.dataset import encode as encode_all

    settings = Settings(
        latents=latents.value,
        seed=seed,
        scaled=scaled,
        flip=flip,
        dtype=store.value,
        computed_in=dtype.value,
        backend=backend.value,
        batch=batch,
    )
    encoder = Encoder(
        one_or_all(model),
        settings,
        component=component,
        family=family,
        device=_own_device(device),
        threads=threads,
    )
    options = Options(
        size=size,
        layout=layout.value,
        shard_size=shard_size,
        draft=draft,
        workers=workers or _workers(device),
        decoders=(4 if device.startswith("cuda") else 1) if decoders is None else decoders,
        engine=engine.value,
        rank=_parse_rank(rank),
        on_error=on_error.value,
        force=force,
        rehash=rehash,
        prune=prune,
    )
    with _progress("images") as progress:
        summary = encode_all(source, encoder, out, options=options, progress=progress)
    _print_summary(summary, as_json)


@app.command()
def features(
    source: Source,
    model: Model,
    out: OutFolder,
    points: Annotated[
        list[str],
        typer.Option(
            "--points",
            "-p",
            metavar="GLOB",
            help="Hook points, as `sdconv features` lists them; * also matches dots. Repeat it for "
            "more.",
            show_default=False,
        ),
    ],
    force: ForceAnew = False,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Names to exclude.", show_default=False),
    ] = None,
    timesteps: Annotated[
        str | None,
        typer.Option(
            metavar="T,T",
            help="Of a U-Net: 1,250,500. Noise of each is added to the latents.",
            show_default=False,
        ),
    ] = None,
    vae: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="The autoencoder that encodes the images for a U-Net.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Of the noise; the key decides the rest.")
    ] = 0,
    reduce: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="mean, std or max over space, pool:8, pca:3 (the same axes for all images), or "
            "none.",
        ),
    ] = "mean",
    top_patches: Annotated[
        int,
        typer.Option(
            min=0,
            max=64,
            metavar="K",
            help="Write DIR/patches.html: for each channel the K places of the data set where it "
            "is largest.",
        ),
    ] = 0,
    size: SizeText = "512",
    store: Annotated[
        Dtype,
        typer.Option(
            parser=parse_dtype, metavar="DTYPE", help="The dtype in which they are stored."
        ),
    ] = Dtype.float16,
    layout: Annotated[
        FeatureLayout, typer.Option(help="Tars of safetensors, or zarr arrays.")
    ] = FeatureLayout.webdataset,
    shard_size: ShardSize = 1000,
    draft: Draft = True,
    workers: Workers = None,
    decoders: Decoders = None,
    threads: Threads = 1,
    engine: WithEngine = Engine.processes,
    rank: Rank = None,
    on_error: OnErrors = OnError.quarantine,
    rehash: Rehash = False,
    prune: Prune = False,
    component: Component = None,
    family: Family = None,
    dtype: ComputeDtype = Dtype.float32,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Read feature maps of the images of a data set.

    DIR is resumed, extended and checked as that of `sdconv dataset encode`. An autoencoder encodes
    each image, and decodes it if a point of the decoder is asked for. A U-Net gets the image's
    latents with noise that follows from the seed and the image's key.

    \b
    Examples:
      sdconv dataset features photos -m vae.safetensors -p 'encoder.down_blocks.*' -o features
      sdconv dataset features photos -m unet.safetensors --vae vae.safetensors --timesteps 1,250 \\
          -p 'up_blocks.*.resnets.*' --reduce pool:8 --layout zarr -o features
      sdconv dataset features photos -m vae.safetensors -p encoder.mid_block --top-patches 9 -o top
    """
    from sdconv.dataset import FeatureExtractor, FeatureSettings, Options
    from sdconv.dataset import features as read_all

    settings = FeatureSettings(
        points=tuple(points),
        exclude=tuple(exclude or ()),
        timesteps=_parse_timesteps(timesteps),
        reduce=None if reduce == "none" else reduce,
        seed=seed,
        top=top_patches > 0,
        dtype=store.value,
        computed_in=dtype.value,
    )
    extractor = FeatureExtractor(
        one_or_all(model),
        settings,
        vae=one_or_all(vae) if vae else None,
        component=component,
        family=family,
        device=_own_device(device),
        threads=threads,
    )
    options = Options(
        size=size,
        layout=layout.value,
        shard_size=shard_size,
        draft=draft,
        workers=workers or _workers(device),
        decoders=(4 if device.startswith("cuda") else 1) if decoders is None else decoders,
        engine=engine.value,
        rank=_parse_rank(rank),
        on_error=on_error.value,
        force=force,
        rehash=rehash,
        prune=prune,
    )
    with _progress("images") as progress:
        summary = read_all(source, extractor, out, options, progress=progress)
        page = None
        if top_patches and summary.complete:
            page = _write_patches(out, source, extractor, top_patches, progress)
    _print_summary(summary, as_json, page)


def _write_patches(
    out: Path, source: str, extractor: FeatureExtractor, patches: int, progress: Progress
) -> Path:
    from sdconv.dataset.patches import top_patches
    from sdconv.report.patches import write_patches

    found = top_patches(out, source, extractor, patches, progress=progress)
    page = out / "patches.html"
    name = extractor.network.config.class_name
    images = len(
        {one.key for point in found.channels.values() for p in point.values() for one in p}
    )
    write_patches(found, page, title=f"Where channels of {name} are largest", images=images)
    return page


@app.command()
def status(folder: Folder, as_json: Json = False) -> None:
    """Show how far a data set is, and what is in it.

    \b
    Examples:
      sdconv dataset status latents
      sdconv dataset status latents --json
    """
    from sdconv.dataset import status as status_of

    found = status_of(folder)
    if as_json:
        buckets = {f"{rows}x{columns}": count for (rows, columns), count in found.buckets.items()}
        print_json(
            {
                "complete": found.complete,
                "shards": found.shards,
                "done": found.done,
                "stale": found.stale,
                "images": found.images,
                "encoded": found.encoded,
                "bytes": found.bytes,
                "quarantined": found.quarantined,
                "buckets": buckets,
                "about": found.about,
            }
        )
        return
    about = found.about
    rows = [
        ("shards", f"{found.done} of {found.shards}, {in_bytes(found.bytes)}"),
        ("images", f"{found.encoded} of {found.images}"),
        ("quarantine", _reasons(found.quarantined)),
        ("buckets", _buckets(found.buckets)),
        ("layout", about["layout"]),
        ("model", f"{about['model']['class']}, sha256 {about['model']['sha256'][:16]}"),
        (about["name"], _settings(about[about["name"]])),
        ("images are", _settings(about["preprocessing"])),
    ]
    if found.stale:
        rows.insert(1, ("to be made again", f"{found.stale} shards, whose images have changed"))
    for name, words in rows:
        typer.echo(f"{name:<17} {words}")


@app.command()
def verify(
    folder: Folder,
    discard: Annotated[
        bool,
        typer.Option(
            "--discard", help="Remove damaged shards, so that the next run makes them again."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Read every shard again: hashes, keys and counts, shapes, finite values.

    The exit status is 1 if anything is wrong. Shards that are not made yet are not wrong.

    \b
    Examples:
      sdconv dataset verify latents
      sdconv dataset verify latents --discard
    """
    from sdconv.dataset import verify as verify_all

    with _progress("shards") as progress:
        found = verify_all(folder, discard=discard, progress=progress)
    if as_json:
        print_json(
            {
                "shards": found.shards,
                "samples": found.samples,
                "bytes": found.bytes,
                "unfinished": found.unfinished,
                "problems": [{"shard": number, "what": words} for number, words in found.problems],
            }
        )
    else:
        for number, words in found.problems:
            typer.echo(words if number is None else f"shard {number}: {words}")
        unfinished = f"; {found.unfinished} shards are not made yet" if found.unfinished else ""
        verdict = f"{len(found.problems)} problems" if found.problems else "all is well"
        typer.echo(
            f"{folder}: {found.samples} samples in {found.shards} shards, "
            f"{in_bytes(found.bytes)}: {verdict}{unfinished}"
        )
    if found.problems:
        if not discard and not as_json:
            say("remove damaged shards with --discard, and run the data set again", "hint")
        raise typer.Exit(1)


def _print_summary(summary: Summary, as_json: bool, page: Path | None = None) -> None:
    rank, ranks = summary.rank
    if ranks > 1:
        say(f"rank {rank} of {ranks}: every {ranks}th shard from {rank} on", "note")
    if summary.missing:
        say(
            f"{len(summary.missing)} images of the plan are no longer in the source, such as "
            f"{summary.missing[0]}; their samples are kept, unless --prune is given",
            "note",
        )
    if as_json:
        print_json(
            {
                "folder": str(summary.folder),
                "complete": summary.complete,
                "shards": summary.shards,
                "done": summary.done,
                "made": summary.made,
                "images": summary.images,
                "new": summary.new,
                "changed": summary.changed,
                "missing": len(summary.missing),
                "encoded": summary.encoded,
                "quarantined": summary.quarantined,
                "seconds": round(summary.seconds, 3),
                "images_per_second": round(summary.images_per_second, 3),
                "waited": round(summary.waited, 3),
                "rank": rank,
                "ranks": ranks,
                **({} if page is None else {"page": str(page)}),
            }
        )
        return
    left_out = sum(summary.quarantined.values())
    quarantine = f"; {left_out} in quarantine: {_reasons(summary.quarantined)}" if left_out else ""
    typer.echo(
        f"{summary.folder}: {summary.encoded} images in {summary.made} shards, "
        f"{summary.done} of {summary.shards} shards are there{quarantine}"
    )
    if page is not None:
        typer.echo(f"{page}: where each channel is largest")


def _reasons(quarantined: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in quarantined.items()) or "empty"


def _buckets(buckets: dict[tuple[int, int], int]) -> str:
    shown = [f"{rows}x{columns} ({n})" for (rows, columns), n in list(buckets.items())[:8]]
    return ", ".join(shown) + (f" and {len(buckets) - 8} more" if len(buckets) > 8 else "")


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value}" for name, value in settings.items() if not isinstance(value, dict)
    )


def _workers(device: str) -> int:
    if device == "cpu":
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    import torch

    return max(1, torch.cuda.device_count()) if device == "cuda" else 1


def _own_device(device: str) -> str:
    """``cuda`` as the GPU of this rank on its machine, where torchrun gives one."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if device == "cuda" and rank.isdecimal() else device


def _parse_timesteps(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(
            "not timesteps", where="--timesteps", expected="such as 1,250,500", got=repr(text)
        )
    return tuple(int(part) for part in parts)


def _parse_rank(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found:
        raise InputError("not a rank", where="--rank", expected="R/N, such as 0/4", got=repr(text))
    return int(found[1]), int(found[2])


@contextmanager
def _progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress on standard error: a bar with the rate and the time left on a terminal, a line a
    minute elsewhere."""
    console = errors_console()
    if not console.is_terminal:
        yield _lines(unit)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, tuple[Any, float]] = {}

        def show(words: str, done: int, total: int) -> None:
            if words not in tasks:
                tasks[words] = (bar.add_task(words, total=total, rate=""), time.monotonic())
            task, start = tasks[words]
            rate = done / max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, total=total, rate=f"{rate:.1f} {unit}/s")

        yield show


def _lines(unit: str) -> Callable[[str, int, int], None]:
    start = last = time.monotonic()

    def show(words: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < EVERY:
            return
        last = now
        rate = done / (now - start)
        left = f", {(total - done) / rate / 60:.0f} min left" if rate else ""
        say(f"{words}: {done} of {total}, {rate:.1f} {unit}/s{left}", "progress")

    return show
