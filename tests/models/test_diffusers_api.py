"""A network in the place of diffusers' class of the same name: kept by ``from_pipe``, opened,
saved, measured and offloaded by the methods that diffusers' models have."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from helpers import pipelines, seeded, unets
from helpers.paths import ROOT
from helpers.slow import first_of
from helpers.versions import fails_on_torch_2_6
from safetensors.torch import load_file
from torch import nn

import sdconv
from sdconv.models.base import Network

KL = seeded.kl((32, 64), 4, True, layers_per_block=1, scaling_factor=0.25)
FLUX2 = seeded.flux2((32, 64), layers_per_block=1)
TINY = seeded.tiny(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)
UNET = unets.smallest("SD1") | {"sample_size": 8}
KINDS = ["AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny", "UNet2DConditionModel"]


def network(kind: str) -> Network:
    if kind == "UNet2DConditionModel":
        return unets.ours(unets.theirs(UNET))
    return seeded.network({one.class_name: one for one in (KL, FLUX2, TINY)}[kind])


def pair(kind: str, folder: Path) -> tuple[Network, Any]:
    """Ours, and diffusers' opened from what ours saved."""
    ours = network(kind)
    ours.save_pretrained(folder)
    return ours, getattr(diffusers, kind).from_pretrained(folder)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- pipelines made from other pipelines


def pipeline(**parts: Any) -> Any:
    given: dict[str, Any] = {
        "vae": network("AutoencoderKL"),
        "unet": network("UNet2DConditionModel"),
        "scheduler": pipelines.scheduler(),
        **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
    }
    return diffusers.StableDiffusionPipeline(**given | parts, requires_safety_checker=False)


def test_from_pipe_keeps_the_networks() -> None:
    pipe = pipeline()
    for name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        made = getattr(diffusers, name).from_pipe(pipe)
        assert made.vae is pipe.vae and made.unet is pipe.unet
    again = diffusers.AutoPipelineForText2Image.from_pipe(made)
    assert again.vae is pipe.vae and again.unet is pipe.unet


def test_from_pipe_with_a_tiny_autoencoder() -> None:
    """No pipeline asks for it by its type, so it has to be named, diffusers' own as well."""
    for vae in (network("AutoencoderTiny"), diffusers.AutoencoderTiny()):
        pipe = pipeline(vae=vae)
        with pytest.raises(ValueError, match="but only"):
            diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        made = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, vae=pipe.vae)
        assert made.vae is vae and made.unet is pipe.unet


@pytest.mark.parametrize("kind", KINDS)
def test_equal_classes_are_one_in_sets_and_dictionaries(kind: str) -> None:
    ours, theirs = network(kind), getattr(diffusers, kind)
    before = type(ours)
    assert before != theirs != before and len({before, theirs}) == 2
    assert {before: 1, theirs: 2}[before] == 1
    pipe = pipeline(unet=ours) if kind == "UNet2DConditionModel" else pipeline(vae=ours)
    after = type(ours)
    assert issubclass(after, before) and (after.__name__, after.__module__) == (
        before.__name__,
        before.__module__,
    )
    assert after == theirs == after and not (after != theirs) and after in (theirs,)
    assert hash(after) == hash(theirs)
    assert len({after, theirs}) == len({theirs, after}) == 1 and len({before, after, theirs}) == 2
    table = {theirs: "theirs", before: "before"}
    assert table[after] == "theirs" and table[before] == "before"
    assert {after: "after"}[theirs] == "after"
    equal = [other for other in KINDS if after == getattr(diffusers, other)]
    assert equal == [kind]
    # the same class for every network that a pipeline takes
    other = network(kind)
    pipe.register_modules(**{"unet" if kind == "UNet2DConditionModel" else "vae": other})
    assert type(other) is after


def test_a_class_equals_only_diffusers_class() -> None:
    assert sdconv.AutoencoderKL != diffusers.AutoencoderKL
    assert sdconv.AutoencoderKL != sdconv.AutoencoderKLFlux2 != sdconv.AutoencoderTiny

    class Other:
        pass

    Other.__name__ = "AutoencoderKL"  # somebody else's class of that name
    taken = type(pipeline().vae)
    assert taken != Other and taken != nn.Module and taken != sdconv.AutoencoderKL


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_are_of_sdconvs_class(kind: str) -> None:
    ours = network(kind)
    before = type(ours)
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(again) is before and same(again, ours)
    pipeline(**{"unet" if kind == "UNet2DConditionModel" else "vae": ours})
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        again = pickle.loads(pickle.dumps(ours, protocol))
        assert type(again) is before and same(again, ours)
        assert pickle.loads(pickle.dumps(before, protocol)) is before
    assert type(copy.deepcopy(ours)) is before


