"""`sdconv dataset`, run as a user runs it."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from helpers.photos import files_of, photos, spoil, write
from rich.console import Console

import sdconv
from sdconv.cli import common, verbosity
from sdconv.cli.dataset import progress
from sdconv.cli.dataset.options import default_workers, own_device

QUICK = ("--workers", "1", "--decoders", "0", "--backend", "reference")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with images and a network."""
    config = seeded.kl((32, 32, 32), 4, True, layers_per_block=1, scaling_factor=0.5)
    sdconv.save(seeded.network(config), tmp_path / "vae.safetensors")
    photos(tmp_path / "photos", 5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def encoded(*more: str) -> list[str]:
    line = "dataset encode photos -m vae.safetensors -o out --size 16 --shard-size 2"
    return [*line.split(), *QUICK, *more]


def test_encode_status_and_verify(here: Path) -> None:
    spoil(here / "photos")
    said = answer(*encoded())
    assert (said["images"], said["encoded"], said["shards"], said["complete"]) == (6, 6, 3, True)
    assert said["quarantined"] == {"animated": 1, "damaged": 1, "empty": 1, "not an image": 1}
    assert said["images_per_second"] > 0
    status = answer("dataset", "status", "out")
    assert (status["done"], status["encoded"], status["buckets"]) == (3, 5, {"16x16": 6})
    assert status["about"]["latents"]["latents"] == "moments"
    assert answer("dataset", "verify", "out")["samples"] == 5
    result = run("dataset", "status", "out")
    assert "shards            3 of 3" in result.stdout
    assert "quarantine        " in result.stdout
    result = run(*encoded())
    assert "0 images in 0 shards, 3 of 3 shards are there; 4 in quarantine" in result.stdout


def test_options_reach_the_data_set(here: Path) -> None:
    more = "--latents sample --seed 5 --scaled --flip --store fp16 --batch 2 --no-draft"
    answer(*encoded(*more.split()))
    about = json.loads((here / "out" / "dataset.json").read_text())
    stated = {"latents": "sample", "seed": 5, "scaled": True, "flip": True, "dtype": "float16"}
    assert about["latents"].items() >= {**stated, "batch": 2, "backend": "reference"}.items()
    assert about["preprocessing"]["draft"] is False


def test_another_way_is_refused_and_force_starts_anew(here: Path) -> None:
    answer(*encoded())
    before = files_of(here / "out")
    refused = run(*encoded("--flip"))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "expected: latents.flip: false\n  got: latents.flip: true" in refused.stderr
    assert files_of(here / "out") == before
    assert answer(*encoded("--flip", "--force"))["encoded"] == 5


def test_a_damaged_shard_is_the_answer_no(here: Path) -> None:
    answer(*encoded())
    tar = here / "out" / "latents-000001.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 255
    tar.write_bytes(content)
    result = run("dataset", "verify", "out")
    assert result.exit_code == 1
    assert "shard 1: latents-000001.tar is not as it was written" in result.stdout
    assert "hint: remove damaged shards with --discard" in result.stderr
    said = answer("dataset", "verify", "out", "--discard", status=1)
    assert [one["shard"] for one in said["problems"]] == [1]
    assert answer(*encoded())["made"] == 1
    assert answer("dataset", "verify", "out")["problems"] == []


def test_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(*encoded("--rank", "1/2"))
    assert "note: rank 1 of 2: shards 1, 3, 5 and so on" in result.stderr
    assert "2 images in 1 shards, 1 of 3 shards are there" in result.stdout
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert answer(*encoded())["complete"]
    assert "--rank: not a rank" in run(*encoded("--rank", "one")).stderr
    assert "not a rank" in run(*encoded("--rank", "2/2")).stderr


def test_missing_images_are_a_note(here: Path) -> None:
    answer(*encoded())
    (here / "photos" / "photo04.jpg").unlink()
    result = run(*encoded())
    assert (
        "note: 1 images of the plan are no longer in the source, such as photo04" in result.stderr
    )


def test_features_and_their_page(here: Path) -> None:
    line = "dataset features photos -m vae.safetensors -o maps --size 16 -p encoder.mid_block"
    words = [*line.split(), "--workers", "1", "--decoders", "0", "--top-patches", "3"]
    said = answer(*words)
    assert (said["encoded"], said["page"]) == (5, "maps/patches.html")
    page = (here / "maps" / "patches.html").read_text()
    assert page.count("data:image/webp;base64,") == 32
    assert "receptive field" in page
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)
    # the page is not one of the data set's files: nothing else changes
    assert answer(*words)["encoded"] == 0
    assert answer("dataset", "verify", "maps")["problems"] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("encode photos -m vae.safetensors -o out --size big", "--size: not a size"),
        ("encode nowhere -m vae.safetensors -o out", "nowhere: does not exist"),
        ("encode photos -m photos/photo00.png -o out", "photo00.png"),
        ("encode photos -m vae.safetensors -o out --store int8", "'int8' is not one of"),
        (
            "encode photos -m vae.safetensors -o out --store fp64",
            "'fp64' is not one of float32, float16",
        ),
        ("status photos", "not a data set of sdconv"),
        ("verify nowhere", "not a data set of sdconv"),
        ("features photos -m vae.safetensors -o f -p mid_block --timesteps a", "not timesteps"),
        ("features photos -m vae.safetensors -o f -p nothing", "nothing"),
    ],
)
def test_errors_have_no_traceback(line: str, words: str, here: Path) -> None:
    result = run("dataset", *line.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert not (here / "out").exists()


def test_every_command_has_examples_and_json() -> None:
    for command in ("encode", "features", "status", "verify"):
        text = run("dataset", command, "--help").stdout
        assert f"sdconv dataset {command} " in text.partition("Examples:")[2]
        assert "--json" in text


def test_the_source_may_be_tars(here: Path) -> None:
    import tarfile

    write(here / "one" / "a.png", 3)
    with tarfile.open(here / "shard.tar", "w") as tar:
        tar.add(here / "one" / "a.png", "a.png")
    line = "dataset encode shard.tar -m vae.safetensors -o out --size 16"
    assert answer(*line.split(), *QUICK)["encoded"] == 1


def test_as_many_channels_are_shown_as_asked_for(here: Path) -> None:
    line = "dataset features photos -m vae.safetensors -o maps --size 16 -p encoder.mid_block"
    more = "--workers 1 --decoders 0 --top-patches 2 --top-channels 5"
    answer(*line.split(), *more.split())
    page = (here / "maps" / "patches.html").read_text()
    assert page.count("data:image/webp;base64,") == 5
    assert "the first 5 of 32 channels" in page


def test_progress_off_a_terminal_is_lines(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said = run(*encoded()).stderr
    assert re.search(r"^progress: encoding: 5 of 5, [\d.]+ images/s, 0 min left$", said, re.M)
    assert run(*encoded("--force", "-q")).stderr == ""
    assert "progress: " in run("dataset", "verify", "out").stderr
    assert run("dataset", "verify", "out", "-q").stderr == ""


def test_progress_on_a_terminal_has_a_percentage(monkeypatch: pytest.MonkeyPatch) -> None:
    verbosity.reset()
    shown = Console(file=io.StringIO(), force_terminal=True, width=100)
    for module in (common, progress):
        monkeypatch.setattr(module, "errors_console", lambda: shown)
    with progress.progress_of("images") as show:
        show("encoding", 3, 4)
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "75%" in text
    assert "3/4" in text


def test_workers_and_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = [(default_workers(one), own_device(one)) for one in ("cpu", "cuda", "cuda:2")]
    assert found == [(8, "cpu"), (4, "cuda"), (1, "cuda:2")]
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    found = [(default_workers(one), own_device(one)) for one in ("cpu", "cuda", "cuda:2")]
    assert found == [(2, "cpu"), (1, "cuda:3"), (1, "cuda:2")]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert default_workers("cpu") == 1
