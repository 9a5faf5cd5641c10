"""Finds the networks in a set of named shapes: their kind, layout and prefix, from names alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.keys.prefixes import SortedNames, prefixes, sorted_prefixes
from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical, keys_of_original
from sdconv.checkpoint.keys.vae import (
    FLUX2_RULES,
    TINY_KEYS,
    VAE_RULES,
    modern_attention,
    vae_keys,
)
from sdconv.errors import UnknownNetworkError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class DetectedNetwork:
    """One network in a checkpoint.

    ``component``: ``"vae"`` or ``"unet"``. ``kind``: the name of the network's class. ``layout``:
    ``"diffusers"`` or ``"original"``. ``prefix``: of each of its names in the file. ``names``:
    diffusers' name -> the name in the file. ``dropped``: names under the prefix that are
    deliberately not loaded (losses, EMA copies). ``unexpected``: other names under the prefix that
    the network does not have. ``ema``: diffusers' name -> the name of its running average, if the
    file has one. ``in_layout``: diffusers' name -> the layout's, without the prefix; None if the
    network has no such tensor.
    """

    component: str
    kind: str
    layout: str
    prefix: str
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    ema: Mapping[str, str] = field(default_factory=dict)
    in_layout: Callable[[str], str | None] = field(compare=False, repr=False)

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of the network's tensors by diffusers' names; attention weights that a file
        stores as 1x1 convolutions have their linear shape."""
        return {k: linear_shape(k, tuple(shapes[name])) for k, name in self.names.items()}

    def with_label(self, is_added: bool) -> DetectedNetwork:
        """The same U-Net with the right name for the layers of its added embedding.

        The original layout has one name for two kinds of embedding.

        Args:
            is_added: True for SDXL's text and sizes, False for unCLIP's image.
        """
        ours, other = _EMBEDDINGS if is_added else _EMBEDDINGS[::-1]
        if self.layout == "diffusers" or any(name.startswith(ours) for name in self.names):
            return self
        names, ema = (
            {name.replace(other, ours, 1): stored for name, stored in table.items()}
            for table in (self.names, self.ema)
        )
        return replace(self, names=names, ema=ema)

    def name_in_file(self, canonical: str) -> str:
        """A tensor's name in this file, or the one that it would have, for messages; followed
        by diffusers' name if that is different."""
        name = self.prefix + (self.in_layout(canonical) or canonical)
        return name if name.endswith(canonical) else f"{name} ({canonical})"


_EMBEDDINGS = ("add_embedding.linear_", "class_embedding.linear_")
# the beginnings of the names in a VAE's levels
_VAE_LEVELS: Mapping[str, Collection[str]] = {
    "diffusers": ("encoder.down_blocks.", "decoder.up_blocks."),
    "original": ("encoder.down.", "decoder.up."),
}
# only in FLUX.2's VAE: statistics, and in its original file quant convolutions inside the halves
_ONLY_IN_FLUX2 = ("bn.running_", "encoder.quant_conv.", "decoder.post_quant_conv.")
# how the names of a whole checkpoint's other parts begin
_OTHER_PARTS = (
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
# the noise schedule and the counters that Lightning stores with the weights
_SCHEDULE = re.compile(
    r"((sqrt|log)_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
    r"|logvar|scale_factor|global_step|lvlb_weights"
)
# under a VAE's prefix: the discriminator and the perceptual network of its training, and EMA copies
_DROPPED = re.compile(r"(loss|model_ema)\..*|logvar")
_VAE_ROOTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|bn)\..*")
_ATTENTION_LINEAR = re.compile(r".+\.attentions\.[0-9]{1,4}\.to_(q|k|v|out\.0)\.weight")
# a tiny autoencoder's scale, which some files store next to its halves
_TINY_SCALARS = frozenset({"vae_scale", "vae_shift"})


def linear_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, in)`` for a VAE's attention projection that is stored as a 1x1 convolution; any other
    shape unchanged."""
    if len(shape) == 4 and shape[2:] == (1, 1) and is_vae_projection(canonical):
        return shape[:2]
    return shape


def is_vae_projection(canonical: str) -> bool:
    """Whether the tensor is the weight of one of the four projections in a VAE's attention."""
    return canonical.startswith(("encoder.", "decoder.")) and bool(
        _ATTENTION_LINEAR.fullmatch(canonical)
    )


