"""Several copies of a network in one file, running averages, and what else lies next to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import seeded, unets
from helpers.weight_files import convert
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.analysis.inspection import inspect
from sdconv.checkpoint.save import original_tensors

KL = seeded.SMALL_KL
FIRST, COPY = "first_stage_model.", "conditioner.embedders.3.encoder."
MAIN = "model.diffusion_model."
State = dict[str, Tensor]


def vae(prefix: str = "", seed: int = 0, config: object = KL) -> State:
    named = original_tensors(seeded.tensors(config, seed), config)  # type: ignore[arg-type]
    return {prefix + name: tensor.contiguous() for name, tensor in named.items()}


def same(network: torch.nn.Module, right: State) -> bool:
    state = network.state_dict()
    return set(state) == set(right) and all(torch.equal(state[k], right[k]) for k in right)


# --- the attention's names

SPELLINGS = {
    "diffusers' now": {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"},
    "diffusers' before": {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"},
    "with group_norm": {"norm": "group_norm"},
    "another library's": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj_out": "out_proj"},
}


def respelt(state: State, table: dict[str, str], flat: bool) -> State:
    result = {}
    for name, tensor in state.items():
        for word, other in table.items():
            name = name.replace(f".attn_1.{word}.", f".attn_1.{other}.")
        flatten = flat and ".attn_1." in name and tensor.ndim == 4
        result[name] = tensor.flatten(1) if flatten else tensor
    return result


@pytest.mark.parametrize("prefix", ["", FIRST])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_under_the_originals_names(
    spelling: str, flat: bool, prefix: str, tmp_path: Path
) -> None:
    state = respelt(vae(prefix), SPELLINGS[spelling], flat)
    assert set(state) != set(vae(prefix))
    right = seeded.tensors(KL)
    assert same(sdconv.load(state, family="sd1"), right)
    for layout in ("original", "diffusers"):
        out = tmp_path / f"{layout}.safetensors"
        convert(state, out, layout, family="sd1")
        written = load_file(out)
        usual = vae(prefix) if layout == "original" else right
        assert {k: tuple(v.shape) for k, v in written.items()} == {
            k: tuple(v.shape) for k, v in usual.items()
        }
        assert all(torch.equal(written[k], v) for k, v in usual.items())


def test_the_originals_leaves_in_diffusers_layout() -> None:
    table = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}
    state = {}
    for name, tensor in seeded.tensors(KL).items():
        for ours, other in table.items():
            name = name.replace(f".attentions.0.{ours}.", f".attentions.0.{other}.")
        state[name] = tensor
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL))


@pytest.mark.parametrize("prefix", ["", FIRST, "vae."])
def test_a_file_in_diffusers_layout_has_diffusers_names(prefix: str, tmp_path: Path) -> None:
    """Old names, 4-D projections and the original's prefix, which diffusers refuses."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in seeded.tensors(KL).items():
        for ours, other in old.items():
            if f".attentions.0.{ours}." in name:
                name = name.replace(ours, other)
                tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        state[prefix + name] = tensor.contiguous()
    convert(state, tmp_path / "out.safetensors", "diffusers", family="sd1")
    written = load_file(tmp_path / "out.safetensors")
    right = seeded.tensors(KL)
    assert set(written) == set(right)
    assert all(torch.equal(written[k], v) for k, v in right.items())


# --- several copies


def test_the_first_stage_is_the_vae(tmp_path: Path) -> None:
    state = vae(FIRST, 1) | vae(COPY, 2)
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL, 1))
    chosen = sdconv.load(state, family="sd1", prefix=COPY)
    assert same(chosen, seeded.tensors(KL, 2))
    assert same(sdconv.load(state, family="sd1", prefix=COPY[:-1]), seeded.tensors(KL, 2))
    with pytest.raises(sdconv.UnknownNetworkError, match="no network under the prefix 'x'"):
        sdconv.load(state, prefix="x")
    convert(state, tmp_path / "vae.safetensors", "diffusers", "vae", family="sd1", prefix=COPY)
    assert same(sdconv.load(tmp_path / "vae.safetensors"), seeded.tensors(KL, 2))
    save_file(state, tmp_path / "both.safetensors")
    assert inspect(tmp_path / "both.safetensors", prefix=COPY).networks[0].prefix == COPY


@pytest.mark.parametrize("prefix", ["vae.", FIRST])
def test_one_without_a_prefix_next_to_it(prefix: str, tmp_path: Path) -> None:
    """Either may be the checkpoint's own, so neither is taken in silence."""
    state = vae() | vae(prefix, 1)
    with pytest.raises(sdconv.UnknownNetworkError, match="several networks that could be the vae"):
        sdconv.load(state, family="sd1")
    chosen = sdconv.load(state, family="sd1", prefix=prefix)
    assert same(chosen, seeded.tensors(KL, 1))
    assert same(sdconv.load(vae(), family="sd1"), seeded.tensors(KL)), "the control"


