"""average, merge-lora and extract-lora as a user runs them: reports, notes, JSON, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.commands import answer, run
from safetensors.torch import load_file, save_file

import sdconv
from sdconv.checkpoint.save import original_tensors

KL = seeded.SMALL_KL
NAME = "decoder.conv_in.weight"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two VAEs, a LoRA, and files that do not fit."""
    folder = tmp_path_factory.mktemp("merging")
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        sdconv.save(seeded.network(KL, seed), folder / f"{name}.safetensors", layout="original")
    random = torch.Generator().manual_seed(0)
    lora = {
        "lora_vae_decoder_conv_in.lora_up.weight": torch.randn(64, 2, 1, 1, generator=random),
        "lora_vae_decoder_conv_in.lora_down.weight": torch.randn(2, 4, 3, 3, generator=random),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(()),
    }
    save_file(lora, folder / "lora.safetensors")
    named = original_tensors(seeded.tensors(KL, 1), KL)
    save_file({k: v.contiguous() for k, v in list(named.items())[1:]}, folder / "less.safetensors")
    return folder


def test_average(here: Path, tmp_path: Path) -> None:
    a, b, out = here / "a.safetensors", here / "b.safetensors", tmp_path / "out.safetensors"
    result = run("average", a, b, "--out", out)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].startswith("vae: shares 0.5, 0.5; ")
    assert result.stdout.splitlines()[1] == str(out)
    assert "changed, by " in result.stdout
    one, two = load_file(a)[NAME], load_file(b)[NAME]
    assert torch.equal(load_file(out)[NAME], one * 0.5 + two * 0.5)
    said = answer("average", a, b, "-fo", out, "--weight", "0.25")
    assert said["shares"] == {"vae": [0.75, 0.25]}
    assert said["changes"]["vae"]["tensors"] == said["averaged"]["vae"] == len(load_file(a))
    assert torch.equal(load_file(out)[NAME], one * 0.75 + two * 0.25)
    said = answer("average", a, b, "-fo", out, "--weight", "0.25", "--weight", "vae=0")
    assert (said["shares"], said["changes"]) == ({"vae": [1, 0]}, {})
    assert torch.equal(load_file(out)[NAME], one)
    said = answer("average", a, b, here / "c.safetensors", "-fo", out, "--weight", "0.5,0.25,0.25")
    assert said["shares"] == {"vae": [0.5, 0.25, 0.25]}


REFUSED = """
average a.safetensors -o OUT                                    | takes several
average a.safetensors b.safetensors -o OUT --weight much        | --weight: not a share
average a.safetensors b.safetensors -o OUT --weight 0.5,0.6     | their sum is 1.1
average a.safetensors b.safetensors -o OUT --weight unet=0.5    | does not have
average a.safetensors less.safetensors -o OUT                   | 1 only in the first
average a.safetensors b.safetensors -o OUT-folder               | written again as a file
merge-lora a.safetensors b.safetensors -o OUT                   | a whole checkpoint, not a LoRA
merge-lora lora.safetensors lora.safetensors -o OUT             | this is a LoRA file
merge-lora a.safetensors lora.safetensors -o OUT --scale nan    | --scale: not a finite number
merge-lora a.safetensors lora.safetensors -o OUT --scale 1 --scale 2 | one for each LoRA
merge-lora a.safetensors absent.safetensors -o OUT              | does not exist
extract-lora a.safetensors a.safetensors --rank 4 -o OUT        | nothing to extract
extract-lora a.safetensors b.safetensors -o OUT                 | Missing option '--rank'
extract-lora a.safetensors b.safetensors --rank 0 -o OUT        | --rank
extract-lora a.safetensors less.safetensors --rank 2 -o OUT     | of another model
"""


@pytest.mark.parametrize(
    "line", REFUSED.strip().splitlines(), ids=lambda line: line.split("|")[0].strip()
)
def test_refused(line: str, here: Path, tmp_path: Path) -> None:
    command, words = (part.strip() for part in line.split("|"))
    out = str(tmp_path / "out.safetensors")
    names = {"OUT": out, "OUT-folder": out.removesuffix(".safetensors")}
    given = [
        str(here / word) if word.endswith(".safetensors") else names.get(word, word)
        for word in command.split()
    ]
    result = run(*given)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_merge_lora(here: Path, tmp_path: Path) -> None:
    a, lora, out = here / "a.safetensors", here / "lora.safetensors", tmp_path / "out.safetensors"
    result = run("merge-lora", a, lora, "--scale", 0.5, "--out", out)
    assert result.exit_code == 0
    assert f"note: {lora}: 1 keys were skipped: lora_te_text_model" in result.stderr
    assert result.stdout.startswith("vae: 1 modules changed, by ")
    assert result.stdout.splitlines()[1] == str(out)
    network = sdconv.load(a)
    sdconv.merge_lora(network, lora, 0.5)
    written = sdconv.load(out).state_dict()
    assert all(torch.equal(written[k], v) for k, v in network.state_dict().items())
    said = answer("merge-lora", a, lora, lora, "--scale", 1, "--scale", -1, "-fo", out)
    assert said["changes"].get("vae", {"relative": 0})["relative"] < 1e-6  # of the last bit
    assert torch.allclose(load_file(out)[NAME], load_file(a)[NAME], atol=1e-6)
    assert "nothing changed" in run("merge-lora", a, lora, "--scale", 0, "-fo", out).stdout
    # the scale of text encoders, of which this checkpoint has none, is one of its own
    given = ("--scale", 0.5, "--text-encoder-scale", 0)
    assert "vae: 1 modules" in run("merge-lora", a, lora, *given, "-fo", out).stdout
    again = sdconv.load(out).state_dict()
    assert all(torch.equal(again[k], v) for k, v in network.state_dict().items())


def test_extract_lora(here: Path, tmp_path: Path) -> None:
    a, lora, tuned = here / "a.safetensors", here / "lora.safetensors", tmp_path / "t.safetensors"
    out = tmp_path / "out.safetensors"
    assert run("merge-lora", a, lora, "--out", tuned).exit_code == 0
    result = run("extract-lora", a, tuned, "--rank", 2, "--out", out)
    assert result.stdout.splitlines() == [
        "vae: 1 layers, 100.00% of the energy kept",
        f"{out}: float32",
    ]
    again = tmp_path / "again.safetensors"
    assert run("merge-lora", a, out, "--out", again).exit_code == 0
    assert torch.allclose(load_file(again)[NAME], load_file(tuned)[NAME], atol=1e-5)
    other = ("extract-lora", a, here / "b.safetensors", "--rank", 1, "-fo", out)
    said = answer(*other, "--dtype=fp16")
    assert said["dtype"] == "float16"
    assert 0 < said["components"]["vae"]["kept"] < 0.9
    assert "decoder.conv_in.bias" in said["components"]["vae"]["left_out"]
    shown = run(*other, "--conv-rank", 0)
    assert "tensors differ and are left out: " in shown.stderr
