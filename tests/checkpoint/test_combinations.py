"""Files as people have them, in all combinations: there and back bit for bit, every value right."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert, raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.analysis.diff import compare
from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical
from sdconv.checkpoint.save import original_tensors

KL = seeded.kl((32,), 4, True, layers_per_block=1)
State = dict[str, Tensor]
# by the original's names of an attention's layers
SPELLINGS: dict[str, dict[str, str]] = {
    "the original's": {},
    "diffusers' now": {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    "diffusers' before": {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
}
EXTRAS: State = {
    "v_pred": torch.empty(0),
    "iteration": torch.tensor(7),
    "edm_vpred.sigma_max": torch.tensor(120.0),
    "cond_stage_model.logit_scale": torch.tensor(4.5),
}


@cache
def unet(linear: bool | None) -> State:
    """A U-Net by diffusers' names: with transformers whose ``proj_in`` is linear or a convolution,
    or with None without transformers."""
    if linear is None:
        config = unets.smallest("no transformers") | {"block_out_channels": (32, 32)}
    else:
        config = unets.smallest("one level") | {"use_linear_projection": linear}
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    return seeded.weights(shapes, 1)


def weights(kind: str, how: dict[str, Any]) -> State:
    return unet(how["linear"]) if kind == "unet" else seeded.tensors(KL, 1)


def in_layout(kind: str, how: dict[str, Any], right: State) -> dict[str, tuple[str, Tensor]]:
    """diffusers' name -> the name and the tensor in the file, without the prefix."""
    if kind == "unet":
        keys = keys_of_canonical(right)
        original = how["layout"] == "original"
        return {k: (keys.original(k) or "" if original else k, v) for k, v in right.items()}
    if how["layout"] == "original":
        made = original_tensors(right, KL)
        named = dict(zip(right, made.items(), strict=True))
        place, table = ".attn_1.{}.", SPELLINGS[how["spelling"]]
    else:
        named = {k: (k, v) for k, v in right.items()}
        place = ".attentions.0.{}."
        # from the names of now
        now = {v: k for k, v in SPELLINGS["diffusers' now"].items()}
        table = {k: SPELLINGS[how["spelling"]].get(v, v) for k, v in now.items()}
    result = {}
    for ours, (name, tensor) in named.items():
        for word, other in table.items():
            name = name.replace(place.format(word), place.format(other))
        result[ours] = (name, tensor)
    return result


PREFIXES = {
    "vae": ["", "first_stage_model.", "vae.", "module.", "model.vae."],
    "unet": ["", "model.diffusion_model.", "unet.", "module."],
}
SCALED = {
    "vae": ["decoder.conv_in.weight", "encoder.mid_block.attentions.0.to_q.weight"],
    "unet": ["conv_in.weight", "mid_block.resnets.0.time_emb_proj.weight"],
}


def quantised(tensor: Tensor, scales: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in fp8, its scale, and the weight that they stand for."""
    rows = (len(tensor), *(1,) * (tensor.ndim - 1))
    small = (tensor.float() * 100).to(dtype)
    scale = torch.tensor(0.01)
    if scales != "one":
        scale = torch.linspace(0.01, 0.02, len(tensor)).reshape(rows)
    right = small.float() * scale
    return small, scale.flatten() if scales == "rows, flat" else scale, right


@st.composite
def files(draw: st.DrawFn, kind: str) -> tuple[dict[str, Any], State, State]:
    """How a file is made, its tensors, and the right ones by diffusers' names."""
    how = {
        "linear": draw(st.sampled_from([None, False, True])),
        "layout": draw(st.sampled_from(["original", "diffusers"])),
        "prefix": draw(st.sampled_from(PREFIXES[kind])),
        "spelling": draw(st.sampled_from(sorted(SPELLINGS))),
        "scaled": draw(st.sampled_from(["", "one", "rows", "rows, flat"])),
        "scale": draw(st.sampled_from(["scale_weight", "weight_scale", "weight_scale_inv"])),
        "fp8": draw(st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2])),
        "marker": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "averages": draw(st.sampled_from(["", "dotted", "undotted"])),
        "extras": draw(st.booleans()),
        "container": draw(st.sampled_from(["safetensors", "ckpt", "shards"])),
    }
    tensors = weights(kind, how)
    right = {k: v.to(how["dtype"]) for k, v in tensors.items()}
    prefix, state = how["prefix"], {}
    for ours, (name, tensor) in in_layout(kind, how, right).items():
        state[prefix + name] = tensor
        if how["scaled"] and ours in SCALED[kind]:
            small, scale, whole = quantised(tensor, how["scaled"], how["fp8"])
            state[prefix + name] = small
            state[f"{prefix}{name.removesuffix('weight')}{how['scale']}"] = scale
            right[ours] = whole.reshape(right[ours].shape)
        if how["averages"] and kind == "vae":
            tail = name if how["averages"] == "dotted" else name.replace(".", "")
            state[f"{prefix}model_ema.{tail}"] = tensor + 1
        elif how["averages"]:
            dotted = f"model_ema.{prefix.removeprefix('model.')}{name}"
            average = dotted if how["averages"] == "dotted" else ema_name(prefix + name)
            state[average] = tensor + 1
    if how["scaled"] and how["marker"]:
        state[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=how["fp8"])
    return how, state | (EXTRAS if how["extras"] else {}), right


