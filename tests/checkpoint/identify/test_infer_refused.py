"""Shapes that cannot be a network's: each has its own message; only sdconv's errors are raised."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import seeded, unets
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import sdconv
from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.identify.infer import identify
from sdconv.checkpoint.save import original_tensors
from sdconv.config import Config

Shapes = dict[str, tuple[int, ...]]
KL = seeded.kl((32, 64), 4, True, layers_per_block=1)


@cache
def _shapes(config: Config, layout: str) -> Shapes:
    tensors = seeded.tensors(config)
    if layout == "original":
        tensors = original_tensors(tensors, config)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def shapes(config: Config = KL, layout: str = "original", **changed: tuple[int, ...]) -> Shapes:
    return {**_shapes(config, layout), **changed}


def meta(named: Shapes) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in named.items()}


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        (None, "a mapping of tensor names"),
        ([1], "a mapping of tensor names"),
        ("vae.safetensors", r"sdconv\.infer\(sdconv\.read_header\(path\)\)"),
        ({"x": 3}, r"got: 'x': 3"),
        ({"x": None}, "not a tensor.s name and shape"),
        ({"x": "12"}, "not a tensor.s name and shape"),
        ({"x": (1.0,)}, "not a tensor.s name and shape"),
        ({"x": (True,)}, "not a tensor.s name and shape"),
        ({"x": (-1,)}, "not a tensor.s name and shape"),
        ({1: (1,)}, "not a tensor.s name and shape"),
        ({"x": torch.ones(2)}, "tensor.shape for name"),
    ],
)
def test_shapes_that_are_refused(argument: Any, words: str) -> None:
    with pytest.raises(sdconv.InputError, match=words):
        sdconv.infer(argument)


@pytest.mark.parametrize("metadata", [3, "sdxl", [("a", "b")], {"a": 1}, {1: "a"}, {"a": None}])
def test_invalid_metadata(metadata: Any) -> None:
    with pytest.raises(sdconv.InputError, match="not a file's metadata"):
        sdconv.infer(shapes(), metadata=metadata)


def test_a_header_is_taken_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    tensors = original_tensors(seeded.tensors(KL), KL)
    said = {"modelspec.architecture": "stable-diffusion-xl-v1-base"}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, said)
    header = sdconv.read_header(path)
    assert sdconv.infer(header) == sdconv.infer(shapes(), family="sdxl")
    # the caller's choice takes precedence
    with pytest.warns(sdconv.SdconvWarning, match="sd1 was taken"):
        sdconv.infer(header, metadata={})


def half(named: Shapes) -> Shapes:
    return {k: v for k, v in named.items() if k.startswith("decoder")}


def of_two(named: Shapes) -> Shapes:
    return {**named, "encoder.layers.14.weight": (16, 64, 3, 3)}


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (half(shapes()), "the VAE is incomplete"),
        (of_two(shapes(seeded.tiny(), "diffusers")), "different autoencoders"),
        (
            half(shapes(seeded.POOLED)) | {"decoder.1.weight": (64, 32)},
            "a shape that it cannot have",
        ),
        ({"0.weight": (7, 9, 3, 3), "0.bias": (7,)}, "not half of a tiny autoencoder"),
        ({"a.weight": (1,)}, "no network that sdconv knows"),
    ],
)
def test_errors_name_the_file(named: Shapes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in named.items()}, path)
    with pytest.raises(sdconv.SdconvError, match=words) as caught:
        sdconv.load(path, family="sd1")
    assert str(caught.value).startswith(f"{path}: ")


PARTS = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    "encoder.mid.attn_1.q": "encoder.mid_block.attentions.0.to_q",
    "decoder.mid.attn_1.q": "decoder.mid_block.attentions.0.to_q",
}


@pytest.mark.parametrize("tail", ["weight", "bias"])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("part", PARTS)
def test_half_of_a_part_is_a_part_with_a_tensor_missing(part: str, layout: str, tail: str) -> None:
    name = f"{part if layout == 'original' else PARTS[part]}.{tail}"
    left = {k: v for k, v in shapes(layout=layout).items() if k != name}
    with pytest.raises(sdconv.WeightsMismatchError, match=r"vae: 1 missing\n") as caught:
        sdconv.load(meta(left), family="sd1")
    assert f"expected: {name}" in str(caught.value)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("gone", ["running_mean", "running_var"])
def test_flux2_without_half_of_its_statistics(gone: str, layout: str) -> None:
    named = shapes(seeded.flux2((32, 32)), layout)
    del named[f"bn.{gone}"]
    with pytest.raises(sdconv.WeightsMismatchError, match=r"1 missing\n  expected: bn\." + gone):
        sdconv.load(meta(named))


@pytest.mark.parametrize("part", ["add_embedding.linear_1", "class_embedding.linear_1"])
def test_a_unets_embedding_without_its_weight(part: str) -> None:
    named = {**shapes_of_unet("SD1"), f"{part}.bias": (64,)}
    with pytest.raises(sdconv.WeightsMismatchError, match=rf"{part}\.weight is missing"):
        sdconv.infer(named)


@cache
def shapes_of_unet(family: str, layout: str = "diffusers") -> Shapes:
    network = unets.on_meta(unets.smallest(family))
    tensors = network.state_dict()
    if layout == "original":
        tensors = original_tensors(tensors, network.config)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def wide_first_level() -> Shapes:
    """``ch`` 32 and ``ch_mult`` (2, 2): ldm's Encoder goes from one to the other in its first
    block."""
    named = shapes(seeded.kl((64, 64), 4, True))
    return {
        **named,
        "encoder.conv_in.weight": (32, 3, 3, 3),
        "encoder.conv_in.bias": (32,),
        "encoder.down.0.block.0.norm1.weight": (32,),
        "encoder.down.0.block.0.norm1.bias": (32,),
        "encoder.down.0.block.0.conv1.weight": (64, 32, 3, 3),
        "encoder.down.0.block.0.nin_shortcut.weight": (64, 32, 1, 1),
        "encoder.down.0.block.0.nin_shortcut.bias": (64,),
    }


def narrow_latents(quantised: bool) -> Shapes:
    """``z_channels`` 4 and ``embed_dim`` 3: ldm's ``quant_conv`` goes from one to the other."""
    twice = 1 if quantised else 2
    named = {
        **shapes(),
        "quant_conv.weight": (3 * twice, 4 * twice, 1, 1),
        "quant_conv.bias": (3 * twice,),
        "post_quant_conv.weight": (4, 3, 1, 1),
    }
    return {**named, "quantize.embedding.weight": (8192, 3)} if quantised else named


