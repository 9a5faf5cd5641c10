"""Shapes to configs, and the family that decides what shapes leave open."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdconv.checkpoint.find import Found, Shapes, find_networks
from sdconv.checkpoint.infer_unet import read_unet
from sdconv.checkpoint.write import CONFIG_KEY
from sdconv.config import (
    AutoencoderKLConfig,
    AutoencoderKLFlux2Config,
    AutoencoderTinyConfig,
    Config,
    UNet2DConditionConfig,
)
from sdconv.config.facts import NORM_NUM_GROUPS, VAE_FACTS, VaeFacts
from sdconv.errors import (
    CheckpointError,
    InputError,
    SdconvWarning,
    UnknownNetworkError,
    WeightsMismatchError,
)


@dataclass(frozen=True, kw_only=True)
class Identified:
    """A network in a checkpoint, and what it is.

    ``family``: a name such as ``"sdxl"``. ``evidence``: what decided it. ``open_to``: the families
    among which nothing decided, empty where something did.
    """

    found: Found
    config: Config
    family: str
    evidence: str
    open_to: tuple[str, ...] = ()

    @property
    def component(self) -> str:
        """``"vae"`` or ``"unet"``."""
        return self.found.component


def infer(
    shapes: Shapes, *, metadata: Mapping[str, str] | None = None, family: str | None = None
) -> dict[str, Config]:
    """Configs of the networks in a checkpoint, from names and shapes alone.

    Args:
        shapes: name -> shape of every tensor, as ``read_header(path).shapes`` gives them;
            diffusers' or the original layout, bare or prefixed, whatever else is beside.
        metadata: the file's own, which may name the family.
        family: the family, where the caller knows it (``"sd1"``, ``"sdxl"``, ``"flux1"``, ...).

    Returns:
        ``{"vae": config, "unet": config}``, as far as they are there; frozen dataclasses with
        diffusers' field names.

    Raises:
        UnknownNetworkError: no network that sdconv knows, or two of one kind.
        WeightsMismatchError: a network without a tensor that its config is read from.
        InputError: an unknown family, or one that does not fit.

    Warns:
        SdconvWarning: the shapes fit several families that differ in, say, the scaling factor.
    """
    identified = identify(shapes, metadata=metadata, family=family)
    for one in identified:
        warn_if_open(one)
    return {one.component: one.config for one in identified}


def identify(
    shapes: Shapes,
    *,
    metadata: Mapping[str, str] | None = None,
    family: str | None = None,
    config: Mapping[str, Any] | None = None,
    where: object = None,
) -> list[Identified]:
    """Like ``infer``, with where each network was found and what decided its family; it does not
    warn.

    Args:
        shapes, metadata, family: as for ``infer``.
        config: the content of a ``config.json`` beside the weights. where: the weights' name, for
            messages.
    """
    if family is not None and family not in VAE_FACTS and family not in _TINY_FAMILIES:
        raise InputError(
            "no such family",
            where="family",
            expected=", ".join([*VAE_FACTS, *_TINY_FAMILIES]),
            got=repr(family),
        )
    found = find_networks(shapes)
    if not found:
        raise UnknownNetworkError(
            "no network that sdconv knows",
            where=where,
            expected="a VAE, a tiny autoencoder or a U-Net, in diffusers' or the original layout",
            got=_glimpse(list(shapes)),
            fix="check that this is the file you meant; `sdconv inspect` lists what a file holds",
        )
    for component in {one.component for one in found}:
        several = [one for one in found if one.component == component]
        if len(several) > 1:
            raise UnknownNetworkError(
                f"several networks that could be the {component}",
                where=where,
                expected="one",
                got=", ".join(f"{one.kind} under {one.prefix or 'no prefix'!r}" for one in several),
                fix="pass a state dict that holds one of them",
            )
    metadata = metadata or {}
    told = dict(config or {}) or _told(metadata, where)
    return [
        _as_told(one, told, family, where)
        if told
        else _IDENTIFY[one.kind](one, shapes, metadata, family)
        for one in found
    ]


def _told(metadata: Mapping[str, str], where: object) -> dict[str, Any]:
    """The config that a file written by sdconv carries; empty where it carries none."""
    if CONFIG_KEY not in metadata:
        return {}
    try:
        content = json.loads(metadata[CONFIG_KEY])
    except ValueError as error:
        raise CheckpointError(
            f"the config in the file's metadata is not JSON ({error})",
            where=where,
            expected=f"a JSON object under {CONFIG_KEY}",
            got=metadata[CONFIG_KEY][:80],
        ) from error
    return content if isinstance(content, dict) else {}


def _as_told(
    found: Found, told: Mapping[str, Any], family: str | None, where: object
) -> Identified:
    """The network with the config that is written beside it."""
    name = told.get("_class_name", found.kind)
    if name != found.kind:
        raise UnknownNetworkError(
            f"the config beside the {found.component} is for another class of network",
            where=where,
            expected=found.kind,
            got=name,
            fix="remove the config: it is then read from the shapes",
        )
    config = _CONFIGS[found.kind].from_json(told, where)
    facts = VAE_FACTS.get(family or "")
    if facts is not None and isinstance(config, AutoencoderKLConfig):
        config = dataclasses.replace(
            config, scaling_factor=facts.scaling_factor, shift_factor=facts.shift_factor
        )
    named = family or _named_by(config) or "of no known family"
    return Identified(found=found, config=config, family=named, evidence="the config beside it")


def _named_by(config: Config) -> str | None:
    """The family whose scaling factor a config gives, where exactly one has it."""
    fitting = [
        name
        for name, facts in VAE_FACTS.items()
        if config.get("scaling_factor") == facts.scaling_factor
        and config.get("latent_channels") == facts.latent_channels
    ]
    return " or ".join(fitting) or None


# what shapes leave open, where they do
_OPEN = {"vae": "the scaling factor", "unet": "the number of attention heads"}


def warn_if_open(identified: Identified) -> None:
    """Warns where a choice of family was made that neither the weights nor the caller decided."""
    if identified.open_to:
        warnings.warn(
            f"the {identified.component} could be of {' or '.join(identified.open_to)}, which "
            f"differ in {_OPEN[identified.component]}; {identified.family} was taken: pass "
            "family= to decide",
            SdconvWarning,
            stacklevel=3,
        )


def _autoencoder_kl(
    found: Found, shapes: Shapes, metadata: Mapping[str, str], family: str | None
) -> Identified:
    own = found.shapes(shapes)
    structure = _vae_structure(own)
    latent = structure["latent_channels"]
    choice = _vae_family(structure, shapes, metadata, family)
    facts = VAE_FACTS.get(choice.family) or VaeFacts(
        latent_channels=latent,
        scaling_factor=1.0,
        shift_factor=None,
        sample_size=512,
        force_upcast=True,
        source="no known family has this many latent channels",
    )
    config = _built(
        AutoencoderKLConfig,
        **structure,
        scaling_factor=facts.scaling_factor,
        shift_factor=facts.shift_factor,
        sample_size=facts.sample_size,
        force_upcast=facts.force_upcast,
    )
    return Identified(
        found=found,
        config=config,
        family=choice.family,
        evidence=choice.evidence,
        open_to=choice.open_to,
    )


def _autoencoder_kl_flux2(
    found: Found, shapes: Shapes, metadata: Mapping[str, str], family: str | None
) -> Identified:
    own = found.shapes(shapes)
    structure = _vae_structure(own)
    decoder = _levels(own, "decoder.up_blocks")[::-1]
    same = decoder == structure["block_out_channels"]
    per_patch = own["bn.running_mean"][0] / structure["latent_channels"]
    side = math.isqrt(int(per_patch))
    assumed = AutoencoderKLFlux2Config.assumed
    config = _built(
        AutoencoderKLFlux2Config,
        **structure,
        decoder_block_out_channels=None if same else decoder,
        sample_size=assumed["sample_size"],
        batch_norm_eps=assumed["batch_norm_eps"],
        batch_norm_momentum=assumed["batch_norm_momentum"],
        patch_size=(side, side),
    )
    return Identified(
        found=found, config=config, family="flux2", evidence="batch-norm statistics of its latents"
    )


def _autoencoder_tiny(
    found: Found, shapes: Shapes, metadata: Mapping[str, str], family: str | None
) -> Identified:
    encoder = _tiny_layers(found, shapes, "encoder")
    decoder = _tiny_layers(found, shapes, "decoder")
    assumed = AutoencoderTinyConfig.assumed
    stem, encoder_channels, encoder_blocks = _tiny_encoder(encoder)
    decoder_channels, decoder_blocks = _tiny_decoder(decoder)
    latent = decoder[0].shape[1] if decoder else encoder[-1].shape[0]
    if encoder and decoder and encoder[-1].shape[0] != latent:
        raise WeightsMismatchError(
            "encoder and decoder are of different autoencoders",
            expected=f"{latent} latent channels, the decoder's",
            got=f"{encoder[-1].shape[0]} out of the encoder",
            fix="load the two halves of one autoencoder",
        )
    pooled = any(layer.pooled for layer in (*encoder, *decoder))
    config = _built(
        AutoencoderTinyConfig,
        in_channels=encoder[0].shape[1] if encoder else 3,
        out_channels=decoder[-1].shape[0] if decoder else 3,
        encoder_block_out_channels=encoder_channels,
        decoder_block_out_channels=decoder_channels,
        num_encoder_blocks=encoder_blocks,
        num_decoder_blocks=decoder_blocks,
        latent_channels=latent,
        encoder_stem_channels=stem,
        use_midblock_gn=pooled,
        latent_magnitude=assumed["latent_magnitude"],
        latent_shift=assumed["latent_shift"],
        force_upcast=assumed["force_upcast"],
        scaling_factor=assumed["scaling_factor"],
        shift_factor=assumed["shift_factor"],
    )
    if family is not None:
        return Identified(found=found, config=config, family=family, evidence="the caller's word")
    name = (
        "taef2"
        if pooled
        else "taesana"
        if stem or len(decoder_blocks) == 6
        else {4: "taesd or taesdxl", 16: "taesd3 or taef1"}.get(latent, "taesd-like")
    )
    # these families differ in no number, so nothing is left open
    return Identified(
        found=found, config=config, family=name, evidence="layers and latent channels"
    )


def _unet(
    found: Found, shapes: Shapes, metadata: Mapping[str, str], family: str | None
) -> Identified:
    read = read_unet(found.shapes(shapes), family)
    return Identified(
        found=found,
        config=read.config,
        family=read.family,
        evidence=read.evidence,
        open_to=read.open_to,
    )


_TINY_FAMILIES = ("taesd", "taesdxl", "taesd3", "taef1", "taef2", "taesana")
_CONFIGS: Mapping[str, type[Config]] = {
    "AutoencoderKL": AutoencoderKLConfig,
    "AutoencoderKLFlux2": AutoencoderKLFlux2Config,
    "AutoencoderTiny": AutoencoderTinyConfig,
    "UNet2DConditionModel": UNet2DConditionConfig,
}
_IDENTIFY = {
    "AutoencoderKL": _autoencoder_kl,
    "AutoencoderKLFlux2": _autoencoder_kl_flux2,
    "AutoencoderTiny": _autoencoder_tiny,
    "UNet2DConditionModel": _unet,
}


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
        int(m[1]) for k in own if (m := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d+)\.", k))
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


def _vae_family(
    structure: Mapping[str, Any],
    shapes: Shapes,
    metadata: Mapping[str, str],
    family: str | None,
) -> _Choice:
    latent = structure["latent_channels"]
    fitting = tuple(name for name, facts in VAE_FACTS.items() if facts.latent_channels == latent)
    if family is not None:
        if family not in fitting:
            raise InputError(
                f"the family {family!r} does not fit a VAE with {latent} latent channels",
                where="family",
                expected=", ".join(fitting) or "no family: none known has so many",
                got=repr(family),
            )
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


def _family_beside(shapes: Shapes) -> tuple[str, str] | None:
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


@dataclass(frozen=True)
class _Layer:
    """A layer of a tiny autoencoder: its first convolution's shape and what it is."""

    shape: tuple[int, ...]
    block: bool
    biased: bool
    pooled: bool


