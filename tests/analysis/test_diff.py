"""The difference of two checkpoints in any layout and dtype, checked against numbers computed in
another way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import pipelines, seeded, unets
from helpers.commands import run
from helpers.weight_files import convert
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdconv.analysis.diff import block_of, compare
from sdconv.errors import CheckpointError, SdconvError

VAE = seeded.kl((32, 64), 4, True, layers_per_block=1)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model in every form: diffusers' folder, files in both layouts, and a wider dtype."""
    root = tmp_path_factory.mktemp("forms")
    pipelines.pipeline("xl").to(torch.float16).save_pretrained(root / "folder")
    made = {"folder": root / "folder"}
    for layout in ("original", "diffusers"):
        made[layout] = root / f"{layout}.safetensors"
    convert(made["folder"], made["original"], "original")
    convert(made["original"], made["diffusers"], "diffusers")
    made["wide"] = root / "wide.safetensors"
    convert(made["folder"], made["wide"], "original", dtype=torch.float32)
    return made


@pytest.mark.parametrize("form", ["original", "diffusers", "wide"])
def test_layout_and_dtype_do_not_matter(form: str, forms: dict[str, Path]) -> None:
    result = compare(forms["folder"], forms[form])
    assert result.equal
    assert (result.only_first, result.only_second, result.whole.changed) == ((), (), 0)
    # of the text encoders one is in OpenCLIP's layout: as many tensors in the file as here
    assert len(result.whole.tensors) == len(load_file(forms["original"]))
    dtypes = {tensor.dtypes for tensor in result.whole.tensors}
    assert dtypes == {("F16", "F32" if form == "wide" else "F16")}
    assert result.whole.norm > 10
    assert run("diff", forms["folder"], forms[form]).exit_code == 0


def test_norms_and_distances(forms: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(forms["folder"], tmp_path / "tuned")
    path = tmp_path / "tuned" / "unet" / "diffusion_pytorch_model.safetensors"
    before, after = load_file(path), load_file(path)
    torch.manual_seed(0)
    touched = [name for name in after if name.startswith("down_blocks.1.")][::3]
    for name in touched:
        after[name] = after[name] + 0.1 * torch.randn(after[name].shape).half()
    save_file(after, path)
    result = compare(forms["original"], tmp_path / "tuned")
    assert not result.equal
    blocks = {block.name: block for block in result.blocks}
    own = [name for name in before if name.startswith("down_blocks.1.")]
    a, b = (torch.cat([one[k].flatten().double() for k in own]) for one in (before, after))
    block = blocks["unet.down_blocks.1"]
    assert block.norm == pytest.approx(float(a.norm()), rel=1e-12)
    assert block.distance == pytest.approx(float((b - a).norm()), rel=1e-12)
    assert block.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert block.max_abs == float((b - a).abs().max())
    assert (len(block.tensors), block.changed) == (len(own), len(touched))
    assert all(one.changed == 0 and one.relative == 0 for one in result.blocks if one != block)
    assert result.whole.distance == pytest.approx(block.distance)
    assert result.whole.norm > 2 * block.norm


def test_blocks_are_in_the_order_of_the_data(forms: dict[str, Path]) -> None:
    names = [block.name for block in compare(forms["folder"], forms["folder"]).blocks]
    assert names[:13] == [
        "unet.conv_in",
        "unet.time_embedding",
        "unet.add_embedding",
        *(f"unet.down_blocks.{level}" for level in range(3)),
        "unet.mid_block",
        *(f"unet.up_blocks.{level}" for level in range(3)),
        "unet.conv_norm_out",
        "unet.conv_out",
        "vae.encoder.conv_in",
    ]
    assert names.index("vae.encoder.conv_out") < names.index("vae.post_quant_conv")
    assert names.index("vae.post_quant_conv") < names.index("vae.decoder.up_blocks.0")


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight", "unet.mid_block"),
        ("unet.up_blocks.10.resnets.0.norm1.bias", "unet.up_blocks.10"),
        ("vae.decoder.layers.3.conv.0.weight", "vae.decoder.layers.3"),
        ("vae.quant_conv.bias", "vae.quant_conv"),
        ("model.diffusion_model.joint_blocks.7.x.weight", "model.diffusion_model.joint_blocks.7"),
        ("conditioner.embedders.1.model.ln_final.bias", "conditioner.embedders.1"),
        ("cond_stage_model.model.text_projection", "cond_stage_model"),
        ("betas", "(no prefix)"),
    ],
)
def test_block_of_a_tensor(name: str, block: str) -> None:
    assert block_of(name) == block


def test_networks_of_different_kinds_are_listed(tmp_path: Path) -> None:
    vae, unet = seeded.tensors(VAE), unets.theirs(unets.smallest("SD1")).state_dict()
    result = compare(vae, unet)
    assert result.blocks == ()
    assert (len(result.only_first), len(result.only_second)) == (len(vae), len(unet))
    assert not result.equal
    save_file(vae, tmp_path / "vae.safetensors")
    save_file(unet, tmp_path / "unet.safetensors")
    shown = run("diff", tmp_path / "vae.safetensors", tmp_path / "unet.safetensors")
    assert shown.exit_code == 1
    assert "unet.mid_block (" in shown.stdout
    assert "vae.encoder.down_blocks.0 (" in shown.stdout


