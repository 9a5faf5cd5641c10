"""Tables for a terminal: what inspect, check, anatomy and fetch print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from math import isnan
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from sdconv.report.pieces import SHOWN, FittingTable, facts_of, plain, some, table_of
from sdconv.sizes import count, format_bytes, format_padding, format_pair, in_bytes

if TYPE_CHECKING:
    from sdconv.analysis.anatomy import Anatomy, Block, Operation
    from sdconv.analysis.inspection import (
        Amount,
        InspectedNetwork,
        InspectedSource,
        Inspection,
        ValueReport,
    )
    from sdconv.analysis.parity import ModuleDifference, ParityReport
    from sdconv.hub.manifest import KnownCheckpoint


def inspection_report(inspection: Inspection, values: ValueReport | None) -> RenderableType:
    """What ``sdconv inspect`` prints."""
    blocks: list[RenderableType] = []
    for part in inspection.parts:
        blocks += _source(part)
    if values is not None:
        blocks += _values(values)
    return Group(*blocks)


def parity_report(report: ParityReport, *, every: bool) -> RenderableType:
    """What ``sdconv check`` prints: every module, or the top-level ones, the first that differs and
    the worst."""
    rows = [
        row
        for row in report.rows
        if every or _is_top(row.name) or row.name == report.first_difference or row is report.worst
    ]
    table = table_of("module", "output", ">max |a-b|", ">relative", ">ULPs", "")
    for row in rows:
        table.add_row(
            plain(row.name if row.call == 1 else f"{row.name} (call {row.call})"),
            " x ".join(map(str, row.shape)),
            *_difference(row),
        )
    shown = "" if every else f" of {len(report.rows)}; --all shows each"
    facts = facts_of(
        {
            "file": report.label,
            "network": f"{report.component}: {report.class_name}",
            "against": f"{report.against}, {report.conversion}",
            "in": f"{report.dtype} on {report.device}",
            "modules": f"{len(rows)}{shown}",
            "tolerance": f"{report.tolerance:.3g} ({report.tolerance_source})",
            "first difference": report.first_difference or "none",
            "worst": "none" if report.first_difference is None else report.worst.name,
        }
    )
    if not report.passed:
        verdict = Text(f"failed: {report.worst.name} {report.worst.verdict}", style="bold red")
    elif report.first_difference is None:
        verdict = Text("passed: every module is equal, bit for bit", style="green")
    else:
        verdict = Text("passed: every module is within the tolerance", style="green")
    return Group(facts, table, verdict)


def anatomy_report(anatomy: Anatomy, *, every: bool, itemsize: int = 4) -> RenderableType:
    """What ``sdconv anatomy`` prints: every block or every operation, and the totals.

    Args:
        anatomy: what is shown. every: every operation. itemsize: bytes of a value.
    """
    from sdconv.analysis.anatomy import PATHS

    rows, columns = anatomy.size
    sides = f"an image of {rows}x{columns} (rows x columns)"
    if unet := anatomy.blocks_of("denoise"):
        sides = f"latents of {_sides(unet[-1].out_size)}, of {sides}"
    parts: list[RenderableType] = [plain(f"{anatomy.class_name} on {sides}", "bold")]
    for path in PATHS:
        if blocks := anatomy.blocks_of(path):
            parts.append(_half(anatomy, path, blocks, every, itemsize))
    return Group(*parts, _totals(anatomy), plain(_EXPLAINED, "dim"))


_EXPLAINED = """\
output: rows x columns of the feature map that comes out
activations: memory of the outputs of all operations of a block, which training keeps
MACs: multiply-accumulates of convolutions, linear layers and attention, for one image
padding: zeros on every side; 0,1 is at the bottom and on the right only
receptive field: the pixels across (latents in decoders and U-Nets) that one value depends on
through convolutions and skips; * global, through attention (GroupNorm's statistics are global too)
downscale: pixels (latents in decoders and U-Nets) from one value to the next, the true stride of
the layers so far; 1/2 after upsampling. Embeddings of the timestep and the prompt have neither"""


def manifest_report(known: Iterable[KnownCheckpoint]) -> RenderableType:
    """What ``sdconv fetch --list`` prints."""
    table = table_of("name", "holds", "family", ">size", "licence", "repository", "file")
    for one in known:
        size = in_bytes(one.size) if one.size else f"about {in_bytes(one.approximate_size or 0)}"
        table.add_row(
            one.name,
            ", ".join(one.components),
            one.family,
            size,
            one.licence + (" (terms to accept)" if one.gated else ""),
            one.repository,
            one.file,
        )
    return table


def _amount(amount: Amount) -> str:
    kinds = ", ".join(f"{number} {dtype}" for dtype, number in amount.dtypes.items())
    return f"{amount.tensors} tensors ({kinds}), {in_bytes(amount.nbytes)}"


def _source(source: InspectedSource) -> Iterator[RenderableType]:
    yield plain(source.name, "bold underline")
    facts: dict[str, object] = {"holds": _amount(source.amount)}
    if len(source.files) > 1 or source.files != (source.name,):
        facts["files"] = some(source.files)
    facts |= {
        f"metadata {key}": value
        if len(value) < 200
        else f"{value[:200]} ... ({len(value)} characters)"
        for key, value in source.metadata.items()
    }
    if source.notes:
        facts["notes"] = plain("; ".join(source.notes))
    yield facts_of(facts)
    for network in source.networks:
        yield Text()
        yield _network(network)
    if source.problem is not None:
        yield plain(source.problem, "yellow")
    if source.unused:
        yield Text()
        table = table_of("other tensors", "prefix", ">tensors", ">values", ">size", "dtypes")
        for unused in source.unused:
            amount = unused.amount
            table.add_row(
                unused.what,
                plain(unused.prefix),
                str(amount.tensors),
                count(amount.numbers),
                in_bytes(amount.nbytes),
                plain(", ".join(amount.dtypes)),
            )
        yield table
    yield Text()


def _network(found: InspectedNetwork) -> RenderableType:
    family = f"{found.family} (by {found.evidence})"
    if found.open_to:
        family += f"; could also be {' or '.join(found.open_to)}: pass --family to decide"
    facts: dict[str, object] = {
        "component": Text(found.component, style="green"),
        "class": found.class_name,
        "family": family,
        "layout": f"{found.layout}, prefix {found.prefix!r}"
        if found.prefix
        else f"{found.layout}, no prefix",
        "parameters": f"{found.parameters:,} ({count(found.parameters)})",
        "holds": _amount(found.amount),
    }
    names = [field.name for field in fields(found.config)]  # type: ignore[arg-type]
    facts |= {f"  {name}": found.config[name] for name in names}
    lacks = (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("wrong shape", found.misshapen),
        ("not floating-point", found.not_floating),
    )
    if found.guess:
        words = f"the {found.component} {found.guess}".replace("pass family=", "pass --family")
        facts["doubt"] = plain(words, "yellow")
    facts |= {what: plain(some(names), "bold red") for what, names in lacks if names}
    return facts_of(facts)


def _values(values: ValueReport) -> Iterator[RenderableType]:
    yield plain(f"values: {values.tensors} tensors read", "bold")
    if values.sound and not values.zero and not values.unread:
        yield plain("all finite, no tensor is all zero", "green")
        return
    table = table_of("tensor", "finding")
    for name, number in values.nan.items():
        table.add_row(plain(name), Text(f"{number} NaN", style="bold red"))
    for name, number in values.infinite.items():
        table.add_row(plain(name), Text(f"{number} infinite", style="bold red"))
    for name in values.zero[:SHOWN]:
        table.add_row(plain(name), "all zero")
    if (rest := len(values.zero) - SHOWN) > 0:
        table.add_row(f"and {rest} more", "all zero (--json names them)")
    for name, dtype in values.unread.items():
        table.add_row(plain(name), plain(f"not read: torch has no dtype {dtype}"))
    yield table


def _is_top(name: str) -> bool:
    """Whether a row is that of a top-level block or of the whole network."""
    parts = name.split(".")
    return len(parts) <= 2 or (len(parts) == 3 and parts[2].isdecimal())


def _difference(row: ModuleDifference) -> tuple[RenderableType, ...]:
    if row.equal and row.passed:
        return "0", "0", "0", Text("equal", style="green")
    if isnan(row.max_abs):
        mark = Text("not finite", style="bold red")
    else:
        mark = Text("within", style="yellow") if row.passed else Text("beyond", style="bold red")
    return f"{row.max_abs:.3g}", f"{row.relative:.3g}", str(row.ulps), mark


# the columns of `anatomy` that a narrow terminal does without, the first one first
_EXPENDABLE = (
    *("weights", "share", "padding", "downscale", "activations", "stride"),
    *("receptive field", "output", "params", "kernel"),
)


def _half(
    anatomy: Anatomy, path: str, blocks: tuple[Block, ...], every: bool, itemsize: int
) -> RenderableType:
    geometry = ("kernel", "stride", "padding", ">channels", ">output")
    costs = (">params", ">weights", ">activations", ">MACs", ">share")
    rows: list[tuple[str, ...]] = []
    for block in blocks:
        if every:
            rows += [_operation_row(anatomy, one, itemsize) for one in block.operations]
        elif block.parameters or block.in_size != block.out_size:
            rows.append(_block_row(anatomy, block, itemsize))
    headings = (path, *geometry, *costs, ">receptive field", ">downscale")
    return Group(Text(), FittingTable(headings, rows, _EXPENDABLE))


def _operation_row(anatomy: Anatomy, operation: Operation, itemsize: int) -> tuple[str, ...]:
    return (
        f"{_short(operation.name)} ({operation.role})",
        _sides(operation.kernel),
        _both(operation.stride),
        format_padding(operation.padding) if operation.kernel else "",
        _change(operation.in_channels, operation.out_channels),
        _sides(operation.out_size),
        count(operation.parameters),
        in_bytes(operation.parameters * itemsize),
        in_bytes(operation.activations * itemsize),
        count(operation.macs),
        _percent(operation.macs / anatomy.macs),
        _receptive_field(operation),
        _both(operation.downscale),
    )


def _block_row(anatomy: Anatomy, block: Block, itemsize: int) -> tuple[str, ...]:
    convolutions = block.convolutions
    return (
        _short(block.name),
        _kernels(block) or block.class_name,
        " ".join(dict.fromkeys(_both(one.stride) for one in convolutions)),
        # a 1x1 shortcut has no padding, which need not be said
        " ".join(
            dict.fromkeys(format_padding(c.padding) for c in convolutions if c.kernel != (1, 1))
        ),
        _change(block.in_channels, block.out_channels),
        _sides(block.out_size),
        count(block.parameters),
        in_bytes(block.parameters * itemsize),
        in_bytes(block.activations * itemsize),
        count(block.macs),
        _percent(block.macs / anatomy.macs),
        _receptive_field(block.last),
        _both(block.last.downscale),
    )


def _totals(anatomy: Anatomy) -> RenderableType:
    table = table_of("role", ">operations", ">parameters", ">share", ">MACs", ">share")
    for total in anatomy.totals:
        table.add_row(
            total.role,
            str(total.operations),
            count(total.parameters),
            _percent(total.parameter_share),
            count(total.macs),
            _percent(total.macs / anatomy.macs),
        )
    table.add_row(
        "all",
        str(len(anatomy.operations)),
        count(anatomy.parameters),
        _percent(1.0),
        count(anatomy.macs),
        _percent(1.0),
        style="bold",
    )
    return Group(Text(), table, Text())


def _short(name: str) -> str:
    """A module's name within the encoder or decoder."""
    return name.removeprefix("encoder.").removeprefix("decoder.")


def _sides(pair: tuple[int, int] | None) -> str:
    """``3x3``: rows x columns."""
    return "" if pair is None else f"{pair[0]}x{pair[1]}"


def _kernels(block: Block) -> str:
    """``3x3 3x3 1x1`` of a block's convolutions; of more than three, how many there are of each."""
    kernels = [_sides(one.kernel) for one in block.convolutions]
    if len(kernels) <= 3:
        return " ".join(kernels)
    return ", ".join(f"{times} of {kernel}" for kernel, times in Counter(kernels).most_common())


def _both(pair: tuple[object, object] | None) -> str:
    """The value for rows and columns; empty for what has none."""
    return "" if pair is None else format_pair(pair)


def _receptive_field(operation: Operation) -> str:
    return _both(operation.receptive_field) + ("*" if operation.global_receptive_field else "")


def _change(before: object, after: object) -> str:
    return str(before) if before == after else f"{before} > {after}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def plan_table(answers: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """What streaming takes in each direction, as ``sdconv plan`` computes it."""
    heads = ("", ">memory", ">on disk", ">strips", ">seconds", ">least", ">without spilling")
    table = table_of(*heads)
    for direction, found in answers.items():
        seconds = "" if found["seconds"] is None else f"{found['seconds']:.3g}"
        table.add_row(
            direction,
            format_bytes(found["peak"]),
            format_bytes(found["spilled"]),
            str(found["strips"]),
            seconds,
            format_bytes(found["least"]),
            format_bytes(found["least_without_spill"]),
        )
    return table
