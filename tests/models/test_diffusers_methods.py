"""Methods and attributes with which diffusers' programs change how a network computes: the results
are diffusers' own, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from helpers import seeded, unets
from helpers.numbers import randn
from helpers.slow import first_of
from torch import Tensor

import sdconv

UNET = unets.smallest("SD1") | {"sample_size": 8}
# wide enough that torch's kernels for the plain and the fused attention round differently
KL = seeded.kl((32, 64), 4, True, layers_per_block=1)
FLUX2 = seeded.flux2((32, 64), layers_per_block=1)
TINY = seeded.SMALL_TINY
Pair = tuple[Any, Any]


def autoencoders(config: Any, folder: Path) -> Pair:
    """sdconv's network, and diffusers' of the same weights."""
    ours = seeded.network(config)
    ours.save_pretrained(folder)
    return ours, getattr(diffusers, config.class_name).from_pretrained(folder).eval()


def unet_pair(config: dict[str, Any] = UNET) -> Pair:
    peer = unets.theirs(config)
    return unets.ours(peer), peer


@torch.no_grad()
def results(network: Any) -> list[Tensor]:
    """What the network computes from seeded inputs, in its dtype."""
    if hasattr(network, "conv_in"):
        given = unets.inputs(network.config)
        return [
            network(
                *(x.to(network.dtype) if x is not None and x.ndim > 1 else x for x in given[:3])
            ).sample
        ]
    config = network.config
    latents = randn(2, config["latent_channels"], 12, 10).to(network.dtype)
    images = randn(2, 3, 24, 20).to(network.dtype)
    encoded = network.encode(images)
    first = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    return [first, network.decode(latents).sample]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- attention of a VAE


@pytest.mark.parametrize("config", [KL, FLUX2], ids=["kl", "flux2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_processors_of_a_vae(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    pair = autoencoders(config, tmp_path)
    ours, theirs = (one.to(dtype) for one in pair)
    assert list(ours.attn_processors) == list(theirs.attn_processors)
    before = results(ours)
    assert equal(before, results(theirs))

    def both(change: Callable[[Any], object]) -> list[Tensor]:
        change(ours)
        change(theirs)
        got = results(ours)
        assert equal(got, results(theirs))
        kinds = [[type(one) for one in network.attn_processors.values()] for network in pair]
        assert kinds[0] == kinds[1]
        return got

    plain = both(lambda one: one.set_default_attn_processor())
    assert not equal(plain, before), "the control: the two kinds round differently"
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, before, strict=True))
    again = both(lambda one: one.set_attn_processor(attention_processor.AttnProcessor2_0()))
    assert equal(again, before)
    both(lambda one: one.set_attn_processor(attention_processor.AttnProcessor()))
    kept = ours.attn_processors
    for one in pair:
        one.fuse_qkv_projections()
    # diffusers multiplies by one wide matrix then, whose kernel may round differently
    for a, b in zip(results(ours), results(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert equal(both(lambda one: one.unfuse_qkv_projections()), plain)
    assert ours.attn_processors == kept
    with pytest.raises(sdconv.InputError, match="not one processor for each"):
        ours.set_attn_processor({"decoder.other": attention_processor.AttnProcessor()})
    assert equal(results(copy.deepcopy(ours)), plain)


# --- U-Net


def test_freeu_by_attributes() -> None:
    ours, theirs = unet_pair(unets.small("SD1"))
    plain = results(ours)
    factors = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}

    def attributes(network: Any) -> list[Any]:
        return [[getattr(b, name, None) for name in factors] for b in network.up_blocks]

    # as diffusers' own enable_freeu does, and programs that copied it
    for block in (*ours.up_blocks, *theirs.up_blocks):
        for name, factor in factors.items():
            setattr(block, name, factor)
    changed = results(ours)
    assert equal(changed, results(theirs)) and not equal(changed, plain)
    for network in (ours, theirs):
        network.disable_freeu()
    assert attributes(ours) == attributes(theirs) and equal(results(ours), plain)
    for network in (ours, theirs):
        network.enable_freeu(**factors)
    assert attributes(ours) == attributes(theirs) and equal(results(ours), changed)
    for network in (ours, theirs):  # a factor of 0 is off
        network.enable_freeu(**factors | {"b2": 0})
    assert equal(results(ours), results(theirs)) and equal(results(ours), plain)
    assert [b.resolution_idx for b in ours.up_blocks] == [
        b.resolution_idx for b in theirs.up_blocks
    ]


@pytest.mark.parametrize("size", first_of(["one for each", "auto", "max", 1, None]))
def test_attention_slices(size: Any) -> None:
    pair = unet_pair()
    plain = results(pair[0])
    for network in pair:
        each = size == "one for each"
        network.set_attention_slice([2] * len(network.attn_processors) if each else size)
    ours, theirs = map(results, pair)
    assert equal(ours, theirs)
    assert equal(ours, plain) == (size is None), "the control: slices round differently"
    with pytest.raises(ValueError, match="has to be smaller"):
        pair[0].set_attention_slice(99)


def test_a_pipeline_slices_attention() -> None:
    found = []
    for unet in unet_pair():
        pipe = diffusers.StableDiffusionPipeline(
            vae=seeded.network(KL),
            unet=unet,
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            **dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor")),
            requires_safety_checker=False,
        )
        seen = [results(unet)]
        pipe.enable_attention_slicing()
        seen.append(results(unet))
        pipe.disable_attention_slicing()
        seen.append(results(unet))
        found.append(seen)
    assert all(map(equal, *found))
    assert not equal(found[0][0], found[0][1])


# --- layerwise casting, attention backends

CASTS: dict[str, dict[str, Any]] = {
    "float8": {"storage_dtype": torch.float8_e4m3fn},
    "float8 e5m2, computed in bfloat16": {
        "storage_dtype": torch.float8_e5m2,
        "compute_dtype": torch.bfloat16,
    },
    "skipped names": {
        "storage_dtype": torch.float8_e4m3fn,
        "compute_dtype": torch.float32,
        "skip_modules_pattern": ("conv_in", "mid_block", "norm"),
    },
    "skipped classes": {
        "storage_dtype": torch.float16,
        "compute_dtype": torch.float32,
        "skip_modules_classes": (torch.nn.Conv2d,),
    },
}


@pytest.mark.parametrize("case", CASTS)
@pytest.mark.parametrize("kind", first_of(["unet", "kl", "flux2", "tiny"]))
def test_layerwise_casting(kind: str, case: str, tmp_path: Path) -> None:
    configs = {"kl": KL, "flux2": FLUX2, "tiny": TINY}
    pair = unet_pair() if kind == "unet" else autoencoders(configs[kind], tmp_path)
    before = results(pair[0])
    compute = CASTS[case].get("compute_dtype", torch.float32)
    for network in pair:
        network.to(compute).enable_layerwise_casting(**CASTS[case])
    ours, theirs = ({n: p.dtype for n, p in one.named_parameters()} for one in pair)
    assert ours == theirs
    if not set(ours.values()) - {compute}:
        assert (kind, case) == ("tiny", "skipped classes")  # it has no other layers
        return
    assert pair[0].dtype == pair[1].dtype == compute
    got = results(pair[0])
    assert got[-1].dtype == compute and equal(got, results(pair[1]))
    assert not equal([x.float() for x in got], before), "the control: rounded weights show"
    # the fast backend leaves these layers to the reference
    with sdconv.backend("fast"):
        fast = results(pair[0])
    assert all(
        torch.allclose(a.float(), b.float(), atol=0.1) for a, b in zip(fast, got, strict=True)
    )


@pytest.mark.parametrize("kind", ["kl", "tiny", "unet"])
def test_modules_that_stay_in_float32(kind: str, tmp_path: Path) -> None:
    configs = {"kl": KL, "tiny": TINY}
    pair = unet_pair() if kind == "unet" else autoencoders(configs[kind], tmp_path)
    for network in pair:
        assert network._keep_in_fp32_modules is None
        network._keep_in_fp32_modules = ["conv_out", "layers.0"]
        network.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    ours, theirs = ({n: p.dtype for n, p in one.named_parameters()} for one in pair)
    assert ours == theirs
    assert any(dtype is torch.float32 for name, dtype in ours.items() if "norm" not in name)
    assert equal(results(pair[0]), results(pair[1]))


@pytest.fixture
def active_backend() -> Iterator[None]:
    """Restores diffusers' attention backend, which is the whole process's."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.parametrize("kind", ["kl", "tiny", "unet"])
