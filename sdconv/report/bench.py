"""The backends' times, and how the fast one computes each layer, as tables."""

from __future__ import annotations

from statistics import median

from rich.console import Group, RenderableType

from sdconv.analysis.explain import Explanation
from sdconv.analysis.timings import Timings
from sdconv.fast.cpu.cost_constants import (
    SHIPPED,
    Calibration,
    CostConstants,
    constants_path,
    present_conditions,
)
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
        "network": f"{found.class_name}, {_by(found.size)}, {found.dtype}, {found.threads} threads",
        "medians of": f"{len(found.rows[0].fast)} rounds",
        "compiling": f"{found.compiling:.3g} s",
        "packed weights": f"{in_bytes(found.memory)} of at most {in_bytes(found.limit)}",
    }
    if found.prompt_memory:
        facts["prompt's keys, values"] = in_bytes(found.prompt_memory)
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
        "network": f"{found.class_name}, {_by(found.size)}, {found.dtype}",
        "packed weights": f"{in_bytes(found.memory)} of at most {in_bytes(found.limit)}",
        "cost model": _source(found.calibrated),
    }
    return Group(facts_of(facts), table, plain(_EXPLAINED, "dim"))


def constants_report(
    constants: CostConstants, calibration: Calibration | None, others: int
) -> RenderableType:
    """What ``sdconv bench --show`` and ``--calibrate`` print.

    Args:
        constants: those in force.
        calibration: where they are from; None if they ship.
        others: how many calibrations of other conditions are kept.
    """
    table = table_of("constant", ">in force", ">shipped", "multiply-accumulates for")
    for name, words in _CONSTANTS.items():
        table.add_row(
            name, f"{getattr(constants, name):.4g}", f"{getattr(SHIPPED, name):.4g}", words
        )
    facts = {"cost model": _source(None if calibration is None else calibration.day)}
    if calibration is not None:
        facts["off by"] = f"{calibration.error:.0%} (median of {calibration.shapes} times)"
    conditions = present_conditions()
    facts |= {
        "processor": conditions.processor,
        "threads": str(conditions.threads),
        "kernels": conditions.kernels,
        "file": str(constants_path()),
    }
    if others:
        facts["also there"] = f"{others} for other processors, threads or kernels"
    return Group(facts_of(facts), table)


def _source(day: str | None) -> str:
    return "the constants that ship" if day is None else f"fitted on this machine on {day}"


_CONSTANTS = {
    "direct": "one of torch's convolution",
    "reorder": "each value of a weight that torch reorders",
    "read": "each value of a packed weight",
    "kernel": "each 3x3 kernel that is transformed for a strip",
    "transform": "each value of a transformed tile",
    "normalise": "each value normalised in a pass of its own",
    "prologue": "each value normalised as Winograd's transform reads it",
    "call": "each call",
}


_EXPLAINED = """\
input: rows x columns of the input
costs: the modelled time of each method, in multiplications of a matrix product
image_conv: of an image or other input with few channels, by a kernel of its own
torch: the layer's own forward. Not listed: 1x1 convolutions, the U-Net's strided convolutions"""


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
