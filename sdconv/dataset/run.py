"""A run over a data set: plan, refuse what does not fit, make the shards that are not there."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from sdconv.dataset.layouts import layout_of
from sdconv.dataset.placement import parse_sizing
from sdconv.dataset.plan import SHARD_SIZE, Plan, extended, shard_digest
from sdconv.dataset.processes import run_processes
from sdconv.dataset.refusals import check_absent, check_empty, check_same
from sdconv.dataset.shards import Job, Shard, Tick, Work, made_by, make_shards, refusal
from sdconv.dataset.sources import find_images
from sdconv.dataset.store import ABOUT, FORMAT, PLAN, VERSION, Record, Store, settings_digest
from sdconv.errors import InputError, SdconvWarning

ENGINES = ("processes", "ray")
ON_ERROR = ("quarantine", "fail")

Progress = Callable[[str, int, int], object]
"""Called with what is done (``planning``, ``encoding``), how much of it, and how much there is."""


class DatasetWork(Work, Protocol):
    """Work that a data set is made of."""

    @property
    def multiple(self) -> int:
        """Of which the sides of the network's input must be."""

    def about(self) -> dict[str, Any]:
        """What decides the results."""

    def prepare(self, store: Store, root: Path, plan: Plan) -> None:
        """Called once before the first shard, while the folder is locked."""

    def for_worker(self, number: int) -> DatasetWork:
        """The same work for one of several processes, without what has been loaded."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a data set is made.

    Attributes:
        size: see ``placement.parse_sizing``.
        layout: ``"webdataset"``; ``"kohya"`` or ``"parquet"`` for latents; ``"zarr"`` for images of
            one size each shard.
        shard_size: the most images of a shard.
        draft: large JPEGs are decoded at a fraction of their size: see ``decoding.DRAFT``.
        workers: processes with a network each; 1 computes in this process.
        decoders: processes of each worker that decode images ahead of its network; 0 for none.
        engine: ``"processes"`` on this machine, or ``"ray"``.
        rank: (rank, number of ranks) of a static split: shard ``i`` is made by rank ``i`` modulo
            their number; None for what the environment says, see ``environment_rank``.
        on_error: ``"quarantine"`` leaves images out that cannot be encoded, ``"fail"`` stops.
        force: start anew, which one of several ranks cannot. rehash, prune: see ``plan.extended``.
    """

    size: str = "512"
    layout: str = "webdataset"
    shard_size: int = SHARD_SIZE
    draft: bool = True
    workers: int = 1
    decoders: int = 0
    engine: str = "processes"
    rank: tuple[int, int] | None = None
    on_error: str = "quarantine"
    force: bool = False
    rehash: bool = False
    prune: bool = False

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("engine", self.engine, ENGINES),
            ("on_error", self.on_error, ON_ERROR),
        ):
            if value not in allowed:
                raise InputError(
                    f"unknown {name}", where=name, expected=", ".join(allowed), got=repr(value)
                )
        for name, number, least in (("workers", self.workers, 1), ("decoders", self.decoders, 0)):
            if number < least:
                raise InputError(
                    "not a number of processes", where=name, expected=f"{least} or more", got=number
                )


