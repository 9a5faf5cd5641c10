"""What a run refuses: to go on with a data set that was made in another way, and to overwrite files
of others."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdconv.dataset.store import LOCK, PLAN, QUARANTINE, Store, settings_digest
from sdconv.errors import InputError


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with a data set that was made in another way.

    Raises:
        InputError: the lines of ``dataset.json`` that differ, apart from sdconv's version.
    """
    if settings_digest(before) == settings_digest(now):
        return
    old, new = (_lines({**about, "sdconv": ""}) for about in (before, now))
    raise InputError(
        "this data set was made in another way",
        where=where,
        expected="; ".join(line for line in old if line not in new) or "no such line",
        got="; ".join(line for line in new if line not in old) or "no such line",
        hint="go on as it was made, or give --out another name; --force starts anew",
    )


def _lines(about: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in about.items():
        if isinstance(value, Mapping):
            found += _lines(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}: {json.dumps(value)}")
    return found


def check_empty(store: Store, source: Path) -> None:
    """Refuses a folder with files of others; if it is the source itself, only such files as would
    be overwritten.

    Raises:
        InputError: their names.
    """
    names = [one.name for one in store.folder.iterdir() if one.name != LOCK]
    if store.folder.resolve() == source.resolve():
        ours = re.compile(rf"{PLAN}|{QUARANTINE}|{store.name}-\d{{6,}}\..*")
        names = [name for name in names if ours.fullmatch(name)]
    if others := sorted(names):
        raise InputError(
            "the folder is not empty, and is not a data set of sdconv",
            where=store.folder,
            expected="an empty folder, or none",
            got=", ".join(others[:3]),
            hint="give --out another name",
        )


def check_absent(folder: Path, names: Iterable[str | None]) -> None:
    """Refuses to overwrite files of others next to the images, such as sd-scripts' own cache.

    Raises:
        InputError: one of the names is there.
    """
    for name in names:
        if name is not None and (folder / name).exists():
            raise InputError(
                "there is a file that this run would overwrite",
                where=folder / name,
                hint="remove it, or pass --force to overwrite all of them",
            )
