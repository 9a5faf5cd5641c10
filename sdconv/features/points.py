"""The points of a network at which feature maps can be read and edited, with their facts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, overload

from sdconv.features.attention import PROBABILITIES
from sdconv.features.dry_run import PointFacts, dry_run
from sdconv.features.hook_points import HookPoint, hook_points
from sdconv.features.targets import target_of
from sdconv.sizes import count, format_padding, format_pair

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Point:
    """A hook point and its facts.

    The facts from ``channels`` on, except ``parameters``, are None if the network's inputs are not
    known or a run does not pass the point.

    Attributes:
        name: as ``sdconv.capture`` takes it.
        kind: one of ``sdconv.features.hook_points.KINDS``.
        of: name of the enclosing block.
        skip: the other end of a skip connection that begins or ends here.
        channels: of the feature map.
        size: rows and columns of the feature map.
        downscale: input pixels per pixel of the feature map (rows, columns); below 1 after
            upsampling beyond the input's size.
        receptive_field: input pixels that one pixel of the feature map depends on through
            convolutions (rows, columns).
        global_receptive_field: attention makes it depend on the whole input.
        kernel: rows and columns of the convolution's kernel. It, ``stride`` and ``padding`` are
            None unless the module is one convolution, or up- or downsampling with one.
        stride: of that convolution (rows, columns).
        padding: zeros above, below, left and right of that convolution's input, including those
            that a downsampling block adds.
        parameters: of the module.
        multiplies: of the module, a block's operations all together, for one sample.
    """

    name: str
    kind: str
    of: str
    skip: str | None = None
    channels: int | None = None
    size: tuple[int, int] | None = None
    downscale: tuple[Fraction, Fraction] | None = None
    receptive_field: tuple[int, int] | None = None
    global_receptive_field: bool | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    padding: tuple[int, int, int, int] | None = None
    parameters: int = 0
    multiplies: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; ``downscale`` as text such as ``"1/2"``."""
        downscale = None if self.downscale is None else [str(factor) for factor in self.downscale]
        return {**vars(self), "downscale": downscale}


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
        """The names of all points."""
        return tuple(point.name for point in self)

    def table(self) -> Table:
        """A table for a terminal: ``rich.print(points.table())``."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        # long names and convolutions are folded, so that the short columns need not be
        table.add_column("name", overflow="fold")
        table.add_column("kind", no_wrap=True)
        table.add_column("convo-\nlution", min_width=6, overflow="fold")
        for words in _NUMBERS:
            table.add_column(words, justify="right", no_wrap=True)
        table.caption = "\n".join(self._legend())
        for point in self:
            field = "" if point.receptive_field is None else format_pair(point.receptive_field)
            table.add_row(
                Text(point.name),
                point.kind,
                _convolution(point),
                "" if point.channels is None else str(point.channels),
                "" if point.size is None else "x".join(map(str, point.size)),
                "" if point.downscale is None else format_pair(point.downscale),
                f"{field}*" if point.global_receptive_field else field,
                count(point.parameters) if point.parameters else "",
                count(point.multiplies) if point.multiplies else "",
            )
        return table

    def _legend(self) -> Iterator[str]:
        if any(point.kernel is not None for point in self):
            yield "s: stride, p: padding; p0,1 is at the bottom and on the right only"
        if any(point.global_receptive_field for point in self):
            yield "* the whole input, through attention"

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values, for ``json.dump``."""
        return [point.to_json() for point in self]


_NUMBERS = ("chan-\nnels", "size", "down-\nscale", "receptive\nfield", "parameters", "multiplies")


def points_of(target: Any, size: int | tuple[int, int] | None = None) -> Points:
    """Every point of a network at which feature maps can be read; called as
    ``sdconv.features(target)``.

    Args:
        target: a network, any module, or a diffusers pipeline, of which every component is listed.
        size: rows and columns of the image or, for a U-Net, of the latents that sizes and
            multiplies are computed for; None for 512 pixels or 64 latents. Facts are known for
            autoencoders and U-Nets, sdconv's or diffusers'.

    Raises:
        InputError: ``target`` is neither a module nor a pipeline, or the network cannot take
            ``size``.
    """
    found = target_of(target)
    points: list[Point] = []
    for prefix, network in found.networks.items():
        rest = hook_points(network, prefix)
        facts = dry_run(network, size)
        # in the order of the run, then the points that it did not pass
        passed = []
        for one in facts:
            # before the output of their layer: probabilities have no facts
            for name in (f"{prefix}{one}{PROBABILITIES}", prefix + one):
                if name in rest:
                    passed.append(rest.pop(name))
        for point in (*passed, *rest.values()):
            points.append(_point(point, facts.get(point.name.removeprefix(prefix))))
    return Points(points)


def _point(point: HookPoint, facts: PointFacts | None) -> Point:
    # the input of a module has no parameters
    weights = () if point.before else point.module.parameters()
    return Point(
        name=point.name,
        kind=point.kind,
        of=point.of,
        skip=point.skip,
        parameters=sum(weight.numel() for weight in weights),
        **({} if facts is None else vars(facts)),
    )


def _convolution(point: Point) -> str:
    if point.kernel is None or point.stride is None or point.padding is None:
        return ""
    rows, columns = point.kernel
    return f"{rows}x{columns} s{format_pair(point.stride)} p{format_padding(point.padding)}"
