"""Where captured maps go: into memory, as far as that is allowed, or to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sdconv.errors import InputError, SdconvError
from sdconv.features.calls import Call
from sdconv.features.writing import Store

Load = Callable[[], Tensor]


class Sink:
    """Takes maps, and gives for each what brings it back.

    Args:
        limit: bytes that may be held in memory; None for all there is, or, with a folder, for 0.
        path: of a folder that every map is written to, or None.
        pipeline: the maps are a pipeline's.

    Raises:
        InputError: a negative limit. SdconvError: the folder exists; the zarr package is missing.
    """

    def __init__(self, limit: int | None, path: Path | None, *, pipeline: bool) -> None:
        if limit is not None and (not isinstance(limit, int) or limit < 0):
            raise InputError(
                "no number of bytes", where="max_memory", expected="0 or more", got=limit
            )
        self.limit = limit
        self.store = None if path is None else Store(path, pipeline=pipeline)
        self._held = 0

    def put(self, name: str, call: Call, x: Tensor, ready: Callable[[], object]) -> Load:
        """Keeps a map.

        Args:
            name, call: where it passed. x: what is kept of it. ready: waits until it is there.

        Raises:
            SdconvError: there is no room for it, in memory or on the disk.
        """

        def held() -> Tensor:
            ready()
            return x

        if self.store is not None:
            ready()
        written = None if self.store is None else self.store.append(name, call, x)
        limit = 0 if self.limit is None and written is not None else self.limit
        if limit is None or self._held + x.nbytes <= limit:
            self._held += x.nbytes
            return held
        if written is None:
            raise too_wide(self._held + x.nbytes, limit, "so far")
        return written


def too_wide(needed: int, limit: int, when: str) -> SdconvError:
    """What to say of maps that need more memory than they may have."""
    return SdconvError(
        "these maps need more memory than they may take",
        where="max_memory",
        expected=f"at most {limit:,} bytes",
        got=f"{needed:,} bytes {when}",
        fix="choose fewer layers or steps, reduce= them, or give a store= on the disk",
    )
