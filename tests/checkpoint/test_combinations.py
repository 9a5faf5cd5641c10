"""Files as people have them, in all combinations: there and back bit for bit, every value right."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from helpers import seeded
from helpers.weight_files import convert, raw
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.save import original_tensors

KL = seeded.kl((32,), 4, True, layers_per_block=1)
E4M3 = torch.float8_e4m3fn
State = dict[str, Tensor]
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


@st.composite
def files(draw: st.DrawFn) -> tuple[dict[str, Any], State, State]:
    """How a file is made, its tensors, and the right ones by diffusers' names."""
    how = {
        "prefix": draw(st.sampled_from(["", "first_stage_model.", "vae."])),
        "spelling": draw(st.sampled_from(sorted(SPELLINGS))),
        "scaled": draw(st.booleans()),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "averages": draw(st.sampled_from(["", "dotted", "undotted"])),
        "extras": draw(st.booleans()),
    }
    right = {k: v.to(how["dtype"]) for k, v in seeded.tensors(KL, 1).items()}
    names = dict(zip(right, original_tensors(right, KL), strict=True))
    state: State = {}
    for ours, name in names.items():
        (tensor,) = original_tensors({ours: right[ours]}, KL).values()
        stored = name
        for word, other in SPELLINGS[how["spelling"]].items():
            stored = stored.replace(f".attn_1.{word}.", f".attn_1.{other}.")
        state[how["prefix"] + stored] = tensor
        if how["scaled"] and name == "decoder.conv_in.weight":
            small, scale = (tensor.float() * 100).to(E4M3), torch.tensor(0.01)
            state[how["prefix"] + stored] = small
            state[f"{how['prefix']}decoder.conv_in.scale_weight"] = scale
            right[ours] = (small.float() * scale).reshape(right[ours].shape)
        if how["averages"]:
            tail = name if how["averages"] == "dotted" else name.replace(".", "")
            state[f"{how['prefix']}model_ema.{tail}"] = tensor + 1
    return how, state | (EXTRAS if how["extras"] else {}), right


def same(found: State, right: State) -> bool:
    return set(found) == set(right) and all(
        torch.equal(found[name].float(), tensor.float()) for name, tensor in right.items()
    )


@settings(max_examples=25, deadline=None)
@given(files())
def test_there_and_back(made: tuple[dict[str, Any], State, State]) -> None:
    how, state, right = made
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, between, back = (folder / f"{n}.safetensors" for n in ("in", "between", "back"))
        save_file({k: v.contiguous() for k, v in state.items()}, path)
        network = sdconv.load(path, family="sd1")
        assert same(network.state_dict(), right)
        if how["averages"]:
            averages = sdconv.load(path, family="sd1", ema=True).state_dict()
            plain = {k: v.to(how["dtype"]) + 1 for k, v in seeded.tensors(KL, 1).items()}
            assert same(averages, plain)
        convert(path, between, "diffusers", family="sd1")
        convert(between, back, "original")
        for one in (between, back):
            assert same(sdconv.load(one).state_dict(), right)
            if how["extras"]:
                written = load_file(one)
                assert all(torch.equal(written[k], v) for k, v in EXTRAS.items())
        if not how["scaled"]:
            # the file's own names and shapes, too
            assert raw(back) == raw(path)
        convert(path, folder / "out", "diffusers", "vae", family="sd1")
        assert same(sdconv.load(folder / "out").state_dict(), right)
