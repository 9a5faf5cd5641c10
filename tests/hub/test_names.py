"""Weights by name: what ships, and what a path is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.paths import TINY_VAE, WEIGHTS

import sdconv
from sdconv.hub.names import HubId, weights_named
from sdconv.hub.shipped import SHIPPED, shipped


@pytest.mark.parametrize("name", SHIPPED)
def test_a_network_that_ships_opens_by_its_name_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    by_name = sdconv.load(name).state_dict()
    by_path = sdconv.load(WEIGHTS / f"{name}.safetensors").state_dict()
    assert by_name.keys() == by_path.keys()
    assert all(torch.equal(by_name[key], by_path[key]) for key in by_name)


def test_a_path_that_exists_is_not_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-vae").write_bytes(b"mine")
    with pytest.raises(sdconv.CheckpointError, match="tiny-vae"):
        sdconv.load("tiny-vae")
    (tmp_path / "tiny-vae").unlink()
    assert sdconv.load("tiny-vae").config.class_name == "AutoencoderKL"


def test_from_pretrained_takes_a_name() -> None:
    assert sdconv.AutoencoderKL.from_pretrained("tiny-vae").dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", HubId("owner/name", "")),
        ("owner/name:vae", HubId("owner/name", "vae")),
        ("owner/name:vae/a.safetensors", HubId("owner/name", "vae/a.safetensors")),
        ("owner/name:../a", None),
        ("owner/name:/a", None),
        ("a/b/c", None),
        ("name", None),
        ("/owner/name", None),
        ("../name", None),
    ],
)
def test_the_form_of_a_hub_id(text: str, expected: HubId | None) -> None:
    assert HubId.parse(text) == expected


def test_a_missing_path_is_not_taken_for_a_repository() -> None:
    for text in ("folder/vae.safetensors", "vae.safetensors", "nothing", "/a/b", "../a"):
        assert weights_named(text) is None


def test_what_looks_like_a_repository_is_answered_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(sdconv.CheckpointError) as caught:
        sdconv.load("no-such-owner/no-such-name")
    assert isinstance(caught.value, FileNotFoundError)
    assert "sdconv fetch no-such-owner/no-such-name" in str(caught.value)
    assert "the working folder is" in str(caught.value)


def test_shipped_files_exist() -> None:
    assert shipped("tiny-vae.safetensors").read_bytes() == TINY_VAE.read_bytes()
    assert shipped("photo.jpg").is_file()
    assert not shipped("no-such-file").exists()
