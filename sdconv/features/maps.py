"""Captured feature maps, by the names of their hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.arrays import as_numpy, data_array, statistics_table
from sdconv.features.calls import Call
from sdconv.features.selection import Patterns, match_patterns
from sdconv.features.zarr_store import read_store, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from pandas import DataFrame
    from xarray import DataArray

SHOWN = 12
"""Rows of the table of feature maps, in a notebook and in ``repr``, before "and n more"."""


@dataclass(frozen=True)
class CapturedMap:
    """One captured feature map.

    Attributes:
        name: of its hook point.
        network_call: the call of the network that computed it.
        load: returns the tensor.
    """

    name: str
    network_call: Call
    load: Callable[[], Tensor]

    @property
    def call(self) -> int:
        """The number of the network's call, from 0."""
        return self.network_call.index

    @property
    def timestep(self) -> float | tuple[float, ...] | None:
        """The timestep of a denoiser's call; a tuple if the samples of the batch have different
        ones; None for other networks."""
        return self.network_call.timestep

    @property
    def tensor(self) -> Tensor:
        """The feature map as it was captured; if it is on the disk, each access reads it."""
        return self.load()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``tensor``, which is not read for it."""
        return tuple(self._about("shape"))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of ``tensor``, which is not read for it."""
        found: torch.dtype = self._about("dtype")
        return found

    def _about(self, name: str) -> Any:
        return getattr(self.load if hasattr(self.load, name) else self.tensor, name)

    @property
    def conditional(self) -> Tensor:
        """The half of the batch that follows the prompt; without guidance the whole batch.

        Raises:
            SdconvError: it is not known which half that is.
        """
        tensor = self.tensor
        return tensor[self.network_call.rows("conditional", len(tensor))]

    @property
    def unconditional(self) -> Tensor:
        """The half of the batch that follows the negative prompt.

        Raises:
            SdconvError: there is none, or it is not known which half that is.
        """
        tensor = self.tensor
        return tensor[self.network_call.rows("unconditional", len(tensor))]


class Series(Sequence[CapturedMap]):
    """The feature maps captured at one hook point, in order."""

    def __init__(self, captured: Sequence[CapturedMap]) -> None:
        self._captured = tuple(captured)

    @overload
    def __getitem__(self, index: int) -> CapturedMap: ...
    @overload
    def __getitem__(self, index: slice) -> Series: ...
    def __getitem__(self, index: int | slice) -> CapturedMap | Series:
        found = self._captured[index]
        return found if isinstance(found, CapturedMap) else Series(found)

    def __len__(self) -> int:
        return len(self._captured)

    def __repr__(self) -> str:
        name = self._captured[0].name if self._captured else "empty"
        return f"<{len(self)} maps of {name}>"

    @property
    def timesteps(self) -> tuple[float | tuple[float, ...] | None, ...]:
        """The timestep of each feature map."""
        return tuple(one.timestep for one in self)

    @property
    def calls(self) -> tuple[int, ...]:
        """The call number of each feature map."""
        return tuple(one.call for one in self)

    @property
    def tensors(self) -> list[Tensor]:
        """The feature maps as tensors."""
        return [one.tensor for one in self]

    def stack(self) -> Tensor:
        """All feature maps in one tensor with a new first axis.

        Raises:
            InputError: their shapes differ.
        """
        if len({one.shape for one in self}) > 1:
            raise InputError(
                "feature maps of different shapes cannot be stacked",
                where=self[0].name,
                got=", ".join(str(one.shape) for one in self),
            )
        return torch.stack(self.tensors)

    def to_numpy(self) -> NDArray[Any]:
        """``stack()`` as a numpy array, on the CPU; in float32 where numpy lacks the dtype.

        Raises:
            InputError: the shapes differ.
        """
        values: NDArray[Any] = as_numpy(self.stack())
        return values

    def to_xarray(self) -> DataArray:
        """``to_numpy()`` with the axes ``call``, ``batch``, ``channel``, ``row`` and ``column``
        (for tokens ``call``, ``batch``, ``token``, ``channel``), and the coordinates ``call``,
        ``timestep`` (NaN without one) and, under guidance, ``half`` of the batch.

        Raises:
            InputError: the shapes differ.
            SdconvError: xarray is not installed.
        """
        return data_array(self[0].name, [one.network_call for one in self], self.to_numpy())


