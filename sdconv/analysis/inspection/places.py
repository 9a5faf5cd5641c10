"""The sources of weights under a path: one, or one for each folder of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sdconv.checkpoint.io.folder import folder_at
from sdconv.checkpoint.io.source import Source, open_files, open_folder
from sdconv.checkpoint.open import network_folders

Paths = str | Path | Sequence[str | Path]
"""A file, a component's folder, a whole pipeline's folder, or several files of one network."""


def open_all(paths: Paths, stack: ExitStack) -> list[tuple[str, Source]]:
    """The sources under ``paths`` by name: one, or one for each folder of a pipeline."""
    if isinstance(paths, list | tuple) and len(paths) == 1:
        (paths,) = paths
    folder = folder_at(paths)
    if folder and (network_folders(folder) or (folder.is_pipeline and folder.components)):
        parts = folder.components.items()
        return [(name, stack.enter_context(open_folder(one))) for name, one in parts]
    source = stack.enter_context(open_files(paths) if folder is None else open_folder(folder))
    return [(source.label, source)]
