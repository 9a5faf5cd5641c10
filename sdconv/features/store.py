"""Folders of maps, opened without being read."""

from __future__ import annotations

from pathlib import Path

from sdconv.features.calls import Call
from sdconv.features.maps import Entry, Maps
from sdconv.features.writing import FORMAT, VERSION, read_map, said, zarr_for


def open_maps(path: str | Path) -> Maps:
    """Maps that ``maps.save`` or ``sdconv.capture(..., store=...)`` wrote; each is read when it is
    asked for.

    Of a run that was killed there is every map that was complete.

    Raises:
        SdconvError: there is no such folder, or it holds something else; the zarr package is
            missing.
    """
    path = Path(path).absolute()
    zarr = zarr_for(path)
    with said(path, "no folder of maps", hint="open what maps.save(path) wrote"):
        about = dict(zarr.open_group(path, mode="r", zarr_format=3).attrs)
        if about.get(FORMAT) != VERSION:
            raise ValueError(f"its attributes do not say {FORMAT} {VERSION}")
        found: list[tuple[int, str, list[Entry]]] = []
        for folder in sorted(one for one in path.iterdir() if one.is_dir()):
            entries: list[Entry] = []
            order, name = 0, ""
            # a run may have been killed between making a folder and saying what is in it
            begun = (one.parent.name for one in folder.glob("*/zarr.json"))
            numbers = (int(name) for name in begun if name.isdecimal())
            for number in sorted(numbers):
                order, name, more = _entries(folder / str(number))
                entries += more
            if entries:
                found.append((order, name, entries))
    found.sort(key=lambda one: one[0])
    return Maps({name: entries for _, name, entries in found}, pipeline=bool(about["pipeline"]))


def _entries(folder: Path) -> tuple[int, str, list[Entry]]:
    """The maps in one array: its rank among the places, the place's name, and they themselves."""
    attributes = zarr_for(folder).open_array(folder, mode="r", zarr_format=3).attrs
    name, order = attributes["name"], attributes["order"]
    calls = [_call(*written) for written in attributes["calls"]]
    if not isinstance(name, str) or not isinstance(order, int):
        raise ValueError("attributes of other types")
    entries = [
        Entry(name, call, lambda row=row: read_map(folder, row))  # type: ignore[misc]
        for row, call in enumerate(calls)
    ]
    return order, name, entries


def _call(index: int, timestep: float | list[float] | None, guided: bool | None) -> Call:
    return Call(index, tuple(timestep) if isinstance(timestep, list) else timestep, guided)
