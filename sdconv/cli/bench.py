"""The command that times the backends, explains how the fast one computes each layer, and fits the
cost model by which it chooses."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Component,
    ComputeDtype,
    Dtype,
    Ema,
    Family,
    InputSize,
    Json,
    Key,
    Prefix,
    counting,
    one_or_all,
    print_json,
    say,
    show,
)
from sdconv.errors import InputError
from sdconv.sizes import parse_size


def bench(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]",
            help="The weights; not with --calibrate and --show. A file, a folder, several files of "
            "one network, or a name such as tiny-vae.",
            show_default=False,
        ),
    ] = None,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    ema: Ema = False,
    size: InputSize = None,
    dtype: ComputeDtype = Dtype.float32,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each backend.")] = 3,
    explained: Annotated[
        bool,
        typer.Option(
            "--explain", help="Time nothing: print the method of each convolution, and why."
        ),
    ] = False,
    calibrated: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Time convolutions for less than a minute and fit the cost model to this machine.",
        ),
    ] = False,
    shown: Annotated[
        bool, typer.Option("--show", help="Print the cost model's constants in force.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the reference and the fast backend against each other.

    They take turns on this CPU. Prints medians, the first fast call (which packs
    weights), the memory of the packed weights, and the largest difference over the largest value.
    With --explain: the method for each 3x3 convolution, what each method would cost, and why; from
    headers alone, without computing anything.

    The methods are chosen by a cost model whose constants ship. --calibrate fits them to this
    processor with this number of threads, and keeps them in the user's cache folder, or in that
    which SDCONV_CACHE names. Another method rounds differently.

    \b
    Examples:
      sdconv bench weights/tiny-vae.safetensors --size 128x128
      sdconv bench v1-5-pruned-emaonly.safetensors --component unet --rounds 5 --json
      sdconv bench v1-5-pruned-emaonly.safetensors --component unet --size 96x64 --explain
      sdconv bench weights/tiny-vae.safetensors --dtype bfloat16 --explain
      sdconv bench --calibrate
      sdconv bench --show --json
    """
    if calibrated or shown:
        if paths:
            raise InputError(
                "the cost model is not a network's",
                where="--calibrate" if calibrated else "--show",
                expected="no PATH",
                got=", ".join(map(str, paths)),
            )
        _cost_model(calibrated, as_json)
        return
    if not paths:
        raise typer.BadParameter("give the weights.", param_hint="PATH")

    from sdconv.analysis.explain import explain
    from sdconv.analysis.inspection import inspect
    from sdconv.analysis.memory import check_free_memory
    from sdconv.checkpoint.io.pickles import weights_key
    from sdconv.cli.running import running
    from sdconv.report.bench import explanation_report, timings_report

    given = None if size is None else parse_size(size)
    with weights_key(key):
        found = inspect(one_or_all(paths), family=family, prefix=prefix).network(component)
    pixels = found.component == "vae"
    shape = given or ((512, 512) if pixels else (64, 64))
    with running("running without values"):
        explanation = explain(found.config, shape, dtype=dtype.in_torch())
    if explained:
        if as_json:
            print_json({"component": found.component, **asdict(explanation)})
        else:
            show(explanation_report(explanation))
        return

    from sdconv.analysis.timings import time_backends
    from sdconv.loading import load

    where = f"{shape[0]}x{shape[1]}"
    # the input and output of the largest layer
    least = max(
        (
            layer.size[0] * layer.size[1] * (layer.channels + layer.out_channels)
            for layer in explanation.layers
        ),
        default=0,
    )
    least *= dtype.in_torch().itemsize
    check_free_memory(least, where, ("size",))
    network = load(
        one_or_all(paths),
        found.component,
        dtype=dtype.in_torch(),
        family=family,
        prefix=prefix,
        key=key,
        ema=ema,
    )
    with counting("timing") as progress, running(""):
        timings = time_backends(network, shape, rounds, progress)
    if as_json:
        rows = [asdict(row) | {"ratio": row.ratio} for row in timings.rows]
        print_json({"component": found.component, **asdict(timings), "rows": rows})
    else:
        show(timings_report(timings))


def _cost_model(calibrated: bool, as_json: bool) -> None:
    """Print the cost model's constants in force, fitted first if ``calibrated``."""
    from sdconv.fast.cpu.calibrate import calibrate
    from sdconv.fast.cpu.cost_constants import (
        SHIPPED,
        calibration_in_force,
        constants_in_force,
        constants_path,
        keep,
        other_conditions,
        present_conditions,
    )
    from sdconv.report.bench import constants_report

    if calibrated:
        with counting("timing convolutions") as progress:
            fitted = calibrate(on_case=progress)
        keep(fitted)
        if fitted.error > 0.25:
            say(
                f"the model is off by {fitted.error:.0%} (median): calibrate again while nothing "
                "else runs on this machine",
                "warning",
            )
    constants, found, others = constants_in_force(), calibration_in_force(), other_conditions()
    if not as_json:
        show(constants_report(constants, found, len(others)))
        return
    print_json(
        {
            "constants": asdict(constants),
            "shipped": asdict(SHIPPED),
            "calibration": None if found is None else asdict(found),
            "conditions": asdict(present_conditions()),
            "others": [asdict(one) for one in others],
            "file": str(constants_path()),
        }
    )