def find_networks(shapes: Shapes, where: object = None) -> list[DetectedNetwork]:
    """Finds the VAEs, tiny autoencoders and U-Nets in a checkpoint.

    Args:
        shapes: name -> shape of every tensor of the checkpoint.
        where: the checkpoint's name, for messages.

    Raises:
        UnknownNetworkError: numbered layers that are not half of a tiny autoencoder, or more
            networks than any checkpoint has.
    """
    names = SortedNames(shapes)
    return [
        *_find_vaes(shapes, names, where),
        *_find_tiny(shapes, names, where),
        *_find_unets(shapes, names, where),
    ]


def _find_vaes(shapes: Shapes, names: SortedNames, where: object) -> Iterable[DetectedNetwork]:
    layouts: dict[str, str] = {}
    anchors = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    for prefix in prefixes(shapes, *anchors):
        # four axes: a convolution over images, not over videos
        if not any(len(shapes.get(prefix + anchor, ())) == 4 for anchor in anchors):
            continue
        for layout, levels in _VAE_LEVELS.items():
            if any(names.any_begins(prefix + level) for level in levels):
                layouts[prefix] = layout
                break
    for prefix in sorted_prefixes("vae", layouts, where):
        yield _vae(prefix, layouts[prefix], names.under(prefix))


def _vae(prefix: str, layout: str, inside: list[str]) -> DetectedNetwork:
    levels = 1 + max(
        (
            int(m[1])
            for name in inside
            if (m := re.match(r"decoder\.up(?:_blocks)?\.([0-9]{1,4})\.", name))
        ),
        default=-1,
    )
    of_flux2 = any(name.startswith(_ONLY_IN_FLUX2) for name in inside)
    keys = vae_keys(levels, FLUX2_RULES if of_flux2 else VAE_RULES)
    # repacked FLUX.2 files have the statistics, but quant convolutions outside the halves
    repacked = vae_keys(levels)
    names: dict[str, str] = {}
    dropped: list[str] = []
    unexpected: list[str] = []
    for name in inside:
        if layout == "diffusers":
            canonical = modern_attention(name) if keys.original(modern_attention(name)) else None
        else:
            canonical = keys.canonical(name) or repacked.canonical(name)
        if canonical is not None and canonical not in names:
            names[canonical] = prefix + name
        elif _DROPPED.fullmatch(name):
            dropped.append(prefix + name)
        elif prefix or _VAE_ROOTS.fullmatch(name) or not _is_of_another_part(name):
            unexpected.append(prefix + name)
    has_statistics = any(name.startswith("bn.") for name in names)
    kind = "AutoencoderKLFlux2" if has_statistics else "AutoencoderKL"
    return DetectedNetwork(
        component="vae",
        kind=kind,
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=tuple(dropped),
        unexpected=tuple(unexpected),
        in_layout=str if layout == "diffusers" else keys.original,
    )


def _is_of_another_part(name: str) -> bool:
    """Whether a name without a prefix belongs to another part of a whole checkpoint."""
    return name.startswith(_OTHER_PARTS) or bool(_SCHEDULE.fullmatch(name))


_TINY_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<half>(?:taesd_)?(?:encoder|decoder)\.)(?P<layers>layers\.)?(?P<rest>[0-9]{1,4}\..+)"
)
_BARE = re.compile(
    r"[0-9]{1,4}\.(weight|bias|conv\.[024]\.(weight|bias)|pool\.[013]\.(weight|bias)|skip\.weight)"
)


def _find_tiny(shapes: Shapes, names: SortedNames, where: object) -> Iterable[DetectedNetwork]:
    if is_bare_half(shapes):
        half = tiny_half(shapes, where)
        named = ((TINY_KEYS.canonical(f"{half}.{name}"), name) for name in shapes)
        bare = {canonical: name for canonical, name in named if canonical}
        yield _tiny("", "original", bare, (), partial(_tiny_name, is_bare=True))
        return
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for name in shapes:
        if match := _TINY_NAME.fullmatch(name):
            half = match["half"].removeprefix("taesd_").removesuffix(".")
            if match["layers"]:
                layout, canonical = "diffusers", f"{half}.layers.{match['rest']}"
            else:
                layout, canonical = "original", TINY_KEYS.canonical(f"{half}.{match['rest']}") or ""
            groups.setdefault((match["prefix"], layout), {})[canonical] = name
    # the first layer distinguishes a tiny autoencoder from other stacks of numbered layers
    firsts = {"encoder.layers.0.weight", "decoder.layers.0.weight"}
    groups = {key: names for key, names in groups.items() if firsts & set(names)}
    sorted_prefixes("vae", (prefix for prefix, _ in groups), where)
    for (prefix, layout), own in groups.items():
        known = set(own.values())
        rest = [
            prefix + name
            for name in names.under(prefix)
            if prefix + name not in known
            and prefix + name not in _TINY_SCALARS
            and (prefix or not _is_of_another_part(name))
        ]
        in_layout = str if layout == "diffusers" else partial(_tiny_name, is_bare=False)
        yield _tiny(prefix, layout, own, tuple(rest), in_layout)