def written(state: State, container: str, folder: Path) -> Path:
    """The file with a state, or the folder with its shards."""
    state = {k: v.contiguous() for k, v in state.items()}
    if container == "shards":
        (folder / "in").mkdir()
        shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        listed = {name: shards[n % 2] for n, name in enumerate(state)}
        for shard in shards:
            own = {name: state[name] for name in state if listed[name] == shard}
            save_file(own, folder / "in" / shard)
        index = folder / "in" / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": listed}))
        return folder / "in"
    path = folder / f"in.{container}"
    if container == "ckpt":
        torch.save({"state_dict": state, "epoch": 3}, path)
    else:
        save_file(state, path)
    return path


def same(found: State, right: State) -> bool:
    return set(found) == set(right) and all(
        torch.equal(found[name].float(), tensor.float()) for name, tensor in right.items()
    )


def check(kind: str, made: tuple[dict[str, Any], State, State]) -> None:
    """There and back: the network, its averages, the extras, and what ``sdconv diff`` says."""
    how, state, right = made
    plain = {k: v.to(how["dtype"]) + 1 for k, v in weights(kind, how).items()}
    other = {"original": "diffusers", "diffusers": "original"}[how["layout"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        between, back = (folder / f"{n}.safetensors" for n in ("between", "back"))
        path = written(state, how["container"], folder)
        assert same(sdconv.load(path, kind, family="sd1").state_dict(), right)
        if how["averages"]:
            assert same(sdconv.load(path, kind, family="sd1", ema=True).state_dict(), plain)
        convert(path, between, other, family="sd1")
        convert(between, back, how["layout"], family="sd1")
        for one in (between, back):
            assert same(sdconv.load(one, kind, family="sd1").state_dict(), right)
            if how["extras"]:
                found = load_file(one)
                assert all(torch.equal(found[k], v) for k, v in EXTRAS.items())
            assert compare(path, one).equal
        if not how["scaled"] and how["layout"] == "original" and path.suffix == ".safetensors":
            # the file's own names and shapes, too
            assert raw(back) == raw(path)
        convert(path, folder / "out", "diffusers", kind, family="sd1")
        assert same(sdconv.load(folder / "out", family="sd1").state_dict(), right)
        convert(path, back, how["layout"], family="sd1", prune=True)
        assert same(sdconv.load(back, kind, family="sd1").state_dict(), right)
        assert not any("model_ema" in one for one in load_file(back))
        if how["averages"]:
            convert(path, back, other, family="sd1", ema="only")
            assert same(sdconv.load(back, kind, family="sd1").state_dict(), plain)


@settings(max_examples=10, deadline=None)
@given(files("vae"))
def test_vaes(made: tuple[dict[str, Any], State, State]) -> None:
    check("vae", made)


@settings(max_examples=6, deadline=None)
@given(files("unet"))
def test_unets(made: tuple[dict[str, Any], State, State]) -> None:
    check("unet", made)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(files("vae"))
def test_many_vaes(made: tuple[dict[str, Any], State, State]) -> None:
    check("vae", made)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(files("unet"))
def test_many_unets(made: tuple[dict[str, Any], State, State]) -> None:
    check("unet", made)


@given(st.sampled_from(["one", "rows", "rows, flat"]))
def test_the_comparison_can_fail(scales: str) -> None:
    right = seeded.tensors(KL, 1)
    name = SCALED["vae"][0]
    small, _, whole = quantised(right[name], scales, torch.float8_e4m3fn)
    assert not same({**right, name: small}, {**right, name: whole})
    assert same({**right, name: whole}, {**right, name: whole})