@dataclass
class Summary:
    """What a run did.

    Attributes:
        folder: of the data set.
        images, shards: in the plan.
        encoded, made: images and shards of this run.
        done: shards that are committed, of this run or an earlier one.
        quarantined: reason -> number of images.
        new, changed: images that were planned, and that had other contents.
        missing: keys of planned images that are no longer in the source.
        rank: see ``Options``.
        seconds: of the encoding. waited: of these, how long networks waited for images, summed
            over the workers.
    """

    folder: Path
    images: int
    shards: int
    new: int
    changed: int
    missing: tuple[str, ...]
    rank: tuple[int, int]
    encoded: int = 0
    made: int = 0
    done: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether every shard is committed."""
        return self.done == self.shards

    @property
    def images_per_second(self) -> float:
        """The rate of this run."""
        return self.encoded / self.seconds if self.seconds else 0.0


def make_dataset(
    name: str,
    source: str | Path,
    out: str | Path,
    work: DatasetWork,
    options: Options,
    progress: Progress = lambda *_: None,
) -> Summary:
    """Makes a data set, or what is missing of it.

    Args:
        name: what it holds, ``"latents"`` or ``"features"``.
        source: see ``sources.find_images``.
        out: its folder.
        work: what is computed. options: how.
        progress: see ``Progress``.

    Raises:
        InputError: the folder holds something else, or was made in another way; or an argument is
            not valid.
        SdconvError: as ``find_images``, ``shards.make_shards`` and ``processes.run_processes``.
    """
    rank, ranks = options.rank or environment_rank(os.environ)
    if not 0 <= rank < ranks:
        raise InputError(
            "not a rank", where="rank", expected=f"0 to {ranks - 1}", got=f"{rank} of {ranks}"
        )
    if options.force and ranks > 1:
        raise InputError(
            "several ranks cannot start anew: each would remove what the others have made",
            where="force",
            hint="remove the folder first, or run without --force",
        )
    store = Store(Path(out), name)
    sizing = parse_sizing(options.size, work.multiple)  # before anything is written
    root, plan, settings = _planned(store, str(source), work, options, sizing, progress)
    strict = options.on_error == "fail"
    if strict and plan.left_out:
        one = plan.left_out[0]
        raise refusal(one.path, one.member, one.reason, one.detail)
    summary = Summary(
        folder=Path(out),
        images=plan.images,
        shards=len(plan.shards),
        new=plan.new,
        changed=plan.changed,
        missing=plan.missing,
        rank=(rank, ranks),
    )
    todo: list[Shard] = []
    ways = set()
    for number, shard in enumerate(plan.shards):
        record = _current(store, number, shard)
        if record is None:
            if shard and number % ranks == rank:
                todo.append((number, shard))
            continue
        if strict and record["quarantined"]:
            bad = record["quarantined"][0]
            raise refusal(bad["path"], bad["member"], bad["reason"], bad["detail"])
        ways.add(_way(record["made_by"]))
    now = _way(made_by(work))
    if todo and (others := sorted(ways - {now})):
        before = "; ".join(others)
        words = f"{store.folder}: shards were made with {before}, and more are made with {now}"
        warnings.warn(SdconvWarning(f"{words}: their numbers differ by rounding"), stacklevel=2)
    total = sum(len(shard) for _, shard in todo)

    def tick(images: int, waited: float) -> None:
        summary.encoded += images
        summary.waited += waited
        progress("encoding", summary.encoded, total)

    start = time.perf_counter()
    for _ in _made(_jobs(store, root, work, options, settings, len(todo)), todo, options, tick):
        summary.made += 1
    summary.seconds = time.perf_counter() - start
    with store.locked():
        store.remove_leftovers()
        plan = store.plan()  # another run may have extended it meanwhile
        summary.quarantined = dict(sorted(store.write_quarantine(plan).items()))
    summary.images, summary.shards = plan.images, len(plan.shards)
    summary.done = sum(
        not shard or _current(store, number, shard) is not None
        for number, shard in enumerate(plan.shards)
    )
    return summary


def _planned(
    store: Store,
    source: str,
    work: DatasetWork,
    options: Options,
    sizing: Any,
    progress: Progress,
) -> tuple[Path, Plan, str]:
    """The source's root; the plan, which is on the disk when this returns; and what tells the
    settings from others."""
    layout = layout_of(options.layout)
    about = {
        "format": FORMAT,
        "version": VERSION,
        "name": store.name,
        "sdconv": metadata.version("sdconv"),
        "layout": options.layout,
        "preprocessing": {
            "size": options.size,
            "multiple": work.multiple,
            "resampling": "lanczos",
            "draft": options.draft,
        },
        **work.about(),
    }
    layout.check_packages(store)  # before anything is read or written
    found = find_images(source, skip=store.folder)
    with store.locked():
        store.remove_leftovers()
        before = store.about()
        if before is not None and options.force:
            Store(store.folder, before["name"]).remove_all()
            before = None
        elif before is None:
            check_empty(store, found.root)
        else:
            check_same(before, about, store.folder / ABOUT)
        old = store.plan()
        plan = extended(
            old,
            found,
            sizing,
            work.multiple,
            options.shard_size,
            lambda: contents(store, old),
            rehash=options.rehash,
            prune=options.prune,
            progress=lambda _, done, total: progress("planning", done, total),
        )
        layout.check(about, plan.shards)
        if not options.force:
            ours = {one.identity for shard in old.shards for one in shard}
            new = (one for shard in plan.shards for one in shard if one.identity not in ours)
            check_absent(store.folder, (layout.file_of(about, one) for one in new))
        if before is None:
            store.write_json(ABOUT, about)
        if plan != old or before is None:
            store.write_text(PLAN, plan.lines())
        work.prepare(store, found.root, plan)
        for number, shard in enumerate(plan.shards):
            if not shard:
                store.remove_shard(number)
    return found.root, plan, settings_digest(about)


def contents(store: Store, plan: Plan) -> dict[str, str | None]:
    """By key: the SHA-256 of each encoded image, or the reason for which it was left out.

    Images whose record is older than the plan are not in it: they are made again in any case.
    """
    found: dict[str, str | None] = {}
    planned = {one.key: one.digest for shard in plan.shards for one in shard}
    for number in range(len(plan.shards)):
        if (record := store.record(number)) is None:
            continue
        for one in record["samples"] + record["quarantined"]:
            if one.get("digest") == planned.get(one["key"]):  # 0.1.0 wrote none for images left out
                found[one["key"]] = one.get("sha256") or one["reason"]
    return found


def _current(store: Store, number: int, shard: Sequence[Any]) -> Record | None:
    """The record of a shard, if that is on the disk as it is planned."""
    record = store.record(number)
    return record if record is not None and record["digest"] == shard_digest(shard) else None


def _way(made_by: Mapping[str, Any]) -> str:
    """What a shard was made with, in words; sdconv's version does not count."""
    return ", ".join(f"{name} {value}" for name, value in made_by.items() if name != "sdconv")