def _tiny_layers(found: Found, shapes: Shapes, half: str) -> list[_Layer]:
    """The layers of one half that have weights, in order; empty where that half is absent."""
    numbers = {
        int(m[1]) for name in found.names if (m := re.match(rf"{half}\.layers\.(\d+)\.", name))
    }
    layers = []
    for number in sorted(numbers):
        at = f"{half}.layers.{number}."
        first = found.names.get(at + "conv.0.weight") or found.names.get(at + "weight")
        if first is None or len(shapes[first]) != 4:
            raise WeightsMismatchError(
                "a layer of the tiny autoencoder is incomplete",
                where=at.removesuffix("."),
                expected="a 3x3 convolution or a block of three",
                got=", ".join(k for k in found.names if k.startswith(at)),
            )
        layers.append(
            _Layer(
                shape=tuple(shapes[first]),
                block=at + "conv.0.weight" in found.names,
                biased=at + "bias" in found.names,
                pooled=at + "pool.0.weight" in found.names,
            )
        )
    if layers and (layers[0].block or layers[-1].block or len(layers) < 3):
        raise WeightsMismatchError(
            "the tiny autoencoder is incomplete",
            where=half,
            expected="a convolution at each end and blocks between",
            got=f"{len(layers)} layers with weights",
        )
    return layers


