"""The sources of weights under a path: one, or one for each folder of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from sdconv.checkpoint.io.files import os_errors
from sdconv.checkpoint.io.folder import is_pipeline
from sdconv.checkpoint.io.source import Source, components_in, open_source
from sdconv.loading import pipeline_parts

Paths = str | Path | Sequence[str | Path]
"""A file, a component's folder, a whole pipeline's folder, or several files of one network."""


def open_all(paths: Paths, stack: ExitStack) -> list[tuple[str, Source]]:
    """The sources under ``paths`` by name: one, or one for each folder of a pipeline."""
    if isinstance(paths, list | tuple) and len(paths) == 1:
        (paths,) = paths
    if isinstance(paths, str | Path) and (pipeline_parts(paths) or _says_pipeline(Path(paths))):
        folders = components_in(paths)
        return [(name, stack.enter_context(open_source(at))) for name, at in folders.items()]
    source = stack.enter_context(open_source(paths))
    return [(source.label, source)]


def _says_pipeline(folder: Path) -> bool:
    with os_errors(folder):
        is_folder = folder.is_dir()
    return is_folder and is_pipeline(folder) and bool(components_in(folder))
