"""Captured feature maps, by the names of the places they passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import Call
from sdconv.features.patterns import Patterns
from sdconv.features.writing import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Entry:
    """One map, and which call of its network it is of.

    ``name``: of the place. ``call``: the call's number, from 0. ``timestep``: what a denoiser was
    told, else None.
    """

    name: str
    of: Call
    load: Callable[[], Tensor]

    @property
    def call(self) -> int:
        """The number of the call, from 0."""
        return self.of.index

    @property
    def timestep(self) -> float | tuple[float, ...] | None:
        """What a denoiser was told, one number for each picture if they differ; else None."""
        return self.of.timestep

    @property
    def tensor(self) -> Tensor:
        """The map, as it was captured; read from the disk at each access if it is there."""
        return self.load()

    @property
    def conditional(self) -> Tensor:
        """The half of the batch that followed the prompt; all of it without guidance.

        Raises:
            SdconvError: it is not known which half that is.
        """
        tensor = self.tensor
        return tensor[self.of.rows("conditional", len(tensor))]

    @property
    def unconditional(self) -> Tensor:
        """The half of the batch that followed the negative prompt.

        Raises:
            SdconvError: there is none, or it is not known which half that is.
        """
        tensor = self.tensor
        return tensor[self.of.rows("unconditional", len(tensor))]


class Series(Sequence[Entry]):
    """The maps that passed one place, in order."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> Series: ...
    def __getitem__(self, index: int | slice) -> Entry | Series:
        found = self._entries[index]
        return found if isinstance(found, Entry) else Series(found)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        name = self._entries[0].name if self._entries else "empty"
        return f"<{len(self)} maps of {name}>"

    @property
    def timesteps(self) -> tuple[float | tuple[float, ...] | None, ...]:
        """One for each map."""
        return tuple(entry.timestep for entry in self)

    @property
    def calls(self) -> tuple[int, ...]:
        """Numbers of the calls, one for each map."""
        return tuple(entry.call for entry in self)

    @property
    def tensors(self) -> list[Tensor]:
        """The maps themselves."""
        return [entry.tensor for entry in self]

    def stack(self) -> Tensor:
        """All maps in one tensor with a new first axis.

        Raises:
            InputError: they differ in shape.
        """
        tensors = self.tensors
        if len({tensor.shape for tensor in tensors}) > 1:
            raise InputError(
                "maps of several shapes make no one tensor",
                where=self[0].name,
                got=", ".join(str(tuple(tensor.shape)) for tensor in tensors),
            )
        return torch.stack(tensors)


class Maps(Mapping[str, "Tensor | Series"]):
    """What a capture brought back, by name, in the order in which the places were first passed.

    ``maps[name]`` is a tensor where a bare network passed the place once, else a ``Series``.

    Args:
        entries: by name.
        pipeline: they are a pipeline's, so that each is a ``Series``.
    """

    def __init__(self, entries: dict[str, list[Entry]], *, pipeline: bool) -> None:
        self._entries = entries
        self.pipeline = pipeline

    def __getitem__(self, name: str) -> Tensor | Series:
        series = self.series(name)
        return series if self.pipeline or len(series) > 1 else series[0].tensor

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        return f"<maps of {len(self)} places>"

    def series(self, name: str) -> Series:
        """The maps of a place as a sequence, also where there is only one.

        Raises:
            MissingMapError: nothing was captured there.
        """
        if name not in self._entries:
            raise MissingMapError(name, tuple(self._entries))
        return Series(self._entries[name])

    def to_dict(self) -> dict[str, Tensor | list[Tensor]]:
        """Plain tensors by name; a list of them where ``maps[name]`` is a ``Series``."""
        found: dict[str, Tensor | list[Tensor]] = {}
        for name, value in self.items():
            found[name] = value.tensors if isinstance(value, Series) else value
        return found

    def plot(self, patterns: Patterns = "*", *, call: int = -1, channels: int = 4) -> Figure:
        """A figure with a row for each map: three principal components as colour, mean and standard
        deviation over channels, the channels with the largest variance, a histogram.

        Of a batch the first example is drawn; needs matplotlib.

        Args:
            patterns: names or globs of the maps to draw.
            call: which one of a place's maps, by its place in ``series(name)``.
            channels: how many.

        Raises:
            InputError: a pattern matches nothing, there is no such call, or a value is no map.
            SdconvError: matplotlib is not installed.
        """
        from sdconv.report.features.figures import figure_of

        return figure_of(self, patterns, call=call, channels=channels)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from sdconv.report.features.figures import table_of

        return table_of(self)

    def save(self, path: str | Path) -> None:
        """Writes all maps as a zarr folder, which ``sdconv.open_maps`` opens; needs the ``zarr``
        package.

        Raises:
            SdconvError: the path exists, cannot be written, or zarr is missing; nothing is left.
        """
        entries = ((name, entry.of, entry.tensor) for name in self for entry in self.series(name))
        save(entries, Path(path), pipeline=self.pipeline)


class MissingMapError(SdconvError, KeyError):
    """A name under which nothing was captured."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        from difflib import get_close_matches

        near = get_close_matches(name, names, n=3, cutoff=0.4)
        super().__init__(
            "nothing was captured there",
            where=repr(name),
            expected=f"a name such as {', '.join(near or names[:3])}" if names else None,
        )

    __str__: Any = Exception.__str__  # KeyError's shows the text with its escapes
