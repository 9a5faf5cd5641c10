"""The command that says what a streamed picture will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdconv.cli.common import (
    IMAGE_BACKEND,
    ComputeDtype,
    Dtype,
    Family,
    ImageSize,
    Json,
    With,
    one_or_all,
    print_json,
    show,
    working,
)
from sdconv.errors import InputError
from sdconv.sizes import parse_size

if TYPE_CHECKING:
    from sdconv.models.vae import AutoencoderKL


def plan(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]",
            help="Weights, of which only names and shapes are read; the VAE of SD1, SD2 and SDXL "
            "if left out.",
            show_default=False,
        ),
    ] = None,
    size: ImageSize = "2048x2048",
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="The limit, weights apart: 4GiB, 1500MB.")
    ] = "2GiB",
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="How many pictures.")] = 1,
    spill: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Check that what is spilled has room there.",
            show_default=False,
        ),
    ] = None,
    timed: Annotated[
        bool,
        typer.Option("--time/--no-time", help="Time one strip of each kind of layer, here."),
    ] = True,
    family: Family = None,
    dtype: ComputeDtype = Dtype.float32,
    backend: With = IMAGE_BACKEND,
    as_json: Json = False,
) -> None:
    """Say what streaming a picture through a VAE will take.

    Memory beside the weights, room on the disk for maps beyond the limit, the least limits that can
    be met, and seconds on this machine's CPU. No weights are read: strips are timed with random
    ones. `sdconv encode` and `decode` keep to it with the same --memory and --backend, and so does
    vae.enable_streaming(memory_limit="4GiB", spill="/a/folder") in Python.

    \b
    Examples:
      sdconv plan --size 4096x4096 --memory 4GiB
      sdconv plan vae.safetensors --size 512x16384 --memory 1GiB --spill /var/tmp
      sdconv plan --size 2048x2048 --backend reference --no-time --json
    """
    import torch

    from sdconv.backends import set_backend
    from sdconv.streaming import (
        calibration,
        check_room,
        checked_folder,
        least_memory,
        make_plan,
        parse_bytes,
        steps_of,
    )

    rows, columns = parse_size(size)
    limit = parse_bytes(memory, "--memory")
    folder = None if spill is None else checked_folder(spill)
    network = _blank(paths, family).to(dtype.in_torch())
    set_backend(network, backend.value)
    scale = network.downscale
    if min(rows, columns) < scale:
        raise InputError("too small a picture", where="--size", expected=f"at least {scale}")
    steps = {
        "encode": steps_of(network, "encode", rows, columns),
        "decode": steps_of(network, "decode", rows // scale, columns // scale),
    }
    least = {
        work: {
            spilling: least_memory(own, pictures=batch, spill=spilling)
            for spilling in (True, False)
        }
        for work, own in steps.items()
    }
    answers: dict[str, dict[str, Any]] = {}
    # the one that needs more first: what it says of a limit that is too small holds for both
    for work in sorted(steps, key=lambda work: -least[work][True]):
        found = make_plan(steps[work], pictures=batch, limit=limit, can_spill=True)
        if folder is not None:
            check_room(folder, found.spilled)
        answers[work] = {
            "peak": found.peak,
            "spilled": found.spilled,
            "least": least[work][True],
            "least_without_spill": least[work][False],
            "strips": sum(-(-s.units // n) for s, n in zip(found.steps, found.units, strict=True)),
            "multiplies": found.multiplies,
            "seconds": None,
        }
        if timed:
            with working(f"timing strips: {work}"):
                seconds = calibration.seconds(found, device=torch.device("cpu"))
            answers[work]["seconds"] = seconds
    if as_json:
        head: dict[str, Any] = {
            "height": rows,
            "width": columns,
            "batch": batch,
            "dtype": dtype.value,
        }
        head["backend"] = backend.value
        print_json({**head, "memory_limit": limit, **answers})
    else:
        show(_report(answers))


def _blank(paths: list[Path] | None, family: str | None) -> AutoencoderKL:
    """The network without weights.

    Raises:
        InputError: it is no VAE that can be streamed.
    """
    import torch

    from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
    from sdconv.models.vae import AutoencoderKL

    if paths:
        from sdconv.analysis.inspection import inspect

        config = inspect(one_or_all(paths), family=family).network("vae").config
    else:
        usual = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
        config = AutoencoderKLConfig(**{**AutoencoderKLConfig.assumed, **usual})
    if not isinstance(config, AutoencoderKLConfig | AutoencoderKLFlux2Config):
        raise InputError(
            "only a VAE is streamed",
            where="PATH",
            expected="AutoencoderKL or AutoencoderKLFlux2",
            got=config.class_name,
        )
    with torch.device("meta"):
        return AutoencoderKL(config)


def _report(answers: dict[str, dict[str, Any]]) -> Any:
    from sdconv.report.pieces import table_of
    from sdconv.streaming import in_words

    heads = ("", ">memory", ">on disk", ">strips", ">seconds", ">least", ">without spilling")
    table = table_of(*heads)
    for work, found in answers.items():
        seconds = "" if found["seconds"] is None else f"{found['seconds']:.3g}"
        sizes = {key: in_words(value) for key, value in found.items() if isinstance(value, int)}
        table.add_row(
            work,
            sizes["peak"],
            sizes["spilled"],
            str(found["strips"]),
            seconds,
            sizes["least"],
            sizes["least_without_spill"],
        )
    return table
