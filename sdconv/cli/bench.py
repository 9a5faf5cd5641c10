"""The command that times the backends, and explains how the fast one computes each layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from sdconv.cli.common import (
    Component,
    Ema,
    Family,
    InputSize,
    Json,
    Key,
    Paths,
    Prefix,
    counting,
    one_or_all,
    print_json,
    show,
)
from sdconv.sizes import parse_size


def bench(
    paths: Paths,
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    ema: Ema = False,
    size: InputSize = None,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Runs of each backend.")] = 3,
    explained: Annotated[
        bool,
        typer.Option(
            "--explain", help="Time nothing: print the method of each convolution, and why."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the reference and the fast backend against each other.

    They take turns on this CPU, in float32. Prints medians, the first fast call (which packs
    weights), the memory of the packed weights, and the largest difference over the largest value.
    With --explain: the method for each 3x3 convolution, what each method would cost, and why; from
    headers alone, without computing anything.

    \b
    Examples:
      sdconv bench weights/tiny-vae.safetensors --size 128x128
      sdconv bench v1-5-pruned-emaonly.safetensors --component unet --rounds 5 --json
      sdconv bench v1-5-pruned-emaonly.safetensors --component unet --size 96x64 --explain
    """
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
        explanation = explain(found.config, shape)
    if explained:
        if as_json:
            print_json({"component": found.component, **asdict(explanation)})
        else:
            show(explanation_report(explanation))
        return

    import torch

    from sdconv.analysis.timings import time_backends
    from sdconv.loading import load

    where = f"{shape[0]}x{shape[1]}"
    # the input and output of the largest layer
    least = max(
        (
            4 * layer.size[0] * layer.size[1] * (layer.channels + layer.out_channels)
            for layer in explanation.layers
        ),
        default=0,
    )
    check_free_memory(least, where, ("size",))
    network = load(
        one_or_all(paths),
        found.component,
        dtype=torch.float32,
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
