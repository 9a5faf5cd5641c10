"""Ray Data: the same callable, the same bytes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photos import files_of, pixels

from sdconv import dataset
from sdconv.dataset import Encoder, Options, Settings


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
    import sys

    from sdconv.errors import SdconvError

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(SdconvError, match=r"pip install 'sdconv\[ray\]'"):
        dataset.encode(folder, vae, tmp_path / "out", options=Options(size="16", engine="ray"))
