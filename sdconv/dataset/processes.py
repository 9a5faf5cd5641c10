"""Shards over several processes of one machine. Each asks for a shard when it has room for one; a
process that is killed is replaced, and its shards are made again."""

from __future__ import annotations

import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from sdconv.dataset.shards import Job, Shard, Tick, make_shards
from sdconv.dataset.store import Record
from sdconv.errors import SdconvError

TRIES = 3
"""How often a shard is given to a process before its end is taken for an error."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    holds: list[Shard] = field(default_factory=list)
    dismissed: bool = False  # there was no shard left for it


def run_processes(
    jobs: Sequence[Job], shards: Sequence[Shard], tick: Tick = lambda *_: None
) -> Iterator[Record]:
    """Makes shards in several processes, and yields the record of each when it is committed.

    Args:
        jobs: one for each process.
        shards: number and images of each.
        tick: see ``shards.Tick``.

    Raises:
        SdconvError: from a process; or processes were killed ``TRIES`` times at one shard.
    """
    waiting, left = deque(shards), len(shards)
    tried: Counter[int] = Counter()
    workers = {number: _start(job) for number, job in enumerate(jobs[: len(shards)])}
    try:
        while left:
            ready = wait([one.connection for one in workers.values()])
            for number, worker in list(workers.items()):
                if worker.connection not in ready:
                    continue
                try:
                    what, content = worker.connection.recv()
                except (EOFError, ConnectionResetError):
                    if not worker.dismissed or worker.holds:
                        _check_tries(worker, tried)
                    waiting.extendleft(reversed(worker.holds))
                    worker.connection.close()
                    del workers[number]
                    if waiting:
                        workers[number] = _start(jobs[number])
                    continue
                if what == "tick":
                    tick(*content)
                elif what == "error":
                    raise content
                elif what == "next":
                    _give(worker, waiting)
                else:
                    worker.holds = [one for one in worker.holds if one[0] != content["shard"]]
                    left -= 1
                    yield content
    finally:
        for worker in workers.values():
            worker.connection.close()
            if left:
                worker.process.terminate()
        for worker in workers.values():
            worker.process.join()


def _give(worker: _Worker, waiting: deque[Shard]) -> None:
    shard = waiting.popleft() if waiting else None
    if shard is None:
        worker.dismissed = True
    else:
        worker.holds.append(shard)
    try:
        worker.connection.send(shard)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it was killed: its connection says so next


def _check_tries(worker: _Worker, tried: Counter[int]) -> None:
    """Counts the shards of a process that is gone.

    Raises:
        SdconvError: it was one too many.
    """
    worker.process.join()
    if not worker.holds:
        tried[-1] += 1
    for number, _ in worker.holds[:1]:  # the one that it was at
        tried[number] += 1
    for number, times in tried.items():
        if times >= TRIES:
            code = worker.process.exitcode
            raise SdconvError(
                f"a worker process ended {times} times",
                where="before its first shard" if number < 0 else f"shard {number}",
                expected="a process that stays alive",
                got=f"signal {-code}" if code is not None and code < 0 else f"exit status {code}",
                hint="if memory was short, use fewer --workers or a smaller --batch",
            )


def _start(job: Job) -> _Worker:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, job), name="sdconv-dataset")
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _work(connection: Connection, job: Job) -> None:
    """The life of a worker process; it ends with the process that started it."""

    # where a connection ends, and not around it: within a write, its end is an OSError of the file
    def send(what: str, content: object) -> None:
        with _ends_with_connection():
            connection.send((what, content))

    def shards() -> Iterator[Shard]:
        while True:
            send("next", None)
            with _ends_with_connection():
                shard = connection.recv()
            if shard is None:
                return
            yield shard

    try:
        for record in make_shards(job, shards(), lambda *done: send("tick", done)):
            send("done", record)
    except KeyboardInterrupt:
        sys.exit(1)
    except Exception as error:
        known = error if isinstance(error, SdconvError) else None
        send("error", known or RuntimeError(f"{type(error).__name__}: {error}"))
    finally:
        connection.close()


@contextmanager
def _ends_with_connection() -> Iterator[None]:
    """Ends this process where the one that started it is gone: nobody waits for the rest."""
    try:
        yield
    except (EOFError, ConnectionError):
        os._exit(1)
