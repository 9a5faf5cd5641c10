"""Which networks a set of named shapes holds, in which layout and under which prefix: names only,
no numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sdconv.checkpoint.keys import (
    FLUX2_RULES,
    VAE_RULES,
    KeyMap,
    modern_attention,
    tiny_canonical,
)
from sdconv.checkpoint.keys_unet import ema_name, keys_of_canonical, keys_of_original
from sdconv.errors import UnknownNetworkError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One network in a checkpoint.

    ``component``: ``"vae"`` or ``"unet"``. ``kind``: the class of network. ``layout``:
    ``"diffusers"`` or ``"original"``. ``prefix``: what stands before each of its names. ``names``:
    diffusers' name -> the name in the file. ``dropped``: names under the prefix that are on purpose
    no weights of it (losses, EMA copies). ``unexpected``: names under the prefix that it has no
    place for. ``ema``: diffusers' name -> the name of its running average, as far as there are any.
    """

    component: str
    kind: str
    layout: str
    prefix: str
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    ema: Mapping[str, str] = field(default_factory=dict)

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Its tensors' shapes by diffusers' names, 1x1-convolution attention weights as the linear
        ones they are."""
        return {k: linear_shape(k, tuple(shapes[name])) for k, name in self.names.items()}


# other parts of a whole checkpoint, by the first part of their names
_BESIDE = (
    "cond_stage_model.",
    "conditioner.",
    "denoiser.",
    "embedder.",
    "first_stage_model.",
    "loss.",
    "model.diffusion_model.",
    "model_ema.",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "unet.",
    "vae.",
)
# the noise schedule that Lightning keeps with the weights, and its counters
_SCHEDULE = re.compile(
    r"((sqrt|log)_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|logvar|scale_factor|global_step|lvlb_weights"
)
# under a VAE's prefix: the discriminator and perceptual network it was trained with, and EMA copies
_DROPPED = re.compile(r"(loss|model_ema)\..*|logvar")
_VAE_ROOTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|bn)\..*")
_ATTENTION_LINEAR = re.compile(r".+\.attentions\.[0-9]{1,4}\.to_(q|k|v|out\.0)\.weight")
# files that keep a tiny autoencoder's scale beside its halves
_TINY_SCALARS = frozenset({"vae_scale", "vae_shift"})


def linear_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, in)`` for the VAE's attention projections where a file keeps them as 1x1
    convolutions."""
    if len(shape) == 4 and shape[2:] == (1, 1) and is_vae_projection(canonical):
        return shape[:2]
    return shape


def is_vae_projection(canonical: str) -> bool:
    """Whether the tensor is one of the VAE attention's four projections."""
    return canonical.startswith(("encoder.", "decoder.")) and bool(
        _ATTENTION_LINEAR.fullmatch(canonical)
    )


def find_networks(shapes: Shapes) -> list[Found]:
    """Every network in a checkpoint that sdconv knows: VAEs, tiny ones, U-Nets.

    Args:
        shapes: name -> shape of every tensor of the checkpoint.
    """
    return [*_find_vaes(shapes), *_find_tiny(shapes), *_find_unets(shapes)]


def _find_vaes(shapes: Shapes) -> Iterable[Found]:
    anchors = {
        name[: -len(anchor)]
        for anchor in ("encoder.conv_in.weight", "decoder.conv_in.weight")
        for name in shapes
        # four axes: a picture's convolution, not a video's
        if name.endswith(anchor) and len(shapes[name]) == 4
    }
    for prefix in sorted(anchors):
        if prefix and not prefix.endswith("."):
            continue
        inside = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
        if any(re.match(r"(encoder|decoder)\.(down|up)_blocks\.\d", name) for name in inside):
            yield _vae(prefix, "diffusers", inside)
        elif any(re.match(r"(encoder\.down|decoder\.up)\.\d", name) for name in inside):
            yield _vae(prefix, "original", inside)


def _vae(prefix: str, layout: str, inside: set[str]) -> Found:
    levels = 1 + max(
        (
            int(m[1])
            for name in inside
            if (m := re.match(r"decoder\.up(?:_blocks)?\.([0-9]{1,4})\.", name))
        ),
        default=-1,
    )
    within_halves = "decoder.post_quant_conv.weight" in inside
    keymap = KeyMap(
        FLUX2_RULES if within_halves or "bn.running_mean" in inside else VAE_RULES, levels
    )
    # the statistics also stand beside quant convolutions outside the halves: repacked FLUX.2 files
    outside = KeyMap(VAE_RULES, levels)
    names: dict[str, str] = {}
    dropped: list[str] = []
    unexpected: list[str] = []
    for name in sorted(inside):
        if layout == "diffusers":
            canonical = modern_attention(name) if keymap.original(modern_attention(name)) else None
        else:
            canonical = keymap.canonical(name) or outside.canonical(name)
        if canonical is not None and canonical not in names:
            names[canonical] = prefix + name
        elif _DROPPED.fullmatch(name):
            dropped.append(prefix + name)
        elif prefix or _VAE_ROOTS.fullmatch(name) or not _beside(name):
            unexpected.append(prefix + name)
    kind = "AutoencoderKLFlux2" if "bn.running_mean" in names else "AutoencoderKL"
    return Found(
        component="vae",
        kind=kind,
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=tuple(dropped),
        unexpected=tuple(unexpected),
    )


