"""Every layout loads as the same network; what is refused, and with which message."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.slow import first_of
from helpers.weight_files import PLAIN, is_mapped
from safetensors.torch import save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.save import original_tensors
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config, AutoencoderTinyConfig

SMALL = AutoencoderKLConfig(
    **{
        **AutoencoderKLConfig.assumed,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 512,
    }
)
TINY = AutoencoderTinyConfig(
    **{
        **AutoencoderTinyConfig.assumed,
        "encoder_block_out_channels": (16, 16),
        "decoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (1, 2),
        "num_decoder_blocks": (2, 1),
    }
)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def vae() -> sdconv.AutoencoderKL:
    torch.manual_seed(0)
    return sdconv.AutoencoderKL(SMALL).eval()


@pytest.fixture(scope="module")
def state(vae: sdconv.AutoencoderKL) -> State:
    return {name: tensor.detach().clone() for name, tensor in vae.state_dict().items()}


def same(network: torch.nn.Module, state: State) -> bool:
    own = network.state_dict()
    return list(own) == list(state) and all(torch.equal(own[name], state[name]) for name in state)


def folder_of(state: State, path: Path, config: AutoencoderKLConfig | None = SMALL) -> Path:
    path.mkdir(parents=True)
    save_file(state, path / "diffusion_pytorch_model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config.to_json()))
    return path


def old_names(state: State) -> State:
    """The attention's names before diffusers 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for name, tensor in state.items():
        for new, word in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{word}.")
        result[name] = tensor
    return result


LAYOUTS = {
    "diffusers": lambda state: state,
    "original": lambda state: original_tensors(state, SMALL),
    "original with a prefix": lambda state: {
        f"first_stage_model.{k}": v for k, v in original_tensors(state, SMALL).items()
    },
    "old attention names": old_names,
    "attention as 1x1 convolutions": lambda state: {
        k: v[:, :, None, None].clone() if ".to_" in k and v.ndim == 2 else v
        for k, v in state.items()
    },
    "next to a U-Net's tensor and a schedule": lambda state: {
        **{f"vae.{k}": v for k, v in state.items()},
        "alphas_cumprod": torch.ones(1000),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "state dict"])
def test_layouts(layout: str, kind: str, vae: object, state: State, tmp_path: Path) -> None:
    tensors = {k: v.contiguous() for k, v in LAYOUTS[layout](state).items()}
    source: Path | State
    if kind == "safetensors":
        source = tmp_path / "model.safetensors"
        save_file(tensors, source)
    elif kind == "ckpt":
        source = tmp_path / "model.ckpt"
        torch.save({"state_dict": tensors, "global_step": 3}, source)
    else:
        source = tensors
    loaded = sdconv.load(source, family="sd1")
    assert same(loaded, state)
    assert type(loaded) is sdconv.AutoencoderKL and not loaded.training
    assert loaded.config == SMALL


