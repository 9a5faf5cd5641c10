"""The backends' times, and how the fast one computes each layer, as tables."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType

from sdconv.analysis.explain import Explanation
from sdconv.analysis.timings import Timings
from sdconv.report.pieces import facts_of, plain, table_of
from sdconv.sizes import count, in_bytes


def timings_report(found: Timings) -> RenderableType:
    """What ``sdconv bench`` prints."""
    heads = ("", ">reference", ">fast", ">times as fast", ">first fast call", ">max |a-b|/max |a|")
    table = table_of(*heads)
    for row in found.rows:
        table.add_row(
            row.work,
            f"{median(row.reference):.3g} s",
            f"{median(row.fast):.3g} s",
            f"{row.ratio:.2f}",
            f"{row.first:.3g} s",
            f"{row.difference:.1e}",
        )
    facts = {
        "network": f"{found.class_name}, {_by(found.size)}, {found.threads} threads",
        "medians of": f"{len(found.rows[0].fast)} rounds",
        "compiling": f"{found.compiling:.3g} s",
        "packed weights": f"{in_bytes(found.memory)} of at most {in_bytes(found.limit)}",
    }
    return Group(facts_of(facts), table)


def explanation_report(found: Explanation) -> RenderableType:
    """What ``sdconv bench --explain`` prints."""
    table = table_of("layer", "kind", ">channels", ">input", "method", "costs", "why")
    work = None
    for layer in found.layers:
        if layer.work != work:
            work = layer.work
            table.add_row(plain(work, "bold"))
        table.add_row(
            plain(layer.name),
            layer.kind,
            f"{layer.channels} > {layer.out_channels}",
            _by(layer.size),
            layer.method,
            ", ".join(f"{name} {count(round(cost))}" for name, cost in layer.costs.items()),
            plain(layer.reason),
        )
    facts = {
        "network": f"{found.class_name}, {_by(found.size)}",
        "packed weights": f"{in_bytes(found.memory)} of at most {in_bytes(found.limit)}",
    }
    return Group(facts_of(facts), table, plain(_EXPLAINED, "dim"))


_EXPLAINED = """\
input: rows x columns of the input
costs: the modelled time of each method, in multiplications of a matrix product
torch: the layer's own forward. Not listed: 1x1 convolutions, the U-Net's strided convolutions"""


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
