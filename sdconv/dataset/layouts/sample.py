"""A sample, and what a layout does with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from zipfile import BadZipFile

from safetensors import SafetensorError
from torch import Tensor

from sdconv.dataset.plan import Planned
from sdconv.dataset.store import Record, Store

READ_ERRORS = (OSError, EOFError, ValueError, KeyError, SafetensorError, BadZipFile)
"""What ``Layout.read`` raises if a sample is damaged."""


@dataclass(frozen=True)
class Sample:
    """A sample: what its JSON says, and its tensors."""

    about: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def key(self) -> str:
        """Its name in the data set."""
        return str(self.about["key"])


class Layout(Protocol):
    """A way to write shards and to read single samples of them.

    The bytes that ``write`` writes follow from the samples alone.
    """

    def write(
        self, store: Store, number: int, samples: Iterable[Sample]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes a shard.

        Returns:
            The name, length and SHA-256 of each file, and for each sample where ``read`` finds it.
        """

    def read(self, store: Store, record: Record, place: Mapping[str, Any]) -> Sample:
        """One sample of a shard, at a place that ``write`` returned."""

    def file_of(self, about: Mapping[str, Any], planned: Planned) -> str | None:
        """The name of the file that a sample has to itself; None if a shard is one file."""

    def check_packages(self, store: Store) -> None:
        """Raises an SdconvError if a package that writes this layout is missing."""

    def check(self, about: Mapping[str, Any], shards: Sequence[Sequence[Planned]]) -> None:
        """Refuses settings that it cannot represent.

        Args:
            about: the content of ``dataset.json``.
            shards: the plan's.

        Raises:
            InputError: it cannot.
        """