def test_families_of_other_shapes_are_listed() -> None:
    first, second = (
        unets.theirs(unets.smallest(family)).state_dict() for family in ("SD1", "SDXL")
    )
    result = compare(first, second)
    assert "unet.conv_in.weight" in {tensor.name for tensor in result.whole.tensors}
    assert any(name.startswith("unet.down_blocks.3.") for name in result.only_first)
    assert any(name.startswith("unet.add_embedding.") for name in result.only_second)
    for name, shapes in result.misshapen.items():
        key = name.removeprefix("unet.")
        assert shapes == (tuple(first[key].shape), tuple(second[key].shape))
    assert "unet.up_blocks.2.resnets.1.time_emb_proj.weight" in result.misshapen


def test_nan_infinity_and_empty_tensors() -> None:
    nan, inf = torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf, -torch.inf])
    one = {"nan.a": nan, "inf.a": inf, "zero.a": torch.zeros(2), "empty.a": torch.ones(0, 3)}
    assert compare(one, {name: tensor.clone() for name, tensor in one.items()}).equal
    other = {
        "nan.a": nan + 1,
        "inf.a": -inf,
        "zero.a": torch.tensor([0, 3.0]),
        "empty.a": one["empty.a"],
    }
    blocks = {block.name: block for block in compare(one, other).blocks}
    assert blocks["zero"].relative == math.inf
    assert blocks["inf"].max_abs == math.inf
    assert (blocks["nan"].changed, blocks["nan"].max_abs) == (1, 1.0)
    assert blocks["empty"].changed == 0
    lost = compare({"a.a": torch.ones(2)}, {"a.a": nan})
    assert not lost.equal
    assert math.isnan(lost.blocks[0].max_abs)


def test_every_kind_of_dtype() -> None:
    one = {
        "bool": torch.tensor([True, False]),
        "int": torch.tensor([2**40, 1]),
        "complex": torch.tensor([1 + 2j]),
        "fp8": torch.tensor([0.5, 2.0]).to(torch.float8_e5m2),
    }
    wide = {k: v if v.is_complex() else v.to(torch.float64) for k, v in one.items()}
    assert compare(one, wide).equal
    changed = dict(one, complex=torch.tensor([1 + 3j]), int=torch.tensor([2**40 + 1, 1]))
    result = compare(one, changed)
    assert {tensor.name: tensor.max_abs for tensor in result.whole.tensors if tensor.changed} == {
        "complex": 1.0,
        "int": 1.0,
    }


def test_a_difference_in_the_last_value_of_a_long_tensor() -> None:
    one = torch.zeros(9_000_001, dtype=torch.float16)
    other = one.clone()
    other[-1] = 1
    assert compare({"a": one}, {"a": other}).whole.max_abs == 1.0


TENSORS = st.dictionaries(
    st.sampled_from(["a", "b.c", "layers.0.w", "vae.x"]),
    st.lists(st.sampled_from([0.0, 1.0, -2.0]), min_size=1, max_size=3).map(torch.tensor),
    min_size=1,
)


@given(first=TENSORS, second=TENSORS)
def test_equal_exactly_if_everything_is_the_same(
    first: dict[str, Tensor], second: dict[str, Tensor]
) -> None:
    result, turned = compare(first, second), compare(second, first)
    same = set(first) == set(second) and all(torch.equal(first[k], second[k]) for k in first)
    assert result.equal == turned.equal == same
    assert set(result.only_first) == set(turned.only_second) == set(first) - set(second)
    assert result.whole.distance == turned.whole.distance
    assert len(result.whole.tensors) + len(result.misshapen) == len(set(first) & set(second))


def test_a_dtype_that_torch_lacks(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}
    text = json.dumps(header).encode()
    path = tmp_path / "f4.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"xx")
    result = compare(path, path)
    assert result.unread == {"a": ("F4", "F4")}
    assert not result.equal
    assert "not read" in run("diff", path, path).stdout


def test_two_networks_of_one_kind() -> None:
    vae = seeded.tensors(VAE)
    both = {f"{prefix}.{name}": t for prefix in ("one", "two") for name, t in vae.items()}
    assert compare(both, both).equal
    taken = {f"first_stage_model.{k}": t for k, t in vae.items()} | {"vae.conv.x": torch.ones(1)}
    assert compare(taken, taken).equal
    taken["vae.quant_conv.bias"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"compared as vae\.quant_conv\.bias"):
        compare(taken, taken)


def test_an_argument_that_is_not_a_path() -> None:
    with pytest.raises(SdconvError):
        compare(3, 4)  # type: ignore[arg-type]
