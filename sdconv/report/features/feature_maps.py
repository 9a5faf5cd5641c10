"""The feature maps that the page shows, call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from sdconv.features.maps import CapturedMap, Maps
from sdconv.features.points import Point
from sdconv.features.rendering import Values, as_maps, drawable, unit_of
from sdconv.report.features.drawing import WHOLE, Drawing, box_of
from sdconv.report.features.kernels import padding_words, true_stride
from sdconv.sizes import count, format_pair

THIS_RUN = "this run"
"""What the page calls the run that it is of, next to others."""

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
        half: the guidance half, if there are two; or the run, if there are several.
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

    @property
    def unit(self) -> str:
        """What it has an image for each of: a channel, or a token."""
        return unit_of(self.name)


def feature_maps(
    maps: Maps,
    points: Iterable[Point],
    drawing: Drawing,
    others: Mapping[str, Maps] | None = None,
) -> list[FeatureMap]:
    """Captured feature maps for the page, in the order of the drawing's boxes.

    Args:
        maps: of one network; of a batch the first sample is shown, and the first of each half where
            guidance doubles the batch.
        others: other runs of the network to compare with, by what the page calls them; of these the
            layers are shown that ``maps`` has.
        points: the network's.
        drawing: of the network, with a box for each of the feature maps.

    Raises:
        InputError: a value that is not a feature map.
    """
    by_name = {point.name: point for point in points}
    names = [box.name for box in drawing.boxes]
    runs: list[tuple[str | None, Maps]] = [(THIS_RUN if others else None, maps)]
    runs += (others or {}).items()
    found = []
    for name in maps:
        size = by_name[name].size if name in by_name else None
        snapshots = [
            shot
            for label, run in runs
            if name in run
            for one in run.series(name)
            for shot in _snapshots(one, label, size)
        ]
        box = box_of(name, names)
        assert box is not None, name
        facts = _facts(by_name[name]) if name in by_name else {}
        if (unit := unit_of(name)) != "channel":
            facts["shown"] = f"for each {unit} the mean over heads of the attention to it"
        found.append(FeatureMap(name=name, box=box, snapshots=snapshots, facts=facts))
    order = {name: at for at, name in enumerate(names)}
    return sorted(found, key=lambda one: order[one.box])


def _snapshots(
    captured: CapturedMap, run: str | None, size: tuple[int, int] | None
) -> Iterator[Snapshot]:
    """``size``: rows and columns of the feature map, if they are known."""
    halves: Mapping[str | None, str] = {None: "tensor"}
    if captured.network_call.guided:
        halves = {"conditional": "conditional", "unconditional": "unconditional"}
    timestep = captured.timestep
    for half, attribute in halves.items():
        read = partial(_read, captured, attribute, size)
        channels, rows, columns = read().shape
        yield Snapshot(
            read=read,
            shape=(channels, rows, columns),
            step=captured.call,
            timestep=timestep[0] if isinstance(timestep, tuple) else timestep,
            half=", ".join(filter(None, (run, half))) or None,
        )


def _read(captured: CapturedMap, attribute: str, size: tuple[int, int] | None) -> Values:
    values: Tensor = getattr(captured, attribute)
    return as_maps(drawable(captured.name, values), captured.network_call.size or size)


def _facts(point: Point) -> dict[str, str]:
    facts = {} if point.kind in WHOLE else {"kind": point.kind}
    if point.kernel is not None and point.stride is not None and point.padding is not None:
        facts["kernel"] = _TIMES.join(map(str, point.kernel))
        facts["stride"] = format_pair(point.stride, _TIMES)
        facts["padding"] = padding_words(point.padding)
    if point.downscale is not None:
        facts["true stride"] = true_stride(point)
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