def _jobs(
    store: Store, root: Path, work: DatasetWork, options: Options, settings: str, shards: int
) -> list[Job]:
    """What each worker does; a single one is this process."""
    workers = max(1, min(options.workers, shards))
    alone = workers == 1 and options.engine == "processes"
    return [
        Job(
            folder=store.folder.absolute(),
            name=store.name,
            layout=options.layout,
            root=root.absolute(),
            work=work if alone else work.for_worker(number),
            draft=options.draft,
            decoders=options.decoders,
            strict=options.on_error == "fail",
            settings=settings,
        )
        for number in range(workers)
    ]


def _made(
    jobs: Sequence[Job], shards: Sequence[Shard], options: Options, tick: Tick
) -> Iterator[Record]:
    if not shards:
        return iter(())
    if options.engine == "ray":
        from sdconv.dataset.ray_engine import run_on_ray

        return run_on_ray(jobs[0], shards, options.workers, tick)
    if len(jobs) == 1:
        return make_shards(jobs[0], shards, tick)
    return run_processes(jobs, shards, tick)


def environment_rank(environment: Mapping[str, str]) -> tuple[int, int]:
    """The rank and the number of ranks that the environment gives, (0, 1) if none.

    ``RANK`` and ``WORLD_SIZE`` (torchrun's), a SLURM array's ``SLURM_ARRAY_TASK_ID`` with
    ``_COUNT``, ``_MIN`` and ``_STEP``, or both: a torchrun in each task of an array.

    Raises:
        InputError: they are not numbers, or not of a regular array.
    """
    try:
        rank, ranks = int(environment.get("RANK", 0)), int(environment.get("WORLD_SIZE", 1))
        slurm = "SLURM_ARRAY_TASK_"
        if slurm + "ID" not in environment:
            return rank, ranks
        number, count = int(environment[slurm + "ID"]), int(environment[slurm + "COUNT"])
        least = int(environment.get(slurm + "MIN", 0))
        step = int(environment.get(slurm + "STEP", 1))
        task, odd = divmod(number - least, step)
        if odd or not 0 <= task < count:
            raise ValueError(f"task {number} of {count} from {least} in steps of {step}")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            "the environment's ranks cannot be used",
            where="RANK, WORLD_SIZE, SLURM_ARRAY_TASK_*",
            got=error,
            hint="pass --rank R/N",
        ) from error
    return task * ranks + rank, count * ranks
