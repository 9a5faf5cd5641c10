"""Maps in a zarr folder: written as they come, opened without being read."""

from __future__ import annotations

from pathlib import Path

from sdconv.features.maps import Maps


def save(maps: Maps, path: Path) -> None:
    raise NotImplementedError


def open_maps(path: str | Path) -> Maps:
    """Maps that ``maps.save`` or ``sdconv.capture(..., store=...)`` wrote; each is read when it is
    asked for."""
    raise NotImplementedError