def test_state_dict_in_memory_is_shared(state: State) -> None:
    loaded = sdconv.load(state, family="sd1")
    assert loaded.decoder.conv_in.weight.data_ptr() == state["decoder.conv_in.weight"].data_ptr()


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_file_is_mapped_not_copied(state: State, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "original.safetensors"
    tensors = {prefix + k: v.contiguous() for k, v in original_tensors(state, SMALL).items()}
    save_file(tensors, path)
    loaded = sdconv.load(path, family="sd1")
    for name, parameter in loaded.named_parameters():
        assert is_mapped(parameter, path), name
    # converted weights are the control: they cannot be the file's own bytes
    half = sdconv.load(path, dtype=torch.float16, family="sd1")
    assert not is_mapped(half.decoder.conv_in.weight, path)


def test_writing_to_weights_leaves_the_file_alone(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    before = path.read_bytes()
    loaded = sdconv.load(path, family="sd1")
    with torch.no_grad():
        loaded.decoder.conv_in.weight.zero_()
    assert path.read_bytes() == before


def test_folders(state: State, tmp_path: Path) -> None:
    assert same(sdconv.load(folder_of(state, tmp_path / "vae")), state)
    assert same(sdconv.load(str(tmp_path / "vae")), state)
    bare = folder_of(state, tmp_path / "bare", config=None)
    assert same(sdconv.load(bare, family="sd1"), state)


def test_config_json_decides_what_shapes_cannot(state: State, tmp_path: Path) -> None:
    config = replace(SMALL, scaling_factor=0.5, norm_num_groups=16)
    folder = folder_of(state, tmp_path / "vae", config)
    for named in (folder, folder / PLAIN, [folder / PLAIN]):
        loaded = sdconv.load(named)
        assert loaded.config == config
        assert loaded.decoder.conv_norm_out.num_groups == 16
    elsewhere = shutil.copy(folder / PLAIN, folder / "other.safetensors")
    assert sdconv.load(elsewhere, family="sd1").config.norm_num_groups == 32  # the control


def test_config_json_of_another_class_is_refused(state: State, tmp_path: Path) -> None:
    folder = folder_of(state, tmp_path / "vae")
    (folder / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(sdconv.UnknownNetworkError, match="another class of network"):
        sdconv.load(folder)


def test_config_json_that_contradicts_the_weights(state: State, tmp_path: Path) -> None:
    config = replace(SMALL, block_out_channels=(32, 96))
    with pytest.raises(sdconv.WeightsMismatchError, match="of the wrong shape") as caught:
        sdconv.load(folder_of(state, tmp_path / "vae", config))
    assert "(96, 32, 3, 3)" in str(caught.value) and "(64, 32, 3, 3)" in str(caught.value)
    message = "whose config says block_out_channels = (32, 96) where the shapes say (32, 64)"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "in down_block_types"),
        ({"block_out_channels": [30, 60]}, "30 channels"),
        ({"layers_per_block": "two"}, "layers_per_block"),
        ({"block_out_channels": None}, "block_out_channels"),
    ],
)
def test_bad_config_json(
    change: dict[str, object], words: str, state: State, tmp_path: Path
) -> None:
    folder = folder_of(state, tmp_path / "vae")
    (folder / "config.json").write_text(json.dumps({**SMALL.to_json(), **change}))
    with pytest.raises(sdconv.CheckpointError, match=words):
        sdconv.load(folder)


def test_variants(state: State, tmp_path: Path) -> None:
    half = {k: v.half() for k, v in state.items()}
    folder = folder_of(state, tmp_path / "vae")
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert sdconv.load(folder).dtype == torch.float32
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    assert same(sdconv.load(folder), half)


