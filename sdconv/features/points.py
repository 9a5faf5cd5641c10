"""The named points of a network at which feature maps can be read and edited, and their facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, overload

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
        raise NotImplementedError

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for ``json.dump``."""
        return [point.to_json() for point in self]


def points_of(target: Any, size: int | tuple[int, int] | None = None) -> Points:
    """Every point of a network or pipeline; ``sdconv.features(target)``."""
    found = target_of(target)
    return Points(
        [
            Point(
                name=place.name,
                kind=place.kind,
                of=place.of,
                skip=place.skip,
                parameters=0
                if place.before
                else sum(parameter.numel() for parameter in place.module.parameters()),
            )
            for place in found.places().values()
        ]
    )
