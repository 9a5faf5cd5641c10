"""Downloads from the Hugging Face hub, and checks every byte against the hash that the hub states.

The hub's client downloads, with its cache, its progress bars, its resuming of cut connections and
its environment variables (``HF_ENDPOINT``, ``HF_HOME``, ``HF_TOKEN``, ``HF_HUB_OFFLINE``). This
module adds names, a check of every byte, and errors that say what to do.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdconv.errors import SdconvWarning
from sdconv.hub.errors import DISK_TOO_SMALL, FetchError, HubFile, hub_errors
from sdconv.hub.listing import weights_in
from sdconv.hub.manifest import find_known
from sdconv.hub.names import HubId, is_file_name

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20


def fetch(
    name: str,
    *,
    directory: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
    revision: str | None = None,
) -> Path:
    """Downloads weights from the Hugging Face hub, or finds an earlier download, and checks them.

    Large files are checked against the sha256 that the hub states, small ones against git's hash.
    When the hub does not answer (no network, offline mode, terms not accepted), an earlier download
    is used: one in the hub's cache is checked against the hash under which it is stored; one in
    ``directory`` cannot be checked, and a warning says so.

    Args:
        name: a known checkpoint (``sdconv fetch --list``), or on the hub a file
            (``"owner/name:vae/model.safetensors"``), a folder (``"owner/name:vae"``) or the root
            of a repository (``"owner/name"``). Of a folder the safetensors weights are downloaded
            that diffusers would open, with their index and shards, and ``config.json``.
        directory: files go below ``directory/name``, for a repository without its owner; by
            default to the hub's own cache, where ``sdconv.load(name)`` finds those of the main
            branch.
        overwrite: replace another file that is already in ``directory/name``.
        progress: show progress bars if standard error is a terminal.
        revision: a branch, tag or commit of the repository; None for the main branch.

    Returns:
        The path of the weights, or of the index of their shards, for ``sdconv.load``.

    Raises:
        InputError: unknown name, or a folder without weights or with several.
        FetchError: the hub cannot be reached, refuses the file, does not have it or does not state
            its hash; the connection was cut; the disk is full or not writable; the bytes have
            another hash (the file is then deleted); or ``directory/name`` holds another file.
    """
    hub_id = HubId.parse(name) if "/" in name else None
    root = None if directory is None else Path(directory).expanduser()
    if hub_id is None:
        known = find_known(name)
        wanted = HubFile(
            repository=known.repository,
            file=known.file,
            label=str(known),
            revision=revision,
            gated=known.gated,
        )
        with _bars(progress):
            return _fetch_file(wanted, root and root / known.name, overwrite)
    wanted = HubFile(repository=hub_id.repository, file=hub_id.path, label=name, revision=revision)
    folder = root and root / hub_id.repository.partition("/")[2]
    with _bars(progress):
        if is_file_name(hub_id.path):
            return _fetch_file(wanted, folder, overwrite)
        with hub_errors(wanted):
            files = weights_in(wanted)
        paths = [_fetch_file(replace(wanted, file=file), folder, overwrite) for file in files]
    return paths[0]


def _fetch_file(wanted: HubFile, folder: Path | None, overwrite: bool) -> Path:
    with hub_errors(wanted):
        try:
            with hub_errors(wanted):
                stated = _stated_hash(wanted)
        except FetchError as error:
            return _earlier_download(wanted, folder, error)
        if folder is not None and (folder / wanted.file).exists():
            if _is_kept(folder / wanted.file, stated, overwrite):
                return folder / wanted.file
        return _verify(_download(wanted, folder, overwrite), stated)


def _stated_hash(wanted: HubFile) -> str:
    """The file's hash on the hub: the sha256 of a large file, from its ETag or else from the
    repository's listing, or git's of a small one, of which the repository holds the bytes."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    metadata = get_hf_file_metadata(
        hf_hub_url(wanted.repository, wanted.file, revision=wanted.revision)
    )
    if metadata.etag is not None and _SHA256.fullmatch(metadata.etag):
        return metadata.etag

    from huggingface_hub.hf_api import HfApi, RepoFile  # slow to import, and rarely needed

    commit = metadata.commit_hash
    for entry in HfApi().get_paths_info(wanted.repository, [wanted.file], revision=commit):
        if isinstance(entry, RepoFile) and entry.path == wanted.file and entry.lfs is not None:
            return entry.lfs.sha256
    if metadata.etag is not None and _GIT.fullmatch(metadata.etag):
        return metadata.etag
    raise FetchError(
        "the hub states no hash for this file, so it cannot be checked",
        where=wanted,
        got=f"ETag {metadata.etag}",
        hint="check HF_ENDPOINT, or download the file by hand and pass its path",
    )


def _download(wanted: HubFile, folder: Path | None, overwrite: bool) -> Path:
    from huggingface_hub import hf_hub_download

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=DISK_TOO_SMALL)
        path = hf_hub_download(
            wanted.repository,
            wanted.file,
            revision=wanted.revision,
            local_dir=folder,
            force_download=overwrite and folder is not None,
        )
    return Path(path)


def _earlier_download(wanted: HubFile, folder: Path | None, why: FetchError) -> Path:
    from huggingface_hub import try_to_load_from_cache

    if folder is not None:
        path = folder / wanted.file
        if not path.is_file():
            raise why
        reason = str(why).splitlines()[0]
        warnings.warn(f"{path} cannot be checked: {reason}", SdconvWarning, stacklevel=4)
        return path
    cached = try_to_load_from_cache(wanted.repository, wanted.file, revision=wanted.revision)
    if not isinstance(cached, str):
        raise why
    path = Path(cached)
    # the cache stores a file under its hash, and links to it under its name
    stored_as = path.readlink().name if path.is_symlink() else ""
    is_hash = _SHA256.fullmatch(stored_as) or _GIT.fullmatch(stored_as)
    return _verify(path, stored_as) if is_hash else path


def _is_kept(path: Path, stated: str, overwrite: bool) -> bool:
    """Whether an existing file is the one on the hub; an error if it is another, unless that may be
    overwritten."""
    got = _hash(path, stated)
    if got != stated and not overwrite:
        raise FetchError(
            "exists already and is not the file on the hub; it is not overwritten",
            where=path,
            expected=_named(stated),
            got=_named(got),
            hint="replace it with overwrite= or choose another directory",
        )
    return got == stated


def _verify(path: Path, stated: str) -> Path:
    got = _hash(path, stated)
    if got != stated:
        size = path.stat().st_size
        _remove(path)
        kind = _named(stated).partition(" ")[0]
        raise FetchError(
            f"the download has another {kind} than the hub states; it was deleted",
            where=path,
            expected=_named(stated),
            got=f"{_named(got)} ({size} bytes)",
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


def _named(digest: str) -> str:
    return f"{'sha256' if _SHA256.fullmatch(digest) else 'git-hash'} {digest}"


def _hash(path: Path, like: str) -> str:
    """The file's hash, of the kind of another one: sha256, or git's of a blob."""
    from huggingface_hub.utils.tqdm import tqdm

    size = path.stat().st_size
    if _GIT.fullmatch(like):
        # git's name for a file's content, and not what its safety rests upon
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    else:
        digest = hashlib.sha256()
    bar: type[Any] = tqdm  # untyped
    shown = {"desc": "checking", "total": size, "unit": "B", "unit_scale": True}
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
