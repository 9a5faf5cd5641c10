"""`sdconv features`: its inputs, its outputs, and its errors."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import commands, pipelines, seeded, unets
from helpers.paths import WEIGHTS
from helpers.slow import first_of
from PIL import Image
from safetensors.torch import save_file
from typer.testing import Result

import sdconv

UNET = WEIGHTS / "tiny-unet.safetensors"


def run(*arguments: object) -> Result:
    return commands.run("features", *arguments)


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.stderr
    assert not result.stdout
    return result.stderr


def index_of(page: Path) -> Any:
    found = re.search(r'id="index">(.*?)</script>', page.read_text("utf-8"))
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small autoencoder, a photo and latents."""
    folder = tmp_path_factory.mktemp("features")
    config = seeded.kl((32, 32, 32, 32), 4, True, layers_per_block=1, scaling_factor=0.25)
    sdconv.save(seeded.network(config), folder / "vae.safetensors")
    Image.effect_noise((50, 37), 40).convert("RGB").save(folder / "photo.png")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for kind in ("scaled", "raw"):
        save_file({"latents": z}, folder / f"{kind}.safetensors", {"sdconv.latents": kind})
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_bars_show_percent_and_the_time_that_is_left(
    here: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)  # a terminal to rich
    result = run(here / "photo.png", "--model", here / "vae.safetensors", "--out", out)
    assert result.exit_code == 0, result.stderr
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stderr)
    assert re.search(r"computing \S+ +100% 0:00:00", shown)  # by work: the network is called once
    assert re.search(r"drawing \S+ +100% \d+/\d+ 0:00:00", shown)


def test_the_bar_of_a_unet_is_one_of_all_its_calls(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("FORCE_COLOR", "1"), ("TERM", "xterm"), ("COLUMNS", "120")):
        monkeypatch.setenv(name, value)  # a terminal to rich
    options = ("--noise", "--size", "64x64", "--steps", "3")
    result = run(*options, "--model", UNET, "--out", out)
    assert result.exit_code == 0, result.stderr
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", result.stderr)
    assert re.search(r"computing \S+ +100% 0:00:00", shown)