class Maps(Mapping[str, "Tensor | Series"]):
    """Captured feature maps by name, in the order in which the network first computed them.

    ``maps[name]`` is a tensor if a bare network passed the hook point once, otherwise a ``Series``.

    Args:
        captured: the feature maps by name.
        pipeline: they are a pipeline's, so that every value is a ``Series``.
    """

    def __init__(self, captured: dict[str, list[CapturedMap]], *, pipeline: bool) -> None:
        self._captured = captured
        self.pipeline = pipeline

    def __getitem__(self, name: str) -> Tensor | Series:
        series = self.series(name)
        return series if self.pipeline or len(series) > 1 else series[0].tensor

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._captured))

    def __len__(self) -> int:
        return len(self._captured)

    def __contains__(self, name: object) -> bool:
        return name in self._captured

    def __repr__(self) -> str:
        rows = [_row(self.series(name)) for name in list(self)[:SHOWN]]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        more = [f"and {len(self) - SHOWN} more"] if len(self) > SHOWN else []
        layers = "1 layer" if len(self) == 1 else f"{len(self)} layers"
        return "\n".join([f"<maps of {layers}>", *lines, *more])

    def series(self, name: str) -> Series:
        """The feature maps of one hook point as a sequence, even if there is only one.

        Raises:
            MissingMapError: nothing was captured under this name.
        """
        if name not in self._captured:
            raise MissingMapError(name, tuple(self._captured))
        return Series(self._captured[name])

    def to_dict(self) -> dict[str, Tensor | list[Tensor]]:
        """Plain tensors by name; a list of tensors where ``maps[name]`` is a ``Series``."""
        found: dict[str, Tensor | list[Tensor]] = {}
        for name, value in self.items():
            found[name] = value.tensors if isinstance(value, Series) else value
        return found

    def to_numpy(self) -> dict[str, NDArray[Any]]:
        """Numpy arrays by name, on the CPU: of each layer its feature map or, where ``maps[name]``
        is a ``Series``, all of them with a new first axis. Dtypes that numpy lacks, such as
        bfloat16, become float32.

        Raises:
            InputError: the feature maps of a layer differ in shape.
        """
        return {
            name: value.to_numpy() if isinstance(value, Series) else as_numpy(value)
            for name, value in self.items()
        }

    def to_xarray(self) -> dict[str, DataArray]:
        """The feature maps of each layer as an array with named axes; see ``Series.to_xarray``.

        Raises:
            InputError: the feature maps of a layer differ in shape.
            SdconvError: xarray is not installed.
        """
        return {name: self.series(name).to_xarray() for name in self}

    def to_pandas(self) -> DataFrame:
        """Statistics in a table with a row for each channel of each sample of each feature map:
        ``layer``, ``call``, ``timestep``, ``half``, ``sample``, ``channel``, and over space
        ``mean``, ``std``, ``min`` and ``max``. Feature maps are read one by one.

        Raises:
            SdconvError: pandas is not installed.
        """
        return statistics_table(
            (name, one.network_call, one.tensor) for name in self for one in self.series(name)
        )

    def plot(self, patterns: Patterns = "*", *, call: int = -1, channels: int = 4) -> Figure:
        """A figure with one row for each feature map: three principal components as RGB, mean and
        standard deviation over channels, the channels with the largest variance, and a histogram.
        Of attention probabilities, the mean over the heads is drawn, with a map for each token that
        is attended to in place of a channel.

        Half a percent of an image's values are clipped at either end, as on the page of feature
        maps; pointed ends of the colour bars say so. Signed images have diverging colours whose
        middle is zero. It shows the first sample of a batch, and needs matplotlib. Tokens are laid
        out in the proportions of the network's input, or of a captured feature map, if one of these
        is known; else as a square.

        Args:
            patterns: names or globs of the feature maps to draw.
            call: index into ``series(name)``.
            channels: the number of channels to show.

        Raises:
            InputError: a pattern matches nothing, the call does not exist, or a value is not a
                feature map.
            SdconvError: matplotlib is not installed.
        """
        from sdconv.features.figures import figure_of

        names = {name for some in match_patterns(tuple(self), patterns).values() for name in some}
        drawn = [self._of_call(name, call) for name in self if name in names]
        return figure_of({one.name: (one.tensor, self._size(one)) for one in drawn}, channels)

    def _of_call(self, name: str, call: int) -> CapturedMap:
        series = self.series(name)
        if not -len(series) <= call < len(series):
            raise InputError(
                "this call was not captured",
                where=name,
                expected=f"{-len(series)} to {len(series) - 1}",
                got=call,
            )
        return series[call]

    def _size(self, one: CapturedMap) -> tuple[int, int] | None:
        """Rows and columns by which tokens are laid out: those of the network's input, or else
        those of the feature map with the most similar name."""
        if one.network_call.size is not None or len(one.shape) != 3:
            return one.network_call.size
        shapes = {name: self.series(name)[-1].shape for name in self if not name.endswith(":probs")}
        near = max(
            (name for name, shape in shapes.items() if len(shape) == 4),
            key=lambda name: len(commonprefix([name, one.name])),  # noqa: RUF071 (no paths)
            default=None,
        )
        return None if near is None else (shapes[near][2], shapes[near][3])

    def _repr_html_(self) -> str:
        """The table that a notebook shows."""
        from sdconv.features.figures import html_table

        rows = []
        for name in list(self)[:SHOWN]:
            series = self.series(name)
            rows.append((name, len(series), series[-1].tensor, self._size(series[-1])))
        return html_table(rows, more=len(self) - len(rows))

    def save(self, path: str | Path) -> None:
        """Write all feature maps to a zarr folder, which ``sdconv.open_maps`` opens; needs the
        ``zarr`` package.

        Raises:
            SdconvError: the path exists, cannot be written, or zarr is missing; nothing is left
                behind.
        """
        tensors = (
            (name, one.network_call, one.tensor) for name in self for one in self.series(name)
        )
        save(tensors, Path(path), pipeline=self.pipeline)


