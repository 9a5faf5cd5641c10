"""The command that shows a network's structure: anatomy."""

from __future__ import annotations

from typing import Annotated

import typer

from sdconv.cli.common import (
    Component,
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
    print_json,
    say,
    show,
)
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
    as_json: Json = False,
) -> None:
    """Show each convolution: its geometry, its cost and its receptive field.

    Kernel, stride, padding, channels, the feature map's size, parameters, multiplies, receptive
    field and downscale factor; then the shares of convolutions, attention and normalisation. Only
    headers are read, no tensors.

    \b
    Examples:
      sdconv anatomy vae.safetensors
      sdconv anatomy vae.safetensors --size 1024x1024 --plot anatomy.png
      sdconv anatomy v1-5-pruned-emaonly.safetensors --component vae --json
    """
    from sdconv.analysis.anatomy import dissect
    from sdconv.analysis.inspection import inspect
    from sdconv.checkpoint.io.pickles import weights_key

    shape = parse_size(size)
    if plot is not None:
        from sdconv.report.plots import plot_format

        plot_format(plot)
        check_output(plot, force, paths)
    with weights_key(key):
        inspection = inspect(one_or_all(paths), family=family, prefix=prefix)
    found = inspection.network(component or "vae")
    result = dissect(found.config, shape)
    if plot is not None:
        from sdconv.report.plots import draw_anatomy

        draw_anatomy(result, plot)
        say(f"drawn: {plot}", "note")
    if as_json:
        written = None if plot is None else str(plot)
        print_json({"component": found.component, **result.to_json(), "plot": written})
    else:
        from sdconv.report.tables import anatomy_report

        show(anatomy_report(result, every=every))
