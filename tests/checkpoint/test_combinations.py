"""Files as people have them, in all combinations: there and back bit for bit, every value right."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

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
E4M3 = torch.float8_e4m3fn
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
def unet() -> State:
    """A U-Net by diffusers' names."""
    config = unets.smallest("no transformers") | {"block_out_channels": (32, 32)}
    shapes = {k: tuple(v.shape) for k, v in unets.on_meta(config).state_dict().items()}
    return seeded.weights(shapes, 1)


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
    "vae": ["", "first_stage_model.", "vae."],
    "unet": ["", "model.diffusion_model.", "unet."],
}
SCALED = {"vae": "decoder.conv_in.weight", "unet": "conv_in.weight"}


@st.composite
def files(draw: st.DrawFn, kind: str) -> tuple[dict[str, Any], State, State]:
    """How a file is made, its tensors, and the right ones by diffusers' names."""
    how = {
        "layout": draw(st.sampled_from(["original", "diffusers"])),
        "prefix": draw(st.sampled_from(PREFIXES[kind])),
        "spelling": draw(st.sampled_from(sorted(SPELLINGS))),
        "scaled": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "averages": draw(st.sampled_from(["", "dotted", "undotted"])),
        "extras": draw(st.booleans()),
    }
    tensors = unet() if kind == "unet" else seeded.tensors(KL, 1)
    right = {k: v.to(how["dtype"]) for k, v in tensors.items()}
    prefix, state = how["prefix"], {}
    for ours, (name, tensor) in in_layout(kind, how, right).items():
        state[prefix + name] = tensor
        if how["scaled"] and ours == SCALED[kind]:
            small, scale = (tensor.float() * 100).to(E4M3), torch.tensor(0.01)
            state[prefix + name] = small
            state[f"{prefix}{name.removesuffix('weight')}scale_weight"] = scale
            right[ours] = (small.float() * scale).reshape(right[ours].shape)
        if how["averages"] and kind == "vae":
            tail = name if how["averages"] == "dotted" else name.replace(".", "")
            state[f"{prefix}model_ema.{tail}"] = tensor + 1
        elif how["averages"]:
            dotted = f"model_ema.{prefix.removeprefix('model.')}{name}"
            average = dotted if how["averages"] == "dotted" else ema_name(prefix + name)
            state[average] = tensor + 1
    return how, state | (EXTRAS if how["extras"] else {}), right


def same(found: State, right: State) -> bool:
    return set(found) == set(right) and all(
        torch.equal(found[name].float(), tensor.float()) for name, tensor in right.items()
    )


def check(kind: str, made: tuple[dict[str, Any], State, State]) -> None:
    """There and back: the network, its averages, the extras, and what ``sdconv diff`` says."""
    how, state, right = made
    plain = {
        k: v.to(how["dtype"]) + 1
        for k, v in (unet() if kind == "unet" else seeded.tensors(KL, 1)).items()
    }
    other = {"original": "diffusers", "diffusers": "original"}[how["layout"]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, between, back = (folder / f"{n}.safetensors" for n in ("in", "between", "back"))
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        assert same(sdconv.load(path, kind, family="sd1").state_dict(), right)
        if how["averages"]:
            assert same(sdconv.load(path, kind, family="sd1", ema=True).state_dict(), plain)
        convert(path, between, other, family="sd1")
        convert(between, back, how["layout"])
        for one in (between, back):
            assert same(sdconv.load(one, kind, family="sd1").state_dict(), right)
            if how["extras"]:
                written = load_file(one)
                assert all(torch.equal(written[k], v) for k, v in EXTRAS.items())
            assert compare(path, one).equal
        if not how["scaled"] and how["layout"] == "original":
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


@settings(max_examples=4, deadline=None)
@given(files("unet"))
def test_unets(made: tuple[dict[str, Any], State, State]) -> None:
    check("unet", made)