def test_a_photo_through_an_autoencoder(here: Path, out: Path) -> None:
    result = run(here / "photo.png", "--model", here / "vae.safetensors", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "cropped around the centre" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["maps.zarr", "report.html"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    maps = sdconv.open_maps(out / "maps.zarr")
    index = index_of(out / "report.html")
    assert [one["name"] for one in index["maps"]] == list(maps)
    assert next(iter(maps)) == "encoder.conv_in"
    assert list(maps)[-1] == "decoder.conv_out"
    assert tuple(maps["encoder.conv_in"].shape) == (1, 32, 32, 48)
    assert index["image"].startswith("data:image/webp;base64,")
    assert {level["words"] for level in index["drawing"]["levels"]} >= {"32 \u00d7 48"}


def test_the_feature_maps_are_the_networks(here: Path, out: Path) -> None:
    network = sdconv.load(here / "vae.safetensors", dtype=torch.float32)
    result = run(
        *(here / "raw.safetensors", "--model", here / "vae.safetensors", "--out", out, "--json"),
        *("--layers", "decoder.mid_block.*", "--exclude", "*attentions*", "-l", "decoder.conv_out"),
    )
    answer = json.loads(result.stdout)
    assert "decoder.mid_block.resnets.0:silu1" in answer["layers"]
    assert not [name for name in answer["layers"] if "attentions" in name or "up_blocks" in name]
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoded = network.decode(z).sample
    kept = sdconv.open_maps(out / "maps.zarr")["decoder.conv_out"]
    assert torch.equal(kept, decoded.half())
    assert answer["bytes"] == Path(answer["page"]).stat().st_size


def test_values_that_are_too_large_for_float16_are_kept(here: Path, tmp_path: Path) -> None:
    """SDXL's VAE has such feature maps; in float16 they would be infinite."""
    network = sdconv.load(here / "vae.safetensors", dtype=torch.float32)
    with torch.no_grad():
        network.decoder.conv_in.weight.mul_(1e6)
    sdconv.save(network, tmp_path / "loud.safetensors")
    names = ("post_quant_conv", "decoder.conv_in")
    layers = [part for name in names for part in ("--layers", name)]
    result = run(
        *(here / "raw.safetensors", "-m", tmp_path / "loud.safetensors", *layers),
        *("-o", tmp_path / "out", "--json"),
    )
    assert result.exit_code == 0 and "infinite" not in result.stderr
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sdconv.capture(network, list(names)) as expected:
        network.decode(z)
    kept = sdconv.open_maps(tmp_path / "out" / "maps.zarr")
    assert kept[names[0]].dtype is torch.float16
    assert torch.equal(kept[names[1]], expected[names[1]])
    assert not kept[names[1]].half().isfinite().all(), "the control"
    listed = index_of(tmp_path / "out" / "report.html")["maps"]
    assert [one["snapshots"][0]["notFinite"] for one in listed] == [0, 0]


def test_scaled_latents_are_unscaled(here: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("raw", "scaled"):
        run(here / f"{kind}.safetensors", "-m", here / "vae.safetensors", "-o", tmp_path / kind)
        found[kind] = sdconv.open_maps(tmp_path / kind / "maps.zarr")["post_quant_conv"]
    weight, bias = (
        sdconv.load(here / "vae.safetensors").post_quant_conv.state_dict()[name].float()
        for name in ("weight", "bias")
    )
    raw, scaled = (found[kind].float() - bias.view(1, -1, 1, 1) for kind in ("raw", "scaled"))
    assert weight.numel()
    assert (scaled - raw / 0.25).abs().max() < 1e-2 * scaled.abs().max()


def test_latents_by_their_name(here: Path, tmp_path: Path) -> None:
    z = {name: torch.full((1, 4, 8, 8), value) for name, value in (("a", 0.5), ("b", -0.5))}
    save_file(z, tmp_path / "two.safetensors")
    options = ("-m", here / "vae.safetensors", "-l", "post_quant_conv", "-o")
    found = []
    for name in z:
        out = tmp_path / name
        result = run(tmp_path / "two.safetensors", "--key", name, *options, out)
        assert result.exit_code == 0, result.stderr
        found.append(sdconv.open_maps(out / "maps.zarr")["post_quant_conv"])
        layer = sdconv.load(here / "vae.safetensors", dtype=torch.float32).post_quant_conv
        assert torch.equal(found[-1], layer(z[name]).half())
    assert not torch.equal(*found)
    unnamed = run(tmp_path / "two.safetensors", *options, tmp_path / "c")
    assert unnamed.exit_code == 2
    assert "--key NAME" in unnamed.stderr


def test_noise_through_a_unet(out: Path) -> None:
    result = run("--noise", "-m", UNET, "--steps", 4, "--keep", "0,-1", "-o", out, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert "4 unit vectors" in result.stderr
    assert "prediction epsilon" in result.stderr
    series = sdconv.open_maps(out / "maps.zarr").series("mid_block.resnets.0")
    assert series.calls == (0, 3)
    assert series.timesteps == (999, 249)
    snapshots = index_of(out / "report.html")["maps"][0]["snapshots"]
    assert [snapshot["timestep"] for snapshot in snapshots] == [999, 249]
    # the second is of the latents that the first steps denoised
    unet = sdconv.load(UNET, dtype=torch.float32)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    again = sdconv.run_until(unet, "mid_block.resnets.0", noise, 999, torch.eye(4)[None])
    assert torch.equal(series[0].tensor, again["mid_block.resnets.0"].half())
    still = sdconv.run_until(unet, "mid_block.resnets.0", noise, 249, torch.eye(4)[None])
    assert not torch.allclose(series[1].tensor.float(), still["mid_block.resnets.0"], atol=1e-2)


def test_a_photo_through_a_unet(here: Path, out: Path) -> None:
    given = (here / "photo.png", "-m", UNET, "-o", out, "--steps", 2, "-l", "mid_block")
    assert "--vae PATH" in refused(*given)
    assert run(*given, "--vae", here / "vae.safetensors").exit_code == 0
    maps = sdconv.open_maps(out / "maps.zarr")
    assert maps.series("mid_block").timesteps == (999, 499)
    shutil.rmtree(out)
    assert "scaled" in refused(here / "raw.safetensors", *given[1:])
    assert run(here / "scaled.safetensors", *given[1:]).exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    first_of(
        [
            "SDXL",
            "SD1 inpainting",
            "LCM",
            "SD2 unCLIP",
            "KOALA 700M",
            "x4 upscaler",
            "no transformers",
        ]
    ),
)
def test_noise_through_unets_of_every_kind(family: str, tmp_path: Path) -> None:
    small = unets.smallest(family)
    sdconv.save(unets.ours(unets.theirs(small)), tmp_path / "unet.safetensors")
    given = ("--noise", "-m", tmp_path / "unet.safetensors", "--steps", 2, "--size", 128)
    result = run(*given, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    note = "takes no prompt embedding" if family == "no transformers" else "embedding is zeros"
    assert note in result.stderr
    further = {"SD1 inpainting": 5, "x4 upscaler": 3}.get(family)
    assert (f"{further} further channels are noise" in result.stderr) == (further is not None)
    index = index_of(tmp_path / "out" / "report.html")
    assert sum(line["skip"] for line in index["drawing"]["lines"]) == 2 * len(
        small["down_block_types"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "neither"),
        (("photo.png", "--noise"), "both"),
        (("--noise",), "does not take noise"),
        (("absent.png",), "does not exist"),
        (("vae.safetensors",), "which tensor holds the latents"),
        (("broken.png",), "not an image that can be read"),
        (("bomb.png",), "the image is too large"),
        (("photo.png", "--layers", "decoder.upblocks.*"), "decoder.up_blocks"),
        (("raw.safetensors", "--layers", "encoder.*"), "reached"),
        (("photo.png", "--keep", "99"), "--keep"),
        (("photo.png", "--keep", "5:2"), "keeps no call"),
        (("photo.png", "--size", "2"), "the image is too small"),
        (("photo.png", "--size", "200000"), "the image is too large"),
        (("--noise", "--model", str(UNET), "--size", "4000000"), "for the free memory"),
        (("photo.png", "--model", "absent.safetensors"), "absent.safetensors"),
    ],
)
def test_bad_input_is_an_error_and_leaves_nothing(
    here: Path, out: Path, arguments: tuple[str, ...], words: str
) -> None:
    (here / "broken.png").write_bytes(b"not an image")
    if "bomb.png" in arguments:
        Image.new("1", (20000, 20000)).save(here / "bomb.png")
    placed = [here / one if "." in one and "*" not in one else one for one in arguments]
    model = () if "--model" in arguments else ("--model", here / "vae.safetensors")
    message = refused(*placed, *model, "--out", out)
    assert words in message
    assert "Traceback" not in message
    assert list(out.parent.iterdir()) == []


def test_an_output_that_exists_is_refused_without_force(here: Path, out: Path) -> None:
    given = (here / "raw.safetensors", "-m", here / "vae.safetensors", "-l", "decoder.conv_in")
    out.write_text("mine")
    assert "is not a folder" in refused(*given, "-o", out)
    assert str(out) in refused(*given, "-o", out / "under")
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "mine").touch()
    assert "pass --force" in refused(*given, "-o", out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    for _ in range(2):
        assert run(*given, "-o", out, "--force").exit_code == 0
        assert {path.name for path in out.iterdir()} == {"mine", "maps.zarr", "report.html"}
    shutil.rmtree(out)
    out.mkdir()
    assert run(*given, "-o", out).exit_code == 0
    assert run(*given, "-o", out.parent / "deep" / "er").exit_code == 0


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(here: Path, out: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sdconv.cli import main; main()"
    )
    given = (here / "photo.png", "-m", here / "vae.safetensors", "-o", out)
    command = [sys.executable, "-c", code, "features", *map(str, given)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2, ran.stderr
    assert f"{out}: cannot be written, and nothing is left of it" in ran.stderr
    assert "File too large" in ran.stderr
    assert ".part" not in ran.stderr
    assert "Traceback" not in ran.stderr
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_an_interruption_leaves_nothing(out: Path) -> None:
    given = ("--noise", "-m", UNET, "--steps", 500, "--size", 256, "-o", out)
    command = [sys.executable, "-m", "sdconv", "features", *map(str, given)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 240
    while not list(out.parent.glob(".*.part/*/*")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=240)[1]
    assert process.returncode == 130, message
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_all_blocks_of_a_full_autoencoder_fit(tmp_path: Path) -> None:
    config = seeded.kl((128, 256, 512, 512), 4, True)
    sdconv.save(seeded.network(config), tmp_path / "vae.safetensors")
    given = (WEIGHTS / "photo.jpg", "--size", 512, "-m", tmp_path / "vae.safetensors")
    answer = json.loads(run(*given, "-o", tmp_path / "out", "--json").stdout)
    assert answer["bytes"] < 30_000_000
    assert answer["shown"] > 30


def test_a_missing_zarr_is_said_before_anything_is_computed(
    here: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (here / "photo.png", "-m", here / "vae.safetensors", "-o", out)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "zarr", None)
        opened: list[object] = []
        without.setattr("sdconv.features.drivers.prepare_run", opened.append)
        message = refused(*given)
        assert "pip install 'sdconv[maps]'" in message
        assert not opened and not out.exists()
    assert run(*given, "-l", "encoder.conv_in").exit_code == 0


def test_the_list_of_layers(here: Path, tmp_path: Path) -> None:
    given = ("--list", "-m", here / "vae.safetensors")
    printed = run(*given)
    assert printed.exit_code == 0, printed.stderr
    vae = sdconv.load(here / "vae.safetensors")
    points = sdconv.features(vae)
    listed = json.loads(run(*given, "--json").stdout)["points"]
    assert listed == json.loads(json.dumps(points.to_json()))
    assert all(point.name in printed.stdout for point in points)
    sized = json.loads(run(*given, "--json", "--size", "64x32", "-l", "decoder.conv_*").stdout)
    assert [one["name"] for one in sized["points"]] == [
        "decoder.conv_in",
        "decoder.conv_norm_out",
        "decoder.conv_act",
        "decoder.conv_out",
    ]
    assert sized["points"][-1]["size"] == [64, 32]
    assert "no layer has this name" in refused(*given, "-l", "decoder.nothing")
    # of a U-Net, an image's size is that of its latents times eight
    unet = json.loads(run("--list", "-m", UNET, "--size", "128", "--json", "-l", "conv_in").stdout)[
        "points"
    ]
    assert unet[0]["size"] == [16, 16]


def test_without_a_folder_the_list_is_suggested(here: Path) -> None:
    message = refused(here / "photo.png", "-m", here / "vae.safetensors")
    assert "--out DIR" in message and "--list" in message


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    pipelines.pipeline("text").save_pretrained(folder)
    return folder


def test_a_pipelines_folder_and_a_prompt(here: Path, pipeline_folder: Path, tmp_path: Path) -> None:
    layer = "mid_block.attentions.0"
    found = {}
    for words in ("a cat", "two dogs"):
        out = tmp_path / words
        given = ("-m", pipeline_folder, "--prompt", words, "--steps", 1, "-l", layer)
        result = run(*given, "-o", out, "--size", 64)
        assert result.exit_code == 0, result.stderr
        assert f"the prompt is \u201c{words}\u201d" in result.stderr
        found[words] = sdconv.open_maps(out / "maps.zarr").series(layer)[0]
        assert ["prompt", f"\u201c{words}\u201d"] in index_of(out / "report.html")["facts"]
    assert not torch.equal(*(one.tensor for one in found.values()))
    # by hand, with the pipeline's own encoder
    pipe = pipelines.pipeline("text")
    with torch.no_grad():
        embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    again = sdconv.run_until(pipe.unet, layer, noise, found["a cat"].timestep, embeds)
    assert torch.allclose(found["a cat"].tensor.float(), again[layer], atol=2e-3)

    save_file({"prompt_embeds": embeds}, tmp_path / "embeds.safetensors")
    given = ("-m", pipeline_folder, "--embeds", tmp_path / "embeds.safetensors", "--size", 64)
    result = run(*given, "--steps", 1, "-l", layer, "-o", tmp_path / "embeds")
    assert result.exit_code == 0, result.stderr
    same = sdconv.open_maps(tmp_path / "embeds" / "maps.zarr").series(layer)[0].tensor
    # without a negative half next to it, which rounds otherwise
    assert torch.allclose(same.float(), found["a cat"].tensor.float(), atol=2e-3)
    # an image is encoded by the pipeline's own autoencoder
    given = (here / "photo.png", "-m", pipeline_folder, "--prompt", "a cat", "--steps", 2)
    assert run(*given, "-l", layer, "-o", tmp_path / "image").exit_code == 0


def test_a_prompt_that_cannot_be_used(here: Path, pipeline_folder: Path, out: Path) -> None:
    assert "needs a pipeline's folder" in refused("-m", UNET, "--prompt", "a cat", "-o", out)
    both = ("--prompt", "a", "--embeds", here / "raw.safetensors")
    assert "either a prompt or its embeddings" in refused("-m", pipeline_folder, *both, "-o", out)
    given = (here / "photo.png", "-m", pipeline_folder, "--component", "vae", "--prompt", "a")
    assert "an autoencoder takes no prompt" in refused(*given, "-o", out)


@pytest.mark.slow
def test_two_runs_on_one_page(out: Path, tmp_path: Path) -> None:
    given = ("--noise", "-m", UNET, "--steps", 2, "-l", "mid_block.*", "-o")
    assert run(*given, tmp_path / "one", "--seed", 1).exit_code == 0
    result = run(*given, out, "--seed", 2, "--compare", tmp_path / "one")
    assert result.exit_code == 0, result.stderr
    index = index_of(out / "report.html")
    shots = index["maps"][0]["snapshots"]
    assert [(one["half"], one["step"]) for one in shots] == [
        ("this run", 0),
        ("this run", 1),
        ("one", 0),
        ("one", 1),
    ]
    assert shots[0]["low"] != shots[2]["low"]
    assert index["kernels"] and index["store"] == "maps.zarr"
    assert "absent" in refused(*given, tmp_path / "three", "--compare", tmp_path / "absent")
    assert not (tmp_path / "three").exists()


def test_how_much_detail_the_page_has(here: Path, tmp_path: Path) -> None:
    from sdconv.report.features import content

    command = importlib.import_module("sdconv.cli.features_run")
    assert command.DETAILED == content.DETAILED
    given = (here / "photo.png", "-m", here / "vae.safetensors", "-l", "encoder.conv_in", "-o")
    for number in (0, 20):
        assert run(*given, tmp_path / str(number), "--detail", number).exit_code == 0
        index = index_of(tmp_path / str(number) / "report.html")
        assert len(index["maps"][0]["snapshots"][0]["exact"]) == number
    assert "--page-size: not a memory size" in refused(*given, tmp_path / "x", "--page-size", "big")