def test_shards(state: State, tmp_path: Path) -> None:
    folder = tmp_path / "vae"
    folder.mkdir()
    names = sorted(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(sdconv.load(folder, family="sd1"), state)
    assert same(sdconv.load(sorted(folder.glob("*.safetensors")), family="sd1"), state)


def test_pipeline_folder(state: State, tmp_path: Path) -> None:
    folder_of(state, tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert same(sdconv.load(tmp_path / "pipe"), state)
    assert same(sdconv.load(tmp_path / "pipe", component="vae"), state)
    with pytest.raises(sdconv.UnknownNetworkError, match="no component 'unet'"):
        sdconv.load(tmp_path / "pipe", component="unet")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_requested_dtype(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state, path)
    loaded = sdconv.load(path, dtype=dtype, family="sd1")
    assert same(loaded, {k: v.to(dtype) for k, v in state.items()})
    assert loaded.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_byte_storage_is_upcast(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in state.items()}, path)
    expected = {k: v.to(dtype).float() for k, v in state.items()}
    assert same(sdconv.load(path, family="sd1"), expected)
    half = sdconv.load(path, dtype=torch.float16, family="sd1")
    assert same(half, {k: v.half() for k, v in expected.items()})


def test_mixed_dtypes_become_the_widest(state: State, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    mixed = {k: v.half() if "conv" in k else v for k, v in state.items()}
    save_file(mixed, path)
    assert same(sdconv.load(path, family="sd1"), {k: v.float() for k, v in mixed.items()})


def test_flux2_statistics_are_kept_and_exposed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    assumed = {**AutoencoderKLFlux2Config.assumed, "block_out_channels": (32, 32)}
    network = sdconv.AutoencoderKLFlux2(AutoencoderKLFlux2Config(**assumed)).eval()
    network.bn.running_mean.normal_()
    network.bn.running_var.uniform_(0.5, 2)
    state = {k: v.clone() for k, v in network.state_dict().items()}
    original = original_tensors(state, network.config)
    # the original file has no counter of batches
    del original["bn.num_batches_tracked"]
    for tensors in (state, original):
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "f2.safetensors")
        loaded = sdconv.load(tmp_path / "f2.safetensors")
        assert type(loaded) is sdconv.AutoencoderKLFlux2
        assert same(loaded, state)
        assert torch.equal(loaded.bn.running_var, state["bn.running_var"])


def tiny_halves(tmp_path: Path) -> tuple[sdconv.AutoencoderTiny, Path, Path]:
    torch.manual_seed(2)
    network = sdconv.AutoencoderTiny(TINY).eval()
    tensors = original_tensors(network.state_dict(), TINY)
    paths = []
    for half in ("encoder", "decoder"):
        own = {k.removeprefix(f"{half}."): v for k, v in tensors.items() if k.startswith(half)}
        paths.append(tmp_path / f"{half}.pth")
        torch.save(own, paths[-1])
    return network, *paths


@pytest.mark.parametrize("order", [1, -1])
def test_bare_halves_in_any_order(order: int, tmp_path: Path) -> None:
    network, *halves = tiny_halves(tmp_path)
    loaded = sdconv.load(halves[::order])
    assert same(loaded, dict(network.state_dict())) and loaded.config == TINY


def test_two_halves_of_one_kind_are_refused(tmp_path: Path) -> None:
    _, encoder, decoder = tiny_halves(tmp_path)
    for pair, kind in (((encoder, encoder), "encoder"), ((decoder, decoder), "decoder")):
        with pytest.raises(sdconv.UnknownNetworkError, match="not the two halves") as caught:
            sdconv.load(pair)
        assert str(caught.value).count(f": {kind}") == 2


def test_halves_of_different_autoencoders_are_refused(tmp_path: Path) -> None:
    _, encoder, _ = tiny_halves(tmp_path)
    wide = sdconv.AutoencoderTiny(replace(TINY, latent_channels=16))
    tensors = original_tensors(wide.state_dict(), wide.config)
    decoder = {k[8:]: v for k, v in tensors.items() if k.startswith("decoder.")}
    torch.save(decoder, tmp_path / "wide.pth")
    with pytest.raises(sdconv.WeightsMismatchError, match="different autoencoders"):
        sdconv.load([encoder, tmp_path / "wide.pth"])


def test_one_half_alone(tmp_path: Path) -> None:
    network, encoder, decoder = tiny_halves(tmp_path)
    x, z = torch.rand(1, 3, 16, 16) * 2 - 1, torch.randn(1, 4, 8, 8)
    only_encoder, only_decoder = sdconv.load(encoder), sdconv.load(decoder)
    with torch.no_grad():
        assert torch.equal(only_encoder.encode(x).latents, network.encode(x).latents)
        assert torch.equal(only_decoder.decode(z).sample, network.decode(z).sample)
    with pytest.raises(sdconv.SdconvError, match=r"decoder is missing.*cannot decode"):
        only_encoder.decode(z)
    with pytest.raises(sdconv.SdconvError, match=r"encoder is missing.*cannot encode"):
        only_decoder.encode(x)


def without(state: State, name: str) -> State:
    return {k: v for k, v in state.items() if k != name}


MISFITS = {
    "1 missing": lambda s: without(s, "decoder.up_blocks.1.resnets.0.conv2.bias"),
    "1 unexpected": lambda s: {**s, "decoder.extra.weight": torch.ones(1)},
    "1 of the wrong shape": lambda s: {**s, "quant_conv.weight": torch.ones(8, 4, 1, 1)},
}


@pytest.mark.parametrize("words", MISFITS)
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_tensors_that_do_not_fit(words: str, prefix: str, state: State) -> None:
    broken = {prefix + k: v for k, v in MISFITS[words](state).items()}
    with pytest.raises(sdconv.WeightsMismatchError) as caught:
        sdconv.load(broken, family="sd1")
    text = str(caught.value)
    assert words in text and "expected:" in text and "got:" in text and "hint:" in text
    changed = set(broken).symmetric_difference({prefix + k for k in state}) or {"quant_conv.weight"}
    assert any(name.removeprefix(prefix) in text for name in changed)


ARGUMENTS = {
    "backend": ({"backend": "magic"}, "unknown backend"),
    "integer dtype": ({"dtype": torch.int8}, "do not compute in this dtype"),
    "one-byte dtype": ({"dtype": torch.float8_e4m3fn}, "do not compute in this dtype"),
    "dtype in words": ({"dtype": "float16"}, "do not compute in this dtype"),
    "device": ({"device": "abacus"}, "no such device here"),
    "component": ({"component": "text_encoder"}, "no component 'text_encoder'"),
    "family": ({"family": "flux1"}, "does not fit"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_are_refused(name: str, state: State) -> None:
    arguments, words = ARGUMENTS[name]
    with pytest.raises(sdconv.SdconvError, match=words):
        sdconv.load(state, **arguments)


def test_a_language_model_is_named_as_unknown(tmp_path: Path) -> None:
    path = tmp_path / "llm.safetensors"
    save_file({"model.embed_tokens.weight": torch.ones(8, 4)}, path)
    with pytest.raises(sdconv.UnknownNetworkError, match=r"model\.embed_tokens\.weight") as caught:
        sdconv.load(path)
    assert str(path) in str(caught.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(sdconv.CheckpointError, match="does not exist"):
        sdconv.load(tmp_path / "absent.safetensors")
    with pytest.raises(sdconv.CheckpointError):
        sdconv.load(tmp_path)


def test_running_averages_on_request(tmp_path: Path) -> None:
    from helpers import unets

    unet = unets.ours(unets.theirs(unets.smallest("SD1")))
    weights = original_tensors(unet.state_dict(), unet.config)
    weights = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
    averages = {
        "model_ema." + k.removeprefix("model.").replace(".", ""): v + 1 for k, v in weights.items()
    }
    path = tmp_path / "with-ema.safetensors"
    save_file({k: v.contiguous() for k, v in (weights | averages).items()}, path)
    assert same(sdconv.load(path, family="sd1"), dict(unet.state_dict()))
    assert same(
        sdconv.load(path, ema=True, family="sd1"), {k: v + 1 for k, v in unet.state_dict().items()}
    )
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    with pytest.raises(sdconv.UnknownNetworkError, match="no running averages"):
        sdconv.load(path, ema=True, family="sd1")
    del averages[next(iter(averages))]
    with pytest.raises(sdconv.WeightsMismatchError, match="1 missing"):
        sdconv.load(weights | averages, ema=True, family="sd1")


AFTER_DIFFUSERS = """
import sys, diffusers, sdconv
network = sdconv.load(sys.argv[1])
print("diffusers.models.autoencoders" in sys.modules, isinstance(network, diffusers.AutoencoderKL))
"""


@pytest.mark.slow
def test_opening_does_not_import_diffusers_networks(state: State, tmp_path: Path) -> None:
    """diffusers imports a class when it is asked for, which would take seconds and 100 MB."""
    folder = folder_of(state, tmp_path / "vae")
    command = [sys.executable, "-W", "ignore", "-c", AFTER_DIFFUSERS, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point(dtype: torch.dtype, state: State) -> None:
    broken = {**state, "encoder.conv_in.weight": state["encoder.conv_in.weight"].to(dtype)}
    with pytest.raises(sdconv.WeightsMismatchError, match="1 not floating-point") as caught:
        sdconv.load(broken, family="sd1")
    assert "got: encoder.conv_in.weight" in str(caught.value)


def test_weights_that_are_not_dense(state: State) -> None:
    broken = {**state, "quant_conv.weight": state["quant_conv.weight"].to_sparse()}
    with pytest.raises(
        sdconv.WeightsMismatchError, match=r"quant_conv\.weight is not a dense tensor"
    ):
        sdconv.load(broken, family="sd1")


@pytest.mark.parametrize("dtype", first_of([None, torch.float16]))
@pytest.mark.parametrize("kind", ["file", "whole checkpoint", "folder", "pipeline", "pickle"])
def test_without_a_mapping(
    kind: str, dtype: torch.dtype | None, state: State, tmp_path: Path
) -> None:
    """Every tensor is in memory: what happens to the file afterwards does not matter."""
    path = file = tmp_path / "model.safetensors"
    component = None
    if kind == "file":
        save_file(state, path)
    elif kind == "whole checkpoint":
        named = original_tensors(state, SMALL)
        whole = {f"first_stage_model.{k}": v.contiguous() for k, v in named.items()}
        save_file(whole | {"cond_stage_model.a.weight": torch.ones(3)}, path)
        component = "vae"
    elif kind == "pickle":
        path = file = tmp_path / "model.ckpt"
        torch.save({"state_dict": state}, path)
    else:
        path = tmp_path / "model"
        folder = path if kind == "folder" else path / "vae"
        folder.mkdir(parents=True)
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file(state, file)
        component = None if kind == "folder" else "vae"
    network = sdconv.load(path, component, dtype, family="sd1", mmap=False)
    assert not any(is_mapped(tensor, file) for tensor in network.state_dict().values())
    if dtype is None and kind != "pickle":  # the control
        mapped = sdconv.load(path, component, family="sd1")
        assert all(is_mapped(tensor, file) for tensor in mapped.state_dict().values())
        del mapped
    file.write_bytes(b"")
    wanted = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    assert all(torch.equal(network.state_dict()[k], v) for k, v in wanted.items())
