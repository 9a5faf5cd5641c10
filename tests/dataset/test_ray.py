"""Ray Data: the same callable, the same bytes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photos import files_of, pixels

from sdconv import dataset
from sdconv.dataset import Encoder, Options, Settings
from sdconv.dataset.shards import Job, refusal
from sdconv.errors import SdconvError


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Ray on this machine."""
    found = pytest.importorskip("ray", reason="needs Ray: pip install 'sdconv[ray]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield found
        found.shutdown()


@pytest.mark.filterwarnings("ignore")
def test_ray_writes_the_same_bytes(ray: Any, vae: Path, folder: Path, tmp_path: Path) -> None:
    for name, engine in (("a", "processes"), ("b", "ray")):
        options = Options(size="16", shard_size=2, engine=engine, workers=1 + (engine == "ray"))
        summary = dataset.encode(folder, vae, tmp_path / name, options=options)
        assert (summary.encoded, summary.complete) == (9, True)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


@pytest.mark.filterwarnings("ignore")
def test_the_encoder_fits_map_batches(ray: Any, vae: Path) -> None:
    rows = [{"key": str(n), "image": pixels(n, 16, 16)} for n in range(4)]
    made = ray.data.from_items(rows).map_batches(
        Encoder,
        fn_constructor_args=(vae, Settings(latents="mean")),
        batch_size=2,
        concurrency=1,
    )
    found = {row["key"]: row["latents"] for row in made.take_all()}
    encoder = Encoder(vae, Settings(latents="mean"))
    for row in rows:
        (one,) = encoder.encode(np.asarray(row["image"])[None], [str(row["key"])])
        assert isinstance(one, dict)
        assert torch.equal(torch.tensor(found[row["key"]]), one["latents"])


def test_without_ray_it_says_what_to_install(
    vae: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hides Ray, as where it is not installed."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(SdconvError, match=r"pip install 'sdconv\[ray\]'"):
        dataset.encode(folder, vae, tmp_path / "out", options=Options(size="16", engine="ray"))


def test_an_error_of_an_actor_is_told_whole(
    vae: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of Ray, modules that give up as it does: with the traceback of the actor."""
    jobs: list[Job] = []

    class RayError(Exception):
        pass

    class Rows:
        def map_batches(self, maker: object, fn_constructor_args: tuple[Job], **how: object) -> Any:
            jobs.extend(fn_constructor_args)
            return self

        def iter_rows(self) -> Any:
            error = refusal("cut.jpg", None, "damaged", "image file is truncated")
            raise RayError(
                "ray::MapWorker.submit()\n"
                '  File "shards.py", line 199, in samples\n'
                f"sdconv.errors.SdconvError: {error}\n\n"
                "The above exception was the direct cause of the following exception:\n"
            )

    modules = {name: ModuleType(name) for name in ("ray", "ray.data", "ray.exceptions")}
    vars(modules["ray.data"])["from_items"] = lambda rows, override_num_blocks: Rows()
    vars(modules["ray.exceptions"])["RayError"] = RayError
    for name in ("data", "exceptions"):
        vars(modules["ray"])[name] = modules[f"ray.{name}"]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(vae.parent)
    options = Options(size="16", engine="ray", on_error="fail")
    with pytest.raises(SdconvError) as raised:
        dataset.encode(folder, vae.name, tmp_path / "out", options=options)
    words = "got: cut.jpg: an image cannot be encoded: damaged got: image file is truncated hint: "
    assert words in str(raised.value)
    # the actors run in folders of their own
    assert jobs[0].work.model == vae  # type: ignore[attr-defined]