def attention_in_a_level() -> Shapes:
    return {**shapes(), "encoder.down.1.attn.0.q.weight": (64, 64, 1, 1)}


# names that only other VAEs have: of Allegro, Stable Video Diffusion (in
# both layouts), diffusers' asymmetric one, Qwen-Image 2.1 and KVAE
OTHERS = {
    "decoder.mid_block.temp_convs.0.conv1.0.weight": r"for videos",
    "decoder.mid_block.resnets.0.temporal_res_block.conv1.weight": r"for videos",
    "decoder.up.0.block.0.time_stack.in_layers.0.weight": r"for videos",
    "decoder.condition_encoder.layers.0.weight": r"AsymmetricAutoencoderKL",
    "encoder.norm_out.gamma": r"does not use group normalisation",
    "decoder.mid.block_1.norm1.conv_y.weight": r"does not use group normalisation",
}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_other_kinds_are_not_taken_for_the_nearest(layout: str) -> None:
    assert set(sdconv.infer(shapes(layout=layout), family="sd1")) == {"vae"}  # the control
    for name, words in OTHERS.items():
        named = {**shapes(layout=layout), name: (64, 64, 1, 1)}
        with pytest.raises(sdconv.UnknownNetworkError, match=words) as caught:
            sdconv.infer(named, family="sd1")
        assert f"got: '{name}'" in str(caught.value)
    # an unknown name does not show another kind: loading refuses it
    stray = {**shapes(layout=layout), "decoder.timeless.weight": (3,)}
    assert set(sdconv.infer(stray, family="sd1")) == {"vae"}
    with pytest.raises(sdconv.WeightsMismatchError, match="1 unexpected"):
        sdconv.load(meta(stray), family="sd1")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize(
    ("named", "words"),
    [
        (wide_first_level(), r"ch_mult\[0\] is not 1(?s:.*)32 channels out of encoder.conv_in, 64"),
        (narrow_latents(False), r"embed_dim is not z_channels(?s:.*)\(4, 3, 1, 1\)"),
        (narrow_latents(True), r"is a VQ model(?s:.*)quantize\.embedding\.weight"),
        (attention_in_a_level(), r"attn_resolutions(?s:.*)down\.1\.attn\.0\.q\.weight"),
    ],
)
def test_originals_that_diffusers_class_cannot_be(
    named: Shapes, words: str, prefix: str, tmp_path: Path
) -> None:
    path = tmp_path / "vae.safetensors"
    save_file({prefix + name: torch.zeros(shape) for name, shape in named.items()}, path)
    with pytest.raises(sdconv.SdconvError, match=words) as caught:
        sdconv.load(path, family="sd1")
    assert str(caught.value).startswith(f"{path}: ")
    assert "hint: run it with the code that it was trained with" in str(caught.value)


