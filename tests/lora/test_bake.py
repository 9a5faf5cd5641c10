"""LoRAs baked into whole checkpoints: merge_lora's bits, and diffusers' text encoders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import clip, loras, pipelines, seeded
from helpers.slow import first_of
from helpers.weight_files import convert, raw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdconv
from sdconv.checkpoint.keys.clip import open_clip_names
from sdconv.errors import CheckpointError, InputError, WeightsMismatchError
from sdconv.lora.bake import bake_lora

ENCODERS = {"text": ("text_encoder",), "xl": ("text_encoder", "text_encoder_2")}
PREFIXES = {
    "text": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "xl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
State = dict[str, Tensor]


def half(pipe: Any) -> Any:
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).half()
    return pipe


def lora_for(pipe: Any, kind: str, seed: int = 0, scale: float = 0.3) -> State:
    """A LoRA with kohya's names for the U-Net and the text encoders."""
    result: State = {}
    for part, prefix in PREFIXES[kind].items():
        # one alpha, for diffusers does not read several from kohya's files
        made = loras.matrices(getattr(pipe, part), seed, only="attn|mlp|conv1|proj_in", alpha=2.0)
        for name, (down, up, alpha) in made.items():
            own = name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"
            stem = prefix + own.replace(".", "_")
            result[f"{stem}.lora_down.weight"] = down
            result[f"{stem}.lora_up.weight"] = up * scale
            result[f"{stem}.alpha"] = torch.tensor(alpha)
    return result


@pytest.fixture(scope="module", params=["text", "xl"])
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, State]:
    """A kind of pipeline; its folder and original file, in float16; and a LoRA, in a file too."""
    kind, folder = request.param, tmp_path_factory.mktemp("bake")
    pipe = pipelines.pipeline(kind)
    lora = lora_for(pipe, kind)
    half(pipe).save_pretrained(folder / "pipe")
    convert(folder / "pipe", folder / "model.safetensors", "original")
    save_file(lora, folder / "lora.safetensors")
    return kind, folder, lora


def fused(kind: str, lora: State, scale: float) -> Any:
    """diffusers' pipeline in float32, of the float16 weights, with the LoRA fused."""
    pipe = half(pipelines.pipeline(kind))
    for part in ("unet", *ENCODERS[kind]):
        getattr(pipe, part).float()
    pipe.load_lora_weights(dict(lora))
    pipe.fuse_lora(lora_scale=scale, components=["unet", *ENCODERS[kind]])
    pipe.unload_lora_weights()
    return pipe


