"""The feature maps that the page shows, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial

from torch import Tensor

from sdconv.features.maps import CapturedMap, Maps
from sdconv.features.points import Point
from sdconv.features.rendering import Values, as_maps
from sdconv.report.features.drawing import WHOLE, Drawing, box_of
from sdconv.sizes import count, format_pair

_TIMES = " \u00d7 "


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A feature map as one call computed it.

    Attributes:
        read: returns the values; called when they are needed, so that feature maps on the disk are
            not all in memory at once.
        shape: of the values, ``(C, H, W)``.
        step: the number of the call.
        timestep: of the call, if the network has one.
        half: the guidance half, if there are two.
    """

    read: Callable[[], Values]
    shape: tuple[int, int, int]
    step: int = 0
    timestep: float | None = None
    half: str | None = None


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """A hook point of the network and the feature maps captured there, call by call.

    Args:
        name: of the hook point, such as ``decoder.up_blocks.0.resnets.1:silu1``.
        box: name of the drawing's box that it belongs to.
        snapshots: at least one, in order.
        facts: label -> text.
    """

    name: str
    box: str
    snapshots: Sequence[Snapshot]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name within its box."""
        inside = self.name.removeprefix(self.box).lstrip(".:")
        return inside or "output"


def feature_maps(maps: Maps, points: Iterable[Point], drawing: Drawing) -> list[FeatureMap]:
    """Captured feature maps for the page, in the order of the drawing's boxes.

    Args:
        maps: of one network; of a batch the first sample is shown, and the first of each half where
            guidance doubles the batch.
        points: the network's.
        drawing: of the network, with a box for each of the feature maps.

    Raises:
        InputError: a value that is not a feature map.
    """
    by_name = {point.name: point for point in points}
    names = [box.name for box in drawing.boxes]
    found = []
    for name in maps:
        snapshots = [shot for captured in maps.series(name) for shot in _snapshots(captured)]
        box = box_of(name, names)
        assert box is not None, name
        facts = _facts(by_name[name]) if name in by_name else {}
        found.append(FeatureMap(name=name, box=box, snapshots=snapshots, facts=facts))
    order = {name: at for at, name in enumerate(names)}
    return sorted(found, key=lambda one: order[one.box])


def _snapshots(captured: CapturedMap) -> Iterator[Snapshot]:
    halves: Mapping[str | None, str] = {None: "tensor"}
    if captured.network_call.guided:
        halves = {"conditional": "conditional", "unconditional": "unconditional"}
    timestep = captured.timestep
    for half, attribute in halves.items():
        read = partial(_read, captured, attribute)
        channels, rows, columns = read().shape
        yield Snapshot(
            read=read,
            shape=(channels, rows, columns),
            step=captured.call,
            timestep=timestep[0] if isinstance(timestep, tuple) else timestep,
            half=half,
        )


def _read(captured: CapturedMap, attribute: str) -> Values:
    values: Tensor = getattr(captured, attribute)
    return as_maps(values)


def _facts(point: Point) -> dict[str, str]:
    facts = {} if point.kind in WHOLE else {"kind": point.kind}
    if (convolution := _convolution(point)) is not None:
        facts["convolution"] = convolution
    if point.downscale is not None:
        facts |= _scale(point.downscale)
    if point.receptive_field is not None:
        sides = "{} \u00d7 {}".format(*point.receptive_field)
        facts["receptive field"] = (
            f"{sides}, global by attention" if point.global_receptive_field else sides
        )
    if point.parameters:
        facts["parameters"] = count(point.parameters)
    if point.multiplies:
        facts["multiplies"] = count(point.multiplies)
    if point.skip is not None:
        facts["skip from" if point.kind == "skip" else "skip to"] = point.skip.partition(":")[0]
    return facts


def _convolution(point: Point) -> str | None:
    """Such as ``3 \u00d7 3, stride 2, padding 1 below, 1 right``; None for others."""
    if point.kernel is None or point.stride is None or point.padding is None:
        return None
    kernel = "{} \u00d7 {}".format(*point.kernel)
    if len(set(point.padding)) == 1:
        padding = str(point.padding[0])
    else:
        sides = zip(point.padding, ("above", "below", "left", "right"), strict=True)
        padding = ", ".join(f"{zeros} {side}" for zeros, side in sides if zeros)
    return f"{kernel}, stride {format_pair(point.stride, _TIMES)}, padding {padding}"


def _scale(downscale: tuple[Fraction, Fraction]) -> dict[str, str]:
    """How much smaller or larger the feature map is than the network's input."""
    if all(factor < 1 for factor in downscale):
        return {"upscale": format_pair((1 / downscale[0], 1 / downscale[1]), _TIMES)}
    return {"downscale": format_pair(downscale, _TIMES)}