def test_attention_backends(kind: str, active_backend: None, tmp_path: Path) -> None:
    configs = {"kl": KL, "tiny": TINY}
    pair = unet_pair() if kind == "unet" else autoencoders(configs[kind], tmp_path)
    for network in pair:
        network.set_attention_backend("_native_math")
        with pytest.raises(ValueError, match="must be one of"):
            network.set_attention_backend("no such backend")
    assert equal(results(pair[0]), results(pair[1]))
    for network in pair:
        network.reset_attention_backend()
    assert equal(results(pair[0]), results(pair[1]))


# --- adapters that take a U-Net apart


@pytest.mark.parametrize("family", first_of(["SDXL", "SD1"]))
def test_controlnet_xs(family: str) -> None:
    config = unets.small(family) | {"layers_per_block": 2, "sample_size": 8}
    pair = unet_pair(config)
    found = []
    for unet in pair:
        torch.manual_seed(11)
        adapter = diffusers.ControlNetXSAdapter.from_unet(unets.theirs(config), size_ratio=0.5)
        for parameter in adapter.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        model = diffusers.UNetControlNetXSModel.from_unet(unet, adapter).eval()
        # its up path does not resize to odd sizes
        sample, timestep, text, *_, added = unets.inputs(unets.theirs(config).config, size=(8, 16))
        with torch.no_grad():
            found += [
                model(
                    sample,
                    timestep,
                    text,
                    controlnet_cond=randn(2, 3, 64, 128),
                    added_cond_kwargs=added,
                    apply_control=control,
                ).sample
                for control in (True, False)
            ]
            found.append(unet(sample, timestep, text, added_cond_kwargs=added).sample)
    assert equal(found[:3], found[3:])
    assert not torch.equal(found[0], found[1]), "the control does something"
