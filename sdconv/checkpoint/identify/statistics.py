"""Statistics of latents that a file holds: tensors, or numbers in its metadata.

Playground v2.5 has ``edm_mean`` and ``edm_std``, one number for each channel.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sdconv.config.facts import EDM_STATISTICS

Statistics = Mapping[str, tuple[float, ...]]
"""The values of ``edm_mean`` and ``edm_std``; empty if a file does not have both."""

_STATISTIC = re.compile(r"(?:.*\.)?(?:edm|latents?)_(?:mean|std)")


def is_statistic(name: str) -> bool:
    """Whether a tensor, or a key of the metadata, is by its name a statistic of latents."""
    return _STATISTIC.fullmatch(name) is not None


def statistics_in(
    names: Iterable[str], metadata: Mapping[str, str], read: Callable[[str], Any]
) -> Statistics:
    """The statistics of a file, from tensors under any prefix, or else from the metadata.

    Args:
        names: of the file's tensors.
        read: gives a tensor.
    """
    if (pair := tensors_of_statistics(names)) is not None:
        return {one: _values(read(name)) for one, name in zip(EDM_STATISTICS, pair, strict=True)}
    if all(one in metadata for one in EDM_STATISTICS):
        return {one: _numbers(metadata[one]) for one in EDM_STATISTICS}
    return {}


def tensors_of_statistics(names: Iterable[str]) -> tuple[str, str] | None:
    """The names of a mean and of a standard deviation under the same prefix, the shortest first."""
    mean, std = EDM_STATISTICS
    there = {name for name in names if name.endswith(EDM_STATISTICS) and is_statistic(name)}
    found = (
        (name, name.removesuffix(mean) + std)
        for name in sorted(there, key=len)
        if name.endswith(mean) and name.removesuffix(mean) + std in there
    )
    return next(found, None)


def unrelated_statistics(names: Iterable[str], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Names that look like statistics of latents, where the file does not have the two that sdconv
    knows."""
    names = tuple(names)
    if tensors_of_statistics(names) is not None or all(one in metadata for one in EDM_STATISTICS):
        return ()
    return tuple(name for name in (*names, *metadata) if is_statistic(name))


def _values(tensor: Any) -> tuple[float, ...]:
    return tuple(map(float, tensor.float().flatten().tolist())) if tensor.numel() <= 64 else ()


def _numbers(text: str) -> tuple[float, ...]:
    """Numbers in JSON, or separated by commas or spaces; empty if they are none."""
    try:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            content = text.replace(",", " ").split()
        return tuple(map(float, content))
    except (TypeError, ValueError):
        return ()
