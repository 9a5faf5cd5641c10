"""convert and inspect on files as people have them: options, notes and messages."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import seeded
from helpers.commands import answer, run
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdconv.checkpoint.save import original_tensors

KL = seeded.SMALL_KL
FIRST, COPY = "first_stage_model.", "conditioner.embedders.3."
NAME = "decoder.conv_in.weight"


def vae(prefix: str = "", seed: int = 0) -> dict[str, Tensor]:
    named = original_tensors(seeded.tensors(KL, seed), KL)
    return {prefix + name: tensor.contiguous() for name, tensor in named.items()}


def test_overflow_and_clamp(tmp_path: Path) -> None:
    state = vae()
    state[NAME] = state[NAME].clone()
    state[NAME].view(-1)[0] = 70000
    path, out = tmp_path / "vae.safetensors", tmp_path / "half.safetensors"
    save_file(state, path)
    options = ("--layout=diffusers", "--family=sd1", "--dtype=float16")
    result = run("convert", path, out, *options)
    assert result.exit_code == 2
    assert f"{NAME} holds 70000, which is infinite in float16" in result.stderr
    assert "pass --clamp for the largest" in result.stderr
    assert not out.exists()
    result = run("convert", path, out, *options, "--clamp")
    assert result.exit_code == 0
    assert f"clamped, first {NAME} (which holds 70000)" in result.stderr
    assert float(load_file(out)[NAME].view(-1)[0]) == 65504


def test_scaled_fp8_is_said(tmp_path: Path) -> None:
    state = vae()
    state[NAME] = (state[NAME] * 100).to(torch.float8_e4m3fn)
    state["decoder.conv_in.scale_weight"] = torch.tensor(0.01)
    path, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    found = answer("inspect", path, "--family=sd1")
    assert any("scaled fp8: 1 weights" in note for note in found["parts"][0]["notes"])
    assert "scaled fp8" in run("inspect", path, "--family=sd1").stdout
    result = run("convert", path, out, "--layout=diffusers", "--family=sd1")
    assert "1 scaled fp8 weights were multiplied by their scales" in result.stderr
    right = state[NAME].float() * state["decoder.conv_in.scale_weight"]
    assert torch.equal(load_file(out)[NAME], right)
    # diff multiplies too
    assert run("diff", path, out).exit_code == 0


def test_copies_and_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    half = {k: v for k, v in vae(FIRST).items() if "encoder." not in k}
    save_file(half | vae(COPY, 2), path)
    result = run("convert", path, tmp_path / "o", "--layout=diffusers", "--component=vae")
    assert result.exit_code == 2
    assert f"pass --prefix {COPY}" in result.stderr
    options = ("--layout=diffusers", "--component=vae", "--family=sd1", f"--prefix={COPY}")
    assert run("convert", path, tmp_path / "o.safetensors", *options).exit_code == 0
    assert torch.equal(load_file(tmp_path / "o.safetensors")[NAME], seeded.tensors(KL, 2)[NAME])
    found = answer("inspect", path, "--family=sd1", f"--prefix={COPY}")
    assert found["parts"][0]["networks"][0]["prefix"] == COPY


def test_a_doubt_in_the_users_words(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    save_file(vae(), path)
    shown = run("inspect", path).stdout
    assert "0.18215 for sd1 and sd2, 0.13025 for sdxl" in shown
    assert "--family" in shown
    assert "family=" not in shown
    for _ in range(2):
        out = tmp_path / f"again{_}"
        result = run("convert", path, out, "--layout=diffusers")
        assert "0.18215 for sd1 and sd2, 0.13025 for sdxl" in result.stderr
        assert "pass --family to decide" in result.stderr
        path = out


def test_what_a_component_leaves_out_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(vae(FIRST) | {f"{FIRST}loss.logvar": torch.zeros(())}, path)
    options = ("--layout=original", "--component=vae", "--family=sd1")
    result = run("convert", path, tmp_path / "vae.safetensors", *options)
    assert "left out" in result.stderr
    assert "first_stage_model (1)" in result.stderr
