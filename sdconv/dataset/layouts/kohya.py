"""The ``.npz`` files that sd-scripts reads next to each image instead of encoding it.

Names and meaning are those of ``LatentsCachingStrategy`` in ``library/strategy_base.py`` of
sd-scripts, read at commit 040c04f; earlier versions had the same for SD and SDXL: ``latents``
``(C, h, w)``, raw, float32; ``original_size`` (width, height); ``crop_ltrb``; ``latents_flipped``.
SD and SDXL have them in ``NAME.npz``, which every version reads; SD3 and FLUX.1 in
``NAME_WxH_sd3.npz`` and ``NAME_WxH_flux.npz``, where each name ends in the latents' size, as in
``latents_32x64``. FLUX.1's are scaled, not raw: its ``vae.encode`` scales them, and its trainer, in
``flux_train_network.py``, takes them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch

from sdconv.config.facts import VAE_FACTS
from sdconv.dataset.layouts.sample import Sample
from sdconv.dataset.plan import Planned
from sdconv.dataset.store import Record, Store
from sdconv.errors import InputError


class Kohya:
    """One ``.npz`` for each image; a shard is a list of them."""

    def write(
        self, store: Store, number: int, samples: Iterable[Sample]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Writes the files of a shard, one by one."""
        files: list[dict[str, Any]] = []
        places: list[dict[str, Any]] = []
        latents = (store.about() or {})["latents"]
        for sample in samples:
            name = _file_name(sample.about, latents)
            arrays = _arrays(sample, _suffix(sample.about) if _family(latents) else "")

            def write(file: BinaryIO, arrays: Mapping[str, Any] = arrays) -> None:
                np.savez(file, **arrays)

            places.append({"file": len(files), "about": dict(sample.about)})
            files.append(store.write(name, write))
        return files, places

    def read(self, store: Store, record: Record, place: Mapping[str, Any]) -> Sample:
        """The latents of one file; the rest is in the record."""
        about = place["about"]
        path = store.folder / record["files"][place["file"]]["name"]
        # numpy leaves a file open that it cannot read
        with path.open("rb") as file, np.load(file) as arrays:
            tensors = {
                name.removesuffix(_suffix(about)): torch.from_numpy(arrays[name])
                for name in arrays.files
                if name.startswith("latents")
            }
        return Sample(about, tensors)

    def check_packages(self, store: Store) -> None:
        """Needs none."""

    def check(self, about: Mapping[str, Any], shards: Sequence[Sequence[Planned]]) -> None:
        """Refuses what sd-scripts does not read."""
        if "latents" not in about:
            raise InputError("sd-scripts reads latents only", where="layout", got=about["name"])
        latents, size = about["latents"], about["preprocessing"]["size"]
        family = _family(latents)
        expected = {
            "latents": ("mean", "sample"),
            "scaled": (family == "flux",),
            "dtype": ("float32",),
        }
        hints = {
            "latents": "pass --latents sample, which is what sd-scripts itself stores",
            "scaled": "leave --scaled out; a tiny autoencoder's always are",
            "dtype": "pass --store float32",
        }
        if family == "flux":
            hints["scaled"] = "pass --scaled, as sd-scripts scales them itself"
        for name, allowed in expected.items():
            if latents[name] not in allowed:
                raise InputError(
                    "sd-scripts reads other latents",
                    where="layout",
                    expected=f"{name}: {' or '.join(map(str, allowed))}",
                    got=f"{name}: {latents[name]}",
                    hint=hints[name],
                )
        if size == "native":
            raise InputError(
                "sd-scripts does not read padded images",
                where="layout",
                expected="one size, or buckets:N:MIN:MAX as in its own options",
                got="--size native",
            )
        taken: dict[str, str] = {}
        for shard in shards:
            for one in shard:
                name = str(_stem(vars(one)))
                if (other := taken.setdefault(name, one.path)) != one.path:
                    raise InputError(
                        "two images would share one .npz, for sd-scripts too",
                        where=one.path,
                        got=other,
                        hint="rename one of them",
                    )

    def file_of(self, about: Mapping[str, Any], planned: Planned) -> str:
        """The name of an image's ``.npz``."""
        return _file_name({**vars(planned), "original_size": planned.original}, about["latents"])


def crop_ltrb(bucket: tuple[int, int], original: tuple[int, int]) -> tuple[float, ...]:
    """What sd-scripts stores as the crop, ``BucketManager.get_crop_ltrb``: left, top, right and
    bottom of the image as it would fit *into* the bucket.

    Args:
        bucket, original: rows and columns.
    """
    rows, columns = bucket
    ratio = original[1] / original[0]
    if columns / rows > ratio:
        height, width = float(rows), rows * ratio
    else:
        height, width = columns / ratio, float(columns)
    left, top = (columns - width) // 2, (rows - height) // 2
    return left, top, left + width, top + height


def _arrays(sample: Sample, suffix: str) -> dict[str, np.ndarray]:
    about = sample.about
    rows, columns = about["original_size"]
    arrays = {name + suffix: one.numpy() for name, one in sample.tensors.items()}
    bucket = (about["bucket"][0], about["bucket"][1])
    arrays["original_size" + suffix] = np.array([columns, rows])
    arrays["crop_ltrb" + suffix] = np.array(crop_ltrb(bucket, (rows, columns)))
    return arrays


def _suffix(about: Mapping[str, Any]) -> str:
    return f"_{about['shape'][1]}x{about['shape'][2]}"


def _file_name(about: Mapping[str, Any], latents: Mapping[str, Any]) -> str:
    rows, columns = about["original_size"]
    family = _family(latents)
    return (
        f"{_stem(about)}_{columns:04d}x{rows:04d}_{family}.npz" if family else f"{_stem(about)}.npz"
    )


def _stem(about: Mapping[str, Any]) -> PurePosixPath:
    path = PurePosixPath(about["key"] if about.get("member") else about["path"]).with_suffix("")
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            "this image is outside of the data set's folder",
            where=path,
            hint="list paths below the list's own folder, or take another --layout",
        )
    return path


def _family(latents: Mapping[str, Any]) -> str:
    """``""`` for SD and SDXL, ``"sd3"`` or ``"flux"``.

    Raises:
        InputError: the latents are of another family.
    """
    if latents["channels"] == 4:
        return ""
    shift = (latents["scale"] or {}).get("shift")
    for family, name in (("sd3", "sd3"), ("flux1", "flux")):
        if latents["channels"] == 16 and shift == VAE_FACTS[family].shift_factor:
            return name
    raise InputError(
        "sd-scripts' names for this network's latents are not known",
        where="layout",
        expected="the VAE of SD, SDXL, SD3 or FLUX.1",
        got=f"{latents['channels']} channels, scale {latents['scale']}",
        hint="take another --layout",
    )