def test_a_damaged_width_is_still_a_wrong_shape() -> None:
    """The control: anything else is not taken for such an original."""
    for name, shape in (
        ("encoder.conv_in.weight", (64, 3, 3, 3)),
        ("post_quant_conv.weight", (5, 5, 1, 1)),
    ):
        with pytest.raises(sdconv.WeightsMismatchError, match="1 of the wrong shape"):
            sdconv.load(meta(shapes(**{name: shape})), family="sd1")


@pytest.mark.parametrize(("patch", "count"), [((1, 2), 64), ((2, 1), 64), ((3, 2), 192)])
def test_flux2_patches_that_are_not_square(patch: tuple[int, int], count: int) -> None:
    config = seeded.flux2((32, 32), patch_size=patch)
    named = shapes(config, "diffusers")
    with pytest.raises(sdconv.WeightsMismatchError, match="not for square patches") as caught:
        sdconv.infer(named)
    assert "32 latent channels" in str(caught.value) and f"({count},)" in str(caught.value)
    assert "config.json" in str(caught.value)
    (identified,) = identify(named, config=config.to_json())
    assert (identified.config, identified.family, identified.contradicted) == (config, "flux2", ())


@pytest.mark.parametrize(("side", "count"), [(1, 32), (2, 128), (3, 288)])
def test_patches_of_flux2_that_are_squares(side: int, count: int) -> None:
    named = shapes(seeded.flux2((32, 32), patch_size=(side, side)), "diffusers")
    assert named["bn.running_mean"] == (count,)
    assert sdconv.infer(named)["vae"]["patch_size"] == (side, side)


def test_a_number_of_latent_channels_that_no_family_has() -> None:
    named = shapes(seeded.kl((32, 64), 8, True))
    words = r"the vae has 8 latent channels, unlike any known family: scaling_factor 1\.0, "
    with pytest.warns(sdconv.SdconvWarning, match=words) as caught:
        assert sdconv.infer(named)["vae"]["scaling_factor"] == 1.0
    assert "family=" not in str(caught[0].message)  # none would fit
    with pytest.warns(sdconv.SdconvWarning, match=r"sd1 was taken \(scaling_factor 0\.18215, "):
        sdconv.infer(shapes())


