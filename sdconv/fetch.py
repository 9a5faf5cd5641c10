"""Known checkpoints, downloaded from the Hugging Face hub and checked against its sha256.

The hub's client downloads, with its cache, its progress bars, its resuming of cut connections and
its environment variables (``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). This
module adds a list of names, a check of every byte, and errors that say what to do.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import re
import tomllib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from sdconv.errors import InputError, SdconvError, SdconvWarning

FAMILIES = frozenset(
    "sd1 sd2 sdxl sdxl-refiner sd3 flux1 flux2 x4-upscaler taesd taesdxl taesd3 taef1 taef2".split()
)
COMPONENTS = ("vae", "unet")
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The hub's client only warns, with these words, and then fills the disk.
_DISK_TOO_SMALL = "Not enough free disk space"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_PLACE = (errno.EEXIST, errno.EISDIR, errno.ENOTDIR)
_CHUNK = 1 << 20


class FetchError(SdconvError):
    """A known checkpoint could not be downloaded whole. No broken file is left under its name."""


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
    where = path or _manifest_path()
    try:
        tables = tomllib.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise SdconvError("the manifest cannot be read", where=where, got=error.strerror) from error
    except ValueError as error:  # tomllib's errors and unicode's are both
        raise SdconvError("not a TOML file", where=where, got=error) from error
    return {name: _known_checkpoint(name, table, where) for name, table in tables.items()}


def fetch(
    name: str, *, directory: Path | None = None, overwrite: bool = False, progress: bool = True
) -> Path:
    """Downloads a known checkpoint, or find an earlier download, and check its sha256.

    When the hub does not answer (no network, offline mode, terms not accepted), an earlier download
    is used: one in the hub's cache is checked against the hash under which it is stored; one in
    ``directory`` cannot be checked, and a warning says so.

    Args:
        name: a name from the manifest.
        directory: the file goes to ``directory/name``; by default to the hub's own cache.
        overwrite: replace another file that is already in ``directory/name``.
        progress: show progress bars if standard error is a terminal.

    Returns:
        The file's path.

    Raises:
        InputError: unknown name.
        FetchError: the hub cannot be reached, refuses the file, does not have it or does not state
            its sha256; the connection was cut; the disk is full or not writable; the bytes have
            another sha256 (the file is then deleted); or ``directory/name`` holds another file.
    """
    known = _find(name)
    folder = None if directory is None else Path(directory).expanduser() / known.name
    with _hub_errors(known), _bars(progress):
        try:
            with _hub_errors(known):
                stated = _stated_sha256(known)
        except FetchError as error:
            return _earlier_download(known, folder, error)
        if folder is not None and (folder / known.file).exists():
            if _is_kept(folder / known.file, stated, overwrite):
                return folder / known.file
        return _verify(_download(known, folder, overwrite), stated)


def _manifest_path() -> Path:
    packaged = Path(str(resources.files("sdconv"))) / "data" / "manifest.toml"
    repository = Path(__file__).parent.parent / "weights" / "manifest.toml"
    return packaged if packaged.is_file() else repository


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
    if not _REPOSITORY.fullmatch(table["repository"]):
        raise wrong("repository is not a name on the hub", "owner/name", table["repository"])
    inside = PurePosixPath(table["file"])
    if inside.is_absolute() or ".." in inside.parts or "\\" in table["file"]:
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


def _find(name: str) -> KnownCheckpoint:
    manifest = load_manifest()
    if name in manifest:
        return manifest[name]
    asked = name.lower()
    near = [known for known in manifest if asked and known.startswith(asked)]
    near = near or difflib.get_close_matches(asked, manifest, n=1, cutoff=0.4)
    raise InputError(
        "unknown checkpoint",
        where=repr(name),
        expected=f"one of {', '.join(manifest)}",
        hint=f"did you mean {' or '.join(near)}?" if near else "choose one of these names",
    )


def _stated_sha256(known: KnownCheckpoint) -> str:
    """The file's sha256 on the hub: the ETag of a large file, or else from the repository's
    listing."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    metadata = get_hf_file_metadata(hf_hub_url(known.repository, known.file))
    if metadata.etag is not None and _SHA256.fullmatch(metadata.etag):
        return metadata.etag

    from huggingface_hub.hf_api import HfApi, RepoFile  # slow to import, and rarely needed

    commit = metadata.commit_hash
    for entry in HfApi().get_paths_info(known.repository, [known.file], revision=commit):
        if isinstance(entry, RepoFile) and entry.lfs is not None:
            return entry.lfs.sha256
    raise FetchError(
        "the hub states no sha256 for this file, so it cannot be checked",
        where=known,
        got=f"ETag {metadata.etag}",
        hint="check HF_ENDPOINT, or download the file by hand and pass its path",
    )


