"""A data set's folder: each file in it is complete or absent, whenever the process is killed.

- ``dataset.json``: what made it;
- ``plan.jsonl``: the images and their shards;
- ``NAME-000000.json``: the record of a shard. It appears after the files that it lists, and without
  it they do not count;
- ``quarantine.jsonl``: the images that were left out, and why.

What follows from all images, such as ``AXES`` and ``PATCHES``, is next to them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from sdconv.dataset.plan import Plan
from sdconv.errors import InputError, SdconvError

FORMAT, VERSION = "sdconv_dataset", 1
ABOUT, PLAN, QUARANTINE, LOCK = "dataset.json", "plan.jsonl", "quarantine.jsonl", ".lock"
_NUMBERS = count()  # threads of one process must not share a temporary file
SHARDS = (".tar", ".parquet", ".zarr.zip")
"""The suffixes of a shard, in layouts that write it as one file."""
_QUARANTINED = ("key", "path", "member", "reason", "detail")
AXES, PATCHES = "pca.safetensors", "patches.html"

Record = dict[str, Any]


class Store:
    """The folder of a data set.

    Args:
        folder: its path. name: what its shards' names begin with, such as ``latents``.
        settings: write only while ``dataset.json`` has this ``settings_digest``.
    """

    def __init__(self, folder: Path, name: str, settings: str | None = None) -> None:
        self.folder = folder
        self.name = name
        self._settings = settings
        self._staged: dict[Path, str] | None = None  # files under temporary names

    def shard_name(self, number: int) -> str:
        """The name of a shard, without a suffix."""
        return f"{self.name}-{number:06d}"

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """The data set in a folder that exists.

        Raises:
            InputError: there is none.
        """
        store = cls(Path(folder), "")
        about = store.about()
        if about is None:
            raise InputError(
                "not a data set of sdconv",
                where=folder,
                expected=f"a folder with {ABOUT}",
                hint="name the folder that `sdconv dataset encode` wrote",
            )
        store.name = about["name"]
        return store

    def about(self) -> dict[str, Any] | None:
        """The content of ``dataset.json``; None if there is none.

        Raises:
            SdconvError: it cannot be read, or is of a later version.
        """
        path = self.folder / ABOUT
        try:
            about = json.loads(path.read_text("utf-8"))
            if about["format"] != FORMAT:
                raise ValueError(f"its format is {about['format']!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SdconvError(f"cannot be read ({error})", where=path) from error
        if about["version"] != VERSION:
            raise SdconvError(
                "this data set is of another version of sdconv",
                where=path,
                expected=f"version {VERSION}",
                got=about["version"],
                hint="update sdconv",
            )
        return dict(about)

    def plan(self) -> Plan:
        """The plan; an empty one if there is none."""
        path = self.folder / PLAN
        return Plan.read(path) if path.exists() else Plan()

    def record(self, number: int) -> Record | None:
        """The record of a shard that is on the disk; None if it is not, is not whole, or was made
        in another way than ``dataset.json`` says."""
        record = self._stated(number)
        try:
            whole = record["settings"] == settings_digest(self.about()) and all(
                (self.folder / file["name"]).stat().st_size == file["bytes"]
                for file in record["files"]
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return record if whole else None

    def _stated(self, number: int) -> Record:
        """What a shard's record says, whole or not; nothing if it cannot be read."""
        path = self.folder / f"{self.shard_name(number)}.json"
        try:
            return dict(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock, which processes on one file system take in turn; it ends with
        the process."""
        from filelock import FileLock

        with self.errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def write(self, name: str, write: Callable[[BinaryIO], object]) -> dict[str, Any]:
        """Writes a file of the folder: under a temporary name, synced, and then renamed; within
        ``staged`` it is ``commit`` that renames it.

        Returns:
            Its name, length and SHA-256.

        Raises:
            SdconvError: it cannot be written, or another process has started the folder anew in
                another way; what was there before is left as it is.
        """
        path = self.folder / name
        process = f"{socket.gethostname()}.{os.getpid()}"
        part = path.with_name(f".{path.name}.{next(_NUMBERS)}.{process}.part")
        with self.errors(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with part.open("w+b") as file:
                    write(file)
                    file.flush()
                    os.fsync(file.fileno())
                    file.seek(0)
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    length = file.tell()
                self._check_settings()
                if self._staged is None:
                    part.replace(path)
                else:
                    self._staged[part] = name
            finally:
                if part not in (self._staged or ()):
                    part.unlink(missing_ok=True)
            sync_folder(path.parent)
        return {"name": name, "bytes": length, "sha256": digest}

    def write_text(self, name: str, lines: Iterable[str]) -> None:
        """Writes lines to a file of the folder, as ``write`` does.

        Raises:
            SdconvError: it cannot be written.
        """
        self.write(name, lambda file: file.writelines(line.encode() for line in lines))

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Writes JSON to a file of the folder, as ``write`` does.

        Raises:
            SdconvError: it cannot be written.
        """
        self.write_text(name, [json.dumps(content, indent=1) + "\n"])

    @contextmanager
    def staged(self) -> Iterator[None]:
        """Files that are written within it get their names in ``commit``, or are removed."""
        self._staged = {}
        try:
            yield
        finally:
            parts, self._staged = self._staged or {}, None
            for part in parts:
                part.unlink(missing_ok=True)

    def commit(self, record: Record, leftovers: Mapping[str, str]) -> None:
        """Gives the staged files of a shard their names, and writes its record.

        Other runs wait meanwhile, and a shard that is made again has no record until the new one
        is there: at no moment do files of one run stand next to the record of another.

        Args:
            record: of the shard. Staged files that it does not list are removed.
            leftovers: key -> file that an image without a sample may have all the same, from a run
                that was killed before the shard's first record.

        Raises:
            SdconvError: as ``write``.
        """
        number, kept = record["shard"], {file["name"] for file in record["files"]}
        with self.locked(), self.errors():
            self._check_settings()
            before = self._stated(number)
            (self.folder / f"{self.shard_name(number)}.json").unlink(missing_ok=True)
            parts, self._staged = self._staged or {}, None
            for part, name in parts.items():
                if name in kept:
                    part.replace(self.folder / name)
                else:
                    part.unlink()
            for folder in {part.parent for part in parts}:
                sync_folder(folder)
            stale = _files_by_key(before) if before else leftovers
            self._remove_replaced(number, stale, kept)
            self.write_json(f"{self.shard_name(number)}.json", record)

    def write_quarantine(self, plan: Plan) -> dict[str, int]:
        """Writes ``quarantine.jsonl`` from the plan and the records.

        Returns:
            The number of images for each reason.
        """
        left = self.quarantined(plan)
        self.write_text(QUARANTINE, [json.dumps(one) + "\n" for one in left])
        return Counter(one["reason"] for one in left)

    def quarantined(self, plan: Plan) -> list[dict[str, Any]]:
        """The lines of ``quarantine.jsonl``: images that were left out, sorted by key."""
        left = [{name: getattr(one, name) for name in _QUARANTINED} for one in plan.left_out]
        for number in range(len(plan.shards)):
            record = self.record(number)
            if record is not None:
                left += [
                    {name: one[name] for name in _QUARANTINED} for one in record["quarantined"]
                ]
        return sorted(left, key=lambda one: str(one["key"]))

    def remove_leftovers(self) -> None:
        """Removes the temporary files of processes of this machine that are gone."""
        for part in self.folder.rglob(".*.part"):
            host, _, number = part.name.removesuffix(".part").rpartition(".")
            if host.endswith(f".{socket.gethostname()}") and not _runs(number):
                with suppress(OSError):
                    part.unlink()

    def remove_all(self) -> None:
        """Removes the data set's files, and no others; ``dataset.json`` is the last."""
        suffixes = "|".join(map(re.escape, SHARDS))
        names = re.compile(rf"{re.escape(self.name)}-(\d{{6,}})(\.json|{suffixes})")
        found = (names.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = {int(match[1]) for match in found if match}
        names_of_shards = [name for n in sorted(numbers) for name in self._files_of(n)]
        with self.errors():
            for name in (*names_of_shards, AXES, PATCHES, QUARANTINE, PLAN, ABOUT):
                (self.folder / name).unlink(missing_ok=True)

    def remove_shard(self, number: int) -> None:
        """Removes a shard, which the next run makes again; its record is the first."""
        with self.errors():
            for name in reversed(self._files_of(number)):
                (self.folder / name).unlink(missing_ok=True)

    def _remove_replaced(self, number: int, stale: Mapping[str, str], kept: set[str]) -> None:
        """Removes files that a shard no longer has: ``stale`` ones of images that were removed,
        renamed, or cannot be encoded any more, and those of a run that was killed."""
        gone = {key: name for key, name in stale.items() if name not in kept}
        if gone:
            shards = enumerate(self.plan().shards)
            elsewhere = {one.key for n, shard in shards if n != number for one in shard}
            for key in gone.keys() - elsewhere:
                (self.folder / gone[key]).unlink(missing_ok=True)
        for name in self._names_of(number) - kept:
            (self.folder / name).unlink(missing_ok=True)

    def _files_of(self, number: int) -> list[str]:
        """The names of a shard's files, with a record or without, and its record last."""
        record = f"{self.shard_name(number)}.json"
        stated = set(_files_by_key(self._stated(number)).values())
        return [*sorted(stated | self._names_of(number)), record]

    def _names_of(self, number: int) -> set[str]:
        """The names that the file of a shard may have."""
        return {self.shard_name(number) + suffix for suffix in SHARDS}

    def _check_settings(self) -> None:
        if self._settings is not None and self._settings != settings_digest(self.about()):
            raise SdconvError(
                "another process has started this data set anew, in another way",
                where=self.folder,
                hint="let one run end before you start another with --force",
            )

    @contextmanager
    def errors(self, path: Path | None = None) -> Iterator[None]:
        """Translates an OSError about the folder."""
        try:
            yield
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise SdconvError(
                "the disk is full" if full else "cannot be written",
                where=path or self.folder,
                got=error.strerror or error,
                hint="make room and run it again: what is committed stays"
                if full
                else "check that the folder is writable, and run it again: what is committed stays",
            ) from error


def _files_by_key(record: Record) -> dict[str, str]:
    """Key -> the name of the file that its sample is in; of a damaged record, none."""
    try:
        return {
            one["key"]: record["files"][one["place"].get("file", 0)]["name"]
            for one in record["samples"]
        }
    except (KeyError, TypeError, IndexError, AttributeError):
        return {}


def settings_digest(about: Mapping[str, Any] | None) -> str:
    """What tells whether two data sets are made in one way, whichever version of sdconv did it."""
    named = json.dumps({**(about or {}), "sdconv": ""}, sort_keys=True)
    return hashlib.sha256(named.encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _runs(number: str) -> bool:
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    try:  # one that is killed, but whose parent has not noticed yet, runs no more
        state = Path(f"/proc/{number}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return True
    return state[:1] != ["Z"]
