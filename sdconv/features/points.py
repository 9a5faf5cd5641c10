"""The named points of a network at which feature maps can be read and edited, and their facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, overload

from sdconv.features.facts import Facts, facts_of
from sdconv.features.places import Place, places
from sdconv.features.targets import target_of

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place where maps pass.

    ``name``: as ``sdconv.capture`` takes it. ``kind``: what it is of, one of
    ``sdconv.features.places.KINDS``. ``of``: the enclosing block's name. ``skip``: the other end of
    a skip connection that begins or ends here.

    None where the network's inputs are not known or it was not passed: ``channels``; ``size``, the
    map's (rows, columns); ``stride``, input places from one value to the next (rows, columns),
    below 1 after upsampling; ``receptive_field``, input places that one value sees through
    convolutions (rows, columns); ``sees_all``, an attention before it lets it see everything;
    ``multiplies`` of its operation (a block's: of all its operations) for one picture.
    ``parameters``: likewise.
    """

    name: str
    kind: str
    of: str
    skip: str | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    stride: tuple[Fraction, Fraction] | None = None
    receptive_field: tuple[int, int] | None = None
    sees_all: bool | None = None
    parameters: int = 0
    multiplies: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them; a stride is text such as ``"1/2"``."""
        stride = None if self.stride is None else [str(step) for step in self.stride]
        return {**vars(self), "stride": stride}


class Points(Sequence[Point]):
    """The points of a network, in the order in which a call passes them."""

    def __init__(self, points: Sequence[Point]) -> None:
        self._points = tuple(points)

    @overload
    def __getitem__(self, index: int) -> Point: ...
    @overload
    def __getitem__(self, index: slice) -> Points: ...
    def __getitem__(self, index: int | slice) -> Point | Points:
        found = self._points[index]
        return found if isinstance(found, Point) else Points(found)

    def __iter__(self) -> Iterator[Point]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __repr__(self) -> str:
        return f"<{len(self)} points, {', '.join(self.names[:3])} ...>"

    @property
    def names(self) -> tuple[str, ...]:
        """Of all points."""
        return tuple(point.name for point in self)

    def table(self) -> Table:
        """For a terminal: ``rich.print(points.table())``."""
        from sdconv.report.pieces import count, plain, table_of

        table = table_of(
            "name", "kind", ">channels", ">map", ">stride", ">sees", ">parameters", ">multiplies"
        )
        if any(point.sees_all for point in self):
            table.caption = "* and, through an attention, everything"
        # long names are folded, so that short facts need not be
        for column in table.columns[1:]:
            column.no_wrap = True
        for point in self:
            sees = "" if point.receptive_field is None else _sides(point.receptive_field)
            table.add_row(
                plain(point.name),
                point.kind,
                "" if point.channels is None else str(point.channels),
                "" if point.size is None else "x".join(map(str, point.size)),
                "" if point.stride is None else _sides(point.stride),
                f"{sees}*" if point.sees_all else sees,
                count(point.parameters) if point.parameters else "",
                count(point.multiplies) if point.multiplies else "",
            )
        return table

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for ``json.dump``."""
        return [point.to_json() for point in self]


def points_of(target: Any, size: int | tuple[int, int] | None = None) -> Points:
    """Every point at which maps of a network can be read; ``sdconv.features(target)``.

    Args:
        target: a network, any module, or a diffusers pipeline, of which every component is listed.
        size: rows and columns of the picture or, for a U-Net, of the latents, which the sizes and
            multiplies are for; None for 512 pixels or 64 latents. Channels and receptive fields
            are known for autoencoders and U-Nets, sdconv's or diffusers'.

    Raises:
        InputError: neither a module nor a pipeline; a size that the network cannot take.
    """
    found = target_of(target)
    points: list[Point] = []
    for prefix, network in found.networks.items():
        unseen = places(network, prefix)
        facts = facts_of(network, size)
        # as a run passes them; those that it did not pass last
        passed = [unseen.pop(name) for one in facts if (name := prefix + one) in unseen]
        for place in (*passed, *unseen.values()):
            known = facts.get(place.name.removeprefix(prefix))
            points.append(_point(place, known))
    return Points(points)


def _point(place: Place, facts: Facts | None) -> Point:
    # what is read before a module has none of its own
    weights = () if place.before else place.module.parameters()
    return Point(
        name=place.name,
        kind=place.kind,
        of=place.of,
        skip=place.skip,
        parameters=sum(weight.numel() for weight in weights),
        **({} if facts is None else vars(facts)),
    )


def _sides(pair: tuple[object, object]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"
