"""The command about a network's structure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import (
    Component,
    Family,
    Json,
    Paths,
    one_or_all,
    print_json,
    say,
    show,
)
from sdconv.sizes import parse_size


def anatomy(
    paths: Paths,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Of the picture: rows and columns.")
    ] = "512x512",
    component: Component = None,
    family: Family = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw it: .png, .svg or .pdf (needs the extra: pip install 'sdconv[plot]').",
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every single operation.")] = False,
    as_json: Json = False,
) -> None:
    """Show what each convolution does, costs and sees.

    Kernel, stride, padding, channels and size of the map, parameters and multiplies, receptive
    field, and the share of convolutions, attention and norms in the whole. Works from headers
    alone; no tensor is read.

    \b
    Examples:
      sdconv anatomy vae.safetensors
      sdconv anatomy vae.safetensors --size 1024x1024 --plot anatomy.png
      sdconv anatomy v1-5-pruned-emaonly.safetensors --component vae --json
    """
    from sdconv.analysis.anatomy import dissect
    from sdconv.analysis.inspection import inspect

    shape = parse_size(size)
    if plot is not None:
        from sdconv.report.plots import plot_format

        plot_format(plot)
    found = inspect(one_or_all(paths), family=family).network(component or "vae")
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
