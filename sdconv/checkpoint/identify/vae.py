"""Infers a VAE's config from its shapes, and its family from the rest of the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.identify.metadata import family_in, spoken
from sdconv.checkpoint.identify.shapes import BY_CALLER, InferredConfig, NetworkShapes, Shape
from sdconv.checkpoint.identify.statistics import (
    Statistics,
    tensors_of_statistics,
    unrelated_statistics,
)
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.keys.prefixes import how_many
from sdconv.config import AutoencoderKLConfig, AutoencoderKLFlux2Config
from sdconv.config.facts import EDM_STATISTICS, NORM_NUM_GROUPS, VAE_FACTS, VaeFacts, family_of_text
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


def check_kind(found: DetectedNetwork, shapes: Mapping[str, Shape], where: object) -> None:
    """Refuses a VAE with parts that ``AutoencoderKL`` does not have, and says what it is.

    Args:
        shapes: of its tensors, by diffusers' names.

    Raises:
        UnknownNetworkError: it has such a part.
    """
    # a distribution has a mean and a variance for each channel, a codebook's vectors have neither
    given, taken = (
        shapes.get(f"{end}.weight", ()) for end in ("encoder.conv_out", "decoder.conv_in")
    )
    if given[2:] == taken[2:] == (3, 3) and 0 < given[0] == taken[1]:
        raise UnknownNetworkError(
            "the vae is a VQ model, with a codebook in place of a distribution, which diffusers' "
            "AutoencoderKL cannot represent",
            where=where,
            expected=f"{2 * taken[1]} channels out of the encoder, a mean and a variance for each "
            f"of the {taken[1]} that the decoder takes",
            got=f"{given[0]} channels out of the encoder",
            hint="run it with the code that it was trained with",
        )
    for name, shape in shapes.items():
        if name.endswith("upsamplers.0.conv.weight") and len(shape) == 4 and shape[0] > shape[1]:
            raise UnknownNetworkError(
                "the vae upsamples by shuffling channels into pixels, as HunyuanImage's and DC-AE "
                "do, which sdconv does not build",
                where=where,
                expected="as many channels out of an upsampling convolution as into it",
                got=f"{name} {shape}",
                hint="run it with the code that it was trained with",
            )
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


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What else a checkpoint holds, which may show a VAE's family.

    ``shapes``: of all of its tensors. ``networks``: every network in it that was found.
    ``metadata``: the file's own. ``statistics``: the values of ``edm_mean`` and ``edm_std``, if
    they were read.
    """

    shapes: Mapping[str, Shape]
    networks: Sequence[DetectedNetwork] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)


def read_vae(
    shapes: NetworkShapes, around: Surroundings, family: str | None = None
) -> InferredConfig:
    """The config of a VAE.

    Args:
        shapes: of its own tensors.
        around: the rest of the checkpoint, which may show the family.
        family: a key of ``VAE_FACTS``, if the caller knows it.

    Raises:
        WeightsMismatchError: a part is missing, or laid out as diffusers' class cannot be.
        InputError: the family does not fit.
    """
    structure = _vae_structure(shapes)
    latent = structure["latent_channels"]
    choice = _vae_family(structure, around, family)
    facts = VAE_FACTS.get(choice.family) or VaeFacts(
        latent_channels=latent,
        scaling_factor=1.0,
        shift_factor=None,
        sample_size=512,
        force_upcast=True,
        source="no known family has this number of latent channels",
    )
    mean, std = facts.latents_mean, facts.latents_std
    if mean is not None and around.statistics:
        mean, std = (_statistic(shapes, around, name, latent) for name in EDM_STATISTICS)
    config = shapes.config(
        AutoencoderKLConfig,
        **structure,
        scaling_factor=facts.scaling_factor,
        shift_factor=facts.shift_factor,
        latents_mean=mean,
        latents_std=std,
        sample_size=facts.sample_size,
        force_upcast=facts.force_upcast,
    )
    if choice.open_to:
        config = config.left_open(choice.open_to)
    return InferredConfig(
        config=config,
        family=choice.family,
        evidence=choice.evidence,
        open_to=choice.open_to,
        guess=open_vae(config, choice.doubt) if choice.open_to else None,
    )