def text_state(encoder: nn.Module) -> State:
    """A text encoder's tensors by transformers' names with ``text_model.``."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": t
        for name, t in encoder.state_dict().items()
        if "position_ids" not in name
    }


def close(one: Tensor, other: Tensor) -> bool:
    """Whether a float16 tensor is a float32 one rounded: within one step of 2 ** -11."""
    return torch.allclose(one.float(), other.float(), rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("form", first_of(["folder", "original", "folder to a file"]))
def test_a_whole_model(form: str, case: tuple[str, Path, State], tmp_path: Path) -> None:
    kind, folder, lora = case
    source = folder / ("model.safetensors" if form == "original" else "pipe")
    out = tmp_path / ("out" if form == "folder" else "out.safetensors")
    result = bake_lora(source, folder / "lora.safetensors", out, 0.7)
    assert result.skipped == {}
    assert set(result.changes) == {"unet", *ENCODERS[kind]}
    # the U-Net: the bits of load, merge_lora and save
    network = sdconv.load(source, "unet")
    merged = sdconv.merge_lora(network, lora, 0.7)
    written = sdconv.load(out, "unet").state_dict()
    assert result.changes["unet"].modules == len(merged.layers)
    for name, tensor in network.state_dict().items():
        assert torch.equal(written[name], tensor), name
        assert written[name].dtype == torch.float16
    # the VAE is as it was
    written = sdconv.load(out, "vae").state_dict()
    for name, tensor in sdconv.load(source, "vae").state_dict().items():
        assert torch.equal(written[name], tensor)
    # the text encoders: what diffusers fuses, rounded
    theirs = fused(kind, lora, 0.7)
    for part in ENCODERS[kind]:
        ours = baked_encoder(out, part, form, kind)
        before = text_state(getattr(half(pipelines.pipeline(kind)), part))
        changed = 0
        for name, tensor in text_state(getattr(theirs, part)).items():
            assert close(ours[name], tensor), name
            changed += not torch.equal(ours[name], before[name])
        assert changed == result.changes[part].modules > 5


def baked_encoder(out: Path, part: str, form: str, kind: str) -> State:
    """A text encoder's tensors in what was written, by transformers' names."""
    if form == "folder":
        tensors = load_file(out / part / "model.safetensors")
        prefix = ""
    else:
        tensors = load_file(out)
        prefix = f"{part}."
        if form == "original":
            prefix = {
                ("text", "text_encoder"): "cond_stage_model.transformer.",
                ("xl", "text_encoder"): "conditioner.embedders.0.transformer.",
                ("xl", "text_encoder_2"): "conditioner.embedders.1.model.",
            }[kind, part]
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if prefix.endswith("1.model."):
        names = text_state(getattr(pipelines.pipeline(kind), part))
        made = open_clip_names(names)
        assert made is not None
        result: State = {}
        for name, pieces in made.items():
            tensor = own[name].T if name == "text_projection" else own[name]
            result |= dict(zip(pieces, tensor.chunk(len(pieces)), strict=True))
        return result
    return {
        k if k.startswith(("text_model.", "text_projection.")) else f"text_model.{k}": v
        for k, v in own.items()
    }


def test_everything_else_stays(case: tuple[str, Path, State], tmp_path: Path) -> None:
    kind, folder, lora = case
    source, out = folder / "model.safetensors", tmp_path / "out.safetensors"
    unet_only = {k: v for k, v in lora.items() if k.startswith("lora_unet_")}
    result = bake_lora(source, unet_only, out)
    before, after = raw(source), raw(out)
    assert list(before) and set(before) == set(after)
    changed = {name for name in before if before[name] != after[name]}
    assert all(name.startswith("model.diffusion_model.") for name in changed)
    assert len(changed) == result.changes["unet"].tensors
    assert dict(sdconv.read_header(out).metadata) == dict(sdconv.read_header(source).metadata)
    # in a folder, the other files too
    bake_lora(folder / "pipe", unet_only, tmp_path / "out")
    assert names_in(tmp_path / "out") == names_in(folder / "pipe")
    pipe = type(pipelines.pipeline(kind)).from_pretrained(tmp_path / "out")
    assert pipe.unet.dtype == torch.float32  # diffusers reads the whole folder


def test_several_loras_are_summed(case: tuple[str, Path, State], tmp_path: Path) -> None:
    kind, folder, lora = case
    source, out = folder / "model.safetensors", tmp_path / "out.safetensors"
    other = lora_for(pipelines.pipeline(kind), kind, seed=9)
    bake_lora(source, [lora, other], out, [0.5, -0.25])
    network = sdconv.load(source, "unet")
    sdconv.merge_lora(network, lora, 0.5)
    sdconv.merge_lora(network, other, -0.25)
    written = sdconv.load(out, "unet").state_dict()
    assert all(torch.equal(written[k], v) for k, v in network.state_dict().items())
    # at scale 0 nothing changes
    result = bake_lora(source, [lora], out, 0.0)
    assert result.changes == {}
    assert raw(out) == raw(source)
    for scales in ([1.0, 2.0, 3.0], []):
        with pytest.raises(InputError, match="one for each LoRA"):
            bake_lora(source, [lora, other], out, scales)


def names_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


LAYER = "text_model.encoder.layers.{n}.{d}"
SPELLINGS = {
    "kohya": "lora_te1_text_model_encoder_layers_{n}_{u}.lora_[down|up].weight",
    "peft": f"text_encoder.{LAYER}.lora_[A|B].weight",
    "diffusers": f"text_encoder.{LAYER}.lora_linear_layer.[down|up].weight",
    "lycoris": "lycoris_text_model_encoder_layers_{n}_{u}.lora_[down|up].weight",
    "ComfyUI": f"text_encoders.clip_l.transformer.{LAYER}.lora_[A|B].weight",
    "clip_l": f"clip_l.{LAYER}.lora_[down|up].weight",
    "original": f"cond_stage_model.transformer.{LAYER}.lora_[A|B].weight",
    "PEFT's own": f"base_model.model.{LAYER}.lora_[A|B].weight",
}


@pytest.mark.filterwarnings("ignore:.*alpha is unknown")
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_text_encoders(spelling: str, tmp_path: Path) -> None:
    encoder = pipelines.text_encoder()
    state = text_state(encoder)
    path, out = tmp_path / "text.safetensors", tmp_path / "out.safetensors"
    save_file({f"cond_stage_model.transformer.{k}": v for k, v in state.items()}, path)
    lora, right = {}, dict(state)
    for n, layer in ((0, "self_attn.q_proj"), (1, "mlp.fc2")):
        name = f"text_model.encoder.layers.{n}.{layer}.weight"
        up, down = torch.randn(state[name].shape[0], 2), torch.randn(2, state[name].shape[1])
        key = SPELLINGS[spelling].replace("{n}", str(n)).replace("{d}", layer)
        key = key.replace("{u}", layer.replace(".", "_"))
        words = key[key.index("[") + 1 : key.index("]")]
        for word, matrix in zip(words.split("|"), (down, up), strict=True):
            lora[key.replace(f"[{words}]", word)] = matrix
        right[name] = state[name] + 0.5 * (up @ down)
    result = bake_lora(path, lora, out, 0.5)
    assert result.changes["text_encoder"].modules == 2
    written = load_file(out)
    for name, tensor in right.items():
        stored = written[f"cond_stage_model.transformer.{name}"]
        assert torch.allclose(stored, tensor, atol=1e-6), name


def test_open_clips_names(case: tuple[str, Path, State], tmp_path: Path) -> None:
    """A LoRA in OpenCLIP's names is that of the same layers."""
    kind, folder, _ = case
    if kind != "xl":
        return
    source, out = folder / "model.safetensors", tmp_path / "out.safetensors"
    up, down = torch.randn(32, 2), torch.randn(2, 32)
    layer = "conditioner.embedders.1.model.transformer.resblocks.0.attn.out_proj"
    bake_lora(source, {f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, out)
    before, after = load_file(source), load_file(out)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"{layer}.weight"]
    assert close(after[changed[0]], before[changed[0]].float() + up @ down)