def test_two_that_could_be_meant() -> None:
    state = vae(FIRST, 1) | vae("vae.", 2)
    with pytest.raises(sdconv.UnknownNetworkError, match=r"several(?s:.*)prefix='vae\.'"):
        sdconv.load(state, family="sd1")
    assert same(sdconv.load(state, family="sd1", prefix="vae."), seeded.tensors(KL, 2))


@pytest.mark.parametrize(("there", "gone"), [("decoder", "encoder"), ("encoder", "decoder")])
def test_half_of_the_first_stage(there: str, gone: str) -> None:
    half = {k: v for k, v in vae(FIRST).items() if k.startswith(FIRST + there)}
    with pytest.raises(sdconv.WeightsMismatchError, match=f"{there} alone, and its {gone}") as c:
        sdconv.load(half | vae(COPY, 2), family="sd1")
    assert f"pass prefix={COPY!r}" in str(c.value)
    with pytest.raises(sdconv.WeightsMismatchError, match=f"its {gone} is missing") as c:
        sdconv.load(half, family="sd1")
    assert "prefix=" not in str(c.value)


def test_a_video_vae_is_not_replaced() -> None:
    video = {k: v[:, :, None] if v.ndim == 4 else v for k, v in vae(FIRST).items()}
    with pytest.raises(sdconv.UnknownNetworkError, match=r"under first_stage_model\. is .*video"):
        sdconv.load(video | vae(COPY, 2), family="sd1")
    chosen = sdconv.load(video | vae(COPY, 2), family="sd1", prefix=COPY)
    assert same(chosen, seeded.tensors(KL, 2))


# --- running averages


def unet_state(seed: int) -> tuple[State, State]:
    """A U-Net by diffusers' names and by the original's."""
    network = unets.on_meta(unets.smallest("SD1"))
    shapes = {k: tuple(v.shape) for k, v in network.state_dict().items()}
    drawn = seeded.weights(shapes, seed)
    return drawn, original_tensors(drawn, network.config)


def test_dotted_averages_of_a_unet(tmp_path: Path) -> None:
    weights, named = unet_state(1)
    averages, named_averages = unet_state(2)
    state = {MAIN + k: v for k, v in named.items()}
    state |= {f"model_ema.diffusion_model.{k}": v for k, v in named_averages.items()}
    assert same(sdconv.load(state, family="sd1"), weights)
    assert same(sdconv.load(state, ema=True, family="sd1"), averages)
    convert(state, tmp_path / "d.safetensors", "diffusers", family="sd1")
    assert same(sdconv.load(tmp_path / "d.safetensors", family="sd1"), weights)
    assert same(sdconv.load(tmp_path / "d.safetensors", ema=True, family="sd1"), averages)


@pytest.mark.parametrize("dotted", [False, True])
def test_averages_after_a_layout_change_and_one_missing(dotted: bool, tmp_path: Path) -> None:
    _, named = unet_state(1)
    averages, other = unet_state(2)
    state = {MAIN + k: v for k, v in named.items()}
    ema = {
        f"model_ema.diffusion_model{'.' if dotted else ''}"
        + (k if dotted else k.replace(".", "")): v
        for k, v in other.items()
    }
    convert(state | ema, tmp_path / "d.safetensors", "diffusers", family="sd1")
    assert same(sdconv.load(tmp_path / "d.safetensors", ema=True, family="sd1"), averages)
    gone = next(name for name in ema if "out" in name and "2" in name and "bias" in name)
    left = {k: v for k, v in ema.items() if k != gone}
    with pytest.raises(
        sdconv.WeightsMismatchError, match=r"1 missing of the .* averages"
    ) as caught:
        sdconv.load(state | left, ema=True, family="sd1")
    assert f"expected: {gone}\n" in str(caught.value)
    with pytest.raises(sdconv.UnknownNetworkError, match="no running averages of the unet"):
        sdconv.load(state, ema=True, family="sd1")


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("prefix", ["", FIRST])
def test_a_vaes_own_averages(prefix: str, dotted: bool) -> None:
    named = original_tensors(seeded.tensors(KL, 2), KL)
    ema = {f"{prefix}model_ema.{k if dotted else k.replace('.', '')}": v for k, v in named.items()}
    state = vae(prefix, 1) | ema
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL, 1))
    assert same(sdconv.load(state, family="sd1", ema=True), seeded.tensors(KL, 2))


# --- marks and counters next to a bare network