def _row(series: Series) -> tuple[str, str, str, str, str]:
    """Name, calls, shape, dtype and timesteps, for ``repr``."""
    one = series[-1]
    calls = f"{len(series)} calls of" if len(series) > 1 else ""
    shapes = {other.shape for other in series}
    shape = "several shapes" if len(shapes) > 1 else " \u00d7 ".join(map(str, one.shape))
    timesteps = [f"{t:g}" for t in (series[0].timestep, one.timestep) if isinstance(t, float)]
    words = f"t = {' to '.join(dict.fromkeys(timesteps))}" if timesteps else ""
    return one.name, calls, shape, str(one.dtype).removeprefix("torch."), words


def open_maps(path: str | Path) -> Maps:
    """Open a folder that ``maps.save`` or ``sdconv.capture(..., store=...)`` wrote.

    Each feature map is read when it is used. If the writing process was killed, every map that was
    complete is there.

    Raises:
        SdconvError: the folder does not exist or holds something else, or the zarr package is
            missing.
    """
    stored, pipeline = read_store(Path(path))
    captured = {
        name: [CapturedMap(name, call, load) for call, load in calls]
        for name, calls in stored.items()
    }
    return Maps(captured, pipeline=pipeline)


class MissingMapError(SdconvError, KeyError):
    """A name under which nothing was captured."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        near = get_close_matches(name, names, n=3, cutoff=0.4)
        super().__init__(
            "nothing was captured under this name",
            where=repr(name),
            expected=f"a name such as {', '.join(near or names[:3])}" if names else None,
        )

    __str__: Any = Exception.__str__  # KeyError's shows the text with escapes
