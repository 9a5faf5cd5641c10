"""Averages of checkpoints: values, shares by component, form, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from helpers import clip, seeded, unets
from helpers.weight_files import convert, put
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.average import average
from sdconv.checkpoint.keys.unet import keys_of_canonical
from sdconv.checkpoint.save import original_tensors
from sdconv.errors import CheckpointError, InputError, WeightsMismatchError

KL = seeded.SMALL_KL
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
LAYER = "text_model.encoder.layers.0.self_attn.q_proj.weight"
TOKENS = "text_model.embeddings.token_embedding.weight"
POSITIONS = "text_model.embeddings.position_ids"
State = dict[str, Tensor]


def checkpoint(seed: int, dtype: torch.dtype = torch.float32) -> State:
    """A small SD1 in the original layout."""
    config = unets.smallest("SD1")
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    keys = keys_of_canonical(shapes)
    state = {f"{UNET}{keys.original(k)}": v for k, v in seeded.weights(shapes, seed).items()}
    state |= {VAE + k: v for k, v in original_tensors(seeded.tensors(KL, seed), KL).items()}
    text = seeded.weights({LAYER: (8, 8), TOKENS: (9, 8)}, seed)
    state |= {TEXT + k: v for k, v in text.items()}
    state = {k: v.to(dtype).contiguous() for k, v in state.items()}
    return state | {
        TEXT + POSITIONS: torch.arange(77)[None],
        "betas": torch.linspace(0, 1, 10, dtype=torch.float64),
        "model_ema.decay": torch.tensor(0.5),
        "global_step": torch.tensor(seed),
        "v_pred": torch.empty(0),
    }


A, B, C = (checkpoint(seed) for seed in (1, 2, 3))


def files(folder: Path, *states: State) -> list[Path]:
    paths = [folder / f"{name}.safetensors" for name, _ in zip("abcdef", states, strict=False)]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path, metadata={"of": path.stem})
    return paths


def floating(state: Mapping[str, Tensor]) -> list[str]:
    return [k for k, v in state.items() if v.is_floating_point() and k != "v_pred"]


def test_the_mean(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = average(files(tmp_path, A, B), out)
    written = load_file(out)
    assert set(written) == set(A)
    for name in floating(A):
        assert torch.equal(written[name], A[name] * 0.5 + B[name] * 0.5), name
    assert torch.equal(written[TEXT + POSITIONS], A[TEXT + POSITIONS])
    assert int(written["global_step"]) == 1
    assert result.taken == ("global_step",)
    assert dict(sdconv.read_header(out).metadata) == {"of": "a"}
    assert result.averaged["unet"] == sum(name.startswith(UNET) for name in A)
    assert set(result.averaged) == {"unet", "vae", "text_encoder", "model_ema"}
    assert result.changes["vae"].tensors == result.averaged["vae"]
    assert 0 < result.changes["vae"].relative < 2
    # the control: neither of the two
    assert not torch.equal(written[TEXT + LAYER], A[TEXT + LAYER])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_sum_is_wide_and_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    a, b = checkpoint(1, dtype), checkpoint(2, torch.float32)
    average(files(tmp_path, a, b, C), out, (0.5, 0.3, 0.2))
    written, name = load_file(out), TEXT + LAYER
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    right = a[name].to(wide) * 0.5 + b[name].to(wide) * 0.3 + C[name].to(wide) * 0.2
    assert written[name].dtype == dtype
    assert torch.equal(written[name], right.to(dtype))


def test_shares_by_component(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    own = {"vae": (1, 0), "text_encoder": (0, 1)}
    result = average(files(tmp_path, A, B), out, (0.25, 0.75), own)
    written = load_file(out)
    for name in floating(A):
        shares = (1.0, 0.0) if name.startswith(VAE) else (0.25, 0.75)
        if name.startswith(TEXT):
            shares = (0.0, 1.0)
        right = A[name] if shares[0] == 1 else A[name] * shares[0] + B[name] * shares[1]
        assert torch.equal(written[name], right), name
    assert "vae" not in result.changes
    assert result.shares["unet"] == (0.25, 0.75)
    with pytest.raises(InputError, match="does not have") as error:
        average(files(tmp_path, A, B), out, None, {"transformer": (1, 0)})
    assert "model_ema, text_encoder, unet, vae" in str(error.value)


@pytest.mark.slow
def test_equal_checkpoints_keep_their_bits(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    a, b, c = files(tmp_path, A, A, checkpoint(1, torch.float16))
    result = average([a, b], out, (0.3, 0.7))
    assert all(torch.equal(load_file(out)[name], tensor) for name, tensor in A.items())
    assert result.changes == {}
    average([c, c, c], out)
    assert all(torch.equal(tensor, load_file(c)[k]) for k, tensor in load_file(out).items())


@pytest.mark.slow
def test_any_layout_and_form(tmp_path: Path) -> None:
    a, b = files(tmp_path, A, B)
    other, out = tmp_path / "other.safetensors", tmp_path / "out.safetensors"
    convert(b, other, "diffusers", family="sd1")
    average([a, other], out)
    right = tmp_path / "right.safetensors"
    average([a, b], right)
    one, two = load_file(out), load_file(right)
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    # a folder becomes a folder
    folder, averaged = tmp_path / "folder", tmp_path / "averaged"
    convert(a, folder, "diffusers", family="sd1")
    put(folder / "text_encoder" / "pytorch_model.bin", **{LAYER: A[TEXT + LAYER]})
    (folder / "model_index.json").write_text(
        json.dumps({name: ["diffusers", "X"] for name in ("unet", "vae", "text_encoder")})
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "unet" / "flax_model.msgpack").write_bytes(b"of before")
    with pytest.raises(WeightsMismatchError, match="do not fit"):
        average([folder, b], averaged)
    twin = tmp_path / "twin"
    convert(b, twin, "diffusers", family="sd1")
    put(twin / "text_encoder" / "model.safetensors", **{LAYER: B[TEXT + LAYER]})
    result = average([folder, twin], averaged, (0.5, 0.5))
    kept = {path.relative_to(averaged).as_posix() for path in averaged.rglob("*") if path.is_file()}
    assert kept == {
        "model_index.json",
        "tokenizer/vocab.json",
        "text_encoder/model.safetensors",
        *(f"{name}/config.json" for name in ("unet", "vae")),
        *(f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")),
    }
    assert len(result.files) == 3
    for component in ("unet", "vae"):
        got = sdconv.load(averaged, component).state_dict()
        wanted = sdconv.load(right, component, family="sd1").state_dict()
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    text = load_file(averaged / "text_encoder" / "model.safetensors")
    assert torch.equal(text[LAYER], load_file(right)[TEXT + LAYER])
    # or a single file in diffusers' layout
    average([folder, twin], out, (0.5, 0.5))
    single = load_file(out)
    assert torch.equal(single[f"text_encoder.{LAYER}"], text[LAYER])
    assert sdconv.load(out, "vae").config == sdconv.load(folder, "vae").config


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    out, name = tmp_path / "out.safetensors", TEXT + LAYER
    changed = {k: v for k, v in B.items() if k != name} | {"more.weight": torch.ones(2)}
    changed[TEXT + TOKENS] = torch.ones(10, 8)
    with pytest.raises(WeightsMismatchError) as error:
        average(files(tmp_path, A, changed), out)
    assert f"1 only in the first: {name}" in str(error.value)
    assert "1 only in the other: more.weight" in str(error.value)
    assert f"1 of another shape: {TEXT}{TOKENS} (9, 8) and (10, 8)" in str(error.value)
    # integers and the schedule are the first's, and need not be in the others
    without = {k: v for k, v in B.items() if k not in (TEXT + POSITIONS, "betas")}
    average(files(tmp_path, A, without), out)
    assert torch.equal(load_file(out)["betas"], A["betas"])


def test_wrong_shares_and_overflow_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    a, b = files(tmp_path, checkpoint(1, torch.float16), B)
    for shares in ((0.5, 0.6), (1.0,), (0.5, 0.25, 0.25), (float("nan"), 1.0)):
        with pytest.raises(InputError, match="1 in all"):
            average([a, b], out, shares)
    with pytest.raises(InputError, match="takes several"):
        average([a], out)
    with pytest.raises(CheckpointError, match="infinite in float16"):
        average([a, b], out, (-1e6, 1e6 + 1))
    with pytest.raises(InputError, match="a file is written again as a file"):
        average([a, b], tmp_path / "folder")
    assert not out.exists()


def test_scaled_fp8_is_multiplied(tmp_path: Path) -> None:
    name = f"{VAE}decoder.conv_in.weight"
    small = (A[name] * 100).to(torch.float8_e4m3fn)
    scaled = A | {name: small, f"{VAE}decoder.conv_in.scale_weight": torch.tensor(0.01)}
    out = tmp_path / "out.safetensors"
    result = average(files(tmp_path, scaled, B), out)
    assert result.dequantised == 1
    written = load_file(out)
    assert f"{VAE}decoder.conv_in.scale_weight" not in written
    right = small.float() * torch.tensor(0.01) * 0.5 + B[name] * 0.5
    assert torch.equal(written[name], right)


@pytest.mark.slow
@pytest.mark.parametrize("width", [768, 1024])
def test_text_encoders_in_other_layouts(width: int, tmp_path: Path) -> None:
    """A folder and an original file, which has OpenCLIP's layout for SD2."""
    folders, singles = [], []
    config = {**unets.smallest("SD1"), "cross_attention_dim": width}
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    for seed in (1, 2):
        folder, single = tmp_path / f"folder{seed}", tmp_path / f"{seed}.safetensors"
        sdconv.save(sdconv.load(seeded.tensors(KL, seed), family="sd1"), folder / "vae")
        sdconv.save(sdconv.load(seeded.weights(shapes, seed), family="sd1"), folder / "unet")
        put(folder / "text_encoder" / "model.safetensors", **clip.text_encoder("", seed))
        listed = {name: ["diffusers", "X"] for name in ("unet", "vae", "text_encoder")}
        (folder / "model_index.json").write_text(json.dumps(listed))
        convert(folder, single, "original", family="sd1" if width == 768 else "sd2")
        folders.append(folder)
        singles.append(single)
    out, right = tmp_path / "out.safetensors", tmp_path / "right.safetensors"
    average(singles, right, (0.25, 0.75))
    wanted = load_file(right)
    assert any(name.endswith("in_proj_weight") for name in wanted) == (width == 1024)
    result = average([singles[0], folders[1]], out, (0.25, 0.75))
    assert result.averaged["text_encoder"] > 10
    found = load_file(out)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    # the other way round, a folder is written
    average([folders[0], singles[1]], tmp_path / "mixed", (0.25, 0.75))
    average(folders, tmp_path / "pure", (0.25, 0.75))
    one, two = (
        load_file(tmp_path / name / "text_encoder" / "model.safetensors")
        for name in ("mixed", "pure")
    )
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
    # the control: they differ, and another shape is refused
    assert not torch.equal(two[LAYER], clip.text_encoder("", 1)[LAYER])
    put(folders[1] / "text_encoder" / "model.safetensors", **clip.text_encoder("", 2, 16))
    with pytest.raises(WeightsMismatchError, match="do not fit"):
        average([singles[0], folders[1]], out)


