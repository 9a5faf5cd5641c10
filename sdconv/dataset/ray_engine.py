"""Shards on Ray Data: the same callable in actors, on a cluster's CPUs or GPUs.

Retries and lost nodes are Ray's. Every node must see the source, the model and the output under the
same paths.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sdconv.dataset.shards import Job, Shard, Tick, make_shards
from sdconv.dataset.store import Record
from sdconv.errors import SdconvError


class ShardMaker:
    """Makes the shards of a batch; an actor of ``map_batches``.

    Args:
        job: how.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        shards = [pickle.loads(one) for one in batch["shard"]]  # written by run_on_ray
        return {"record": [json.dumps(record) for record in make_shards(self._job, shards)]}


def run_on_ray(
    job: Job, shards: Sequence[Shard], workers: int, tick: Tick = lambda *_: None
) -> Iterator[Record]:
    """Makes shards in actors, and yields the record of each when it is committed.

    Args:
        job: how. shards: number and images of each.
        workers: the number of actors. On a GPU each has one of its own.
        tick: called after each shard.

    Raises:
        SdconvError: Ray is not installed, or gave up.
    """
    try:
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise SdconvError(
            "this engine needs Ray", where="engine", hint="pip install 'sdconv[ray]'"
        ) from error
    rows = [{"shard": pickle.dumps(one)} for one in shards]
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardMaker,
        fn_constructor_args=(job,),
        batch_size=1,
        concurrency=min(workers, len(rows)),
        num_gpus=1 if getattr(job.work, "device", "cpu").startswith("cuda") else 0,
    )
    try:
        for row in made.iter_rows():
            record: Record = json.loads(row["record"])
            tick(len(record["samples"]) + len(record["quarantined"]), 0.0)
            yield record
    except ray.exceptions.RayError as error:
        raise SdconvError(
            "Ray could not make a shard",
            where=job.folder,
            got=_reason(str(error)),
            hint="run it again: what is committed stays",
        ) from error


def _reason(traceback: str) -> str:
    """What Ray's account of an error says at its end: an error of sdconv with all its lines, or the
    last line."""
    ours = r"^sdconv\.errors\.\w+: (.*(?:\n  (?:expected|got|hint): .*)*)"
    found = re.findall(ours, traceback, re.MULTILINE) or traceback.strip().splitlines()
    return " ".join(found[-1].split())