IN_ORDER = """
import warnings
warnings.simplefilter("ignore")
{imports}
vae = sdconv.AutoencoderKL(sdconv.AutoencoderKLConfig(**sdconv.AutoencoderKLConfig.assumed | dict(
    block_out_channels=(32, 32), layers_per_block=1)))
table = {{sdconv.AutoencoderKL: "sdconv"}}
isinstance(vae, dict)  # puts the class into the cache of an abstract base class
import diffusers
table[diffusers.AutoencoderKL] = "diffusers"
names = ("unet", "text_encoder", "tokenizer", "safety_checker", "feature_extractor", "scheduler")
pipe = diffusers.StableDiffusionPipeline(
    vae=vae, requires_safety_checker=False, **dict.fromkeys(names))
assert table[sdconv.AutoencoderKL] == "sdconv" and table[type(vae)] == "diffusers"
assert len({{sdconv.AutoencoderKL, diffusers.AutoencoderKL, type(vae)}}) == 2
assert vae in {{vae}} and isinstance(vae, (diffusers.AutoencoderKL, sdconv.AutoencoderKL))
assert not isinstance(vae, dict)
made = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
assert made.vae is vae
"""


@pytest.mark.slow
@pytest.mark.parametrize("imports", first_of(["import sdconv", "import diffusers, sdconv"]))
def test_classes_behave_in_either_order_of_imports(imports: str) -> None:
    command = [sys.executable, "-c", IN_ORDER.format(imports=imports)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr


# --- opened and saved


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_and_from_config(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path / "part")
    cls = type(ours)
    opened = cls.from_pretrained(tmp_path, subfolder="part", local_files_only=True)
    assert type(opened) is cls and same(opened, theirs) and not opened.training
    assert opened.config == ours.config
    half = cls.from_pretrained(tmp_path / "part", torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert cls.from_pretrained(str(tmp_path / "part"), dtype=torch.float16).dtype == half.dtype
    # float32 for any dtype of the file, as in diffusers
    half.save_pretrained(tmp_path / "half")
    assert cls.from_pretrained(tmp_path / "half").dtype == torch.float32
    sdconv.save(ours, tmp_path / "alone.safetensors")
    alone = cls.from_single_file(tmp_path / "alone.safetensors")
    assert same(alone, ours) and alone.config == ours.config

    content = cls.load_config(tmp_path, subfolder="part")
    assert content["_class_name"] == kind
    for config in (content, ours.config, dict(theirs.config)):
        made = cls.from_config(config)
        assert type(made) is cls and made.config == ours.config
        assert list(made.state_dict()) == list(ours.state_dict())
    assert json.loads(ours.to_json_string()) == content
    ours.save_config(tmp_path / "config only")
    assert cls.load_config(tmp_path / "config only") == content


def test_the_skeleton_class_opens_with_transformers(tmp_path: Path) -> None:
    ours, _ = pair("UNet2DConditionModel", tmp_path)
    assert same(sdconv.UNet2DConditionModel.from_pretrained(tmp_path), ours)
    made = sdconv.UNet2DConditionModel.from_config(ours.config)
    assert list(made.state_dict()) == list(ours.state_dict())


def test_variants(tmp_path: Path) -> None:
    ours = network("AutoencoderKL").half()
    ours.save_pretrained(tmp_path, variant="fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ]
    cls = sdconv.AutoencoderKL
    assert same(cls.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16), ours)
    with pytest.raises(sdconv.InputError, match="unknown variant"):
        cls.from_pretrained(tmp_path, variant="bf16")
    # next to weights without a variant, each opens its own
    network("AutoencoderKL").save_pretrained(tmp_path)
    assert same(cls.from_pretrained(tmp_path), network("AutoencoderKL"))
    assert same(cls.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16), ours)


def test_options_of_from_pretrained(tmp_path: Path) -> None:
    """What diffusers takes for the config, the device and the hub; what does not exist is said."""
    network("AutoencoderKL").save_pretrained(tmp_path)
    cls, peer = sdconv.AutoencoderKL, diffusers.AutoencoderKL
    for fields in ({}, {"scaling_factor": 0.5}, {"force_upcast": False, "sample_size": 64}):
        ours, theirs = (one.from_pretrained(tmp_path, **fields) for one in (cls, peer))
        assert same(ours, theirs)
        for name in ("scaling_factor", "force_upcast", "sample_size", "latent_channels"):
            assert ours.config[name] == theirs.config[name]
    quiet: dict[str, Any] = {
        **{"device_map": {"": "cpu"}, "low_cpu_mem_usage": False, "mirror": None},
        **{"ignore_mismatched_sizes": False, "disable_mmap": True, "max_memory": None},
    }
    assert same(cls.from_pretrained(tmp_path, **quiet), network("AutoencoderKL"))
    with pytest.warns(sdconv.SdconvWarning, match="ignores options that do not exist: foo"):
        assert same(cls.from_pretrained(tmp_path, foo=1), network("AutoencoderKL"))
    # a config of one's own, as for from_single_file
    config = {**network("AutoencoderKL").config.to_json(), "scaling_factor": 0.75}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    for one in (config, tmp_path / "own", str(tmp_path / "own" / "config.json")):
        state = network("AutoencoderKL").state_dict()
        assert cls.from_single_file(state, config=one).config.scaling_factor == 0.75
    with pytest.raises(sdconv.InputError, match="config is not on this machine"):
        cls.from_pretrained(tmp_path, config="owner/name")
    with pytest.raises(sdconv.InputError, match="not support"):
        cls.from_pretrained(tmp_path, original_config="v1-inference.yaml")
    with pytest.raises(sdconv.CheckpointError, match="block_out_channels"):
        cls.from_pretrained(tmp_path, block_out_channels="many")


def test_what_from_pretrained_refuses(tmp_path: Path) -> None:
    network("AutoencoderTiny").save_pretrained(tmp_path)
    with pytest.raises(sdconv.InputError, match="another network") as caught:
        sdconv.AutoencoderKL.from_pretrained(tmp_path)
    assert "got: AutoencoderTiny" in str(caught.value)
    with pytest.raises(sdconv.UnknownNetworkError, match="no component 'unet'"):
        sdconv.UNet2DConditionModel.from_pretrained(tmp_path)
    for option in ({"quantization_config": {}, "output_loading_info": True}, {"from_flax": 1}):
        with pytest.raises(sdconv.InputError, match="not support") as caught:
            sdconv.AutoencoderTiny.from_pretrained(tmp_path, **option, token=None)
        assert f"got: {list(option)[-1]}\n" in str(caught.value)
    with pytest.raises(sdconv.InputError, match="does not spread a network over devices"):
        sdconv.AutoencoderTiny.from_pretrained(tmp_path, device_map="auto")
    with pytest.warns(sdconv.SdconvWarning, match="could be of sd1"):
        sdconv.AutoencoderKL.from_single_file(network("AutoencoderKL").state_dict())
    decided = sdconv.AutoencoderKL.from_single_file(
        network("AutoencoderKL").state_dict(), family="sdxl"
    )
    assert decided.config.scaling_factor == 0.13025
    # a repository id is not a path, and nothing is fetched
    with pytest.raises(sdconv.CheckpointError, match="madebyollin"):
        sdconv.AutoencoderTiny.from_pretrained("madebyollin/taesd")
    for config in (None, "config.json", 3):
        with pytest.raises(sdconv.InputError, match="not a config"):
            sdconv.AutoencoderTiny.from_config(config)
    for config in (None, {"latent_channels": 4}, network("AutoencoderKL").config):
        with pytest.raises(sdconv.InputError, match="not a config"):
            sdconv.AutoencoderTiny(config)  # type: ignore[arg-type]
    with pytest.raises(sdconv.CheckpointError):
        sdconv.AutoencoderTiny.from_config({"latent_channels": "four"})
    with pytest.raises(sdconv.CheckpointError):
        sdconv.AutoencoderTiny.load_config(tmp_path, subfolder="none")


def test_options_of_save_pretrained(tmp_path: Path) -> None:
    ours = network("AutoencoderKL")
    ours.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    ours.save_pretrained(tmp_path / "a", max_shard_size="1GB", push_to_hub=False)
    assert same(sdconv.load(tmp_path / "a"), ours)
    with pytest.raises(sdconv.InputError, match="uploads nothing"):
        ours.save_pretrained(tmp_path / "b", push_to_hub=True, repo_id="a/b")
    with pytest.raises(sdconv.InputError, match="does not support"):
        ours.save_pretrained(tmp_path / "b", use_flashpack=True)
    with pytest.raises(sdconv.InputError, match="not a size"):
        ours.save_pretrained(tmp_path / "b", max_shard_size="much")
    assert not (tmp_path / "b").exists()
    # diffusers ignores these too
    ours.save_pretrained(tmp_path / "c", save_function=print, repo_id="a/b", token=None)
    assert same(sdconv.load(tmp_path / "c"), ours)
    with pytest.warns(sdconv.SdconvWarning, match="safetensors are written, not pickles"):
        ours.save_pretrained(tmp_path / "b", safe_serialization=False)
    assert same(sdconv.load(tmp_path / "b"), ours)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", first_of(["20KB", "1KB", 100_000]))
def test_shards_are_diffusers(size: int | str, variant: str | None, tmp_path: Path) -> None:
    ours, theirs = pair("AutoencoderKL", tmp_path / "first")
    for name, one in (("ours", ours), ("theirs", theirs)):
        one.save_pretrained(tmp_path / name, max_shard_size=size, variant=variant)
    names, expected = (
        sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "theirs")
    )
    assert names == expected and len(names) > 3
    (index,) = (name for name in names if "index" in name)
    read = [json.loads((tmp_path / name / index).read_text()) for name in ("ours", "theirs")]
    assert read[0]["weight_map"] == read[1]["weight_map"]
    for name in names:
        if name.endswith(".safetensors"):
            assert list(load_file(tmp_path / "ours" / name)) == list(
                load_file(tmp_path / "theirs" / name)
            )
    again = type(theirs).from_pretrained(tmp_path / "ours", variant=variant)
    assert same(again, ours)
    assert same(sdconv.AutoencoderKL.from_pretrained(tmp_path / "ours", variant=variant), ours)


