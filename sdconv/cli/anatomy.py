"""The command that shows a network's structure: anatomy."""

from __future__ import annotations

import csv
import sys
from typing import Annotated

import typer

from sdconv.cli.common import (
    Component,
    Dtype,
    Family,
    Force,
    ImageSize,
    Json,
    Key,
    Paths,
    Plot,
    Prefix,
    check_output,
    one_or_all,
    parse_dtype,
    print_json,
    say,
    show,
)
from sdconv.errors import InputError
from sdconv.sizes import parse_size


def anatomy(
    paths: Paths,
    size: ImageSize = "512x512",
    component: Component = None,
    family: Family = None,
    prefix: Prefix = None,
    key: Key = None,
    plot: Plot = None,
    force: Force = False,
    every: Annotated[bool, typer.Option("--all", help="Show every single operation.")] = False,
    depth: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Add up blocks whose names share the first N parts: 1 for the two halves, 3 for "
            "encoder.down_blocks.0 and the like.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            parser=parse_dtype, metavar="DTYPE", help="For the memory of weights and activations."
        ),
    ] = Dtype.float32,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="Print CSV on standard output, nothing else.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show each block's geometry, memory, cost and receptive field.

    Kernel, stride, padding, channels, the feature map's size, parameters, the memory of weights and
    activations, MACs (multiply-accumulates), receptive field and downscale factor; then the shares
    of convolutions, attention and normalisation. Only headers are read, no tensors. A U-Net gets
    the latents of an image of --size, and a prompt of 77 tokens. In a whole checkpoint the VAE is
    shown, unless --component says otherwise.

    \b
    Examples:
      sdconv anatomy vae.safetensors
      sdconv anatomy tiny-vae --depth 2 --dtype float16
      sdconv anatomy tiny-vae --all --csv
      sdconv anatomy vae.safetensors --size 1024x1024 --plot anatomy.png
      sdconv anatomy v1-5-pruned-emaonly.safetensors --component unet --depth 3 --json
    """
    from sdconv.analysis.anatomy import dissect
    from sdconv.analysis.inspection import inspect
    from sdconv.checkpoint.io.pickles import weights_key

    if as_csv and as_json:
        raise InputError("only one form can be printed", where="--csv and --json")
    shape = parse_size(size)
    if plot is not None:
        from sdconv.report.plots import plot_format

        plot_format(plot)
        check_output(plot, force, paths)
    with weights_key(key):
        inspection = inspect(one_or_all(paths), family=family, prefix=prefix)
    several = {one.component for one in inspection.networks}
    if component is None and len(several) > 1:
        component = "vae"
        say(
            f"the weights hold {' and '.join(sorted(several))}; the vae is shown (see --component)",
            "note",
        )
    found = inspection.network(component)
    result = dissect(found.config, shape)
    if depth is not None:
        result = result.at_depth(depth)
    if plot is not None:
        from sdconv.report.plots import draw_anatomy

        draw_anatomy(result, plot)
        say(f"drawn: {plot}", "note")
    itemsize = dtype.in_torch().itemsize
    if as_csv:
        rows = list(result.to_rows(every=every, itemsize=itemsize))
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif as_json:
        written = None if plot is None else str(plot)
        print_json(
            {
                "component": found.component,
                "dtype": dtype.value,
                **result.to_json(itemsize),
                "plot": written,
            }
        )
    else:
        from sdconv.report.tables import anatomy_report

        show(anatomy_report(result, every=every, itemsize=itemsize))