def _download(known: KnownCheckpoint, folder: Path | None, overwrite: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_DISK_TOO_SMALL)
        path = hf_hub_download(
            known.repository,
            known.file,
            local_dir=folder,
            force_download=overwrite and folder is not None,
        )
    return Path(path)


def _earlier_download(known: KnownCheckpoint, folder: Path | None, why: FetchError) -> Path:
    from huggingface_hub import try_to_load_from_cache

    if folder is not None:
        path = folder / known.file
        if not path.is_file():
            raise why
        reason = str(why).splitlines()[0]
        warnings.warn(f"{path} cannot be checked: {reason}", SdconvWarning, stacklevel=3)
        return path
    cached = try_to_load_from_cache(known.repository, known.file)
    if not isinstance(cached, str):
        raise why
    path = Path(cached)
    # the cache stores a file under its hash, and links to it under its name
    stored_as = path.readlink().name if path.is_symlink() else ""
    return _verify(path, stored_as) if _SHA256.fullmatch(stored_as) else path


def _is_kept(path: Path, stated: str, overwrite: bool) -> bool:
    """Whether an existing file is the one on the hub; an error if it is another, unless that may be
    overwritten."""
    got = _sha256(path)
    if got != stated and not overwrite:
        raise FetchError(
            "exists already and is not the file on the hub; it is not overwritten",
            where=path,
            expected=f"sha256 {stated}",
            got=f"sha256 {got}",
            hint="replace it with overwrite= or choose another directory",
        )
    return got == stated


def _verify(path: Path, stated: str) -> Path:
    got = _sha256(path)
    if got != stated:
        size = path.stat().st_size
        _remove(path)
        raise FetchError(
            "the download has another sha256 than the hub states; it was deleted",
            where=path,
            expected=f"sha256 {stated}",
            got=f"sha256 {got} ({size} bytes)",
            hint="fetch it again; if this happens again, a proxy or mirror may alter the file",
        )
    return path


def _remove(path: Path) -> None:
    """Delete a file together with the symbolic links that lead to it, as in the hub's cache."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    from huggingface_hub.utils.tqdm import tqdm

    bar: type[Any] = tqdm  # untyped
    shown = {"desc": "sha256", "total": path.stat().st_size, "unit": "B", "unit_scale": True}
    digest = hashlib.sha256()
    with path.open("rb") as file, bar(**shown, disable=None) as progress:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()


@contextmanager
def _bars(progress: bool) -> Iterator[None]:
    """Hide the progress bars of the hub's client, unless its environment variable decides."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    decided = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
    if progress or decided or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _hub_errors(known: KnownCheckpoint) -> Iterator[None]:
    """Translates any exception of the hub's client into an error that says what to do.

    The client raises its own errors, its HTTP library's, the operating system's and those of its
    compiled downloader; Exception is their only common base.
    """
    try:
        yield
    except (SdconvError, SdconvWarning):
        raise
    except Exception as error:
        raise _explain(known, error) from error


def _explain(known: KnownCheckpoint, error: Exception) -> FetchError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    page = f"{constants.ENDPOINT}/{known.repository}"
    got = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

    def failed(what: str, hint: str) -> FetchError:
        return FetchError(what, where=known, got=got, hint=hint)

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403) and known.gated:
            return failed(
                "the hub gives this file only to users who accepted its terms",
                f"accept them at {page}, log in with `hf auth login` or set HF_TOKEN, and fetch it "
                "again",
            )
        if status in (401, 403):
            return failed(
                "the hub refuses access: the repository is private or gone, or the token invalid",
                f"look at {page}; log in again with `hf auth login`, or unset HF_TOKEN",
            )
        if status == 404:
            return failed("the hub has no such file", f"it may have moved: look at {page}")
        return failed(f"the hub answered with HTTP status {status}", "try again later")
    if isinstance(error, OfflineModeIsEnabled):
        return failed(
            "offline mode is on, and there is no earlier download",
            "unset HF_HUB_OFFLINE, or pass the path of a file that you have",
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in _DISK_FULL or str(error).startswith(_DISK_TOO_SMALL):
        return failed("the disk is full", "free some space, or choose another directory or HF_HOME")
    if number in (*_NO_ACCESS, *_NO_PLACE):
        return failed("cannot be read or written there", "choose another directory or HF_HOME")
    return failed(
        "the hub could not be reached, or the connection was cut; no partial file was left",
        f"check your network and that {constants.ENDPOINT} is a hub, and fetch it again",
    )
