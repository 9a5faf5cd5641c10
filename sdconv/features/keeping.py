"""Where captured maps go: into memory, as far as that is allowed, or to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sdconv.errors import SdconvError
from sdconv.features.calls import Call
from sdconv.features.writing import Store, said
from sdconv.sizes import parse_bytes

Load = Callable[[], Tensor]


class Sink:
    """Takes maps, and gives for each what brings it back.

    Args:
        limit: bytes that may be held in memory, or words such as ``"2GiB"``; None for all there is,
            or, with a folder, for 0.
        path: of a folder that every map is written to, or None.
        pipeline: the maps are a pipeline's.

    Raises:
        InputError: no such limit. SdconvError: the folder exists; the zarr package is missing.
    """

    def __init__(self, limit: int | str | None, path: Path | None, *, pipeline: bool) -> None:
        self.limit = limit if limit is None or limit == 0 else parse_bytes(limit, "max_memory")
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

        written = None
        if self.store is not None:
            ready()
            place, left = self.store.path, "make room; what was complete can be opened"
            with said(place, "cannot be written", hint=left):
                written = self.store.append(name, call, x)
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
        hint="choose fewer layers or steps, reduce= them, or give a store= on the disk",
    )