def _beside(name: str) -> bool:
    """Whether a top-level name belongs to another part of a whole checkpoint."""
    return name.startswith(_BESIDE) or bool(_SCHEDULE.fullmatch(name))


_TINY_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<half>(?:taesd_)?(?:encoder|decoder)\.)(?P<layers>layers\.)?(?P<rest>[0-9]{1,4}\..+)"
)
_BARE = re.compile(
    r"[0-9]{1,4}\.(weight|bias|conv\.[024]\.(weight|bias)|pool\.[013]\.(weight|bias)|skip\.weight)"
)


def _find_tiny(shapes: Shapes) -> Iterable[Found]:
    if is_bare_half(shapes):
        half = tiny_half(shapes)
        bare = {canonical: name for name in shapes if (canonical := tiny_canonical(half, name))}
        yield _tiny("", "original", bare, ())
        return
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in shapes:
        if match := _TINY_NAME.fullmatch(name):
            half = match["half"].removeprefix("taesd_").removesuffix(".")
            if match["layers"]:
                layout, canonical = "diffusers", f"{half}.layers.{match['rest']}"
            else:
                layout, canonical = "original", tiny_canonical(half, match["rest"]) or ""
            groups.setdefault((match["prefix"], layout), {})[canonical] = name
    for (prefix, layout), names in groups.items():
        # its first layer is what tells a tiny autoencoder from other stacks of numbered layers
        if not {"encoder.layers.0.weight", "decoder.layers.0.weight"} & set(names):
            continue
        known = set(names.values())
        rest = [
            name
            for name in shapes
            if name.startswith(prefix)
            and name not in known
            and name not in _TINY_SCALARS
            and (prefix or not _beside(name))
        ]
        yield _tiny(prefix, layout, names, tuple(rest))


def _tiny(prefix: str, layout: str, names: dict[str, str], unexpected: tuple[str, ...]) -> Found:
    return Found(
        component="vae",
        kind="AutoencoderTiny",
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=(),
        unexpected=unexpected,
    )


def is_bare_half(shapes: Shapes) -> bool:
    """Whether all names are numbered layers, as in the files of a tiny autoencoder's halves."""
    return bool(shapes) and all(_BARE.fullmatch(name) for name in shapes)


def tiny_half(shapes: Shapes) -> str:
    """``"encoder"`` or ``"decoder"``: which half a file of bare numbered layers is, by its shapes
    alone.

    Raises:
        UnknownNetworkError: neither takes nor gives pictures of three channels.
    """
    convolutions = {
        int(name.split(".")[0]): shape
        for name, shape in shapes.items()
        if re.fullmatch(r"[0-9]{1,4}\.weight", name) and len(shape) == 4
    }
    if convolutions:
        first, last = convolutions[min(convolutions)], convolutions[max(convolutions)]
        if first[1] == 3 and min(convolutions) == 0:
            return "encoder"
        if last[0] == 3:
            return "decoder"
    raise UnknownNetworkError(
        "numbered layers that are no half of a tiny autoencoder",
        expected="3 channels into the first layer (an encoder) or out of the last one (a decoder)",
        got=f"convolutions {dict(sorted(convolutions.items()))}"
        if convolutions
        else "no convolutions",
    )


# what only a U-Net has all of, by layout: the way in, the time, the way up
_UNET_ANCHORS: Mapping[str, tuple[str, ...]] = {
    "diffusers": (
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "up_blocks.0.resnets.0.conv1.weight",
    ),
    "original": (
        "input_blocks.0.0.weight",
        "time_embed.0.weight",
        "output_blocks.0.0.in_layers.0.weight",
    ),
}
# modules of networks that are built around such a U-Net: for videos, and ControlNets
_NOT_A_UNET = re.compile(
    r".*(?:motion_modules|temp_convs|temp_attentions|temporal_transformer_block|time_stack"
    r"|time_mixer|input_hint_block|zero_convs|controlnet_\w+)\..*"
)


def _find_unets(shapes: Shapes) -> Iterable[Found]:
    for layout, anchors in _UNET_ANCHORS.items():
        starts = {name[: -len(anchors[0])] for name in shapes if name.endswith(anchors[0])}
        for prefix in sorted(starts):
            inside = [name.removeprefix(prefix) for name in shapes if name.startswith(prefix)]
            if (
                all(prefix + anchor in shapes for anchor in anchors)
                and (not prefix or prefix.endswith("."))
                and len(shapes[prefix + anchors[0]]) == 4
                and not any(_NOT_A_UNET.fullmatch(name) for name in inside)
            ):
                yield _unet(prefix, layout, sorted(inside), shapes)


def _unet(prefix: str, layout: str, inside: list[str], shapes: Shapes) -> Found:
    there = frozenset(inside)
    keys = keys_of_canonical(there) if layout == "diffusers" else keys_of_original(there)
    names: dict[str, str] = {}
    unexpected: list[str] = []
    for name in inside:
        if layout == "diffusers":
            canonical = name if keys.original(name) else None
        else:
            canonical = keys.canonical(name)
        if canonical is not None:
            names[canonical] = prefix + name
        elif prefix or not _beside(name):
            unexpected.append(prefix + name)
    averages = {canonical: ema_name(name) for canonical, name in names.items()}
    return Found(
        component="unet",
        kind="UNet2DConditionModel",
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=(),
        unexpected=tuple(unexpected),
        ema={canonical: name for canonical, name in averages.items() if name in shapes},
    )