def test_a_save_leaves_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    ours = network("AutoencoderKL")
    whole = ["config.json", "diffusion_pytorch_model.safetensors"]
    ours.save_pretrained(tmp_path, variant="fp16")
    for size in ("20KB", "1GB", "50KB", "20KB", None):
        ours.save_pretrained(tmp_path, max_shard_size=size)
        assert same(sdconv.load(tmp_path), ours)
    names = sorted(path.name for path in tmp_path.iterdir() if "fp16" not in path.name)
    assert names == whole
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").exists(), "another variant"


@torch.no_grad()
def test_results_survive_accelerate() -> None:
    """It converts and moves what is in a mapping, and calls the class with a dictionary."""
    from accelerate.utils import convert_outputs_to_fp32, send_to_device

    unet, vae, tiny = (
        network(kind).to(torch.bfloat16)
        for kind in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny")
    )
    z, x = torch.zeros(1, 4, 8, 8).bfloat16(), torch.zeros(1, 3, 16, 16).bfloat16()
    text = torch.zeros(1, 7, UNET["cross_attention_dim"]).bfloat16()
    for run, name in (
        (lambda: unet(z, 1, text), "sample"),
        (lambda: vae.decode(z), "sample"),
        (lambda: tiny.encode(x), "latents"),
    ):
        out = run()
        assert out[name].dtype is torch.bfloat16
        for found in (convert_outputs_to_fp32(run)(), send_to_device(out, "meta")):
            assert type(found) is type(out) and list(found) == [name]
            assert found[name] is getattr(found, name) is found[0] is found.to_tuple()[0]
        assert convert_outputs_to_fp32(run)()[name].dtype is torch.float32
        assert send_to_device(out, "meta")[name].is_meta
        assert dict(**out)[name] is out[name] and "other" not in out
    posterior = vae.encode(x)
    moved = send_to_device(posterior, "cpu")
    assert moved.latent_dist is posterior.latent_dist


