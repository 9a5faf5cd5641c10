"""The plan of a data set: which image is in which shard, and how it becomes the network's input.

It is made from names and headers alone. Planning again keeps what is planned: unchanged images stay
in their shards, changed ones are marked, new ones make new shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any

from sdconv.dataset.headers import RETRIED, Header, Rejected, read_header, read_header_in_thread
from sdconv.dataset.placement import Placement, Sizing, parse_sizing
from sdconv.dataset.pools import process_pool
from sdconv.dataset.sources import Item, Source, find_images, open_item
from sdconv.errors import InputError, SdconvError
from sdconv.images import pillow_warnings

SHARD_SIZE = 1000
# from how many headers on processes read them; a process takes a second or two to start
_MANY = 20_000


@dataclass(frozen=True, kw_only=True)
class Planned:
    """An image in a shard.

    Attributes:
        key: the name of the sample: the path without its suffix, or with it where two images would
            share one.
        path, member, offset, bytes, mtime_ns: where it is, and what tells that it has not changed:
            see ``sources.Item``.
        original: rows and columns, upright. orientation, mode: as in ``headers.Header``.
        resized, crop, size: see ``placement.Placement``.
        revision: how often its content has changed since it was planned first.
    """

    key: str
    path: str
    member: str | None
    offset: int
    bytes: int
    mtime_ns: int
    original: tuple[int, int]
    orientation: int
    mode: str
    resized: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]
    revision: int = 0

    @property
    def identity(self) -> tuple[str, str | None]:
        """What tells it from other images of the source."""
        return self.path, self.member

    @property
    def stamp(self) -> tuple[int, int]:
        """Length and date: an image that keeps both is taken for unchanged."""
        return self.bytes, self.mtime_ns

    @property
    def placement(self) -> Placement:
        """How it becomes the network's input."""
        return Placement(self.resized, self.crop, self.size)

    @property
    def digest(self) -> str:
        """Equal digests have equal samples, as long as the settings are the same."""
        named = {**vars(self), "offset": 0, "bytes": 0, "mtime_ns": 0}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:32]

    def as_item(self) -> Item:
        """The image as the source lists it."""
        place = (self.path, self.member, self.offset, self.bytes, self.mtime_ns)
        return Item(self.key, *place)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """An image that is in no shard, and why; its other fields are those of ``Planned``."""

    key: str
    path: str
    member: str | None
    bytes: int
    mtime_ns: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """The shards of a data set, and the images that are in none.

    Attributes:
        shards: the images of each shard, in the order of its samples.
        left_out: the images that cannot be read, by their headers.
        missing: keys of planned images that are no longer in the source. Their samples are kept.
        changed: how many images have other contents than before.
        new: how many images were planned now.
    """

    shards: tuple[tuple[Planned, ...], ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    missing: tuple[str, ...] = field(default=(), compare=False)
    changed: int = field(default=0, compare=False)
    new: int = field(default=0, compare=False)

    @property
    def images(self) -> int:
        """How many images are in shards."""
        return sum(map(len, self.shards))

    def lines(self) -> Iterable[str]:
        """The plan as JSON, one line for each image."""
        for number, shard in enumerate(self.shards):
            for one in shard:
                yield json.dumps({"shard": number, **vars(one)}) + "\n"
            if not shard:  # all its images were removed; the numbers of the others stay
                yield json.dumps({"shard": number}) + "\n"
        for left in self.left_out:
            yield json.dumps({"shard": None, **vars(left)}) + "\n"

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a file.

        Raises:
            SdconvError: it cannot be read, or is not a plan.
        """
        shards: dict[int, list[Planned]] = {}
        left_out = []
        try:
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    fields = json.loads(line)
                    number = fields.pop("shard")
                    if number is None:
                        left_out.append(LeftOut(**fields))
                        continue
                    shard = shards.setdefault(number, [])
                    if fields:
                        shard.append(Planned(**{**fields, **_pairs(fields)}))
            if list(shards) != list(range(len(shards))):
                raise ValueError("shards are missing")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise SdconvError(
                f"the plan cannot be read ({error})",
                where=path,
                hint="start the data set anew: --force",
            ) from error
        return cls(tuple(map(tuple, shards.values())), tuple(left_out))


def _pairs(fields: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: tuple(fields[name]) for name in ("original", "resized", "crop", "size")}


def shard_digest(shard: Iterable[Planned]) -> str:
    """What tells whether a shard on the disk is the planned one."""
    return hashlib.sha256("".join(one.digest for one in shard).encode()).hexdigest()[:32]


def plan(
    source: str | Path,
    size: str = "512",
    *,
    multiple: int = 8,
    shard_size: int = SHARD_SIZE,
) -> Plan:
    """Plans a data set from the headers of its images, without a network.

    Args:
        source: see ``sources.find_images``. size: see ``placement.parse_sizing``.
        multiple: of which the sides of the network's input must be.
        shard_size: the most images of a shard.

    Raises:
        InputError: there are no images, or an argument is not valid.
    """
    sizing = parse_sizing(size, multiple)
    return extended(Plan(), find_images(source), sizing, multiple, shard_size)


def extended(
    old: Plan,
    source: Source,
    sizing: Sizing,
    multiple: int,
    shard_size: int,
    contents: Callable[[], Mapping[str, str | None]] = dict,
    *,
    rehash: bool = False,
    prune: bool = False,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Plan:
    """A plan that takes in what has changed in the source.

    Args:
        old: the plan so far.
        source: the images that there are now.
        sizing, multiple, shard_size: as for ``plan``.
        contents: returns the SHA-256 of each image that was encoded, by key, or a reason for which
            it was not.
        rehash: compare contents even where length and date are the same.
        prune: drop planned images that are no longer there.
        progress: called with a name, the headers read so far and those to read.

    Raises:
        InputError: ``shard_size`` is below 1, or none of the planned images is there.
    """
    if shard_size < 1:
        raise InputError("not a size", where="shard_size", expected="1 or more", got=shard_size)
    found = {item.identity: item for item in source.items}
    planned = {one.identity for shard in old.shards for one in shard}
    planned_or_not = planned | {(one.path, one.member) for one in old.left_out}
    if planned_or_not and not planned_or_not & set(found):
        raise InputError(
            "this is another source: none of the planned images is in it",
            where=source.root,
            expected=f"images such as {min(path for path, _ in planned_or_not)}",
            hint="give each source a data set of its own",
        )
    keep = _Kept(source.root, found, sizing, multiple, contents, rehash, prune)
    shards = [tuple(keep.those(shard)) for shard in old.shards]
    left_out = [one for one in old.left_out if keep.left_out(one)]
    settled = {one.identity for shard in shards for one in shard}
    settled |= {(one.path, one.member) for one in left_out}
    taken = {one.key for shard in shards for one in shard} | {one.key for one in left_out}
    new = [item for item in source.items if item.identity not in settled]
    added = []
    headers = _headers(source.root, new, progress)
    for item, key, header in zip(new, _keys(new, taken), headers, strict=True):
        if isinstance(header, Rejected):
            stamp = {"bytes": item.bytes, "mtime_ns": item.mtime_ns}
            where = {"path": item.path, "member": item.member}
            left_out.append(LeftOut(key=key, **where, **stamp, **vars(header)))  # type: ignore[arg-type]
        else:
            added.append(_planned(key, item, header, sizing, multiple))
    left_out.sort(key=lambda one: one.key)
    return Plan(
        (*shards, *_cut(added, sizing, shard_size)),
        tuple(left_out),
        tuple(sorted(keep.missing)),
        keep.changed,
        len(new),
    )


@dataclass
class _Kept:
    """Decides what happens to the images that are planned already."""

    root: Path
    found: Mapping[tuple[str, str | None], Item]
    sizing: Sizing
    multiple: int
    contents: Callable[[], Mapping[str, str | None]]
    rehash: bool
    prune: bool
    missing: list[str] = field(default_factory=list)
    changed: int = 0
    _known: Mapping[str, str | None] | None = None

    def those(self, shard: Sequence[Planned]) -> Iterable[Planned]:
        """The images of a shard that stay in it, as they are now."""
        for one in shard:
            item = self.found.get(one.identity)
            if item is None or item.bytes < 0:
                self.missing.append(one.key)
                if not self.prune:
                    yield one
                continue
            stays = self._now(one, item)
            if stays is not None:
                yield stays

    def left_out(self, one: LeftOut) -> bool:
        """Whether an image that was left out still is, without another look at it."""
        item = self.found.get((one.path, one.member))
        if item is None:
            return not self.prune
        same = (item.bytes, item.mtime_ns) == (one.bytes, one.mtime_ns)
        return same and one.reason not in RETRIED and not self.rehash

    def _now(self, one: Planned, item: Item) -> Planned | None:
        place = replace(one, offset=item.offset, bytes=item.bytes, mtime_ns=item.mtime_ns)
        known = self._content(one.key)
        same = one.stamp == place.stamp
        if same and not self.rehash and known not in RETRIED:
            return place
        if known is not None and known == self._hash(item):
            return place
        header = read_header(self.root, item)
        if isinstance(header, Rejected):
            return None
        again = _planned(one.key, item, header, self.sizing, self.multiple)
        if self.sizing.grouped and again.size != one.size:
            return None
        self.changed += known is not None
        # what was never encoded needs no new revision
        return replace(again, revision=one.revision + (known is not None))

    def _content(self, key: str) -> str | None:
        if self._known is None:
            self._known = self.contents()
        return self._known.get(key)

    def _hash(self, item: Item) -> str | None:
        place = (item.path, item.offset, item.bytes, item.member is not None)
        try:
            with open_item(self.root, *place) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except OSError:
            return None


def _keys(items: Sequence[Item], taken: Collection[str]) -> list[str]:
    used = set(taken)
    keys = []
    for item in items:
        key = item.name if item.name not in used else item.full_name
        for number in count(2):
            if key not in used:
                break
            key = f"{item.full_name}.{number}"
        used.add(key)
        keys.append(key)
    return keys


def _planned(key: str, item: Item, header: Header, sizing: Sizing, multiple: int) -> Planned:
    placement = sizing.place(header.size, multiple)
    return Planned(
        key=key,
        path=item.path,
        member=item.member,
        offset=item.offset,
        bytes=item.bytes,
        mtime_ns=item.mtime_ns,
        original=header.size,
        orientation=header.orientation,
        mode=header.mode,
        resized=placement.resized,
        crop=placement.crop,
        size=placement.size,
    )


def _cut(images: list[Planned], sizing: Sizing, shard_size: int) -> Iterable[tuple[Planned, ...]]:
    """Shards of images of one size each, or sorted by size where every image has its own."""
    images = sorted(images, key=lambda one: (one.size, one.key))
    groups = [images]
    if sizing.grouped:
        groups = [list(group) for _, group in groupby(images, key=lambda one: one.size)]
    for group in groups:
        for start in range(0, len(group), shard_size):
            yield tuple(group[start : start + shard_size])


def _headers(
    root: Path, items: Sequence[Item], progress: Callable[[str, int, int], object]
) -> list[Header | Rejected]:
    """The headers of many images, read side by side."""
    workers = min(os.cpu_count() or 1, 32)
    with ExitStack() as stack:
        pool: Executor
        read = read_header
        if len(items) < _MANY or workers == 1:
            stack.enter_context(pillow_warnings())
            read, pool = read_header_in_thread, stack.enter_context(ThreadPoolExecutor(8))
        else:
            pool = stack.enter_context(process_pool(workers))
        headers: list[Header | Rejected] = []
        for header in pool.map(partial(read, root), items, chunksize=512):
            headers.append(header)
            progress("", len(headers), len(items))
        return headers
