"""The commands for whole checkpoints: diff and convert."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pipelines, seeded
from helpers.commands import run
from helpers.weight_files import convert
from PIL import Image
from safetensors.torch import load_file, save_file

import sdconv
from sdconv.analysis.diff import compare
from sdconv.report.difference import draw_difference


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A VAE, and the same with other weights in a few layers."""
    folder = tmp_path_factory.mktemp("pair")
    tensors = seeded.tensors(seeded.kl((32, 64), 4, True, layers_per_block=1))
    save_file(tensors, folder / "a.safetensors")
    for number, name in enumerate(sorted(tensors)):
        if name.startswith(("decoder.up_blocks.0", "encoder.conv_in")):
            tensors[name] = tensors[name] * (1.0001 if number % 2 else 1.2)
    save_file(tensors | {"odd": torch.ones(1)}, folder / "b.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def test_diff_prints_every_block(pair: tuple[Path, Path]) -> None:
    shown = run("diff", *pair)
    assert shown.exit_code == 1
    (line,) = [line for line in shown.stdout.splitlines() if "vae.decoder.up_blocks.0" in line]
    count, changed, relative = line.split()[1:4]
    assert int(count) == int(changed) > 0
    assert 0 < float(relative) < 0.2
    assert "only in B" in shown.stdout
    every = run("diff", *pair, "--all").stdout
    assert "vae.decoder.up_blocks.0.resnets.0.conv1.weight" in every
    answer = json.loads(run("diff", *pair, "--json").stdout)
    assert answer["equal"] is False
    assert answer["only_second"] == ["odd"]
    assert answer["plot"] is None
    (block,) = [one for one in answer["blocks"] if one["name"] == "vae.decoder.up_blocks.0"]
    assert block["share"] == 1.0
    assert block["relative"] == pytest.approx(float(relative), rel=1e-2)
    assert json.loads(run("diff", pair[0], pair[0], "--json").stdout)["equal"] is True


def test_diff_draws_a_bar_for_each_block(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "d.png", tmp_path / "d.svg"):
        result = run("diff", *pair, "--plot", path)
        assert (result.exit_code, result.stderr) == (1, f"note: drawn: {path}\n")
    with Image.open(tmp_path / "d.png") as image:
        bars = sum(n for n, colour in image.convert("RGB").getcolors(1 << 20) if colour == GREEN)
        assert image.width > 1000
    assert bars > 5000
    # an empty frame, and names that no font has
    same = compare(pair[0], pair[0])
    odd = {"\x1b$\u4e00": torch.ones(1), "zero.$a": torch.zeros(1), "nan.a": torch.ones(1)}
    save_file(odd, tmp_path / "$\u4e00.safetensors")
    save_file(
        {k: v + 1 if "n" not in k else v * torch.nan for k, v in odd.items()},
        tmp_path / "o.safetensors",
    )
    draw_difference(same, tmp_path / "same.png")
    with Image.open(tmp_path / "same.png") as image:
        assert all(colour != GREEN for _, colour in image.convert("RGB").getcolors(1 << 20))
    drawn = run(
        "diff",
        tmp_path / "$\u4e00.safetensors",
        tmp_path / "o.safetensors",
        "--plot",
        tmp_path / "o.png",
    )
    assert drawn.exit_code == 1
    assert (tmp_path / "o.png").stat().st_size > 1000


GREEN = (106, 168, 79)

BAD: Mapping[str, tuple[list[str], str]] = {
    "absent": (["absent.safetensors", "A"], "does not exist"),
    "no weights": (["A", "text.safetensors"], "header"),
    "cut short": (["A", "cut.safetensors"], "is cut short"),
    "an empty folder": (["A", "empty"], "holds no weights"),
    "one alone": (["A"], "Missing argument"),
    "another format": (["A", "A", "--plot", "d.jpeg"], "not a name for a drawing"),
    "numbered layers": (["A", "numbers.safetensors"], "not half of a tiny autoencoder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "cut.safetensors").write_bytes(pair[0].read_bytes()[:-1])
    save_file({"0.weight": torch.ones(5, 7, 3, 3)}, tmp_path / "numbers.safetensors")
    arguments, words = BAD[case]
    result = run("diff", *(str(pair[0]) if word == "A" else word for word in arguments))
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_convert_lists_what_it_moves_and_leaves_out(tmp_path: Path) -> None:
    pipelines.pipeline("xl").to(torch.float16).save_pretrained(tmp_path / "folder")
    whole, out = tmp_path / "whole.safetensors", tmp_path / "model"
    convert(tmp_path / "folder", whole, "original")
    text = [name for name in load_file(whole) if name.startswith("conditioner.")]
    result = run("convert", whole, out, "--layout", "diffusers", "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["left_out"] == {"conditioner": len(text)}
    assert f"conditioner ({len(text)})" in result.stderr
    assert set(answer["moved"]) == {"unet", "vae"}
    assert answer["dtype"] == "float16"
    for file in answer["files"]:
        assert Path(file).exists()
    assert sdconv.load(out, "unet").config["addition_embed_type"] == "text_time"


def test_a_pipeline_is_not_written_into_itself(tmp_path: Path) -> None:
    vae = tmp_path / "pipe" / "vae"
    vae.mkdir(parents=True)
    tensors = seeded.tensors(seeded.kl((32, 64), 4, True, layers_per_block=1))
    save_file(tensors, vae / "diffusion_pytorch_model.safetensors")
    before = sorted(path.name for path in vae.iterdir())
    shown = run("convert", vae.parent, vae, "--layout", "diffusers")
    assert shown.exit_code == 2
    assert "a part of it" in shown.stderr
    assert sorted(path.name for path in vae.iterdir()) == before
    # control: next to it, it is written
    assert run("convert", vae.parent, tmp_path / "other", "--layout", "diffusers").exit_code == 0