def open_vae(config: AutoencoderKLConfig, doubt: str = "") -> str:
    """The doubt about a VAE's family, in words that follow the component's name: every candidate's
    factors, which one was taken, and how to decide.

    Args:
        config: with the families that are open.
        doubt: why they are, in words that follow the component's name; empty if nothing decides.
    """
    taken = f"scaling_factor {config.scaling_factor}, shift_factor {config.shift_factor}"
    known = [name for name in config.open_to if name in VAE_FACTS]
    if not known:
        return (
            f"has {config.latent_channels} latent channels, unlike any known family: {taken} were "
            "taken; a config.json next to the weights would decide"
        )
    factors: dict[str, list[str]] = {}
    for name in known:
        facts = VAE_FACTS[name]
        shift = "" if facts.shift_factor is None else f" with shift_factor {facts.shift_factor}"
        factors.setdefault(f"{facts.scaling_factor}{shift}", []).append(name)
    listed = ", ".join(f"{factor} for {' and '.join(names)}" for factor, names in factors.items())
    doubt = doubt or f"could be of {' or '.join(known)}, which differ in the scaling factor"
    return f"{doubt} ({listed}); {known[0]} was taken ({taken}): pass family= to decide"


def _statistic(
    shapes: NetworkShapes, around: Surroundings, name: str, latent: int
) -> tuple[float, ...]:
    values = around.statistics.get(name, ())
    sound = len(values) == latent and all(map(math.isfinite, values))
    if not sound or (name == EDM_STATISTICS[1] and min(values) <= 0):
        raise shapes.mismatch(
            f"{name} does not hold statistics of this VAE's latents",
            expected=f"{latent} finite numbers, and standard deviations above 0",
            got=values or "nothing",
            hint="pass family= to leave the statistics out",
        )
    return values


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
    doubt: str = ""


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
    structure: Mapping[str, Any], around: Surroundings, family: str | None
) -> _FamilyChoice:
    latent = structure["latent_channels"]
    fitting = _fitting(latent)
    if family is not None:
        check_family(family, latent)
        return _FamilyChoice(family, BY_CALLER)
    choice = _without_statistics(structure, around, fitting)
    if not (strays := unrelated_statistics(around.shapes, around.metadata)):
        return choice
    candidates = (choice.family, *choice.open_to, "playground-v2.5")
    doubt = (
        f"lies next to {', '.join(strays)}, which may be statistics of its latents, but not both "
        f"{' and '.join(EDM_STATISTICS)}, as Playground v2.5 has them"
    )
    open_to = tuple(dict.fromkeys(name for name in candidates if name in (choice.family, *fitting)))
    return replace(choice, open_to=open_to, doubt=doubt)


def _without_statistics(
    structure: Mapping[str, Any], around: Surroundings, fitting: Sequence[str]
) -> _FamilyChoice:
    """The family, except for what statistics say that sdconv does not know."""
    said = family_in(around.metadata)
    shown = _shown(around, fitting)
    if shown is not None:
        return shown if said is None else _compared(shown, said, fitting)
    choice = _by_itself(structure)
    if said is None:
        return choice
    if said in fitting:
        return _FamilyChoice(said, f"metadata: {spoken(around.metadata)}")
    return _compared(choice, said, fitting)


def _by_itself(structure: Mapping[str, Any]) -> _FamilyChoice:
    """What a VAE's own shapes show."""
    latent = structure["latent_channels"]
    if latent == 4:
        if len(structure["block_out_channels"]) == 3:
            return _FamilyChoice("x4-upscaler", "4 latent channels and three levels")
        return _FamilyChoice("sd1", "4 latent channels", open_to=("sd1", "sd2", "sdxl"))
    if latent == 16:
        return _FamilyChoice("flux1", "16 latent channels", open_to=("flux1", "sd3"))
    name = f"{latent}-channel"
    evidence = f"{latent} latent channels, unlike any known family"
    return _FamilyChoice(name, evidence, open_to=(name,))


