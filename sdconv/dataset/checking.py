"""How far a data set is, and whether everything in it is as it was written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdconv.dataset.layouts import layout_of
from sdconv.dataset.layouts.sample import READ_ERRORS, Layout
from sdconv.dataset.plan import Planned, shard_digest
from sdconv.dataset.store import Record, Store, file_digest


@dataclass(frozen=True)
class Status:
    """How far a data set is.

    Attributes:
        about: the content of ``dataset.json``.
        images, shards: in the plan. encoded: images in committed shards. done: committed shards.
        stale: committed shards whose images have changed since.
        quarantined: reason -> number of images.
        bytes: of the committed files.
        buckets: (rows, columns) -> number of planned images.
    """

    about: dict[str, Any]
    images: int
    shards: int
    encoded: int
    done: int
    stale: int
    quarantined: dict[str, int]
    bytes: int
    buckets: dict[tuple[int, int], int]

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.done == self.shards


@dataclass(frozen=True)
class Verified:
    """What a check of all shards found.

    Attributes:
        shards, samples, bytes: that were read.
        problems: what is wrong, in words, with the number of its shard, or None.
        unfinished: shards that are not committed, which is not a problem.
    """

    shards: int
    samples: int
    bytes: int
    problems: tuple[tuple[int | None, str], ...]
    unfinished: int


def status(folder: str | Path) -> Status:
    """How far a data set is, from its plan and its records.

    Raises:
        InputError: there is none. SdconvError: it cannot be read.
    """
    store = Store.open(folder)
    plan = store.plan()
    encoded = done = stale = size = 0
    for number, shard in enumerate(plan.shards):
        record = store.record(number)
        if not shard:
            done += 1
        elif record is not None:
            fresh = record["digest"] == shard_digest(shard)
            done, stale = done + fresh, stale + (not fresh)
            encoded += len(record["samples"])
            size += sum(file["bytes"] for file in record["files"])
    return Status(
        about=store.about() or {},
        images=plan.images,
        shards=len(plan.shards),
        encoded=encoded,
        done=done,
        stale=stale,
        quarantined=dict(Counter(one["reason"] for one in store.quarantined(plan))),
        bytes=size,
        buckets=dict(sorted(Counter(one.size for s in plan.shards for one in s).items())),
    )


def verify(
    folder: str | Path,
    *,
    discard: bool = False,
    progress: Callable[[str, int, int], object] = lambda *_: None,
) -> Verified:
    """Reads every committed shard again: files and hashes, keys and counts, shapes and finite
    values.

    Args:
        folder: the data set.
        discard: remove damaged shards, so that the next run makes them again.
        progress: called with a name, the shards read so far and all shards.

    Raises:
        InputError: there is no data set. SdconvError: its plan cannot be read.
    """
    store = Store.open(folder)
    layout, plan = layout_of((store.about() or {})["layout"]), store.plan()
    problems: list[tuple[int | None, str]] = []
    seen: Counter[str] = Counter()
    shards = samples = size = unfinished = 0
    for number, shard in enumerate(plan.shards):
        progress("", number, len(plan.shards))
        record = store.record(number)
        if record is None or record["digest"] != shard_digest(shard):
            wrong = record is None and (store.folder / f"{store.shard_name(number)}.json").exists()
            if wrong:
                problems.append((number, "its record or one of its files is damaged or missing"))
            unfinished += bool(shard) and not wrong
            continue
        found = list(_problems_of(store, layout, record, shard))
        problems += [(number, words) for words in found]
        seen.update(sample["key"] for sample in record["samples"])
        shards, samples = shards + 1, samples + len(record["samples"])
        size += sum(file["bytes"] for file in record["files"])
    problems += [
        (None, f"{key} is there {times} times") for key, times in seen.items() if times > 1
    ]
    if discard:
        for damaged in sorted({number for number, _ in problems if number is not None}):
            store.remove_shard(damaged)
    return Verified(shards, samples, size, tuple(problems), unfinished)


def _problems_of(
    store: Store, layout: Layout, record: Record, shard: tuple[Planned, ...]
) -> Iterator[str]:
    for file in record["files"]:
        if file_digest(store.folder / file["name"]) != file["sha256"]:
            yield f"{file['name']} is not as it was written"
            return
    keys = [one["key"] for one in record["samples"] + record["quarantined"]]
    if sorted(keys) != sorted(one.key for one in shard):
        yield f"it has {len(keys)} images, and the plan {len(shard)} of other keys"
    for entry in record["samples"]:
        try:
            sample = layout.read(store, record, entry["place"])
        except READ_ERRORS as error:
            yield f"{entry['key']} cannot be read ({error})"
            continue
        if sample.key != entry["key"]:
            yield f"{sample.key} is in the place of {entry['key']}"
        for name, x in sample.tensors.items():
            shapes = sample.about.get("shapes", {})
            if list(x.shape) != shapes.get(name, sample.about.get("shape", list(x.shape))):
                yield f"{entry['key']}: {name} has shape {tuple(x.shape)}"
            if not torch.isfinite(x).all():
                yield f"{entry['key']}: {name} holds NaN or infinity"
