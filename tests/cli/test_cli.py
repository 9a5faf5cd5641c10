"""The commands: what they print and write, and how they end on bad input."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from helpers.paths import ROOT
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.main import get_command

import sdconv
from sdconv.cli import COMMANDS as GROUPS
from sdconv.cli import app
from sdconv.config import Config
from sdconv.images import psnr, to_tensor
from sdconv.latents import scale

KL = seeded.kl((32, 32, 32, 32), 4, True, layers_per_block=1, scaling_factor=0.25)
FLUX2 = seeded.flux2((32, 32), layers_per_block=1)
TINY = seeded.tiny(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)
COMMANDS = (
    *("inspect", "check", "convert", "export", "diff", "encode", "decode", "reconstruct", "fetch"),
    *("merge-lora", "extract-lora", "average"),
    "anatomy",
    "plan",
    "features",
    "explain-page",
    "bench",
)


def in_its_own_process(*arguments: object, code: str | None = None, **variables: str) -> Any:
    """A command run as a shell runs it."""
    start = ["-m", "sdconv"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=120,
    )


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a photo, small networks, and files that are neither."""
    folder = tmp_path_factory.mktemp("cli")
    for name, config in (("vae", KL), ("flux2", FLUX2), ("tiny", TINY)):
        sdconv.save(seeded.network(config), folder / f"{name}.safetensors")
    y, x = np.mgrid[:37, :50]
    pixels = np.stack([x * 5, y * 6, (x * y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    Image.fromarray(pixels[:4, :4]).save(folder / "speck.png")
    (folder / "text.png").write_text("not an image", encoding="utf-8")
    (folder / "damaged.jpg").write_bytes((folder / "photo.png").read_bytes()[:200])
    (folder / "empty").mkdir()
    (folder / "text.safetensors").write_text("no weights", encoding="utf-8")
    whole = (folder / "vae.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"model.layers.0.w": torch.ones(4, 4)}, folder / "llm.safetensors")
    tensors = seeded.tensors(KL)
    save_file(dict(list(tensors.items())[1:]), folder / "lacks.safetensors")
    tensors["decoder.conv_in.bias"] = torch.full((32,), torch.nan)
    save_file(tensors, folder / "nan.safetensors")
    integers = {name: tensor.to(torch.int8) for name, tensor in seeded.tensors(KL).items()}
    save_file(integers, folder / "int.safetensors")
    save_file({"z": torch.zeros(1, 4, 4, 5)}, folder / "z.safetensors")
    save_file({"z": torch.zeros(1, 7, 4, 5)}, folder / "z7.safetensors")
    save_file({"z": torch.zeros(1, 4, 1, 1)}, folder / "spot.safetensors")
    save_file({"z": torch.zeros(3)}, folder / "z1.safetensors")
    two = {"a": torch.zeros(1, 4, 2, 2), "b": torch.zeros(1, 4, 2, 2)}
    save_file(two, folder / "z2.safetensors")
    save_file({"z": torch.zeros(1, 128, 4, 5)}, folder / "patches.safetensors")
    return folder


BAD = """
inspect absent.safetensors                                          | does not exist
inspect empty                                                       | holds no weights
inspect text.safetensors                                            | header
inspect cut.safetensors                                             | is cut short
inspect vae.safetensors --family sd99                               | --family: unknown family
inspect vae.safetensors vae.safetensors                             | is in two files
inspect                                                             | Missing argument
check lacks.safetensors                                             | 1 missing
check llm.safetensors                                               | no network
check vae.safetensors --against someone                             | --against: unknown reference
check vae.safetensors --dtype int8                                  | int8
check vae.safetensors --device nowhere                              | --device: no such device
check vae.safetensors --size 8xx8                                   | not a size
check vae.safetensors --size 0x8                                    | not a size
check vae.safetensors --size 4x4                                    | wrong shape
check vae.safetensors --component unet                              | no component
convert vae.safetensors OUT.ckpt --layout diffusers                 | only safetensors
convert vae.safetensors OUT --layout original                       | single file
convert int.safetensors OUT.safetensors --layout original           | not floating-point
convert vae.safetensors vae.safetensors --layout original           | one of the inputs
convert vae.safetensors OUT.safetensors                             | Missing option '--layout'
convert vae.safetensors OUT.safetensors --layout mine               | mine
convert llm.safetensors OUT.safetensors --layout diffusers          | no network
convert vae.safetensors photo.png/OUT.safetensors --layout original | cannot be written
encode absent.png -m vae.safetensors -o OUT.safetensors             | does not exist
encode text.png -m vae.safetensors -o OUT.safetensors               | not an image
encode damaged.jpg -m vae.safetensors -o OUT.safetensors            | damaged
encode empty -m vae.safetensors -o OUT.safetensors                  | cannot be opened
encode speck.png -m vae.safetensors -o OUT.safetensors              | too small
encode photo.png -m vae.safetensors -o OUT.safetensors --size 0     | --size
encode photo.png -m vae.safetensors -o OUT.safetensors --size 8     | too small for this network
decode spot.safetensors -m vae.safetensors -o OUT.png               | too small for this network
encode photo.png -m vae.safetensors -o OUT.png                      | as safetensors
encode photo.png -m vae.safetensors -o vae.safetensors              | one of the inputs
encode photo.png -m llm.safetensors -o OUT.safetensors              | no network
encode photo.png -m tiny.safetensors -o OUT.safetensors --sample    | leave --sample out
encode photo.png -o OUT.safetensors                                 | Missing option '--model'
decode absent.safetensors -m vae.safetensors -o OUT.png             | does not exist
decode photo.png -m vae.safetensors -o OUT.png                      | is a PNG image, not a file
decode z.safetensors -m vae.safetensors -o OUT.txt                  | not the name of an image file
decode z.safetensors -m vae.safetensors -o OUT.png --key y          | which tensor
decode z7.safetensors -m vae.safetensors -o OUT.png                 | wrong shape
decode z1.safetensors -m vae.safetensors -o OUT.png                 | not latents
decode z2.safetensors -m vae.safetensors -o OUT.png                 | which tensor
decode patches.safetensors -m flux2.safetensors -o OUT.png          | normalised patches
decode z.safetensors -m nan.safetensors -o OUT.png                  | NaN
decode z.safetensors -m vae.safetensors -o OUT.png --memory plenty   | not a memory size
decode z.safetensors -m vae.safetensors -o OUT.png --memory 10KiB    | at least
decode z.safetensors -m vae.safetensors -o OUT.png --spill .         | feature maps are not spilled
encode photo.png -m tiny.safetensors -o OUT.safetensors --memory 9MB | limit cannot be met
encode photo.png -m vae.safetensors -o OUT.safetensors --backend no  | no
reconstruct photo.png -m vae.safetensors -o photo.png               | one of the inputs
plan --size 2x2                                                     | the image is too small
plan --memory plenty                                                | not a memory size
plan --memory 10MiB                                                 | at least
plan tiny.safetensors --memory 9MB                                  | limit cannot be met
plan --spill absent                                                 | --spill: not a writable folder
reconstruct photo.png -m vae.safetensors -o OUT.xyz                 | not the name of an image file
reconstruct photo.png -m vae.safetensors -o photo.png/OUT.png       | cannot be written
reconstruct photo.png -m absent.safetensors -o OUT.png              | does not exist
reconstruct photo.png -m vae.safetensors -o OUT.png --component unet | no component
fetch                                                               | nothing to fetch, or too much
fetch nonesuch                                                      | unknown checkpoint
fetch sd15 --list                                                   | nothing to fetch, or too much
anatomy llm.safetensors                                             | no network
anatomy vae.safetensors --size 4x4                                  | --size: the image is too small
anatomy vae.safetensors --size 99999x9                              | --size: the image is too large
anatomy vae.safetensors --plot OUT.txt                              | not a name for a drawing
anatomy vae.safetensors --component unet                            | --component vae
nonsense                                                            | No such command
"""


@pytest.mark.parametrize(
    "line", BAD.strip().splitlines(), ids=lambda line: line.split("|")[0].strip()
)
def test_bad_input_ends_with_a_message(
    line: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
    command, words = line.split("|")
    result = run(*shlex.split(command.replace(" OUT", f" {tmp_path}/OUT")))
    assert result.exit_code == 2
    assert words.strip() in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in here.iterdir()} == before


def test_inspect(here: Path) -> None:
    found = answer("inspect", here / "vae.safetensors")
    (network,) = found["parts"][0]["networks"]
    assert network["config"]["block_out_channels"] == [32, 32, 32, 32]
    assert (found["complaint"], found["values"]) == (None, None)
    shown = run("inspect", here / "vae.safetensors")
    assert shown.exit_code == 0
    for word in ("AutoencoderKL", "block_out_channels", "diffusers, no prefix", "F32"):
        assert word in shown.stdout


def test_inspect_has_status_1_for_unusable_weights(here: Path) -> None:
    assert answer("inspect", here / "llm.safetensors", status=1)["parts"][0]["networks"] == []
    integers = run("inspect", here / "int.safetensors")
    assert integers.exit_code == 1
    assert "not floating-point" in integers.stderr
    lacks = answer("inspect", here / "lacks.safetensors", status=1)
    assert len(lacks["parts"][0]["networks"][0]["missing"]) == 1
    assert answer("inspect", here / "nan.safetensors")["values"] is None
    values = answer("inspect", here / "nan.safetensors", "--values", status=1)["values"]
    assert values["nan"] == {"decoder.conv_in.bias": 32}
    shown = run("inspect", here / "nan.safetensors", "--values")
    assert shown.exit_code == 1
    assert "32 NaN" in shown.stdout
    assert "decoder.conv_in.bias" in shown.stderr
    assert answer("inspect", here / "vae.safetensors", "--values")["values"]["sound"]


def test_control_characters_in_names_are_escaped(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"[red]\x1b[31m\x07": torch.full((1,), torch.nan), "[/]": torch.zeros(1)}, path)
    result = run("inspect", path, "--values")
    assert result.exit_code == 1
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    assert r"[red]\x1b[31m\x07" in result.stdout


def test_a_warning_is_one_line_and_names_the_option(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(seeded.tensors(KL), path)
    result = run("convert", path, tmp_path / "out.safetensors", "--layout", "original")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: ")
    assert line.endswith("pass --family to decide")
    decided = run("convert", path, tmp_path / "b.safetensors", "--layout=original", "--family=sd1")
    assert (decided.exit_code, decided.stderr) == (0, "")


def test_check(here: Path) -> None:
    report = answer("check", here / "vae.safetensors", "--size", "32x40")
    assert report["passed"] is True
    assert report["first_difference"] is None
    assert len(report["rows"]) > 50
    shown = run("check", here / "vae.safetensors", "--size", "32")
    assert "bit for bit" in shown.stdout
    assert "encoder.down_blocks.0 " in shown.stdout
    assert "resnets" not in shown.stdout
    every = run("check", here / "vae.safetensors", "--size", "32", "--all")
    assert "encoder.down_blocks.0.resnets.0.conv1" in every.stdout


def test_check_has_status_1_for_nan(here: Path) -> None:
    result = run("check", here / "nan.safetensors", "--size", "32", "--family", "sd1")
    assert result.exit_code == 1
    assert "decoder.conv_in" in result.stdout
    assert "failed" in result.stdout
    assert (
        "gives NaN or infinity on both sides; to look for NaN in the weights: sdconv"
        in result.stderr
    )
    report = answer("check", here / "nan.safetensors", "--size=32", "--family=sd1", status=1)
    assert report["first_difference"] == "decoder.conv_in"


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_convert_there_and_back(layout: str, here: Path, tmp_path: Path) -> None:
    middle, back = tmp_path / "middle.safetensors", tmp_path / "back"
    written = answer("convert", here / "vae.safetensors", middle, "--layout", layout)
    assert written["files"] == [str(middle)]
    with safe_open(middle, "pt") as file:
        names = set(file.keys())
    assert ("decoder.up.0.block.0.norm1.weight" in names) == (layout == "original")
    assert run("convert", middle, back, "--layout", "diffusers").exit_code == 0
    result = load_file(back / "diffusion_pytorch_model.safetensors")
    expected = seeded.tensors(KL)
    assert set(result) == set(expected)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert json.loads((back / "config.json").read_text())["scaling_factor"] == 0.25


def test_convert_narrows_and_replaces(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    out.write_text("an older output", encoding="utf-8")
    arguments = ("convert", here / "vae.safetensors", out, "--layout=diffusers", "--dtype=float16")
    assert answer(*arguments, "--force")["dtype"] == "float16"
    assert {tensor.dtype for tensor in load_file(out).values()} == {torch.float16}


def cropped(path: Path, sides: tuple[int, int, int, int]) -> torch.Tensor:
    with Image.open(path) as image:
        return to_tensor(image.convert("RGB").crop(sides))


@torch.no_grad()
def test_encode(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "z.safetensors"
    options = ["-m", here / "vae.safetensors", "--backend", "reference", "--crop"]
    said = answer("encode", here / "photo.png", *options, "-o", out)
    assert (said["width"], said["height"], said["shape"]) == (48, 32, [1, 4, 4, 6])
    assert "48x32" in said["notes"][0]
    posterior = seeded.network(KL).encode(cropped(here / "photo.png", (1, 2, 49, 34))).latent_dist
    assert torch.equal(load_file(out)["latents"], posterior.mode())
    drawn = run("encode", here / "photo.png", *options, "-fo", out, "--sample", "--seed", 5)
    assert drawn.exit_code == 0
    assert "1 x 4 x 4 x 6, raw" in drawn.stdout
    expected = posterior.sample(torch.Generator().manual_seed(5))
    assert torch.equal(load_file(out)["latents"], expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "config"), [("vae", KL), ("flux2", FLUX2), ("tiny", TINY)])
@pytest.mark.parametrize("scaled", [True, False])
def test_encode_and_decode(
    name: str, config: Config, scaled: bool, here: Path, tmp_path: Path
) -> None:
    z, out, model = tmp_path / "z.safetensors", tmp_path / "a.png", here / f"{name}.safetensors"
    flags, options = ["--scaled"] if scaled else [], ["-m", model, "--backend", "reference"]
    answer("encode", here / "photo.png", *options, "-o", z, "--size", 32, *flags)
    # the file itself says whether they are scaled
    said = answer("decode", z, *options, "-o", out)
    # a tiny autoencoder's always are
    assert (said["files"], said["scaled"]) == ([str(out)], scaled or name == "tiny")
    network = seeded.network(config)
    with Image.open(here / "photo.png") as image:
        small = image.resize((32, 24), Image.Resampling.LANCZOS)
    encoded = network.encode(to_tensor(small))
    latents = encoded.latents if name == "tiny" else encoded.latent_dist.mode()
    assert torch.equal(load_file(z)["latents"], scale(network, latents) if scaled else latents)
    decoded = network.decode(latents).sample.clamp(-1, 1)
    # one step of 8 bits: rounding, and what scaling there and back leaves
    assert float((cropped(out, (0, 0, 32, 24)) - decoded).abs().max()) <= 1.01 / 127.5


@torch.no_grad()
def test_comfyuis_latents_through_a_tiny_autoencoder(here: Path, tmp_path: Path) -> None:
    """They are raw, and the file does not say which VAE made them: --family does."""
    z, out = tmp_path / "z.latent", tmp_path / "a.png"
    raw = torch.randn(1, 4, 3, 4, generator=torch.Generator().manual_seed(1))
    save_file({"latent_tensor": raw, "latent_format_version_0": torch.tensor([])}, z)
    options = ["-m", here / "tiny.safetensors", "-o", out, "--backend", "reference"]
    refused = run("decode", z, *options)
    assert refused.exit_code == 2
    assert "does not say of which VAE" in refused.stderr
    assert "pass --family to say it: sd1 or sd2 or sdxl" in refused.stderr.replace("\n", " ")
    wrong = run("decode", z, *options, "--family", "sd3")
    assert wrong.exit_code == 2
    assert "--family: the family 'sd3' has no known scale for latents with 4" in wrong.stderr
    for family, factor in (("sdxl", 0.13025), ("taesd", 0.18215)):
        answer("decode", z, *options, "--family", family, "--force")
        decoded = seeded.network(TINY).decode(raw * factor).sample.clamp(-1, 1)
        sides = (0, 0, decoded.shape[3], decoded.shape[2])
        assert float((cropped(out, sides) - decoded).abs().max()) <= 1.01 / 127.5


@torch.no_grad()
@pytest.mark.parametrize("flags", [(), ("--scaled",)])
def test_latents_of_a_vae_through_a_tiny_autoencoder_and_back(
    flags: tuple[str, ...], here: Path, tmp_path: Path
) -> None:
    """Raw latents of the VAE times its factor are what a tiny autoencoder makes."""
    z, out, photo = tmp_path / "z.safetensors", tmp_path / "a.png", here / "photo.png"
    vae, tiny = (["-m", here / f"{name}.safetensors"] for name in ("vae", "tiny"))
    answer("encode", photo, *vae, "-o", z, "--size", 32, *flags)
    said = answer("decode", z, *tiny, "-o", out, "--backend", "reference")
    assert said["scaled"] is bool(flags)
    raw = load_file(z)["latents"] / (0.25 if flags else 1)
    expected = seeded.network(TINY).decode(raw * 0.25).sample.clamp(-1, 1)
    with Image.open(out) as image:
        assert (to_tensor(image) - expected).abs().max() <= 1.01 / 127.5
    assert (seeded.network(TINY).decode(raw).sample.clamp(-1, 1) - expected).abs().max() > 0.05

    answer("encode", photo, *tiny, "-o", z, "--size", 32, "--force", *flags)
    answer("decode", z, *vae, "-o", out, "--backend", "reference", "--force")
    decoded = seeded.network(KL).decode(load_file(z)["latents"] / 0.25).sample.clamp(-1, 1)
    with Image.open(out) as image:
        assert (to_tensor(image) - decoded).abs().max() <= 1.01 / 127.5


@torch.no_grad()
def test_seamless(here: Path, tmp_path: Path) -> None:
    """Rolled latents give the rolled image."""
    z = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    images = {}
    for name, latents in (("a", z), ("rolled", z.roll(3, 3))):
        save_file({"latents": latents}, tmp_path / f"{name}.safetensors")
        for options in ((), ("--seamless", "x")):
            out = tmp_path / "a.png"
            model = ["-m", here / "vae.safetensors", *options, "--force"]
            answer("decode", tmp_path / f"{name}.safetensors", *model, "-o", out)
            with Image.open(out) as image:
                images[name, bool(options)] = to_tensor(image)
    by = 3 * images["a", True].shape[3] // 8
    assert (images["rolled", True] - images["a", True].roll(by, 3)).abs().max() <= 1.01 / 127.5
    assert (images["rolled", False] - images["a", False].roll(by, 3)).abs().max() > 0.1


@pytest.mark.parametrize("options", [
    (), ("--memory", "1GiB"), ("--memory", "1GiB", "--spill", "FOLDER", "--backend", "reference"),
])  # fmt: skip
def test_backends_and_streaming_agree(options: tuple[str, ...], here: Path, tmp_path: Path) -> None:
    z, out, own = tmp_path / "z.safetensors", tmp_path / "a.png", tmp_path / "own.png"
    words = [str(tmp_path) if word == "FOLDER" else word for word in options]
    model = ["-m", here / "vae.safetensors"]
    answer("encode", here / "photo.png", *model, "-o", z, "--crop", *words)
    posterior = seeded.network(KL).encode(cropped(here / "photo.png", (1, 2, 49, 34))).latent_dist
    found, expected = load_file(z)["latents"], posterior.mode()
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert not torch.equal(found, expected), "the options were not passed on"
    answer("decode", z, *model, "-o", own, "--backend", "reference")
    answer("decode", z, *model, "-o", out, *words)
    with Image.open(own) as one, Image.open(out) as other:
        assert psnr(to_tensor(one), to_tensor(other)) > 60
    answer("reconstruct", here / "photo.png", *model, "-o", out, *words, "--force")
    assert sorted(tmp_path.iterdir()) == [out, own, z]


def test_decode_latents_of_other_programs(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file({"samples": z * 0.25, "other": z}, tmp_path / "scaled.safetensors")
    save_file({"samples": z}, tmp_path / "raw.safetensors")
    model = ["-m", here / "vae.safetensors"]
    scaled = ["--scaled", "--key", "samples", "-o", tmp_path / "a.png"]
    said = answer("decode", tmp_path / "scaled.safetensors", *model, *scaled)
    assert said["files"] == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    answer("decode", tmp_path / "raw.safetensors", *model, "-o", tmp_path / "b.png")
    monkeypatch.chdir(tmp_path)
    said = answer("decode", tmp_path / "raw.safetensors", *model)
    assert said["files"] == ["picture-0.png", "picture-1.png"]
    for number in (0, 1):
        names = ("a", "b", "picture")
        a, b, unnamed = ((tmp_path / f"{name}-{number}.png").read_bytes() for name in names)
        assert a == b == unnamed


def test_a_file_that_says_otherwise(here: Path, tmp_path: Path) -> None:
    z, model = tmp_path / "z.safetensors", here / "vae.safetensors"
    answer("encode", here / "photo.png", "-m", model, "-o", z, "--scaled")
    result = run("decode", z, "-m", model, "-o", tmp_path / "a.png", "--raw")
    assert result.exit_code == 2
    assert "the file says otherwise" in result.stderr


@torch.no_grad()
def test_reconstruct(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "deeper" / "r.png"
    model = ["-m", here / "vae.safetensors", "--crop"]
    said = answer("reconstruct", here / "photo.png", *model, "-o", out)
    network, x = seeded.network(KL), cropped(here / "photo.png", (1, 2, 49, 34))
    back = network.decode(network.encode(x).latent_dist.mode()).sample
    assert said["psnr"] == pytest.approx(psnr(back, x))
    assert math.log2(said["amplification"]) % 1 == 0
    with Image.open(out) as sheet:
        assert sheet.width > 3 * 48
    shown = run("reconstruct", here / "photo.png", *model, "-fo", out)
    assert f"PSNR {said['psnr']:.2f} dB" in shown.stdout
    assert "note: cropped around the centre" in shown.stderr


def test_a_failure_leaves_the_old_output(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.png"
    out.write_text("before", encoding="utf-8")
    model = here / "nan.safetensors"
    failed = run("reconstruct", here / "photo.png", "-m", model, "-o", out, "--force")
    assert failed.exit_code == 2
    assert "NaN" in failed.stderr
    assert out.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_fetch_list() -> None:
    known = answer("fetch", "--list")["checkpoints"]
    assert {"sd15", "sdxl-vae", "taesd"} <= {one["name"] for one in known}
    shown = run("fetch", "--list")
    assert "sdxl-vae" in shown.stdout
    assert shown.exit_code == 0


def test_anatomy(here: Path, tmp_path: Path) -> None:
    found = answer("anatomy", here / "vae.safetensors", "--size", "64x96")
    assert found["size"] == [64, 96]
    first = found["blocks"][0]["operations"][0]
    assert (first["kernel"], first["stride"], first["downscale"]) == ([3, 3], [1, 1], ["1", "1"])
    assert {total["role"] for total in found["totals"]} >= {"convolution", "attention"}
    plot = tmp_path / "a.png"
    shown = run("anatomy", here / "vae.safetensors", "--size", "64", "--plot", plot)
    assert "down_blocks.0.downsamplers.0" in shown.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    every = run("anatomy", here / "vae.safetensors", "--size", "64", "--all")
    assert "conv1 (convolution)" in every.stdout
    half = answer("anatomy", here / "vae.safetensors", "--size", "64x96", "--dtype", "float16")
    for memory in ("weight_bytes", "activation_bytes"):
        assert half["blocks"][0][memory] * 2 == found["blocks"][0][memory] > 0
    drawings = []
    for depth in ((), ("--depth", 1)):
        out = tmp_path / f"{len(drawings)}.svg"
        run("anatomy", here / "vae.safetensors", "--size", "64", "--plot", out, *depth)
        drawings.append(out.read_text("utf-8"))
    assert len(drawings[1]) < 0.8 * len(drawings[0])


def test_help_has_examples_that_parse() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == {*COMMANDS, "dataset"}  # which is a group
    for name in COMMANDS:
        shown = run(name, "--help").stdout
        examples = [line.strip() for line in shown.splitlines() if line.startswith("    sdconv ")]
        assert len(examples) >= 2
        for example in examples:
            words = shlex.split(example.replace("$(sdconv fetch sdxl-vae)", "a.safetensors"))[1:]
            with commands[words[0]].make_context(words[0], words[1:]):  # raises on unknown options
                pass


def test_help_shows_the_commands_in_groups() -> None:
    shown = run("--help").stdout
    for title, commands in GROUPS.items():
        section = shown.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        names = [line.split()[0] for line in section.splitlines() if line.startswith("  ")]
        assert {command.__name__.replace("_", "-") for command in commands} <= set(names), title
    assert "--install-completion" in shown


def test_completion_is_there_for_the_usual_shells() -> None:
    for shell in ("bash", "zsh", "fish"):
        script = in_its_own_process(
            code="from sdconv.cli import main; main()", _SDCONV_COMPLETE=f"source_{shell}"
        )
        assert "sdconv" in script.stdout, shell


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("sdconv re", ["reconstruct"]),
        ("sdconv features --mod", ["--model", "--model-key"]),
        ("sdconv dataset enc", ["encode"]),
        ("sdconv export --half d", ["decoder"]),
    ],
)
def test_commands_options_and_values_are_completed(typed: str, offered: list[str]) -> None:
    said = in_its_own_process(
        code="from sdconv.cli import main; main()",
        _SDCONV_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - 1),
    )
    assert said.stdout.split() == offered


def test_no_option_shows_a_type_in_place_of_its_meaning() -> None:
    group = get_command(app).commands["dataset"]  # type: ignore[attr-defined]
    for names in (*([name] for name in COMMANDS), *(["dataset", name] for name in group.commands)):
        options = run(*names, "--help").stdout.partition("\nOptions:\n")[2]
        assert options
        assert not re.findall(r"--[\w-]+ +<?(TEXT|INTEGER|FLOAT|str|int)\b", options), names


def test_quiet_and_verbose(here: Path, tmp_path: Path) -> None:
    given = ("encode", here / "photo.png", "-m", here / "vae.safetensors", "--force")
    given += ("--out", tmp_path / "z.safetensors")
    said = run(*given)
    assert "note: padded from 50x37 to 56x40" in said.stderr and "encoding: " not in said.stderr
    quiet = run(*given, "-q")
    assert (quiet.stdout, quiet.stderr) == (said.stdout, "")
    assert re.search(r"^note: encoding: \d+\.\d\d s$", run(*given, "-v").stderr, re.MULTILINE)
    assert "encoding: " not in run(*given).stderr, "it holds for one command"
    assert "exclude each other" in run(*given, "-q", "-v").stderr
    assert "error: " in run("inspect", tmp_path / "absent.safetensors", "-q").stderr


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_an_image_given_as_weights_is_named(form: str, tmp_path: Path) -> None:
    for name in ("photo.safetensors", "photo.ckpt", f"photo.{form.lower()}"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name, format=form)
        said = run("inspect", tmp_path / name)
        assert said.exit_code == 2
        assert f"{name}: is a {form.replace('WEBP', 'WebP')} image" in said.stderr


def test_version() -> None:
    assert run("--version").stdout == f"sdconv {sdconv.__version__}\n"


HEAVY = "torch diffusers transformers matplotlib numpy rich PIL huggingface_hub safetensors".split()


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from sdconv.cli import main
try:
    main()
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    result = in_its_own_process("--help", code=code)
    assert (result.returncode, result.stderr.split()) == (0, [])
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.slow
def test_drawing_without_matplotlib(here: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from sdconv.cli import main; main()"
    model = here / "vae.safetensors"
    result = in_its_own_process("anatomy", model, "--plot", tmp_path / "a.png", code=code)
    assert result.returncode == 2
    assert "pip install 'sdconv[plot]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_errors_have_a_status_and_no_traceback(here: Path, tmp_path: Path) -> None:
    bad = in_its_own_process("reconstruct", here / "text.png", "-m", here / "vae.safetensors")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: ")
    assert "Traceback" not in bad.stderr
    offline = in_its_own_process("fetch", "taesd", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert offline.returncode == 2
    assert "Traceback" not in offline.stderr


def test_interrupted(here: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "picture.png"
    os.mkfifo(pipe)
    command = [
        sys.executable,
        "-m",
        "sdconv",
        "encode",
        str(pipe),
        "-m",
        str(here / "vae.safetensors"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    with pipe.open("wb"):  # opens once the command does, which then waits for an image
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("error: interrupted")
    assert "Traceback" not in errors