EXTRAS = {
    "v_pred": torch.empty(0),
    "ztsnr": torch.empty(0),
    "edm_vpred.sigma_max": torch.tensor(120.0),
    "edm_vpred.sigma_min": torch.tensor(0.002),
    "iteration": torch.tensor(7),
    "epoch": torch.tensor([3]),
    "global_step": torch.tensor(470000),
    "some_counter": torch.tensor(1.0),
}


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_marks_are_carried_and_explained(layout: str, tmp_path: Path) -> None:
    weights, named = unet_state(1)
    state = (weights if layout == "diffusers" else named) | EXTRAS
    path = tmp_path / "unet.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    assert same(sdconv.load(path, family="sd1"), weights)
    for other in ("diffusers", "original"):
        convert(path, tmp_path / "out.safetensors", other, family="sd1")
        written = load_file(tmp_path / "out.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in EXTRAS.items())
        assert same(sdconv.load(tmp_path / "out.safetensors", family="sd1"), weights)
    found = inspect(path)
    assert found.complaint is None
    said = "; ".join(found.parts[0].notes)
    assert "v-prediction" in said
    assert "zero terminal SNR" in said
    assert "the largest sigma, 120" in said
    assert "training iterations, 7" in said
    # the control: a weight is no mark
    with pytest.raises(sdconv.WeightsMismatchError, match="1 unexpected"):
        sdconv.load(state | {"stray.weight": torch.ones(3, 3)}, family="sd1")


def test_marks_next_to_a_vae() -> None:
    assert same(sdconv.load(vae() | EXTRAS, family="sd1"), seeded.tensors(KL))


@pytest.mark.parametrize("first", ["vae.", ""])
def test_no_video_vae_is_replaced(first: str) -> None:
    video = {k: v[:, :, None] if v.ndim == 4 else v for k, v in vae(first).items()}
    with pytest.raises(sdconv.UnknownNetworkError, match="video"):
        sdconv.load(video | vae(COPY, 2), family="sd1")
    assert same(sdconv.load(vae(COPY, 2), family="sd1"), seeded.tensors(KL, 2))  # the control


def test_quant_convolutions_elsewhere() -> None:
    state = {k if "quant" in k else f"module.{k}": v for k, v in vae().items()}
    with pytest.raises(sdconv.WeightsMismatchError, match="post_quant_conv, but the file has one"):
        sdconv.load(state, family="sd1")
    bare = {f"module.{k}": v for k, v in vae().items() if "quant" not in k}
    assert not sdconv.load(bare, family="sd1").config.use_quant_conv  # the control


def test_convolutions_over_sequences_are_linear() -> None:
    state = {k: v[..., 0] if ".attn_1." in k and v.ndim == 4 else v for k, v in vae().items()}
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL))


@pytest.mark.parametrize(
    "part", ["ema.", "ema_model.", "ema_model.module.", "vae_ema.", "model_ema."]
)
@pytest.mark.parametrize("prefix", ["", FIRST])
def test_averages_under_other_names(part: str, prefix: str, tmp_path: Path) -> None:
    state = vae(prefix, 1) | vae(part + prefix, 2)
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL, 1))
    assert same(sdconv.load(state, family="sd1", ema=True), seeded.tensors(KL, 2))
    out = tmp_path / "out.safetensors"
    convert(state, out, "diffusers", family="sd1", ema="only")
    assert set(load_file(out)) == set(seeded.tensors(KL))
    assert same(sdconv.load(out), seeded.tensors(KL, 2))
    convert(state, out, "diffusers", family="sd1", prune=True)
    assert not any("ema" in name for name in load_file(out))


def test_averages_of_everything_without_dots() -> None:
    state = vae(FIRST, 1) | {
        f"model_ema.{name.replace('.', '')}": tensor for name, tensor in vae(FIRST, 2).items()
    }
    assert same(sdconv.load(state, family="sd1", ema=True), seeded.tensors(KL, 2))
    name = "model_ema.first_stage_modeldecoderconv_outbias"
    del state[name]
    with pytest.raises(sdconv.WeightsMismatchError, match=f"expected: {name}"):
        sdconv.load(state, family="sd1", ema=True)
    only = {k: v for k, v in state.items() if k.startswith("model_ema.")}
    with pytest.raises(sdconv.UnknownNetworkError, match="only running averages"):
        sdconv.load(only)


def test_any_small_tensor_without_a_dot_is_carried(tmp_path: Path) -> None:
    state = vae() | {"noise_offset": torch.rand(3), "sigmas": torch.rand(100)}
    assert same(sdconv.load(state, family="sd1"), seeded.tensors(KL))
    convert(state, tmp_path / "o.safetensors", "diffusers", family="sd1")
    assert torch.equal(load_file(tmp_path / "o.safetensors")["noise_offset"], state["noise_offset"])
