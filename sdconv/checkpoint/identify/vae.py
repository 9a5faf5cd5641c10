"""Infers a VAE's config from its shapes, and its family from the rest of the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdconv.checkpoint.identify.find import DetectedNetwork
from sdconv.checkpoint.identify.shapes import InferredConfig, NetworkShapes, Shape
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.keys.prefixes import how_many
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from sdconv.config.facts import NORM_NUM_GROUPS, VAE_FACTS, VaeFacts
from sdconv.errors import InputError, UnknownNetworkError

_ATTENTION = "mid_block.attentions.0"
# names under a VAE's prefix which show that it is of a kind that sdconv does not build
_OTHER_KINDS = (
    (
        re.compile(r"quantize\..+"),
        "is a VQ model, with a codebook in place of a distribution, which diffusers' AutoencoderKL "
        "cannot represent",
    ),
    (
        re.compile(r"(encoder|decoder)\.(down|up)(_blocks)?\.[0-9]+\.(attn|attentions)\..+"),
        "has attention within its levels (attn_resolutions in its original config), which sdconv "
        "does not build",
    ),
    (
        re.compile(r"(encoder|decoder)\.(.+\.)?(temp|temporal|time)_\w+\..+"),
        "is for videos, with convolutions over time, which sdconv does not build",
    ),
    (
        re.compile(r"decoder\.condition_encoder\..+"),
        "decodes with a masked image (diffusers' AsymmetricAutoencoderKL), which sdconv does "
        "not build",
    ),
    (
        re.compile(r"(encoder|decoder)\.(.+\.)?norm\w*\.(gamma|conv_[by]\..+)"),
        "does not use group normalisation, as every VAE that sdconv builds does",
    ),
)


def check_kind(found: DetectedNetwork, where: object) -> None:
    """Refuses a VAE with parts that ``AutoencoderKL`` does not have, and says what it is.

    Raises:
        UnknownNetworkError: it has such a part.
    """
    for name in found.unexpected:
        for pattern, what in _OTHER_KINDS:
            if pattern.fullmatch(name.removeprefix(found.prefix)):
                raise UnknownNetworkError(
                    f"the vae {what}",
                    where=where,
                    expected="an encoder and a decoder of images: convolutions, group norms, and "
                    "attention in the mid block only",
                    got=short(name),
                    hint="run it with the code that it was trained with",
                )


def read_vae(
    shapes: NetworkShapes,
    checkpoint: Mapping[str, Shape],
    metadata: Mapping[str, str],
    family: str | None = None,
) -> InferredConfig:
    """The config of a VAE.

    Args:
        shapes: of its own tensors.
        checkpoint: the shapes of the whole checkpoint, which may show the family.
        metadata: the file's own, which may name the family.
        family: a key of ``VAE_FACTS``, if the caller knows it.

    Raises:
        WeightsMismatchError: a part is missing, or laid out as diffusers' class cannot be.
        InputError: the family does not fit.
    """
    structure = _vae_structure(shapes)
    latent = structure["latent_channels"]
    choice = _vae_family(structure, checkpoint, metadata, family)
    facts = VAE_FACTS.get(choice.family) or VaeFacts(
        latent_channels=latent,
        scaling_factor=1.0,
        shift_factor=None,
        sample_size=512,
        force_upcast=True,
        source="no known family has this number of latent channels",
    )
    taken = f"scaling_factor {facts.scaling_factor}, shift_factor {facts.shift_factor}"
    guess = None
    if choice.open_to:
        guess = (
            f"could be of {' or '.join(choice.open_to)}, which differ in the scaling factor; "
            f"{choice.family} was taken ({taken}): pass family= to decide"
        )
    elif choice.family not in VAE_FACTS:
        guess = (
            f"has {latent} latent channels, unlike any known family: {taken} were taken; a "
            "config.json next to the weights would decide"
        )
    config = shapes.config(
        AutoencoderKLConfig,
        **structure,
        scaling_factor=facts.scaling_factor,
        shift_factor=facts.shift_factor,
        sample_size=facts.sample_size,
        force_upcast=facts.force_upcast,
    )
    return InferredConfig(
        config=config,
        family=choice.family,
        evidence=choice.evidence,
        open_to=choice.open_to,
        guess=guess,
    )


def read_flux2(shapes: NetworkShapes, family: str | None = None) -> InferredConfig:
    """The config of FLUX.2's VAE; arguments and errors are as in ``read_vae``."""
    if family not in (None, "flux2"):
        raise misfit(family, "a VAE with statistics of its latents", ("flux2",))
    structure = _vae_structure(shapes)
    decoder = shapes.block_channels("decoder.up_blocks")[::-1]
    same = decoder == structure["block_out_channels"]
    assumed = AutoencoderKLFlux2Config.assumed
    config = shapes.config(
        AutoencoderKLFlux2Config,
        **structure,
        decoder_block_out_channels=None if same else decoder,
        sample_size=assumed["sample_size"],
        batch_norm_eps=assumed["batch_norm_eps"],
        batch_norm_momentum=assumed["batch_norm_momentum"],
        patch_size=_patch_size(shapes, structure["latent_channels"]),
    )
    evidence = "batch-norm statistics of its latents"
    return InferredConfig(config=config, family="flux2", evidence=evidence)


