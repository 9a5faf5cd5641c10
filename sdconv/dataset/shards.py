"""The unit of work: the images of a shard go in, its files and its record come out.

A shard can be made by any process, any number of times: its bytes are the same, and it counts once
its record is there.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sdconv.dataset.decoding import Decoded, decode
from sdconv.dataset.headers import Rejected
from sdconv.dataset.layouts import layout_of
from sdconv.dataset.layouts.sample import Layout, Sample
from sdconv.dataset.plan import Planned, shard_digest
from sdconv.dataset.pools import process_pool
from sdconv.dataset.store import Record, Store, file_digest
from sdconv.errors import SdconvError

Tick = Callable[[int, float], object]
"""Called with the images done since the last call, and the seconds the network waited for them."""

Shard = tuple[int, Sequence[Planned]]


class Work(Protocol):
    """What is computed from images: an ``Encoder``, or features."""

    @property
    def batch(self) -> int:
        """The most images that are computed at once."""

    @property
    def computed_on(self) -> dict[str, Any]:
        """The device, and on a CPU the threads: numbers differ by rounding on others."""

    def compute(self, images: Sequence[Decoded]) -> list[dict[str, Tensor] | Rejected]:
        """The tensors of each image; the images have one size."""

    def facts(self, image: Decoded, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a sample's JSON says about its tensors."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to make shards of a data set; it can be pickled.

    Attributes:
        folder, name, layout: of the data set: see ``Store`` and ``layout_of``.
        root: of the source.
        work: what is computed.
        draft: see ``decode``.
        decoders: processes that decode images ahead of the network; 0 decodes in between.
        strict: an image that cannot be encoded is an error.
        settings: see ``store.settings_digest``.
    """

    folder: Path
    name: str
    layout: str
    root: Path
    work: Work
    draft: bool
    decoders: int
    strict: bool
    settings: str | None

    @property
    def store(self) -> Store:
        """The data set's folder."""
        return Store(self.folder, self.name, self.settings)


def make_shards(
    job: Job, shards: Iterable[Shard], tick: Tick = lambda *_: None
) -> Iterator[Record]:
    """Makes shards, one after the other, and yields the record of each when it is committed.

    Args:
        job: how.
        shards: number and images of each, at least one; while a shard is encoded, images of the
            next are decoded already.
        tick: called after each batch.

    Raises:
        SdconvError: a file cannot be written; or an image cannot be encoded, if ``job.strict``.
    """
    store, layout = job.store, layout_of(job.layout)
    ahead = _ahead(job, _tasks(store, layout, shards), tick)
    with closing(ahead):  # with its processes, also where a shard cannot be made
        for number, results in groupby(ahead, key=lambda pair: pair[0].number):
            yield _make(job, store, layout, number, results, tick)


@dataclass(frozen=True)
class _Task:
    """An image of ``shard``. ``stored``: reads its sample, if that is on the disk already."""

    number: int
    shard: Sequence[Planned]
    planned: Planned
    stored: Callable[[], Sample] | None


Result = Decoded | Rejected | Sample


def _tasks(store: Store, layout: Layout, shards: Iterable[Shard]) -> Iterator[_Task]:
    for number, images in shards:
        record = store.record(number)
        stored: dict[str, Callable[[], Sample]] = {}
        if record is not None and _intact(store, record):
            for sample in record["samples"]:
                stored[sample["digest"]] = _reader(store, layout, record, sample["place"])
        for planned in images:
            yield _Task(number, images, planned, stored.get(planned.digest))


def _reader(
    store: Store, layout: Layout, record: Record, place: Mapping[str, Any]
) -> Callable[[], Sample]:
    return lambda: layout.read(store, record, place)


def _intact(store: Store, record: Record) -> bool:
    try:
        return all(
            file_digest(store.folder / file["name"]) == file["sha256"] for file in record["files"]
        )
    except OSError:
        return False