def _tiny_encoder(
    layers: list[_Layer],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Stem channels, channels and number of blocks of each stage."""
    if not layers:
        return (), (), ()
    body = layers[:-1]
    stem = [layer.shape[0] for layer in body if layer.biased and not layer.block]
    channels, blocks = _stages(stem[-1], body)
    # a stem of one convolution is the plain one, at stride 1; the strided stem has several
    return tuple(stem) if len(stem) > 1 else (), channels, blocks


def _tiny_decoder(layers: list[_Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and number of blocks of each stage."""
    return _stages(layers[0].shape[0], layers[:-1]) if layers else ((), ())


def _stages(first: int, layers: list[_Layer]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Stages begin at convolutions without bias: those at stride 2, and those after a doubling."""
    channels, blocks = [first], [0]
    for layer in layers:
        if layer.block:
            blocks[-1] += 1
        elif not layer.biased:
            channels.append(layer.shape[0])
            blocks.append(0)
    return tuple(channels), tuple(blocks)


def _built(cls: type[Config], **fields: Any) -> Config:
    try:
        return cls(**fields)
    except ValueError as error:
        raise WeightsMismatchError(
            f"the shapes make no {cls.class_name}: {error}",
            expected=f"channels that are multiples of {NORM_NUM_GROUPS}, as in every known family",
            fix="a network with other groups needs its config.json beside the weights",
        ) from error


def _glimpse(names: list[str]) -> str:
    if not names:
        return "no tensors"
    return (
        f"{len(names)} tensors: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
    )