def _patch_size(shapes: NetworkShapes, latent_channels: int) -> tuple[int, int]:
    """Rows and columns of the patches that the statistics are for. Shapes give only their product,
    so the patches must be square."""
    name = "bn.running_mean" if "bn.running_mean" in shapes else "bn.running_var"
    (count,) = shapes.axes(name, 1)
    side = math.isqrt(count // latent_channels)
    if side * side * latent_channels != count:
        raise shapes.mismatch(
            "the statistics of the latents are not for square patches",
            expected=f"{latent_channels} latent channels times 1, 4, 9, ...",
            got=f"{name} ({count},)",
            hint="put config.json next to the weights: its patch_size says what the patches are",
        )
    return side, side


def _vae_structure(shapes: NetworkShapes) -> dict[str, Any]:
    """The fields of a VAE's config that its shapes determine."""
    down, up = (
        how_many(f"{blocks}.{{}}", shapes.modules)
        for blocks in ("encoder.down_blocks", "decoder.up_blocks")
    )
    if not down or down != up:
        raise shapes.mismatch(
            "the VAE is incomplete",
            expected="an encoder and a decoder with the same number of levels",
            got=f"{down} levels in the encoder, {up} in the decoder",
            hint="load a file with the whole VAE",
        )
    _check_widths(shapes)
    return {
        "in_channels": shapes.axes("encoder.conv_in.weight", 4)[1],
        "out_channels": shapes.axes("decoder.conv_out.weight", 4)[0],
        "latent_channels": shapes.axes("decoder.conv_in.weight", 4)[1],
        "block_out_channels": shapes.block_channels("encoder.down_blocks"),
        "layers_per_block": how_many("encoder.down_blocks.0.resnets.{}", shapes.modules),
        "norm_num_groups": NORM_NUM_GROUPS,
        # a part exists if any of its tensors does
        "use_quant_conv": "quant_conv" in shapes.modules,
        "use_post_quant_conv": "post_quant_conv" in shapes.modules,
        "mid_block_add_attention": any(
            f"{half}.{_ATTENTION}" in shapes.modules for half in ("encoder", "decoder")
        ),
    }


def _check_widths(shapes: NetworkShapes) -> None:
    """Refuses two kinds of original VAEs for which diffusers' class has no field (``ch_mult`` and
    ``embed_dim`` in ldm's configs)."""
    first = shapes.axes("encoder.conv_in.weight", 4)[0]
    after, before, *_ = shapes.axes("encoder.down_blocks.0.resnets.0.conv1.weight", 4)
    if first == before != after:
        raise shapes.mismatch(
            "the VAE's first level is wider than what enters it: ch_mult[0] is not 1 in its "
            "original config, which diffusers' AutoencoderKL cannot represent",
            expected="an encoder.conv_in as wide as the first level",
            got=f"{first} channels out of encoder.conv_in, {after} out of the first level",
            hint="run it with the code that it was trained with",
        )
    latent = shapes.axes("decoder.conv_in.weight", 4)[1]
    if "post_quant_conv.weight" in shapes:
        given, taken, *_ = shapes.axes("post_quant_conv.weight", 4)
        if given == latent != taken:
            raise shapes.mismatch(
                "the VAE's latents and its decoder's input have different numbers of channels: "
                "embed_dim is not z_channels in its original config, which diffusers' "
                "AutoencoderKL cannot represent",
                expected=f"a post_quant_conv of shape ({latent}, {latent}, 1, 1)",
                got=shapes["post_quant_conv.weight"],
                hint="run it with the code that it was trained with",
            )


@dataclass(frozen=True)
class _FamilyChoice:
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()


# beginnings of modelspec.architecture in a file's metadata, the most specific first
_METADATA_WORDS: Sequence[tuple[str, str]] = (
    ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("stable-diffusion-xl", "sdxl"),
    ("sdxl", "sdxl"),
    ("stable-diffusion-v3", "sd3"),
    ("stable-diffusion-3", "sd3"),
    ("sd3", "sd3"),
    ("flux", "flux1"),
    ("stable-diffusion-v2", "sd2"),
    ("sd_v2", "sd2"),
    ("stable-diffusion-v1", "sd1"),
    ("sd_v1", "sd1"),
)


def _fitting(latent_channels: int) -> tuple[str, ...]:
    return tuple(k for k, facts in VAE_FACTS.items() if facts.latent_channels == latent_channels)


def check_family(family: str, latent_channels: int) -> None:
    """Refuses a family whose VAE has a different number of latent channels.

    Raises:
        InputError: the numbers differ.
    """
    if family not in (fitting := _fitting(latent_channels)):
        raise misfit(family, f"a VAE with {latent_channels} latent channels", fitting)


def misfit(family: str | None, network: str, fitting: Sequence[str]) -> InputError:
    """The error for a family that the network does not belong to."""
    return InputError(
        f"the family {family!r} does not fit {network}",
        where="family",
        expected=", ".join(fitting) or "no family: none is known with this number",
        got=repr(family),
    )


def _vae_family(
    structure: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    family: str | None,
) -> _FamilyChoice:
    latent = structure["latent_channels"]
    fitting = _fitting(latent)
    if family is not None:
        check_family(family, latent)
        return _FamilyChoice(family, "given by the caller")
    said = metadata.get("modelspec.architecture", "").lower()
    for word, named in _METADATA_WORDS:
        if said.startswith(word) and named in fitting:
            return _FamilyChoice(named, f"metadata: modelspec.architecture = {said}")
    if (other := _family_of_others(shapes)) and other[0] in fitting:
        return _FamilyChoice(*other)
    if latent == 4:
        if len(structure["block_out_channels"]) == 3:
            return _FamilyChoice("x4-upscaler", "4 latent channels and three levels")
        return _FamilyChoice("sd1", "4 latent channels", open_to=("sd1", "sd2", "sdxl"))
    if latent == 16:
        return _FamilyChoice("flux1", "16 latent channels", open_to=("flux1", "sd3"))
    return _FamilyChoice(f"{latent}-channel", f"{latent} latent channels, unlike any known family")


def _family_of_others(shapes: Mapping[str, Shape]) -> tuple[str, str] | None:
    """The family of the other networks in the checkpoint, and the evidence for it; None if nothing
    shows it."""
    for name, shape in shapes.items():
        if name.endswith(("input_blocks.0.0.weight", "conv_in.weight")) and shape[1:2] == (7,):
            return "x4-upscaler", f"{name} takes 7 channels"
    # the width of the prompt embedding that the U-Net's first cross-attention reads
    widths = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and shape and shape[-1] in widths:
            return widths[shape[-1]], f"the U-Net reads prompt embeddings of width {shape[-1]}"
    for word, named in (("joint_blocks.", "sd3"), ("double_blocks.", "flux1")):
        if any(word in name for name in shapes):
            return named, f"{word}* in the same file"
    prefixes = (
        ("conditioner.embedders.1.", "sdxl"),
        ("conditioner.embedders.0.model.", "sdxl-refiner"),
        ("cond_stage_model.model.", "sd2"),
        ("cond_stage_model.transformer.", "sd1"),
    )
    for prefix, named in prefixes:
        if any(name.startswith(prefix) for name in shapes):
            return named, f"the text encoder under {prefix}"
    return None