W = (8, 8, 3, 3)
MANY = {
    "next to a VAE": lambda n: {**shapes(), **{f"x.{i}.weight": W for i in range(n)}},
    "first layers of VAEs": lambda n: {f"a{i}.encoder.conv_in.weight": W for i in range(n)},
    "VAEs": lambda n: {
        f"a{i}.encoder.{k}": W for i in range(n // 2) for k in ("conv_in.weight", "down.0.x")
    },
    "nested VAEs": lambda n: {
        "a." * i + k: W for i in range(n // 20) for k in ("encoder.conv_in.weight", "encoder.down.")
    },
    "tiny autoencoders": lambda n: {f"a{i}.encoder.0.weight": W for i in range(n)},
    "U-Nets": lambda n: {
        f"a{i}.{k}.weight": W
        for i in range(n // 3)
        for k in ("conv_in", "time_embedding.linear_1", "up_blocks.0.resnets.0.conv1")
    },
    "levels of a U-Net": lambda n: {
        **{f"input_blocks.{i}.0.op.weight": W for i in range(n)},
        "input_blocks.0.0.weight": W,
        "time_embed.0.weight": W,
        "output_blocks.0.0.in_layers.0.weight": W,
    },
}


@pytest.mark.parametrize("kind", MANY)
@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_very_many_names_take_no_quadratic_time(kind: str) -> None:
    named = MANY[kind](30_000)
    start = time.process_time()
    try:
        identify(named)
    except sdconv.SdconvError as error:
        assert len(str(error)) < 2000
    # a look at all names for each name takes minutes
    assert time.process_time() - start < 6


BASES = {
    "vae": shapes(),
    "vae, diffusers": shapes(layout="diffusers"),
    "flux2": shapes(seeded.flux2((32, 32), layers_per_block=1)),
    "tiny": shapes(seeded.tiny()),
    "sana": shapes(seeded.SANA, "diffusers"),
    "unet": shapes_of_unet("SDXL"),
    "unet, original": shapes_of_unet("x4 upscaler", "original"),
}
LENGTHS = st.sampled_from([0, 1, 2, 3, 4, 7, 32, 64, 1280, 2**40])
ODD = st.lists(LENGTHS, max_size=5).map(tuple)


@st.composite
def mutated(draw: st.DrawFn) -> Shapes:
    """A network's shapes with some removed, changed, renamed or added."""
    named = dict(BASES[draw(st.sampled_from(sorted(BASES)))])
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(sorted(named)))
        what = draw(st.sampled_from(["gone", "stem gone", "shape", "axes", "renamed", "added"]))
        if what == "gone":
            del named[name]
        elif what == "stem gone":
            stem = ".".join(name.split(".")[: draw(st.integers(2, 4))])
            named = {k: v for k, v in named.items() if not k.startswith(stem)} or named
        elif what == "shape":
            named[name] = draw(ODD)
        elif what == "axes":
            axes = list(named[name])
            if axes:
                axes[draw(st.integers(0, len(axes) - 1))] = draw(LENGTHS)
            named[name] = tuple(axes)
        elif what == "renamed":
            old, new = draw(st.sampled_from([("0", "1"), ("1", "7"), ("0", "9999"), ("conv", "x")]))
            named[name.replace(old, new)] = named.pop(name)
        else:
            named[draw(st.sampled_from(["", "x.", "vae."])) + name] = draw(ODD)
    return named


@given(mutated(), st.sampled_from([None, "sd1", "sdxl", "flux2"]))
@settings(max_examples=200, deadline=None)
@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_only_our_errors_come_out_of_mutated_shapes(named: Shapes, family: str | None) -> None:
    try:
        configs = sdconv.infer(named, family=family)
    except sdconv.SdconvError as error:
        assert len(str(error)) < 20_000
    else:
        assert configs and set(configs) <= {"vae", "unet"}


@pytest.mark.filterwarnings("ignore::sdconv.SdconvWarning")
def test_the_unchanged_shapes_are_known() -> None:
    """The control of the test above."""
    for named in BASES.values():
        (found,) = find_networks(named)
        assert list(sdconv.infer(named)) == [found.component]