@pytest.mark.parametrize("mark", ["v_pred", "ztsnr", "edm_vpred.sigma_max"])
def test_marks_of_only_one_are_said(mark: str, tmp_path: Path) -> None:
    marked, plain = tmp_path / "v.safetensors", tmp_path / "eps.safetensors"
    state = {mark: torch.tensor(120.0), "iteration": torch.tensor(1)}
    put(marked, **seeded.tensors(KL, 0), **state)
    put(plain, **seeded.tensors(KL, 1))
    out = tmp_path / "out.safetensors"
    for paths, has in (([marked, plain], True), ([plain, marked], False)):
        with pytest.warns(sdconv.SdconvWarning, match=f"marked {mark}, .*eps.safetensors is not"):
            average(paths, out)
        assert (mark in load_file(out)) == has
    average([marked, marked], out)  # the control: no warning


def test_vaes_of_other_scales_are_said(tmp_path: Path) -> None:
    paths = []
    for seed, family in enumerate(("sd1", "sdxl", "sd2")):
        paths.append(tmp_path / f"{family}.safetensors")
        sdconv.save(sdconv.load(seeded.tensors(KL, seed), family=family), paths[-1])
    out = tmp_path / "out.safetensors"
    with pytest.warns(sdconv.SdconvWarning, match=r"0\.18215, .*0\.13025"):
        average(paths[:2], out)
    assert sdconv.load(out).config.scaling_factor == 0.18215
    average(paths[::2], out)  # the control: no warning
