"""The known checkpoints: the tables of ``weights/manifest.toml``, strictly read."""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePosixPath

from sdconv.errors import InputError, SdconvError
from sdconv.hub.shipped import SHIPPED, shipped

FAMILIES = frozenset(
    "sd1 sd2 sdxl sdxl-refiner sd3 flux1 flux2 x4-upscaler taesd taesdxl taesd3 taef1 taef2".split()
)
COMPONENTS = ("vae", "unet")
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""A repository's name on the hub: owner/name."""


@dataclass(frozen=True, kw_only=True)
class KnownCheckpoint:
    """One table of ``weights/manifest.toml``; the head of that file explains the fields.

    Exactly one of ``size`` and ``approximate_size``, both in bytes, is given.
    """

    name: str
    repository: str
    file: str
    components: tuple[str, ...]
    family: str
    licence: str
    size: int | None = None
    approximate_size: int | None = None
    gated: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.repository}, {self.file})"


def load_manifest(path: Path | None = None) -> dict[str, KnownCheckpoint]:
    """The known checkpoints by name, in the manifest's order.

    Args:
        path: a manifest; by default the one installed with the package, else the repository's.

    Raises:
        SdconvError: the manifest cannot be read or is not TOML, or an entry lacks a field, has an
            unknown one or one with an invalid value.
    """
    where = path or shipped("manifest.toml")
    try:
        tables = tomllib.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdconvError("the manifest cannot be read", where=where, got=error.strerror) from error
    except ValueError as error:  # tomllib's errors and unicode's are both
        raise SdconvError("not a TOML file", where=where, got=error) from error
    return {name: _known_checkpoint(name, table, where) for name, table in tables.items()}


def find_known(name: str) -> KnownCheckpoint:
    """The known checkpoint of that name.

    Raises:
        InputError: there is none.
    """
    manifest = load_manifest()
    if name in manifest:
        return manifest[name]
    if name in SHIPPED:
        raise InputError(
            "ships with sdconv, and need not be fetched",
            where=repr(name),
            hint=f"open it by its name: sdconv.load({name!r}), or --model {name}",
        )
    asked = name.lower()
    near = [known for known in manifest if asked and known.startswith(asked)]
    near = near or difflib.get_close_matches(asked, manifest, n=1, cutoff=0.4)
    raise InputError(
        "unknown checkpoint",
        where=repr(name),
        expected=f"one of {', '.join(manifest)}; or a repository on the hub: owner/name[:file]",
        hint=f"did you mean {' or '.join(near)}?" if near else "choose one of these names",
    )


def _known_checkpoint(name: str, table: object, where: Path) -> KnownCheckpoint:
    def wrong(what: str, expected: object, got: object) -> SdconvError:
        return SdconvError(what, where=f"{where} [{name}]", expected=expected, got=got)

    if not isinstance(table, dict):
        raise wrong("the entry is not a table", "a table of fields", repr(table))
    known = {field.name: field for field in fields(KnownCheckpoint) if field.name != "name"}
    required = {key for key, field in known.items() if field.default is MISSING}
    if required - table.keys() or table.keys() - known.keys():
        optional = sorted(known.keys() - required)
        raise wrong("wrong fields", f"{sorted(required)}, perhaps {optional}", sorted(table))

    for key in ("repository", "file", "family", "licence"):
        if not isinstance(table[key], str) or not table[key]:
            raise wrong(f"{key} is not a string", "a string", repr(table[key]))
    if not REPOSITORY.fullmatch(table["repository"]):
        raise wrong("repository is not a name on the hub", "owner/name", table["repository"])
    if not is_inside(table["file"]):
        raise wrong("file is not a path inside the repository", "a relative path", table["file"])
    if table["family"] not in FAMILIES:
        raise wrong("unknown family", ", ".join(sorted(FAMILIES)), table["family"])
    parts = table["components"]
    if not isinstance(parts, list) or not parts or any(part not in COMPONENTS for part in parts):
        raise wrong("components is not a list of networks", f"some of {COMPONENTS}", repr(parts))
    sizes = [table[key] for key in ("size", "approximate_size") if key in table]
    if len(sizes) != 1 or type(sizes[0]) is not int or sizes[0] <= 0:
        raise wrong("size or approximate_size is wrong", "one of them, in bytes", sizes)
    if not isinstance(table.get("gated", False), bool):
        raise wrong("gated is not a boolean", "true or false", repr(table["gated"]))
    return KnownCheckpoint(name=name, **{**table, "components": tuple(parts)})


def is_inside(path: str) -> bool:
    """Whether a path stays inside the folder that it starts from."""
    inside = PurePosixPath(path)
    return not inside.is_absolute() and ".." not in inside.parts and "\\" not in path