@pytest.mark.parametrize("kind", first_of(["SDXL", "SD1"]))
def test_controlnet_xs_reads_the_blocks(kind: str) -> None:
    theirs = unets.theirs(unets.small(kind))
    ours: Any = unets.ours(theirs)
    facts = []
    for unet in (ours, theirs):
        named = dict(unet.named_modules())
        resnets = [named[name] for name in named if name.rpartition(".")[0].endswith("resnets")]
        facts.append([(one.in_channels, one.out_channels) for one in resnets])
    assert facts[0] == facts[1] and len(facts[0]) > 10


def test_ema_model(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    ours = network("AutoencoderKL")
    kind: Any = sdconv.AutoencoderKL
    average = EMAModel(
        ours.parameters(), decay=0.5, power=0.7, model_cls=kind, model_config=ours.config
    )
    with torch.no_grad():
        moved = [parameter + 1 for parameter in ours.parameters()]
    average.step(moved)
    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, kind)
    assert (again.decay, again.power, again.optimization_step) == (0.5, 0.7, 1)
    pairs = zip(again.shadow_params, average.shadow_params, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert json.loads((tmp_path / "config.json").read_text())["decay"] == 0.5
    with pytest.warns(FutureWarning, match="name or path to `from_config`"):
        theirs = EMAModel.from_pretrained(tmp_path, diffusers.AutoencoderKL)
    assert theirs.optimization_step == 1
    assert sdconv.load(tmp_path).config == ours.config
    _, unused = kind.from_config(str(tmp_path), return_unused_kwargs=True)
    assert unused["power"] == 0.7
    assert kind.from_config(ours.config, return_unused_kwargs=True)[1] == {}


def test_a_pipeline_saves_with_its_options(tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="5GB", variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").exists()
    vae = sdconv.AutoencoderKL.from_pretrained(tmp_path, subfolder="vae", variant="fp16")
    assert same(vae, pipe.vae)


@pytest.mark.parametrize("kind", KINDS)
def test_register_to_config(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    before = ours.config
    # as training scripts do with a loaded network
    for fields in (theirs.config, before, {}, {"_name_or_path": "somewhere"}):
        ours.register_to_config(**fields)
        assert ours.config == before
    ours.register_to_config(in_channels=5)
    assert ours.config.in_channels == 5 and ours.config != before
    kept = ours.config
    with pytest.raises(sdconv.InputError, match="unknown field") as caught:
        ours.register_to_config(sampel_size=1)
    assert "got: sampel_size" in str(caught.value)
    for wrong in ({"act_fn": "gelu"}, {"latent_channels": "four"}, {"in_channels": None}):
        if set(wrong) <= set(before):
            with pytest.raises(sdconv.InputError, match="invalid config"):
                ours.register_to_config(**wrong)
    assert ours.config == kept


# --- measured


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_parameters_and_bytes(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    for one in (ours, theirs):
        one.requires_grad_(True)
        next(one.parameters()).requires_grad_(False)
    for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
        assert ours.num_parameters(**options) == theirs.num_parameters(**options)
    assert ours.num_parameters(only_trainable=True) < ours.num_parameters()
    for options in ({}, {"return_buffers": False}):
        assert ours.get_memory_footprint(**options) == theirs.get_memory_footprint(**options)
    assert ours.half().get_memory_footprint() < theirs.get_memory_footprint()


def test_embeddings_are_left_out() -> None:
    theirs = unets.theirs(unets.smallest("x4 upscaler"))
    ours = unets.ours(theirs)
    assert ours.num_parameters(exclude_embeddings=True) < ours.num_parameters()
    assert ours.num_parameters(exclude_embeddings=True) == theirs.num_parameters(
        exclude_embeddings=True
    )


# --- attention, tiling, offloading


def decoded(vae: Any) -> torch.Tensor:
    z = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return vae.decode(z).sample


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_attention_settings_change_no_result(kind: str) -> None:
    vae = network(kind)
    expected = decoded(vae)
    vae.fuse_qkv_projections()
    vae.set_attn_processor(attention_processor.AttnProcessor2_0())
    vae.set_attn_processor(vae.attn_processors)
    vae.enable_xformers_memory_efficient_attention()
    assert torch.equal(decoded(vae), expected)
    vae.unfuse_qkv_projections()
    vae.disable_xformers_memory_efficient_attention()
    assert torch.equal(decoded(vae), expected)
    vae.set_default_attn_processor()  # which only rounds differently
    assert torch.allclose(decoded(vae), expected, atol=1e-4)
    with pytest.raises(sdconv.SdconvError, match="cannot be replaced") as caught:
        vae.set_attn_processor({"a": attention_processor.AttnAddedKVProcessor()})
    assert "got: AttnAddedKVProcessor" in str(caught.value)


def test_a_pipeline_fuses_projections() -> None:
    pipe = pipeline()
    expected = decoded(pipe.vae)
    arguments = unets.inputs(pipe.unet.config)
    with torch.no_grad():
        before = pipe.unet(*arguments).sample
        pipe.fuse_qkv_projections()
        after = pipe.unet(*arguments).sample
        assert after is not before and torch.allclose(after, before, atol=1e-4)
        assert torch.equal(decoded(pipe.vae), expected)
        pipe.unfuse_qkv_projections()
        assert torch.equal(pipe.unet(*arguments).sample, before)


def test_use_tiling_gets_and_sets() -> None:
    vae = network("AutoencoderKL")
    assert not vae.use_tiling and not vae.use_slicing
    vae.use_tiling = True
    assert vae.use_tiling and vae.streaming is not None
    vae.enable_tiling(False)
    assert not vae.use_tiling
    tiny = network("AutoencoderTiny")
    tiny.enable_tiling(False)
    assert not tiny.use_tiling
    tiny.use_tiling = True
    assert tiny.use_tiling


@fails_on_torch_2_6("diffusers asks it for an accelerator, which it cannot answer without one")
@pytest.mark.parametrize("level", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}])
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_group_offload(kind: str, level: dict[str, Any]) -> None:
    vae = network(kind)
    expected = decoded(vae)
    vae.enable_group_offload(torch.device("cpu"), **level)
    assert any(hasattr(module, "_diffusers_hook") for module in vae.modules())
    assert torch.equal(decoded(vae), expected)


@fails_on_torch_2_6("diffusers asks it for an accelerator, which it cannot answer without one")
def test_a_pipeline_offloads_in_groups() -> None:
    pipe = pipeline()
    arguments = unets.inputs(pipe.unet.config)
    with torch.no_grad():
        expected = pipe.unet(*arguments).sample
        pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
        assert torch.equal(pipe.unet(*arguments).sample, expected)


@pytest.mark.slow
def test_methods_that_reach_the_transformers() -> None:
    ours, theirs = network("UNet2DConditionModel"), unets.theirs(UNET)
    arguments = unets.inputs(theirs.config)
    results = []
    for unet in (ours, theirs):
        unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert unet.dtype == torch.float32
        assert {p.dtype for p in unet.parameters()} == {torch.float8_e4m3fn, torch.float32}
        with torch.no_grad():
            results.append(unet(*arguments).sample)
    assert torch.equal(*results)
    ours.disable_xformers_memory_efficient_attention()
    ours.compile_repeated_blocks(backend="eager")
    with torch.no_grad():
        assert torch.equal(ours(*arguments).sample, results[0])
    torch.compiler.reset()


def test_parts_of_the_embedding() -> None:
    for family in ("SD1", "SDXL", "x4 upscaler"):
        theirs = unets.theirs(unets.smallest(family))
        ours = unets.ours(theirs)
        sample, timestep, prompt_embeds, labels, *_, added = unets.inputs(theirs.config)
        parts = []
        for unet in (ours, theirs):
            with torch.no_grad():
                time = unet.get_time_embed(sample=sample, timestep=timestep)
                temb = unet.time_embedding(time)
                parts.append(
                    (
                        time,
                        unet.get_class_embed(sample=sample, class_labels=labels),
                        unet.get_aug_embed(
                            emb=temb, encoder_hidden_states=prompt_embeds, added_cond_kwargs=added
                        ),
                        unet.process_encoder_hidden_states(
                            encoder_hidden_states=prompt_embeds, added_cond_kwargs=added
                        ),
                    )
                )
        for one, other in zip(*parts, strict=True):
            assert one is other is None or torch.equal(one, other)
