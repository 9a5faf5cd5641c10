"""Scaled fp8: what is loaded and converted is the weight times its scale, or it is refused."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clip, seeded, unets
from helpers.slow import first_of
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.analysis.inspection import inspect
from sdconv.checkpoint.average import average
from sdconv.checkpoint.io.dequantise import block_size, spread_scale
from sdconv.checkpoint.save import original_tensors
from sdconv.lora.bake import bake_lora
from sdconv.lora.extract import extract_lora

PREFIX = "first_stage_model."
CONFIG = seeded.SMALL_KL
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
State = dict[str, Tensor]


def scale_of(weight: Tensor) -> Tensor:
    """One number for the whole weight, far from 1."""
    return (weight.abs().max() / 3000).reshape(())


def rows_of(weight: Tensor) -> Tensor:
    return weight.flatten(1).abs().amax(1) / 200 + 1e-6


def columns_of(weight: Tensor) -> Tensor:
    """A number for each row, with an axis for each of the weight's."""
    return rows_of(weight).reshape(-1, *(1,) * (weight.ndim - 1))


def blocks_of(weight: Tensor, size: int = 16) -> Tensor:
    """A number for each block of 16 rows and 16 columns."""
    counts = [-(-n // size) for n in weight.shape[:2]]
    return 0.01 + torch.arange(counts[0] * counts[1]).reshape(counts).float() / 100


def spread(scale: Tensor, weight: Tensor, size: int = 16) -> Tensor:
    """The scale of every value, written out; independent of the code under test."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            result[row, column] = scale[row // size, column // size]
    return result


def quantised(
    leaf: str,
    scale: Callable[[Tensor], Tensor],
    dtype: torch.dtype = E4M3,
    prefix: str = PREFIX,
) -> tuple[State, State]:
    """A VAE file whose convolutions are scaled fp8, and the right state dict."""
    config, right = CONFIG, {}
    tensors = seeded.tensors(config)
    file: State = {}
    for name, tensor in tensors.items():
        (stored,) = original_tensors({name: tensor}, config)
        if tensor.ndim < 2:
            file[prefix + stored], right[name] = tensor, tensor
            continue
        (weight,) = original_tensors({name: tensor}, config).values()
        number = scale(weight)
        whole = (
            spread(number, weight)
            if scale is blocks_of
            else number.reshape((-1, *(1,) * (weight.ndim - 1)) if number.numel() > 1 else ())
        )
        small = (weight / whole).clamp(-400, 400).to(dtype)
        file[prefix + stored] = small
        file[prefix + stored.removesuffix("weight") + leaf] = number
        right[name] = (small.float() * whole).reshape(tensor.shape)
    return file, right


CASES = [
    pytest.param("scale_weight", scale_of, E4M3, id="scale_weight"),
    pytest.param("scale_weight", scale_of, E5M2, id="e5m2"),
    pytest.param("scale_weight", lambda w: scale_of(w).reshape(1), E4M3, id="one element"),
    pytest.param("weight_scale", scale_of, E4M3, id="weight_scale"),
    pytest.param("weight_scale", rows_of, E4M3, id="a number for each row"),
    pytest.param("weight_scale", columns_of, E4M3, id="with the weight's axes"),
    pytest.param("weight_scale_inv", blocks_of, E4M3, id="blocks"),
    pytest.param("weight_scale_inv", scale_of, E4M3, id="one inverse scale"),
]


def same(network: torch.nn.Module, right: State) -> bool:
    state = network.state_dict()
    return set(state) == set(right) and all(torch.equal(state[k], right[k]) for k in right)


@pytest.mark.parametrize(("leaf", "scale", "dtype"), CASES)
@pytest.mark.parametrize("marked", [False, True])
def test_load_multiplies(
    leaf: str, scale: Callable[[Tensor], Tensor], dtype: torch.dtype, marked: bool, tmp_path: Path
) -> None:
    file, right = quantised(leaf, scale, dtype)
    if marked:
        file[f"{PREFIX}scaled_fp8"] = torch.empty(0, dtype=dtype)
        file[f"{PREFIX}encoder.conv_in.scale_input"] = torch.tensor(2.0)
        file[f"{PREFIX}encoder.conv_out.input_scale"] = torch.tensor(2.0)
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "vae.safetensors")
    for source in (file, tmp_path / "vae.safetensors"):
        network = sdconv.load(source, family="sd1")
        assert network.dtype == torch.float32
        assert same(network, right)
    # the control: the stored numbers alone are far from it
    name = "decoder.conv_in.weight"
    raw = file[f"{PREFIX}{name}"].float()
    assert (raw - right[name]).abs().max() > 10 * right[name].abs().max()


@pytest.mark.parametrize(("leaf", "scale", "dtype"), CASES)
@pytest.mark.parametrize("layout", first_of(["original", "diffusers"]))
def test_convert_multiplies(
    leaf: str, scale: Callable[[Tensor], Tensor], dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    file, right = quantised(leaf, scale, dtype)
    file[f"{PREFIX}scaled_fp8"] = torch.empty(0, dtype=dtype)
    path, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({k: v.contiguous() for k, v in file.items()}, path)
    result = convert(path, out, layout, family="sd1")
    assert result.dequantised == sum(leaf in name for name in file)
    assert not any(leaf in name or "scaled_fp8" in name for name in load_file(out))
    assert same(sdconv.load(out), right)
    half = convert(path, tmp_path / "half", "diffusers", family="sd1", dtype=torch.float16)
    assert half.dtypes == ("float16",)
    assert same(sdconv.load(tmp_path / "half"), {k: v.half() for k, v in right.items()})


def test_a_unet_too(tmp_path: Path) -> None:
    network = unets.on_meta(unets.smallest("SD1"))
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    drawn = seeded.weights(shapes, 3)
    file = original_tensors(drawn, network.config)
    named = dict(zip(file, drawn, strict=True))
    right = dict(drawn)
    for name in [n for n in file if n.endswith("attn2.to_k.weight")]:
        file[name], scale = (file[name] * 50).to(E4M3), torch.tensor(0.02)
        file[name.removesuffix("weight") + "scale_weight"] = scale
        right[named[name]] = file[name].float() * scale
    file |= {"scaled_fp8": torch.empty(0, dtype=E4M3)}
    for prefix in ("", "model.diffusion_model."):
        loaded = sdconv.load({prefix + k: v for k, v in file.items()}, family="sd1")
        assert same(loaded, right)


def described(said: object) -> Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def test_comfy_quant_names_the_format() -> None:
    file, right = quantised("weight_scale", scale_of)
    layer = f"{PREFIX}encoder.conv_in."
    file[f"{layer}comfy_quant"] = described({"format": "float8_e4m3fn"})
    assert same(sdconv.load(file, family="sd1"), right)
    for said in ({"format": "nvfp4"}, {"format": "int8_tensorwise"}, ["x"], {}):
        file[f"{layer}comfy_quant"] = described(said)
        with pytest.raises(sdconv.WeightsMismatchError, match=r"quantised \(ComfyUI's format"):
            sdconv.load(file, family="sd1")


def changed(change: Callable[[State], Any]) -> State:
    file, _ = quantised("scale_weight", scale_of)
    change(file)
    return file


ONE = f"{PREFIX}encoder.conv_in."


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.update({f"{ONE}weight_scale": torch.tensor(1.0)}), "has two scales"),
        (lambda f: f.update({f"{ONE}scale_weight": torch.ones(7)}), "scale that does not fit it"),
        (lambda f: f.update({f"{ONE}scale_weight": torch.ones(0)}), "scale that does not fit it"),
        (lambda f: f.update({f"{ONE}weight": f[f"{ONE}weight"].half()}), "is F16, but has a scale"),
        (
            lambda f: f.update({f"{ONE}weight": f[f"{ONE}weight"].float().to(torch.int8)}),
            r"quantised \(int8\)",
        ),
        (
            lambda f: f.update({f"{ONE}scale_weight": torch.ones((), dtype=torch.uint8)}),
            r"quantised \(scales in U8\)",
        ),
        (lambda f: f.update({f"{ONE}SCB": torch.ones(32)}), "bitsandbytes int8"),
        (lambda f: f.update({f"{ONE}weight.absmax": torch.ones(32)}), "bitsandbytes NF4"),
        (lambda f: f.update({f"{ONE}weight_scale_2": torch.ones(())}), "NVFP4"),
        (lambda f: f.update({f"{ONE}qweight": torch.ones(3)}), "GPTQ"),
    ],
)
def test_what_is_refused(change: Callable[[State], Any], words: str, tmp_path: Path) -> None:
    file = changed(change)
    path = tmp_path / "vae.safetensors"
    save_file({k: v.contiguous() for k, v in file.items()}, path)
    with pytest.raises(sdconv.WeightsMismatchError, match=words) as caught:
        sdconv.load(path, family="sd1")
    assert "hint: get the weights in float16" in str(caught.value)
    with pytest.raises(sdconv.WeightsMismatchError, match=words):
        convert(path, tmp_path / "out", "diffusers", family="sd1")
    assert not (tmp_path / "out").exists()
    assert words.replace("\\", "") in (inspect(path, family="sd1").complaint or "")


def test_a_marker_whose_scales_are_gone() -> None:
    file, _ = quantised("scale_weight", scale_of)
    file = {k: v for k, v in file.items() if not k.endswith("scale_weight")}
    # without the marker these are plain fp8 weights
    sdconv.load(file, family="sd1")
    file[f"{PREFIX}scaled_fp8"] = torch.empty(0, dtype=E4M3)
    with pytest.raises(sdconv.WeightsMismatchError, match=r"scaled fp8(?s:.*)has a scale"):
        sdconv.load(file, family="sd1")


def test_one_weight_without_a_scale_is_said() -> None:
    file, right = quantised("scale_weight", scale_of)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sdconv.load(file, family="sd1")  # the control
    del file[f"{ONE}scale_weight"]
    with pytest.warns(sdconv.SdconvWarning, match=r"1 fp8 weights.*encoder\.conv_in\.weight"):
        network = sdconv.load(file, family="sd1")
    name = "encoder.conv_in.weight"
    assert same(network, {**right, name: file[PREFIX + name].float()})


def test_plain_fp8_is_what_it_was() -> None:
    state = {k: v.to(E4M3) if v.ndim > 1 else v for k, v in seeded.tensors(CONFIG).items()}
    assert same(sdconv.load(state, family="sd1"), {k: v.float() for k, v in state.items()})


def test_another_component_is_not_in_the_way() -> None:
    """A VAE loads from a file whose other network is quantised."""
    state = {PREFIX + k: v for k, v in seeded.tensors(CONFIG).items()}
    unet = unets.on_meta(unets.smallest("SD1")).state_dict()
    state |= {f"unet.{k}": torch.zeros(v.shape) for k, v in unet.items()}
    state["unet.conv_in.SCB"] = torch.ones(3)
    assert same(sdconv.load(state, "vae", family="sd1"), seeded.tensors(CONFIG))
    with pytest.raises(sdconv.WeightsMismatchError, match="unet is quantised"):
        sdconv.load(state, "unet")


def test_convert_never_drops_what_is_under_the_prefix(tmp_path: Path) -> None:
    state = {PREFIX + k: v for k, v in seeded.tensors(CONFIG).items()}
    state[f"{PREFIX}encoder.extra.weight"] = torch.ones(3)
    for out, component in (("folder", None), ("one.safetensors", "vae")):
        with pytest.raises(sdconv.WeightsMismatchError, match="would be lost"):
            convert(state, tmp_path / out, "diffusers", component, family="sd1")
        assert not (tmp_path / out).exists()
    convert(state, tmp_path / "all.safetensors", "diffusers", family="sd1")
    assert f"{PREFIX}encoder.extra.weight" in load_file(tmp_path / "all.safetensors")


@pytest.mark.parametrize(
    ("length", "count", "size"),
    [
        (320, 3, 128),
        (64, 4, 16),
        (192, 2, 128),
        (96, 2, 64),
        (100, 4, 32),
        (90, 9, 10),
        (9, 8, None),
    ],
)
def test_blocks(length: int, count: int, size: int | None) -> None:
    assert block_size(length, count) == size


def test_a_scale_for_rows_is_not_one_for_columns() -> None:
    weight = torch.ones(3, 5)
    rows = spread_scale(torch.tensor([1.0, 2.0, 3.0]), (3, 5))
    assert rows is not None
    assert (weight * rows)[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert spread_scale(torch.ones(4), (3, 5)) is None


LINEAR = "encoder.mid_block.attentions.0.to_q."


def linear(scale: Tensor, leaf: str = "scale_weight", **more: Tensor) -> tuple[State, Tensor]:
    """A VAE with one scaled fp8 linear layer, and what that layer holds in the file."""
    state = dict(seeded.tensors(seeded.SMALL_KL))
    small = (state[f"{LINEAR}weight"] * 50).to(E4M3)
    added = {LINEAR + name: tensor for name, tensor in {leaf: scale, **more}.items()}
    return state | {f"{LINEAR}weight": small} | added, small.float()


@pytest.mark.parametrize("shape", [(64, 2, 1), (64, 1, 1), (64, 1), (1, 64), (4, 2), (2, 1)])
def test_shapes_of_scales(shape: tuple[int, ...]) -> None:
    """Also musubi-tuner's, one for each row and block of columns with an axis more."""
    scale = 0.01 + torch.arange(math.prod(shape)).reshape(shape) / 1000
    state, small = linear(scale)
    grid = scale.reshape(shape[:2])
    right = torch.empty(64, 64)
    for row, column in itertools.product(range(64), range(64)):
        right[row, column] = grid[row * shape[0] // 64, column * shape[1] // 64]
    loaded = sdconv.load(state, family="sd1").state_dict()[f"{LINEAR}weight"]
    assert torch.equal(loaded, small * right)


@pytest.mark.parametrize("leaf", ["scale", "weight.scale", "weight_zero_point", "weight_qdata"])
def test_names_that_are_not_known_are_refused_as_such(leaf: str, tmp_path: Path) -> None:
    state, _ = linear(torch.tensor(0.02), leaf)
    path = tmp_path / "vae.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    for call in (
        lambda: sdconv.load(path, family="sd1"),
        lambda: convert(path, tmp_path / "o.safetensors", "original", family="sd1"),
    ):
        with pytest.raises(sdconv.WeightsMismatchError, match=r"quantised \(scaled fp8") as caught:
            call()
        assert f"{LINEAR}{leaf}" in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


def test_scales_of_inputs_and_outputs_do_not_matter() -> None:
    plain, small = linear(torch.tensor(0.02))
    extra = {name: torch.tensor(3.0) for name in ("activation_scale", "output_scale")}
    for state in (plain, linear(torch.tensor(0.02), **extra)[0]):
        loaded = sdconv.load(state, family="sd1").state_dict()[f"{LINEAR}weight"]
        assert torch.equal(loaded, small * torch.tensor(0.02))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_scale_is_a_number(value: float) -> None:
    with pytest.raises(sdconv.WeightsMismatchError, match="scaled fp8 weight is not finite"):
        sdconv.load(linear(torch.tensor(value))[0], family="sd1")


def test_a_product_beyond_float32_is_refused(tmp_path: Path) -> None:
    state, _ = linear(torch.tensor(3e38))
    out = tmp_path / "o.safetensors"
    for call in (
        lambda: sdconv.load(state, family="sd1"),
        lambda: convert(state, out, "original", family="sd1"),
    ):
        with pytest.raises(sdconv.WeightsMismatchError, match="times its scale is infinite"):
            call()
    assert not out.exists()


def test_a_scale_of_columns_without_an_axis_is_not_taken_for_one_of_rows() -> None:
    with pytest.raises(sdconv.WeightsMismatchError, match="does not fit it"):
        sdconv.load(linear(torch.ones(32))[0], family="sd1")


def test_formats_in_comfyuis_metadata(tmp_path: Path) -> None:
    key, path, out = "_quantization_metadata", tmp_path / "vae.safetensors", tmp_path / "o"
    state, small = linear(torch.tensor(0.02), "weight_scale")
    layer = LINEAR.removesuffix(".")
    for said, fine in (("float8_e4m3fn", True), ("nvfp4", False)):
        layers = {layer: {"format": said}, "another": {"format": "nvfp4"}}
        save_file(state, path, {key: json.dumps({"format_version": "1.0", "layers": layers})})
        if not fine:
            with pytest.raises(sdconv.WeightsMismatchError, match="ComfyUI's format 'nvfp4'"):
                sdconv.load(path, family="sd1")
            continue
        loaded = sdconv.load(path, family="sd1").state_dict()[f"{LINEAR}weight"]
        assert torch.equal(loaded, small * torch.tensor(0.02))
        convert(path, tmp_path / "o.safetensors", "diffusers", family="sd1")
        # what is written is not quantised any more
        kept = json.loads(sdconv.read_header(tmp_path / "o.safetensors").metadata[key])
        assert set(kept["layers"]) == {"another"}
    assert not out.exists()


Q = f"{clip.PREFIX}{clip.LAYER}."
OTHER = "model.diffusion_model.double_blocks.0.img_attn.qkv."


def with_text(seed: int, scale: float, other: bool = False) -> tuple[State, State]:
    """A VAE with a text encoder, or with a network that sdconv does not know, whose one layer is
    scaled fp8; and the same in float32."""
    vae = {PREFIX + k: v for k, v in seeded.tensors(CONFIG, seed).items()}
    text = clip.text_encoder(seed=seed)
    right = vae | ({f"{OTHER}weight": text[f"{Q}weight"]} if other else text)
    layer = OTHER if other else Q
    small, number = (right[f"{layer}weight"] / scale).to(E4M3), torch.tensor(scale)
    right[f"{layer}weight"] = small.float() * number
    return right | {f"{layer}weight": small, f"{layer}scale_weight": number}, right


def stored(folder: Path, *states: State) -> list[Path]:
    paths = [folder / f"{number}.safetensors" for number in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    return paths


def test_a_scaled_text_encoder_is_merged_into_and_extracted_from(tmp_path: Path) -> None:
    (small, right), (tuned, tuned_right) = with_text(1, 0.01), with_text(2, 0.02)
    stem = f"lora_te_{clip.LAYER.replace('.', '_')}"
    lora = {
        f"{stem}.lora_down.weight": torch.ones(1, 32),
        f"{stem}.lora_up.weight": torch.ones(32, 1),
    }
    paths = stored(tmp_path, small, right, tuned, tuned_right, lora)
    results = []
    for path in paths[:2]:
        results.append(bake_lora(path, paths[4], tmp_path / "out.safetensors"))
        written = load_file(tmp_path / "out.safetensors")
        assert torch.equal(written[f"{Q}weight"], right[f"{Q}weight"] + 1)
        assert f"{Q}scale_weight" not in written
    assert [one.dequantised for one in results] == [1, 0]
    outs = [tmp_path / "l0.safetensors", tmp_path / "l1.safetensors"]
    extract_lora(paths[0], paths[2], outs[0], 2)
    extract_lora(paths[1], paths[3], outs[1], 2)
    one, two = map(load_file, outs)
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("other", [False, True])
def test_scaled_weights_outside_of_the_networks_are_averaged(other: bool, tmp_path: Path) -> None:
    (a, a_right), (b, b_right) = with_text(1, 0.01, other), with_text(2, 0.02, other)
    outs = [tmp_path / "s.safetensors", tmp_path / "r.safetensors"]
    marker = {f"{OTHER.partition('double')[0] if other else clip.PREFIX}scaled_fp8": torch.empty(0)}
    paths = stored(tmp_path, a | marker, b | marker, a_right, b_right)
    assert average(paths[:2], outs[0]).dequantised == 1
    average(paths[2:], outs[1])
    one, two = map(load_file, outs)
    assert set(one) == set(two) and all(torch.equal(one[k], two[k]) for k in one)


def test_other_quantisation_outside_of_the_networks_is_not_averaged(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        _, right = with_text(seed, 0.01, other=True)
        right[f"{OTHER}weight"] = right[f"{OTHER}weight"].to(torch.uint8)
        states.append(right | {f"{OTHER}weight.absmax": torch.ones(4) * seed})
    with pytest.raises(sdconv.WeightsMismatchError, match="model is quantised"):
        average(stored(tmp_path, *states), tmp_path / "out.safetensors")


def test_plain_fp8_is_averaged_in_its_own_dtype(tmp_path: Path) -> None:
    states = []
    for seed in (1, 2):
        drawn = seeded.tensors(CONFIG, seed)
        states.append({k: v.to(E4M3) if v.ndim > 1 else v for k, v in drawn.items()})
    out = tmp_path / "out.safetensors"
    average(stored(tmp_path, *states), out)
    name = "decoder.conv_in.weight"
    right = (states[0][name].float() * 0.5 + states[1][name].float() * 0.5).to(E4M3)
    assert torch.equal(load_file(out)[name].float(), right.float())
    states[1][name] = torch.full_like(states[1][name].float(), 448).to(E4M3)
    with pytest.raises(sdconv.CheckpointError, match="out of range in float8_e4m3fn") as caught:
        average(stored(tmp_path, *states), out, (-2, 3))
    assert "clamp" not in str(caught.value)
