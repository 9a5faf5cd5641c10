"""The command that compares two checkpoints: diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sdconv.cli.common import Force, Json, Key, Plot, check_output, print_json, reading, say, show

_EITHER = "A file, a component's folder or a pipeline's, in any layout and dtype."


def diff(
    first: Annotated[Path, typer.Argument(metavar="A", help=_EITHER, show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B", help=_EITHER, show_default=False)],
    key: Key = None,
    plot: Plot = None,
    force: Force = False,
    every: Annotated[bool, typer.Option("--all", help="Show every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show what differs between two checkpoints, block by block.

    For each block: the norm of the difference relative to the norm of A's weights, the largest
    difference of two values, and how many tensors have changed; then the tensors that only one of
    the two holds. The status is 0 if every value is the same, in any dtype, and 1 if not.

    \b
    Examples:
      sdconv diff v1-5-pruned-emaonly.safetensors my-fine-tune.safetensors --plot diff.png
      sdconv diff stable-diffusion-v1-5/ v1-5-pruned-emaonly.safetensors
      sdconv diff a.safetensors b.safetensors --json
    """
    from sdconv.analysis.diff import compare
    from sdconv.checkpoint.io.pickles import weights_key

    if plot is not None:
        from sdconv.report.plots import plot_format

        plot_format(plot)
        check_output(plot, force, [first, second])
    with reading("comparing") as progress, weights_key(key):
        result = compare(first, second, on_tensor=progress)
    if plot is not None:
        from sdconv.report.difference import draw_difference

        draw_difference(result, plot)
        say(f"drawn: {plot}", "note")
    if as_json:
        print_json(result.to_json() | {"plot": None if plot is None else str(plot)})
    else:
        from sdconv.report.difference import difference_report

        show(difference_report(result, every=every))
    if not result.equal:
        raise typer.Exit(1)
