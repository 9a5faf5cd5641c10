"""Data classes of inference: the shapes of one network, and the config inferred from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.keys.prefixes import how_many, modules_of
from sdconv.config import Config
from sdconv.config.facts import NORM_NUM_GROUPS
from sdconv.errors import WeightsMismatchError

_OTHER_NETWORK = "these are the weights of another kind of network; `sdconv inspect` lists them"

AnyConfig = TypeVar("AnyConfig", bound=Config)
Shape = tuple[int, ...]


# What decided, where it was not the weights.
BY_CALLER, BY_CONFIG = "given by the caller", "its config"


@dataclass(frozen=True, kw_only=True)
class InferredConfig:
    """A network's config, and how it was decided.

    ``family``: a name such as ``"sdxl"``. ``evidence``: what decided it. ``open_to``: the families
    that remain possible; empty if one was decided. ``guess``: which of those was chosen, in words
    that follow the component's name; None if one was decided.
    """

    config: Config
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()
    guess: str | None = None


def collapsed(value: Any) -> Any:
    """A tuple whose elements are all equal as that one element; anything else unchanged."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


class NetworkShapes(Mapping[str, Shape]):
    """The shapes of one network's tensors, by diffusers' names.

    Args:
        found: the network.
        shapes: of every tensor in the checkpoint, with any number of axes.
        where: the weights' name, for messages.
    """

    def __init__(self, found: DetectedNetwork, shapes: Mapping[str, Shape], where: object) -> None:
        self._shapes = found.shapes(shapes)
        self._name_in_file = found.name_in_file
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
        """The shape of a tensor that must have ``count`` axes, none of them empty.

        Raises:
            WeightsMismatchError: the tensor is missing, or its shape is different.
        """
        shape = self._shapes.get(name)
        if shape is None:
            raise self.mismatch(
                f"{self._name_in_file(name)} is missing", expected=f"a tensor of {count} axes"
            )
        if len(shape) != count or 0 in shape:
            raise self.mismatch(
                f"{self._name_in_file(name)} has a shape that it cannot have",
                expected=f"{count} axes, none of them empty",
                got=shape,
                hint=_OTHER_NETWORK,
            )
        return shape

    def block_channels(self, blocks: str) -> tuple[int, ...]:
        """Output channels of each block in a list of blocks, in order, up to the first gap in their
        numbers.

        Args:
            blocks: the list's name, such as ``encoder.down_blocks``.

        Raises:
            WeightsMismatchError: as ``axes``.
        """
        numbers = range(how_many(f"{blocks}.{{}}", self.modules))
        return tuple(self.axes(f"{blocks}.{i}.resnets.0.conv1.weight", 4)[0] for i in numbers)

    def config(self, cls: type[AnyConfig], **fields: Any) -> AnyConfig:
        """A config with the fields that were read from the shapes.

        Raises:
            WeightsMismatchError: no network has these fields.
        """
        try:
            return cls(**fields)
        except ValueError as error:
            raise self.mismatch(
                f"the shapes do not describe a {cls.class_name}: {error}",
                expected=f"channels that are multiples of {NORM_NUM_GROUPS}, as in every known "
                "family",
                hint="a network with other groups needs its config.json next to the weights",
            ) from error

    def mismatch(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        hint: str = "check that the file is whole; `sdconv inspect` lists its tensors",
    ) -> WeightsMismatchError:
        """The error for shapes that do not fit a network."""
        return WeightsMismatchError(what, where=self._where, expected=expected, got=got, hint=hint)
