"""`sdconv dataset`, run as a user runs it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers import seeded
from helpers.commands import answer, run
from helpers.photos import files_of, photos, spoil, write

import sdconv

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
        ("encode photos -m vae.safetensors -o out --store fp64", "dtype: unknown dtype"),
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
