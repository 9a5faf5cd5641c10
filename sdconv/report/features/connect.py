"""From a network's points and what a capture brought back to what the page is made from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import partial
from math import log2

from torch import Tensor

from sdconv.features.maps import Entry, Maps
from sdconv.features.points import Point
from sdconv.report.features.drawing import Arm, Block, Drawing, drawn
from sdconv.report.features.views import FeatureMap, Shot, Values, as_maps
from sdconv.report.pieces import count

WHOLE = ("resnet", "attention", "downsample", "upsample")
"""Kinds of points that are one box with all that is in them."""

ALONE = ("conv", "norm", "activation")
"""Kinds that are a box where they are in no such block."""


def block_outputs(points: Iterable[Point]) -> list[str]:
    """Names of what comes out of the drawing's blocks, in order."""
    return [point.name for point in _boxes(list(points))]


def drawing_of(points: Iterable[Point], captured: Iterable[str] = ()) -> Drawing:
    """The drawing of a network.

    Args:
        points: the network's, with their strides.
        captured: names of points that must have a box to belong to, even aside of the path.
    """
    points = list(points)
    boxes = _boxes(points)
    path = _arranged(boxes)
    names = [block.name for block in path]
    kinds = {point.name: point.kind for point in points}
    aside = dict.fromkeys(name for name in captured if _owner(name, names) is None)
    path = [Block(name=name, kind=kinds[name], arm=Arm.aside, level=0) for name in aside] + path
    skips = [
        (point.skip, point.name.partition(":")[0])
        for point in points
        if point.kind == "skip" and point.skip in names
    ]
    return drawn(path, [(source, target) for source, target in skips if source])


def feature_maps(maps: Maps, points: Iterable[Point], drawing: Drawing) -> list[FeatureMap]:
    """What was captured, in the order in which it was passed.

    Args:
        maps: of one network; of a batch the first example is shown, and both halves where the
            batch was doubled for guidance.
        points: the network's.
        drawing: its drawing, with a box for each of the maps.

    Raises:
        InputError: a value that is no map.
    """
    by_name = {point.name: point for point in points}
    names = [block.name for block in drawing.path]
    found = []
    for name in maps:
        shots = [shot for entry in maps.series(name) for shot in _shots(entry)]
        block = _owner(name, names)
        assert block is not None, name
        facts = _facts(by_name[name]) if name in by_name else {}
        found.append(FeatureMap(name=name, block=block, shots=shots, facts=facts))
    order = {name: at for at, name in enumerate(names)}
    return sorted(found, key=lambda one: order[one.block])


def sizes_of(points: Iterable[Point]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each point's map, as far as they are known."""
    return {point.name: point.size for point in points if point.size is not None}


def _boxes(points: Sequence[Point]) -> list[Point]:
    places = [point for point in points if ":" not in point.name]
    whole = {point.name for point in places if point.kind in WHOLE}
    outer = {name for name in whole if not _inside(name, whole)}
    # in a time embedding there is no map
    closed = outer | {point.name for point in places if point.kind == "time"}
    return [
        point
        for point in places
        if point.name in outer or (point.kind in ALONE and not _inside(point.name, closed))
    ]


def _inside(name: str, names: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in names for length in range(1, len(parts)))


def _arranged(boxes: Sequence[Point]) -> list[Block]:
    """Each box on its arm and level: the way down ends with the last of the down blocks, the way up
    begins with the first of the up blocks."""
    names = [point.name for point in boxes]
    ends = [at for at, name in enumerate(names) if _within(name, "down_blocks", "encoder.layers")]
    starts = [at for at, name in enumerate(names) if _within(name, "up_blocks", "decoder.layers")]
    last, first = max(ends, default=-1), min(starts, default=len(names))
    # a decoder's strides are those to the latents: below 1
    levels = list(_levels(boxes))
    inner = [at for at, name in enumerate(names) if _within(name, "decoder", "post_quant_conv")]
    outer = [levels[at] for at in range(len(names)) if at not in inner]
    lowest = max(outer, default=-min([levels[at] for at in inner], default=0))
    return [
        Block(
            name=point.name,
            kind=point.kind,
            arm=Arm.down if at <= last else Arm.up if at >= first else Arm.base,
            level=levels[at] + (lowest if at in inner else 0),
        )
        for at, point in enumerate(boxes)
    ]


def _within(name: str, *parts: str) -> bool:
    return any(f".{part}." in f".{name}." for part in parts)


def _levels(boxes: Sequence[Point]) -> Iterator[int]:
    level = 0
    for point in boxes:
        if point.stride is not None:
            level = round(log2(point.stride[0]))
        yield level


def _owner(name: str, blocks: Sequence[str]) -> str | None:
    """The block that a point is in; of a group of blocks, whose output is its last one's, that."""
    place = name.partition(":")[0]
    around = [block for block in blocks if place == block or place.startswith(block + ".")]
    inside = [block for block in blocks if block.startswith(place + ".")]
    if ":" in name:
        inside = inside[:1]  # what a group is given
    return max(around, key=len) if around else inside[-1] if inside else None


def _shots(entry: Entry) -> Iterator[Shot]:
    halves: Mapping[str | None, str] = {None: "tensor"}
    if entry.of.guided:
        halves = {"conditional": "conditional", "unconditional": "unconditional"}
    timestep = entry.timestep[0] if isinstance(entry.timestep, tuple) else entry.timestep
    for half, attribute in halves.items():
        read = partial(_read, entry, attribute)
        channels, rows, columns = read().shape
        yield Shot(
            read=read,
            shape=(channels, rows, columns),
            step=entry.call,
            timestep=timestep,
            half=half,
        )


def _read(entry: Entry, attribute: str) -> Values:
    values: Tensor = getattr(entry, attribute)
    return as_maps(values)


def _facts(point: Point) -> dict[str, str]:
    facts = {} if point.kind in WHOLE else {"kind": point.kind}
    if point.stride is not None:
        facts["stride"] = _stride(point.stride)
    if point.receptive_field is not None:
        seen = "{} \u00d7 {}".format(*point.receptive_field)
        facts["receptive field"] = f"{seen}, all by attention" if point.sees_all else seen
    if point.parameters:
        facts["parameters"] = count(point.parameters)
    if point.multiplies:
        facts["multiplies"] = count(point.multiplies)
    if point.skip is not None:
        facts["skip from" if point.kind == "skip" else "skip to"] = point.skip.partition(":")[0]
    return facts


def _stride(stride: tuple[Fraction, Fraction]) -> str:
    rows, columns = stride
    return str(rows) if rows == columns else f"{rows} \u00d7 {columns}"
