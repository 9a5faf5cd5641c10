"""The networks against outputs of their original authors' own code.

``data/open-vae.json`` has the tensor names and shapes of a small VAE of CompVis' classes, whose
values follow from a seed; ``data/open-vae-io.safetensors`` has inputs and outputs of that VAE.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.numbers import error
from helpers.paths import DATA
from safetensors.torch import load_file
from torch import Tensor

import sdconv
from sdconv.analysis.parity import check

PREFIX = "first_stage_model."
SEED = 11
# an eps of 1e-5 instead of 1e-6 gives an error of 1.7e-5
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def open_vae() -> dict[str, Tensor]:
    shapes = json.loads((DATA / "open-vae.json").read_text("utf-8"))
    drawn = seeded.weights({n.removeprefix(PREFIX): tuple(s) for n, s in shapes.items()}, SEED)
    return {PREFIX + name: tensor.half() for name, tensor in drawn.items()}


def test_vae_equals_the_original(open_vae: dict[str, Tensor]) -> None:
    io = load_file(DATA / "open-vae-io.safetensors")
    vae = sdconv.load(open_vae, dtype=torch.float32, family="sd1")
    assert isinstance(vae, sdconv.AutoencoderKL)
    with torch.no_grad():
        moments = vae.encode(io["image"]).latent_dist.parameters
        decoded = vae.decode(io["latent"]).sample
    assert error(moments, io["moments"]) < TOLERANCE
    assert error(decoded, io["decoded"]) < TOLERANCE


def test_another_eps_is_noticed(open_vae: dict[str, Tensor]) -> None:
    io = load_file(DATA / "open-vae-io.safetensors")
    vae = sdconv.load(open_vae, dtype=torch.float32, family="sd1")
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-5
    with torch.no_grad():
        assert error(vae.encode(io["image"]).latent_dist.parameters, io["moments"]) > TOLERANCE
        assert error(vae.decode(io["latent"]).sample, io["decoded"]) > TOLERANCE


def test_equals_diffusers(open_vae: dict[str, Tensor]) -> None:
    assert check(open_vae, family="sd1", size=(32, 32)).passed


@pytest.mark.shared
def test_the_seed_gives_the_weights_of_the_original(
    open_vae: dict[str, Tensor], shared_dir: Path
) -> None:
    stored = load_file(shared_dir / "oracle" / "open-vae-ldm.safetensors")
    assert stored.keys() == open_vae.keys()
    assert all(torch.equal(stored[name], open_vae[name]) for name in stored)
    ours, theirs = (
        load_file(folder / "open-vae-io.safetensors") for folder in (DATA, shared_dir / "oracle")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.shared
@pytest.mark.parametrize("reverse", [False, True], ids=["encoder first", "decoder first"])
def test_taef2_equals_the_authors(shared_dir: Path, reverse: bool) -> None:
    folder = shared_dir / "weights"
    io = load_file(folder / "taef2-io.safetensors")
    files = [folder / f"taef2_{half}.safetensors" for half in ("encoder", "decoder")]
    network = sdconv.load(files[::-1] if reverse else files, dtype=torch.float32)
    assert network.config["use_midblock_gn"]
    with torch.no_grad():
        latents = network.encode(io["image"] * 2 - 1).latents  # the author's images are in [0, 1]
        decoded = network.decode(io["latent"]).sample
    assert error(latents, io["latent"]) < 1e-4
    assert error(decoded, io["decoded"] * 2 - 1) < 1e-4


@pytest.mark.shared
def test_one_half_of_taef2(shared_dir: Path) -> None:
    encoder, decoder = (
        sdconv.load(shared_dir / "weights" / f"taef2_{half}.safetensors")
        for half in ("encoder", "decoder")
    )
    assert encoder.dtype == torch.float16
    with pytest.raises(sdconv.SdconvError, match="decoder is missing"):
        encoder.decode(torch.zeros(1, 32, 8, 8))
    with pytest.raises(sdconv.SdconvError, match="encoder is missing"):
        decoder.encode(torch.zeros(1, 3, 64, 64))
