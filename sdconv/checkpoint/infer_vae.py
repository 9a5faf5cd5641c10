"""A VAE's shapes to its config, and what names its family."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdconv.checkpoint.reading import Reading, built
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from sdconv.config.facts import NORM_NUM_GROUPS, VAE_FACTS, VaeFacts
from sdconv.errors import InputError, WeightsMismatchError

Own = Mapping[str, tuple[int, ...]]


def read_vae(
    own: Own, beside: Own, metadata: Mapping[str, str], family: str | None = None
) -> Reading:
    """The config of a VAE.

    Args:
        own: shape of each of its tensors, by diffusers' names.
        beside: shapes of the whole checkpoint, which may name the family.
        metadata: the file's own, which may name it too.
        family: a key of ``VAE_FACTS``, where the caller knows it.

    Raises:
        WeightsMismatchError: a part is missing.
        InputError: the family does not fit.
    """
    structure = _vae_structure(own)
    latent = structure["latent_channels"]
    choice = _vae_family(structure, beside, metadata, family)
    facts = VAE_FACTS.get(choice.family) or VaeFacts(
        latent_channels=latent,
        scaling_factor=1.0,
        shift_factor=None,
        sample_size=512,
        force_upcast=True,
        source="no known family has this many latent channels",
    )
    config = built(
        AutoencoderKLConfig,
        **structure,
        scaling_factor=facts.scaling_factor,
        shift_factor=facts.shift_factor,
        sample_size=facts.sample_size,
        force_upcast=facts.force_upcast,
    )
    return Reading(
        config=config,
        family=choice.family,
        evidence=choice.evidence,
        open_to=choice.open_to,
    )


def read_flux2(own: Own, family: str | None = None) -> Reading:
    """The config of FLUX.2's VAE. Args, Raises: as ``read_vae``."""
    if family not in (None, "flux2"):
        raise misfit(family, "a VAE with statistics of its latents", ("flux2",))
    structure = _vae_structure(own)
    decoder = _levels(own, "decoder.up_blocks")[::-1]
    same = decoder == structure["block_out_channels"]
    per_patch = own["bn.running_mean"][0] / structure["latent_channels"]
    side = math.isqrt(int(per_patch))
    assumed = AutoencoderKLFlux2Config.assumed
    config = built(
        AutoencoderKLFlux2Config,
        **structure,
        decoder_block_out_channels=None if same else decoder,
        sample_size=assumed["sample_size"],
        batch_norm_eps=assumed["batch_norm_eps"],
        batch_norm_momentum=assumed["batch_norm_momentum"],
        patch_size=(side, side),
    )
    return Reading(config=config, family="flux2", evidence="batch-norm statistics of its latents")


def _vae_structure(own: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of a VAE's config that its shapes decide."""
    needed = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    missing = [name for name in needed if name not in own]
    encoder = _levels(own, "encoder.down_blocks")
    decoder = _levels(own, "decoder.up_blocks")
    if missing or not encoder or len(encoder) != len(decoder):
        raise WeightsMismatchError(
            "the VAE is incomplete",
            expected="an encoder and a decoder with as many levels each",
            got=f"{len(encoder)} levels down, {len(decoder)} up"
            + (f", without {', '.join(missing)}" if missing else ""),
            fix="load a file that holds the whole VAE",
        )
    layers = {
        int(m[1])
        for k in own
        if (m := re.match(r"encoder\.down_blocks\.0\.resnets\.([0-9]{1,4})\.", k))
    }
    return {
        "in_channels": own["encoder.conv_in.weight"][1],
        "out_channels": own["decoder.conv_out.weight"][0],
        "latent_channels": own["decoder.conv_in.weight"][1],
        "block_out_channels": encoder,
        "layers_per_block": max(layers) + 1,
        "norm_num_groups": NORM_NUM_GROUPS,
        "use_quant_conv": "quant_conv.weight" in own,
        "use_post_quant_conv": "post_quant_conv.weight" in own,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in own,
    }


def _levels(own: Mapping[str, tuple[int, ...]], blocks: str) -> tuple[int, ...]:
    """Output channels of each block, in the order of the blocks, as far as they are numbered
    without a gap."""
    channels: list[int] = []
    while (shape := own.get(f"{blocks}.{len(channels)}.resnets.0.conv1.weight")) is not None:
        channels.append(shape[0])
    return tuple(channels)


@dataclass(frozen=True)
class _Choice:
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()


# words that a file's metadata uses for its architecture (modelspec.architecture), most telling
# first
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
    """Refuses a family whose VAE has another number of latent channels.

    Raises:
        InputError: it has.
    """
    if family not in (fitting := _fitting(latent_channels)):
        raise misfit(family, f"a VAE with {latent_channels} latent channels", fitting)


def misfit(family: str | None, network: str, fitting: Sequence[str]) -> InputError:
    """The error for a family that the network is not of."""
    return InputError(
        f"the family {family!r} does not fit {network}",
        where="family",
        expected=", ".join(fitting) or "no family: none known has so many",
        got=repr(family),
    )


def _vae_family(
    structure: Mapping[str, Any],
    shapes: Own,
    metadata: Mapping[str, str],
    family: str | None,
) -> _Choice:
    latent = structure["latent_channels"]
    fitting = _fitting(latent)
    if family is not None:
        check_family(family, latent)
        return _Choice(family, "the caller's word")
    said = metadata.get("modelspec.architecture", "").lower()
    for word, named in _METADATA_WORDS:
        if said.startswith(word) and named in fitting:
            return _Choice(named, f"metadata: modelspec.architecture = {said}")
    if (beside := _family_beside(shapes)) and beside[0] in fitting:
        return _Choice(*beside)
    if latent == 4:
        if len(structure["block_out_channels"]) == 3:
            return _Choice("x4-upscaler", "4 latent channels and three levels")
        return _Choice("sd1", "4 latent channels", open_to=("sd1", "sd2", "sdxl"))
    if latent == 16:
        return _Choice("flux1", "16 latent channels", open_to=("flux1", "sd3"))
    return _Choice(
        f"{latent}-channel", f"{latent} latent channels", open_to=("a family unknown here",)
    )


def _family_beside(shapes: Own) -> tuple[str, str] | None:
    """What the other networks in the same checkpoint say of the family, and which of them said
    it."""
    for name, shape in shapes.items():
        if name.endswith(("input_blocks.0.0.weight", "conv_in.weight")) and shape[1:2] == (7,):
            return "x4-upscaler", f"{name} takes 7 channels"
    # the width of the text that the U-Net's first cross-attention reads
    widths = {768: "sd1", 1024: "sd2", 1280: "sdxl-refiner", 2048: "sdxl"}
    for name, shape in shapes.items():
        if name.endswith("attn2.to_k.weight") and shape[-1] in widths:
            return widths[shape[-1]], f"the U-Net reads text {shape[-1]} wide"
    for word, named in (("joint_blocks.", "sd3"), ("double_blocks.", "flux1")):
        if any(word in name for name in shapes):
            return named, f"{word}* beside it"
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
