"""What the shapes of one network say: a config, and how sure its family is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sdconv.checkpoint.identify.find import DetectedNetwork
from sdconv.checkpoint.keys.prefixes import modules_of
from sdconv.config import Config
from sdconv.config.facts import NORM_NUM_GROUPS
from sdconv.errors import WeightsMismatchError

AnyConfig = TypeVar("AnyConfig", bound=Config)
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class InferredConfig:
    """A network's config.

    ``family``: a name such as ``"sdxl"``. ``evidence``: what decided it. ``open_to``: the families
    among which nothing decided, empty where something did. ``guess``: what was taken where nothing
    decided, in words that follow the component's name; None where something did.
    """

    config: Config
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()
    guess: str | None = None


class NetworkShapes(Mapping[str, Shape]):
    """Shapes of one network's tensors, by diffusers' names.

    Args:
        found: the network.
        shapes: of every tensor of the checkpoint; of any number of axes, as a file may hold
            anything.
        where: the weights' name, for messages.
    """

    def __init__(self, found: DetectedNetwork, shapes: Mapping[str, Shape], where: object) -> None:
        self._shapes = found.shapes(shapes)
        self._place = found.place
        self._where = where
        self.modules = modules_of(self._shapes)

    def __getitem__(self, name: str) -> Shape:
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def axes(self, name: str, count: int) -> Shape:
        """The shape of a tensor that must be there with that many axes, none of them empty.

        Raises:
            WeightsMismatchError: it is not.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise self.mismatch(
                f"{self._place(name)} is missing", expected=f"a tensor of {count} axes"
            )
        if len(shape) != count or 0 in shape:
            raise self.mismatch(
                f"the shape of {self._place(name)} is none of its kind",
                expected=f"{count} axes, none of them empty",
                got=shape,
            )
        return shape

    def config(self, cls: type[AnyConfig], **fields: Any) -> AnyConfig:
        """A config of fields that were read from the shapes.

        Raises:
            WeightsMismatchError: they make none.
        """
        try:
            return cls(**fields)
        except ValueError as error:
            raise self.mismatch(
                f"the shapes make no {cls.class_name}: {error}",
                expected=f"channels that are multiples of {NORM_NUM_GROUPS}, as in every known "
                "family",
                hint="a network with other groups needs its config.json beside the weights",
            ) from error

    def mismatch(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        hint: str = "check that the file is whole; `sdconv inspect` lists what it holds",
    ) -> WeightsMismatchError:
        """The error for shapes that are no network's."""
        return WeightsMismatchError(what, where=self._where, expected=expected, got=got, hint=hint)
