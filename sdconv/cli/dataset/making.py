"""`sdconv dataset encode` and `features`."""

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
    Json,
    Model,
    With,
    one_or_all,
    print_json,
    say,
)
from sdconv.cli.dataset.options import (
    Decoders,
    Draft,
    Engine,
    FeatureLayout,
    ForceAnew,
    Kind,
    Layout,
    OnError,
    OnErrors,
    OutFolder,
    Prune,
    Rank,
    Rehash,
    ShardSize,
    SizeText,
    Source,
    Threads,
    WithEngine,
    Workers,
    default_decoders,
    default_workers,
    own_device,
    parse_rank,
    parse_stored,
    parse_timesteps,
)
from sdconv.cli.dataset.progress import Advance, progress_of
from sdconv.cli.running import image_backend

if TYPE_CHECKING:
    from sdconv.dataset import FeatureExtractor, Summary


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
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, metavar="N", help="Of samples; the key decides the rest."
        ),
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
            parser=parse_stored,
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
    backend: With = None,
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
        backend=image_backend(backend, device).value,
        batch=batch,
    )
    encoder = Encoder(
        one_or_all(model),
        settings,
        component=component,
        family=family,
        device=own_device(device),
        threads=threads,
    )
    options = Options(
        size=size,
        layout=layout.value,
        shard_size=shard_size,
        draft=draft,
        workers=workers or default_workers(device),
        decoders=default_decoders(device) if decoders is None else decoders,
        engine=engine.value,
        rank=parse_rank(rank),
        on_error=on_error.value,
        force=force,
        rehash=rehash,
        prune=prune,
    )
    with progress_of("images") as progress:
        summary = encode_all(source, encoder, out, options=options, progress=progress)
    _print_summary(summary, as_json)


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
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, metavar="N", help="Of the noise; the key decides the rest."
        ),
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
            help="Write DIR/patches.html: for each channel the K images of the data set where it "
            "is largest, cut out around that place.",
        ),
    ] = 0,
    top_channels: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="How many channels of each point it shows: the first N."
        ),
    ] = 64,
    size: SizeText = "512",
    store: Annotated[
        Dtype,
        typer.Option(
            parser=parse_stored, metavar="DTYPE", help="The dtype in which they are stored."
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
          -p 'up_blocks.*.resnets.?' --reduce pool:8 --layout zarr -o features
      sdconv dataset features photos -m vae.safetensors -p encoder.mid_block --top-patches 9 -o top
    """
    from sdconv.dataset import FeatureExtractor, FeatureSettings, Options
    from sdconv.dataset import features as read_all

    settings = FeatureSettings(
        points=tuple(points),
        exclude=tuple(exclude or ()),
        timesteps=parse_timesteps(timesteps),
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
        device=own_device(device),
        threads=threads,
    )
    options = Options(
        size=size,
        layout=layout.value,
        shard_size=shard_size,
        draft=draft,
        workers=workers or default_workers(device),
        decoders=default_decoders(device) if decoders is None else decoders,
        engine=engine.value,
        rank=parse_rank(rank),
        on_error=on_error.value,
        force=force,
        rehash=rehash,
        prune=prune,
    )
    with progress_of("images") as progress:
        summary = read_all(source, extractor, out, options, progress=progress)
        page = None
        if top_patches and summary.complete:
            page = _write_patches(out, source, extractor, top_patches, top_channels, progress)
    _print_summary(summary, as_json, page)


def _write_patches(
    out: Path,
    source: str,
    extractor: FeatureExtractor,
    patches: int,
    channels: int,
    progress: Advance,
) -> Path:
    from sdconv.dataset.patches import top_patches
    from sdconv.dataset.store import PATCHES
    from sdconv.report.patches import write_patches

    found = top_patches(out, source, extractor, patches, channels=channels, progress=progress)
    page = out / PATCHES
    name = extractor.network.config.class_name
    write_patches(found, page, title=f"Where channels of {name} are largest")
    return page


def _print_summary(summary: Summary, as_json: bool, page: Path | None = None) -> None:
    rank, ranks = summary.rank
    if ranks > 1:
        say(
            f"rank {rank} of {ranks}: shards {rank}, {rank + ranks}, {rank + 2 * ranks} and so on",
            "note",
        )
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
    quarantine = f"; {left_out} in quarantine: {reasons(summary.quarantined)}" if left_out else ""
    typer.echo(
        f"{summary.folder}: {summary.encoded} images in {summary.made} shards, "
        f"{summary.done} of {summary.shards} shards are there{quarantine}"
    )
    if page is not None:
        typer.echo(f"{page}: where each channel is largest")


def reasons(quarantined: dict[str, int]) -> str:
    """The images in quarantine, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in quarantined.items()) or "empty"
