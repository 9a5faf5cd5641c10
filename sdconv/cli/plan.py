"""The command that predicts the memory and the time of a streamed autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from sdconv.cli.common import (
    ComputeDtype,
    Dtype,
    Family,
    ImageSize,
    Json,
    Key,
    Prefix,
    With,
    counting,
    one_or_all,
    print_json,
    sharing,
    show,
)
from sdconv.cli.running import image_backend
from sdconv.errors import InputError
from sdconv.sizes import parse_bytes, parse_size

if TYPE_CHECKING:
    from sdconv.models.base import Autoencoder
    from sdconv.models.tiny import AutoencoderTiny


def plan(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]",
            help="Weights, of which only names and shapes are read. Without them: the VAE of SD1, "
            "SD2 and SDXL.",
            show_default=False,
        ),
    ] = None,
    size: ImageSize = "2048x2048",
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="The limit, without weights: 4GiB, 1500MB.")
    ] = "2GiB",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Number of images.")] = 1,
    spill: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Check that there is enough disk space for what is spilled.",
            show_default=False,
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option("--time/--no-time", help="Time one strip of each kind of layer on this CPU."),
    ] = True,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    dtype: ComputeDtype = Dtype.float32,
    backend: With = None,
    as_json: Json = False,
) -> None:
    """Predict the memory and the time of streaming an image through an autoencoder.

    Shows the peak memory without the weights, the disk space for feature maps beyond the limit,
    the lowest limits that can be met, and the seconds on this machine's CPU. No weights are read:
    strips are timed with random ones. `sdconv encode` and `decode` follow the same plan with the
    same --memory and --backend, and so does
    vae.enable_streaming(memory_limit="4GiB", spill="/a/folder") in Python.

    \b
    Examples:
      sdconv plan --size 4096x4096 --memory 4GiB
      sdconv plan vae.safetensors --size 512x16384 --memory 1GiB --spill /var/tmp
      sdconv plan --size 2048x2048 --backend reference --no-time --json
    """
    from sdconv.backends import set_backend
    from sdconv.models.tiny import AutoencoderTiny
    from sdconv.report.tables import plan_table
    from sdconv.streaming import spill_folder

    rows, columns = parse_size(size)
    limit = parse_bytes(memory, "--memory")
    folder = None if spill is None else spill_folder(spill)
    network = _without_weights(paths, family, prefix, key).to(dtype.in_torch())
    chosen = image_backend(backend, "cpu").value
    set_backend(network, chosen)
    scale = network.downscale
    if min(rows, columns) < scale:
        raise InputError("the image is too small", where="--size", expected=f"at least {scale}")
    sizes = {"encode": (rows, columns), "decode": (rows // scale, columns // scale)}
    answers = (
        _of_rows(network, sizes, batch, limit, timed)
        if isinstance(network, AutoencoderTiny)
        else _of_layers(network, sizes, batch, limit, timed, folder)
    )
    if as_json:
        print_json(
            {
                "height": rows,
                "width": columns,
                "batch": batch,
                "dtype": dtype.value,
                "backend": chosen,
                "memory_limit": limit,
                **answers,
            }
        )
    else:
        show(plan_table(answers))


def _of_layers(
    network: Autoencoder,
    sizes: Mapping[str, tuple[int, int]],
    batch: int,
    limit: int,
    timed: bool,
    folder: Path | None,
) -> dict[str, dict[str, Any]]:
    """What a VAE takes in each direction, layer by layer."""
    import torch

    from sdconv.streaming import check_disk_space, least_memory, make_plan, steps_of
    from sdconv.streaming.calibration import predict_seconds

    steps = {name: steps_of(network, cast(Any, name), *size) for name, size in sizes.items()}
    least = {
        direction: {
            spilling: least_memory(own, batch=batch, spill=spilling) for spilling in (True, False)
        }
        for direction, own in steps.items()
    }
    answers: dict[str, dict[str, Any]] = {}
    # The one that needs more comes first: the limit that its error asks for is enough for both.
    for direction in sorted(steps, key=lambda direction: -least[direction][True]):
        found = make_plan(steps[direction], batch=batch, limit=limit, can_spill=True)
        if folder is not None:
            check_disk_space(folder, found.spilled)
        answers[direction] = {
            "peak": found.peak,
            "spilled": found.spilled,
            "least": least[direction][True],
            "least_without_spill": least[direction][False],
            "strips": found.strips,
            "multiplies": found.multiplies,
            "seconds": None,
        }
        if timed:
            with counting(f"timing strips: {direction}") as progress:
                seconds = predict_seconds(found, device=torch.device("cpu"), on_step=progress)
            answers[direction]["seconds"] = seconds
    return answers


def _of_rows(
    network: AutoencoderTiny,
    sizes: Mapping[str, tuple[int, int]],
    batch: int,
    limit: int,
    timed: bool,
) -> dict[str, dict[str, Any]]:
    """What a tiny autoencoder takes in each direction that it has, all layers at once."""
    import torch

    from sdconv.streaming import plan_rows
    from sdconv.streaming.calibration import predict_row_seconds

    halves: list[Any] = [
        direction for direction in sizes if getattr(network, f"{direction}r") is not None
    ]
    least = {
        name: plan_rows(network, name, batch, *sizes[name], limit=None).least for name in halves
    }
    answers: dict[str, dict[str, Any]] = {}
    for direction in sorted(halves, key=lambda name: -least[name]):
        size = sizes[direction]
        found = plan_rows(network, direction, batch, *size, limit=limit)
        answers[direction] = {
            "peak": found.peak,
            "spilled": 0,
            "least": found.least,
            "least_without_spill": found.least,
            "strips": found.strips,
            "multiplies": found.multiplies,
            "seconds": None,
        }
        if timed:
            with sharing(f"timing strips: {direction}") as progress:
                answers[direction]["seconds"] = predict_row_seconds(
                    network, direction, found, size[1], torch.device("cpu"), progress
                )
    return answers


def _without_weights(
    paths: list[Path] | None, family: str | None, prefix: str | None, key: str | None
) -> Autoencoder:
    """The network on the meta device.

    Raises:
        InputError: it is not an autoencoder.
    """

    from sdconv.config import AutoencoderKLConfig
    from sdconv.devices import on_meta
    from sdconv.loading import build
    from sdconv.models.base import Autoencoder

    if paths:
        from sdconv.analysis.inspection import inspect
        from sdconv.checkpoint.io.pickles import weights_key

        with weights_key(key):
            found = inspect(one_or_all(paths), family=family, prefix=prefix)
        config = found.network("vae").config
    else:
        usual = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        config = AutoencoderKLConfig(**{**AutoencoderKLConfig.assumed, **usual})
    with on_meta():
        network = build(config)
    assert isinstance(network, Autoencoder)  # what "vae" is
    return network