def test_a_bare_network(tmp_path: Path) -> None:
    config = seeded.SMALL_KL
    path, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    vae = seeded.network(config)
    sdconv.save(vae, path, layout="original")
    lora = {
        key.replace("lora_unet_", "lora_vae_"): tensor
        for key, tensor in loras.kohya(loras.matrices(vae)).items()
    }
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}
    result = bake_lora(path, lora | text, out)
    assert result.skipped == {"state dict in memory": tuple(text)}
    merged = sdconv.load(path)
    sdconv.merge_lora(merged, lora)
    written = sdconv.load(out).state_dict()
    assert all(torch.equal(written[k], v) for k, v in merged.state_dict().items())
    assert sdconv.load(out).config == config
    # the attention's weights are still 1x1 convolutions
    assert load_file(out)["decoder.mid.attn_1.q.weight"].ndim == 4


def test_what_does_not_fit_is_refused(case: tuple[str, Path, State], tmp_path: Path) -> None:
    _, folder, lora = case
    source, out = folder / "model.safetensors", tmp_path / "out.safetensors"
    other = {"lora_te_text_model_encoder_layers_77_mlp_fc1.alpha": torch.ones(())}
    with pytest.raises(WeightsMismatchError, match="name layers that this network does not have"):
        bake_lora(source, lora | other, out)
    wide = {
        k: torch.ones(4, 7) if k.endswith("q_proj.lora_down.weight") else v for k, v in lora.items()
    }
    with pytest.raises(WeightsMismatchError, match="do not fit"):
        bake_lora(source, wide, out)
    with pytest.raises(WeightsMismatchError, match="nothing for this checkpoint"):
        bake_lora(
            source,
            {f"lora_te3_x.{i}": torch.ones(1, 1) for i in ("lora_up.weight", "lora_down.weight")},
            out,
        )
    with pytest.raises(CheckpointError, match="whole checkpoint, not a LoRA"):
        bake_lora(source, source, out)
    with pytest.raises(InputError, match="not finite"):
        bake_lora(source, lora, out, 1e9)
    with pytest.raises(InputError, match="finite number"):
        bake_lora(source, lora, out, float("nan"))
    with pytest.raises(InputError, match="a file is written again as a file"):
        bake_lora(source, lora, tmp_path / "folder")
    assert not out.exists()