def _ahead(
    job: Job, tasks: Iterable[_Task], tick: Tick
) -> Generator[tuple[_Task, Result], None, None]:
    """Each task with its image, decoded while the network computes, in order."""

    def ready(task: _Task, found: Future[Decoded | Rejected] | None) -> tuple[_Task, Result]:
        if task.stored is not None:
            return task, task.stored()
        start = time.perf_counter()
        decoded = decode(job.root, task.planned, job.draft) if found is None else found.result()
        tick(0, time.perf_counter() - start)
        return task, decoded

    if not job.decoders:
        yield from (ready(task, None) for task in tasks)
        return
    waiting: deque[tuple[_Task, Future[Decoded | Rejected] | None]] = deque()
    pool = process_pool(job.decoders)
    try:
        for task in tasks:
            found = None
            if task.stored is None:
                found = pool.submit(decode, job.root, task.planned, job.draft)
            waiting.append((task, found))
            if len(waiting) > 2 * job.decoders + job.work.batch:
                yield ready(*waiting.popleft())
        while waiting:
            yield ready(*waiting.popleft())
    except BrokenProcessPool as error:
        raise SdconvError(
            "a process that decodes images was killed",
            where=job.root,
            hint="run it again: what is committed stays; if memory was short, use fewer --decoders",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _make(
    job: Job,
    store: Store,
    layout: Layout,
    number: int,
    results: Iterator[tuple[_Task, Result]],
    tick: Tick,
) -> Record:
    """Writes a shard, and then its record."""
    shard: Sequence[Planned] = ()
    digests: list[tuple[str, str, str]] = []
    left_out: list[dict[str, Any]] = []
    leftovers: dict[str, str] = {}
    about = store.about() or {}

    def samples() -> Iterator[Sample]:
        nonlocal shard
        for task, result in _computed(job, results, tick):
            shard, planned = task.shard, task.planned
            if isinstance(result, Sample):
                digests.append((planned.key, planned.digest, result.about["sha256"]))
                yield result
                continue
            if job.strict:
                raise refusal(planned.path, planned.member, result.reason, result.detail)
            if (name := layout.file_of(about, planned)) is not None:
                leftovers[planned.key] = name
            left_out.append(
                {
                    "key": planned.key,
                    "digest": planned.digest,
                    "path": planned.path,
                    "member": planned.member,
                    "reason": result.reason,
                    "detail": result.detail,
                }
            )

    with store.staged():
        files, places = layout.write(store, number, samples())
        record = {
            "shard": number,
            "digest": shard_digest(shard),
            "settings": job.settings,
            "made_by": made_by(job.work),
            "files": files if digests else [],
            "samples": [
                {"key": key, "digest": digest, "sha256": content, "place": place}
                for (key, digest, content), place in zip(digests, places, strict=True)
            ],
            "quarantined": left_out,
        }
        store.commit(record, leftovers)
    return record


def made_by(work: Work) -> dict[str, Any]:
    """What the bits of a shard depend on, apart from the settings."""
    return {
        "sdconv": metadata.version("sdconv"),
        "torch": torch.__version__,
        **work.computed_on,
    }


def refusal(path: str, member: str | None, reason: str, detail: str) -> SdconvError:
    """The error about an image that may not be left out."""
    return SdconvError(
        f"an image cannot be encoded: {reason}",
        where=path if member is None else f"{path}/{member}",
        got=detail,
        hint="leave --on-error fail out to put it into quarantine and go on",
    )


def _computed(
    job: Job, results: Iterator[tuple[_Task, Result]], tick: Tick
) -> Iterator[tuple[_Task, Sample | Rejected]]:
    """The results with decoded images turned into samples, batch by batch, in order."""

    def size(pair: tuple[_Task, Result]) -> tuple[int, ...] | None:
        return pair[1].pixels.shape if isinstance(pair[1], Decoded) else None

    for shape, run in groupby(results, key=size):
        if shape is None:
            for task, result in run:
                assert not isinstance(result, Decoded)
                yield task, result
                tick(1, 0.0)
            continue
        while batch := list(islice(run, job.work.batch)):
            images = [result for _, result in batch if isinstance(result, Decoded)]
            computed = job.work.compute(images)
            for (task, _), image, tensors in zip(batch, images, computed, strict=True):
                if isinstance(tensors, Rejected):
                    yield task, tensors
                else:
                    about = {**_about(image), **job.work.facts(image, tensors)}
                    yield task, Sample(about, tensors)
            tick(len(batch), 0.0)


def _about(image: Decoded) -> dict[str, Any]:
    """What a sample's JSON says about its image; sizes are rows and columns."""
    planned = image.planned
    member = {} if planned.member is None else {"member": planned.member}
    return {
        "key": planned.key,
        "path": planned.path,
        **member,
        "sha256": image.content,
        "original_size": list(planned.original),
        "orientation": planned.orientation,
        "mode": planned.mode,
        "notes": list(image.notes),
        "resized": list(planned.resized),
        "crop": list(planned.crop),
        "bucket": list(planned.size),
        "content": list(planned.placement.content),
    }