def _compared(choice: _FamilyChoice, said: str, fitting: Sequence[str]) -> _FamilyChoice:
    """The choice, left open if the metadata names a family with other factors."""
    if choice.family not in VAE_FACTS:
        return choice
    one, other = VAE_FACTS[choice.family], VAE_FACTS.get(said)
    same = other is not None and (one.scaling_factor, one.shift_factor) == (
        other.scaling_factor,
        other.shift_factor,
    )
    # Playground's own files name the architecture that it shares with SDXL
    if same or (choice.family, said) == ("playground-v2.5", "sdxl"):
        return choice
    candidates = (choice.family, *choice.open_to, *((said,) if said in fitting else ()))
    doubt = f"is of {choice.family} ({choice.evidence}), but the metadata says {said}"
    return replace(choice, open_to=tuple(dict.fromkeys(candidates)), doubt=doubt)


# tensors by which a transformer of a known family is recognised, all under one prefix
_TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "sd3": ("joint_blocks.0.x_block.attn.qkv.weight", "context_embedder.weight"),
    "flux1": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
}
# text encoders, which show the family where there is no unknown network that might read them too
_TEXT_ENCODERS = (
    ("conditioner.embedders.1.", "sdxl"),
    ("conditioner.embedders.0.model.", "sdxl-refiner"),
    ("cond_stage_model.model.", "sd2"),
    ("cond_stage_model.transformer.", "sd1"),
)
# prefixes of parts that are no network which reads latents
_NOT_READERS = (
    *("cond_stage_model.", "conditioner.", "text_encoder", "clip_", "loss.", "model_ema."),
    *("ema.", "first_stage_model.", "vae.", "safety_checker.", "image_encoder."),
)


# parts of names in which a network's layers are counted, or its attention is
_STACK = re.compile(r"attn|attention|block|layer|transformer")


def family_of_unets(around: Surroundings) -> tuple[str, str] | None:
    """The family that the U-Nets in a checkpoint belong to, by their own tensors, and what shows
    it; None if they are of several, or of none that is known."""
    families: dict[str, str] = {}
    for one in around.networks:
        if one.component != "unet":
            continue
        # others' transformers have tensors of the same names
        own = one.shapes(around.shapes)
        if own.get("conv_in.weight", ())[1:2] == (7,):
            families["x4-upscaler"] = f"{one.names['conv_in.weight']} takes 7 channels"
            continue
        added = "add_embedding.linear_1.weight" in own
        widths = [v[-1] for k, v in own.items() if k.endswith("attn2.to_k.weight") and v]
        if widths and (family := family_of_text(widths[0], added=added)):
            families[family] = f"the U-Net reads prompt embeddings of width {widths[0]}"
    return next(iter(families.items())) if len(families) == 1 else None


def _shown(around: Surroundings, fitting: Sequence[str]) -> _FamilyChoice | None:
    """The family that the rest of the checkpoint shows."""
    there = around.statistics or tensors_of_statistics(around.shapes)
    if there and "playground-v2.5" in fitting:
        said = " and ".join(EDM_STATISTICS)
        if around.statistics:
            return _FamilyChoice("playground-v2.5", f"{said} in the file")
        doubt = f"has {said}, whose values are not known from shapes alone"
        return _FamilyChoice("playground-v2.5", said, ("playground-v2.5",), doubt)
    if (shown := family_of_unets(around)) and shown[0] in fitting:
        return _FamilyChoice(*shown)
    for family, (first, *others) in _TRANSFORMERS.items():
        for name in around.shapes:
            prefix = name.removesuffix(first)
            if prefix != name and all(prefix + other in around.shapes for other in others):
                if family in fitting:
                    return _FamilyChoice(family, f"{name} in the same file")
    if _holds_unknown(around):
        return None
    for prefix, named in _TEXT_ENCODERS:
        if named in fitting and any(name.startswith(prefix) for name in around.shapes):
            return _FamilyChoice(named, f"the text encoder under {prefix}")
    return None


def _holds_unknown(around: Surroundings) -> bool:
    """Whether a checkpoint holds weights of a network that sdconv does not know."""
    known = {name for one in around.networks for name in one.names.values()}
    return any(
        name not in known and len(shape) > 1 and _STACK.search(name)
        for name, shape in around.shapes.items()
        if not name.startswith(_NOT_READERS)
    )
