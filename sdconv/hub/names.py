"""Finds weights by name on this machine, and never asks the hub for anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from sdconv.errors import MissingFileError
from sdconv.hub.manifest import REPOSITORY, is_inside, load_manifest
from sdconv.hub.shipped import SHIPPED, shipped

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
_FILE = re.compile(
    r".*\.(safetensors|sft|ckpt|pth?|bin|gguf|json|ya?ml)", re.IGNORECASE | re.DOTALL
)


@dataclass(frozen=True)
class HubId:
    """What ``owner/name[:path]`` stands for; ``path``: a file or a folder, ``""`` for the root."""

    repository: str
    path: str

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """The parts of a text; None if it does not have this form."""
        repository, _, path = text.partition(":")
        if not REPOSITORY.fullmatch(repository) or not is_inside(path):
            return None
        return cls(repository, path.strip("/"))

    def __str__(self) -> str:
        return f"{self.repository}:{self.path}" if self.path else self.repository


def weights_named(name: str) -> Path | None:
    """The weights that a name stands for; None if it is not a name.

    Names are those of networks that ship (``"tiny-vae"``) and of known checkpoints (``"taesd"``),
    and repositories on the hub (``"owner/name"``, ``"owner/name:vae"``). The last two are found in
    the hub's cache if ``sdconv.fetch`` or another program has put them there.

    Raises:
        MissingFileError: a name, but the weights are not on this machine.
    """
    if name in SHIPPED:
        return shipped(f"{name}.safetensors")
    wanted = None
    if _NAME.fullmatch(name) and (known := load_manifest().get(name)) is not None:
        wanted = HubId(known.repository, known.file)
    elif (hub_id := HubId.parse(name)) is not None and (hub_id.path or not is_file_name(name)):
        wanted = hub_id  # without a path, folder/name.safetensors is not a repository
    if wanted is None:
        return None
    if (found := _cached(wanted)) is not None:
        return found
    here = "" if _NAME.fullmatch(name) else f"check the path (the working folder is {_folder()}); "
    raise MissingFileError(
        "has not been fetched, and is not a path" if _NAME.fullmatch(name) else "does not exist",
        where=name,
        expected="weights on this machine (nothing is downloaded here)",
        hint=f"{here}to download it from the hub: sdconv fetch {name}",
    )


def _cached(wanted: HubId) -> Path | None:
    """A file or folder of the newest download of a repository in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE) / f"models--{wanted.repository.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    found = folder / "snapshots" / commit / wanted.path
    return found if found.exists() else None


def is_file_name(path: str) -> bool:
    """Whether a path ends as a file of weights does, and not as a folder, such as ``sd-v1.5``."""
    return _FILE.fullmatch(path) is not None


def _folder() -> str:
    try:
        return str(Path.cwd())
    except OSError:
        return "gone"