def test_averages_and_scales_are_said(tmp_path: Path) -> None:
    pipe = pipelines.pipeline("text")
    state = {f"unet.{k}": v for k, v in pipe.unet.state_dict().items()}
    name = "unet.conv_in.weight"
    small = (state[name] * 100).to(torch.float8_e4m3fn)
    state |= {name: small, "unet.conv_in.scale_weight": torch.tensor(0.01)}
    path, out = tmp_path / "m.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    up, down = torch.ones(32, 1), torch.full((1, 4, 3, 3), 0.25)
    lora = {"unet.conv_in.lora_B.weight": up[..., None, None], "unet.conv_in.lora_A.weight": down}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 1, "unet.r": 1})}
    save_file(lora, tmp_path / "lora.safetensors", metadata=metadata)
    result = bake_lora(path, tmp_path / "lora.safetensors", out)
    assert result.dequantised == 1
    written = load_file(out)
    assert "unet.conv_in.scale_weight" not in written
    assert torch.equal(written[name], small.float() * torch.tensor(0.01) + 0.25)


def test_a_one_byte_weight_does_not_saturate_in_silence(tmp_path: Path) -> None:
    state = {k: v.to(torch.float8_e4m3fn) for k, v in seeded.tensors(seeded.SMALL_KL).items()}
    path, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    stem = "lora_vae_decoder_mid_block_attentions_0_to_q"
    for value, fits in ((400.0, True), (500.0, False)):
        lora = {f"{stem}.lora_down.weight": torch.ones(1, 64)}
        lora[f"{stem}.lora_up.weight"] = torch.full((64, 1), value)
        if fits:
            bake_lora(path, lora, out)
            continue
        with pytest.raises(InputError, match="values that are not finite, or too large"):
            bake_lora(path, lora, out)


def test_text_encoders_have_a_scale_of_their_own(tmp_path: Path) -> None:
    vae = seeded.tensors(seeded.SMALL_KL)
    text = clip.text_encoder()
    layer, network = f"{clip.PREFIX}{clip.LAYER}.weight", "decoder.mid_block.attentions.0.to_q"
    state = {f"first_stage_model.{k}": v for k, v in vae.items()} | text
    path, out = tmp_path / "model.safetensors", tmp_path / "out.safetensors"
    save_file(state, path)
    loras = []
    for value in (1.0, 2.0):
        lora = {}
        for stem, width in ((f"lora_te_{clip.LAYER}", 32), (f"lora_vae_{network}", 64)):
            stem = stem.replace(".", "_")
            lora[f"{stem}.lora_down.weight"] = torch.ones(1, width)
            lora[f"{stem}.lora_up.weight"] = torch.full((width, 1), value)
        loras.append(lora)
    for scales, of_text, of_vae, in_text in (
        (1.0, None, 3.0, 3.0),
        (1.0, 0.0, 3.0, 0.0),
        (0.0, 1.0, 0.0, 3.0),
        ([1.0, 2.0], [0.5, -1.0], 5.0, -1.5),
    ):
        bake_lora(path, loras, out, scales, of_text)
        written = load_file(out)
        assert torch.allclose(written[layer], state[layer] + in_text, atol=1e-6)
        name = f"first_stage_model.{network}.weight"
        assert torch.allclose(written[name], state[name] + of_vae, atol=1e-6)
    with pytest.raises(InputError, match="not one for each LoRA") as caught:
        bake_lora(path, loras, out, 1.0, [1.0, 2.0, 3.0])
    assert "text_encoder_scales" in str(caught.value)
