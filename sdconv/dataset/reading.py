"""Reading a data set's samples: a torch ``Dataset`` with random access."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sdconv.dataset.layouts import layout_of
from sdconv.dataset.layouts.sample import READ_ERRORS, Layout, Sample
from sdconv.dataset.store import Record, Store
from sdconv.errors import InputError, SdconvError

Size = tuple[int, int]


class Samples:
    """The samples of a data set as they are stored, in the order of its shards.

    Args:
        folder: the data set.

    Attributes:
        about: the content of ``dataset.json``. plan: its plan.
        keys: of the samples.
        buckets: (rows, columns) of the network's input -> numbers of the samples.

    Raises:
        InputError: there is no data set.
    """

    def __init__(self, folder: str | Path) -> None:
        self._store = Store.open(Path(folder).absolute())
        self.about: Mapping[str, Any] = self._store.about() or {}
        self._layout: Layout = layout_of(self.about["layout"])
        self._records: list[Record] = []
        self._places: list[tuple[int, int]] = []
        self.keys: list[str] = []
        self.buckets: dict[Size, list[int]] = {}
        self.plan = self._store.plan()
        for number, shard in enumerate(self.plan.shards):
            record = self._store.record(number)
            if record is None:
                continue
            planned = {one.key: one for one in shard}
            for row, sample in enumerate(record["samples"]):
                one = planned.get(sample["key"])
                # removed from the plan since, or changed and not made again yet
                if one is None or (one.revision and one.digest != sample["digest"]):
                    continue
                self.buckets.setdefault(one.size, []).append(len(self.keys))
                self.keys.append(sample["key"])
                self._places.append((len(self._records), row))
            self._records.append(record)

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, index: int) -> Sample:
        """A sample: what its JSON says, and its tensors.

        Raises:
            SdconvError: it cannot be read.
        """
        shard, row = self._places[index]
        record = self._records[shard]
        try:
            return self._layout.read(self._store, record, record["samples"][row]["place"])
        except READ_ERRORS as error:
            raise SdconvError(
                f"a sample cannot be read ({error})",
                where=f"{self._store.folder}: {self.keys[index]}",
                hint="find what is damaged: sdconv dataset verify",
            ) from error


class Latents(Samples, Dataset[dict[str, Any]]):
    """The samples of a folder that ``sdconv dataset encode`` wrote, in the order of its shards.

    Item ``i`` is a dictionary: ``latents`` ``(C, h, w)``; ``key``; ``original_size``, ``bucket``
    and ``crop`` of the image, rows first; and what else the data set stores, such as ``mean`` and
    ``logvar``. It can be pickled, and read in the processes of a ``DataLoader``.

    Args:
        folder: the data set.
        draw: of moments, take the ``"mean"`` or a ``"sample"`` (from torch's global generator) as
            ``latents``.
        flip: the probability of the mirror image's latents, which ``--flip`` stores.

    Raises:
        InputError: there is no data set of latents, an argument is not valid, or it has no mirror
            images.
    """

    def __init__(self, folder: str | Path, *, draw: str = "mean", flip: float = 0.0) -> None:
        if draw not in ("mean", "sample"):
            raise InputError(
                "unknown draw", where="draw", expected="mean or sample", got=repr(draw)
            )
        super().__init__(folder)
        if "latents" not in self.about:
            raise InputError(
                "this data set has no latents", where=folder, got=f"{self.about['name']}"
            )
        if flip and not self.about["latents"]["flip"]:
            raise InputError(
                "this data set has no mirror images", where=folder, hint="encode it with --flip"
            )
        self._draw, self._flip = draw, flip

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.sample(index)
        mirrored = self._flip > 0 and float(torch.rand(())) < self._flip
        tensors = {
            name.removesuffix("_flipped"): value
            for name, value in sample.tensors.items()
            if name.endswith("_flipped") is mirrored
        }
        if "latents" not in tensors:
            tensors["latents"] = self._drawn(tensors)
        about = sample.about
        sizes = {name: tuple(about[name]) for name in ("original_size", "bucket", "crop")}
        return {"key": sample.key, **sizes, **tensors}

    def batches(
        self, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ) -> BucketBatches:
        """A ``batch_sampler`` for ``DataLoader``: batches of images of one bucket."""
        return BucketBatches(list(self.buckets.values()), batch_size, shuffle, seed, drop_last)

    def _drawn(self, tensors: Mapping[str, Tensor]) -> Tensor:
        mean = tensors["mean"]
        if self._draw == "mean":
            return mean
        std = torch.exp(0.5 * tensors["logvar"].float())
        return (mean.float() + std * torch.randn(mean.shape)).to(mean.dtype)


class BucketBatches(Sampler[list[int]]):
    """Batches of indices within groups, in another order in each epoch.

    Args:
        groups: indices that may share a batch.
        batch_size: the most of a batch. shuffle: mix them.
        seed: of the first epoch's order; each later one adds 1.
        drop_last: leave out batches that are not full.
    """

    def __init__(
        self, groups: list[list[int]], batch_size: int, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        if batch_size < 1:
            raise InputError(
                "not a batch", where="batch_size", expected="1 or more", got=batch_size
            )
        self._groups, self._size, self._shuffle = groups, batch_size, shuffle
        self._seed, self._drop_last = seed, drop_last

    def __len__(self) -> int:
        return len(self._batches(random.Random(0)))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._batches(random.Random(self._seed))
        self._seed += 1
        return iter(batches)

    def _batches(self, order: random.Random) -> list[list[int]]:
        batches = []
        for group in self._groups:
            indices = order.sample(group, len(group)) if self._shuffle else group
            found = [indices[n : n + self._size] for n in range(0, len(indices), self._size)]
            batches += [one for one in found if len(one) == self._size or not self._drop_last]
        return order.sample(batches, len(batches)) if self._shuffle else batches


def open_latents(folder: str | Path, *, draw: str = "mean", flip: float = 0.0) -> Latents:
    """Opens the latents that ``sdconv dataset encode`` wrote, in any layout: see ``Latents``."""
    return Latents(folder, draw=draw, flip=flip)