def _tiny_name(canonical: str, *, is_bare: bool) -> str | None:
    """The original layout's name in a file of both halves, or (``is_bare``) in a file of one."""
    name = TINY_KEYS.original(canonical)
    return name.partition(".")[2] if name and is_bare else name


def _tiny(
    prefix: str,
    layout: str,
    names: dict[str, str],
    unexpected: tuple[str, ...],
    in_layout: Callable[[str], str | None],
) -> DetectedNetwork:
    return DetectedNetwork(
        component="vae",
        kind="AutoencoderTiny",
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=(),
        unexpected=unexpected,
        in_layout=in_layout,
    )


def is_bare_half(shapes: Shapes) -> bool:
    """Whether all names are numbered layers, as in a file of one half of a tiny autoencoder."""
    return bool(shapes) and all(_BARE.fullmatch(name) for name in shapes)


def tiny_half(shapes: Shapes, where: object) -> str:
    """Which half of a tiny autoencoder a file of numbered layers is, from its shapes.

    Returns:
        ``"encoder"`` or ``"decoder"``.

    Raises:
        UnknownNetworkError: neither its input nor its output is an image of three channels.
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
        "numbered layers that are not half of a tiny autoencoder",
        where=where,
        expected="3 channels into the first layer (an encoder) or out of the last one (a decoder)",
        got=f"convolutions {short(dict(sorted(convolutions.items())))}"
        if convolutions
        else "no convolutions",
    )


# the beginnings of names that only a U-Net has together: input, time embedding and up path
_UNET_ANCHORS: Mapping[str, tuple[str, str, str]] = {
    "diffusers": ("conv_in.", "time_embedding.", "up_blocks.0.resnets."),
    "original": ("input_blocks.0.0.", "time_embed.", "output_blocks.0.0."),
}
# modules of networks that are built around such a U-Net: video models and ControlNets
_NOT_A_UNET = frozenset(
    "motion_modules temp_convs temp_attentions temporal_transformer_block time_stack"
    " time_mixer input_hint_block zero_convs".split()
)


def _is_around_a_unet(name: str) -> bool:
    *modules, _ = name.split(".")
    return any(part in _NOT_A_UNET or part.startswith("controlnet_") for part in modules)


def _find_unets(shapes: Shapes, names: SortedNames, where: object) -> Iterable[DetectedNetwork]:
    for layout, anchors in _UNET_ANCHORS.items():
        first = anchors[0]
        candidates = (
            prefix
            for prefix in prefixes(shapes, f"{first}weight", f"{first}bias")
            if all(names.any_begins(prefix + anchor) for anchor in anchors)
            and len(shapes.get(f"{prefix}{first}weight", (0,) * 4)) == 4
        )
        for prefix in sorted_prefixes("unet", candidates, where):
            inside = names.under(prefix)
            if not any(map(_is_around_a_unet, inside)):
                yield _unet(prefix, layout, inside, shapes)


def _unet(prefix: str, layout: str, inside: list[str], shapes: Shapes) -> DetectedNetwork:
    there = frozenset(inside)
    if layout == "diffusers":
        keys = keys_of_canonical(there)
    else:
        label = shapes.get(f"{prefix}label_emb.0.0.weight", ())
        keys = keys_of_original(there, label[1] if len(label) == 2 else None)
    names: dict[str, str] = {}
    unexpected: list[str] = []
    for name in inside:
        if layout == "diffusers":
            canonical = name if keys.original(name) else None
        else:
            canonical = keys.canonical(name)
        if canonical is not None:
            names[canonical] = prefix + name
        elif prefix or not _is_of_another_part(name):
            unexpected.append(prefix + name)
    averages = {canonical: ema_name(name) for canonical, name in names.items()}
    return DetectedNetwork(
        component="unet",
        kind="UNet2DConditionModel",
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=(),
        unexpected=tuple(unexpected),
        ema={canonical: name for canonical, name in averages.items() if name in shapes},
        in_layout=str if layout == "diffusers" else keys.original,
    )
