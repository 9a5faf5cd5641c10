"""What the shapes of one network say: a config, and how sure its family is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from sdconv.config import Config
from sdconv.config.facts import NORM_NUM_GROUPS
from sdconv.errors import WeightsMismatchError

AnyConfig = TypeVar("AnyConfig", bound=Config)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A network's config.

    ``family``: a name such as ``"sdxl"``. ``evidence``: what decided it. ``open_to``: the families
    among which nothing decided, empty where something did.
    """

    config: Config
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()


def built(cls: type[AnyConfig], **fields: Any) -> AnyConfig:
    """A config of fields that were read from shapes.

    Raises:
        WeightsMismatchError: they make none.
    """
    try:
        return cls(**fields)
    except ValueError as error:
        raise WeightsMismatchError(
            f"the shapes make no {cls.class_name}: {error}",
            expected=f"channels that are multiples of {NORM_NUM_GROUPS}, as in every known family",
            fix="a network with other groups needs its config.json beside the weights",
        ) from error
