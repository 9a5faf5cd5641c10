"""The options that the commands on data sets share."""

from __future__ import annotations

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import Dtype, parse_dtype
from sdconv.errors import InputError


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


def default_workers(device: str) -> int:
    """One for each core that this process may use, shared with the other ranks on this machine; or
    one for each GPU, unless this rank has one of its own."""
    if device == "cpu":
        cores = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "")
        return max(1, cores // max(1, int(ranks if ranks.isdecimal() else 1)))
    import torch

    return max(1, torch.cuda.device_count()) if own_device(device) == "cuda" else 1


def own_device(device: str) -> str:
    """``cuda`` as the GPU of this rank on its machine, where torchrun gives one."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if device == "cuda" and rank.isdecimal() else device


def parse_timesteps(text: str | None) -> tuple[int, ...]:
    """``1,250,500`` as numbers; none for None.

    Raises:
        InputError: another form.
    """
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(
            "not timesteps", where="--timesteps", expected="such as 1,250,500", got=repr(text)
        )
    return tuple(int(part) for part in parts)


def parse_stored(text: str) -> Dtype:
    """A dtype that data sets are stored in, as ``parse_dtype`` takes it."""
    dtype = parse_dtype(text)
    if dtype is Dtype.float64:
        raise typer.BadParameter(f"{text!r} is not one of float32, float16, bfloat16.")
    return dtype


def parse_rank(text: str | None) -> tuple[int, int] | None:
    """``0/4`` as (rank, number of ranks).

    Raises:
        InputError: another form.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not found:
        raise InputError("not a rank", where="--rank", expected="R/N, such as 0/4", got=repr(text))
    return int(found[1]), int(found[2])


def default_decoders(device: str) -> int:
    """A network on a GPU is faster than one process that decodes for it."""
    return 4 if device.startswith("cuda") else 1
