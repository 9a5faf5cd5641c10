"""The command that writes the explainer: explain-page."""

from __future__ import annotations

from pathlib import Path

from sdconv.cli.common import Force, Json, Out, check_output, print_json, say


def explain_page(
    out: Out = Path("explainer.html"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a page that explains convolutions by computing them: one file, opens from the disk.

    A small VAE and a photo are inside, and the page runs them in the browser: kernels, padding and
    strides, neurons, receptive fields, and the whole network, level by level. It loads nothing
    from a network.

    \b
    Examples:
      sdconv explain-page
      sdconv explain-page --out explainer.html --force
    """
    from sdconv.report.explainer.page import write_explainer

    check_output(out, force)
    size = write_explainer(out)
    if as_json:
        print_json({"page": str(out), "bytes": size})
    else:
        say(f"written: {out} ({size / 1e6:.1f} MB); open it in a browser", "note")
