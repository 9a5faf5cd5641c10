"""Finds the networks in a set of named shapes: their kind, layout and prefix, from names alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from sdconv.checkpoint.identify.statistics import is_statistic
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.keys.prefixes import SortedNames, prefixes, sorted_prefixes
from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical, keys_of_original
from sdconv.checkpoint.keys.vae import (
    FLUX2_RULES,
    TINY_KEYS,
    VAE_RULES,
    attention_name,
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
    file has one. ``averages``: the same for every tensor, whether the file has it or not, if the
    names are known. ``in_layout``: diffusers' name -> the layout's, without the prefix; None if the
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
    averages: Mapping[str, str] = field(default_factory=dict)
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


# under which part of a prefix running averages lie: `model_ema.`, `ema.`, `ema_model.`, `vae_ema.`
EMA_PART = re.compile(r"(?:^|(?<=\.))(?:\w+_)?ema(?:_\w+)?\.")
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
# schedules under names of their own
_EXTRAS = re.compile(r"edm_vpred\..+|(model_)?sampling\..+|denoiser\..+|sigmas?|timesteps")
_VAE_ROOTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|bn)\..*")
_ATTENTION_LINEAR = re.compile(r".+\.attentions\.[0-9]{1,4}\.to_(q|k|v|out\.0)\.weight")
# a tiny autoencoder's scale, which some files store next to its halves
_TINY_SCALARS = frozenset({"vae_scale", "vae_shift"})


def linear_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, in)`` for a VAE's attention projection that is stored as a 1x1 convolution, of images
    or of sequences; any other shape unchanged."""
    if len(shape) in (3, 4) and set(shape[2:]) == {1} and is_vae_projection(canonical):
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
    return _with_averages(
        [
            *_find_vaes(shapes, names, where),
            *_find_tiny(shapes, names, where),
            *_find_unets(shapes, names, where),
        ]
    )


def _with_averages(found: list[DetectedNetwork]) -> list[DetectedNetwork]:
    """The networks, of which those under ``model_ema.`` or the like (with dots in their names) are
    the running averages of others, if there are others."""
    averages = [one for one in found if EMA_PART.search(one.prefix)]
    result = [one for one in found if not EMA_PART.search(one.prefix)]
    for ema in averages:
        same = [n for n, one in enumerate(result) if one.component == ema.component]
        usual = [n for n in same if result[n].prefix in _averaged_prefixes(ema.prefix)] or same
        if len(usual) == 1:
            (n,) = usual
            every = {
                canonical: ema.prefix + (ema.in_layout(canonical) or canonical)
                for canonical in result[n].names
            }
            own = {k: name for k, name in ema.names.items() if k in every}
            result[n] = replace(result[n], ema=own, averages=every)
        else:
            result.append(ema)
    return result


# where whole checkpoints keep their own networks, and where they keep others for conditioning
OWN: Mapping[str, tuple[str, ...]] = {
    "vae": ("first_stage_model.", "vae."),
    "unet": ("model.diffusion_model.", "unet."),
}
_COPIES = ("conditioner.", "cond_stage_model.", "embedder", "model_ema.", "ema.", "text_encoder")


def main_network(several: Sequence[DetectedNetwork]) -> DetectedNetwork | None:
    """Of several networks of one component, the checkpoint's own; None if that is not clear."""
    own = [one for one in several if one.prefix in OWN[one.component]]
    if own:
        return own[0] if len(own) == 1 else None
    others = [one for one in several if not one.prefix.startswith(_COPIES)]
    return others[0] if len(others) == 1 else None


def _averaged_prefixes(prefix: str) -> tuple[str, ...]:
    """Prefixes of the network whose running averages are under ``prefix``, in Lightning's layout
    and in diffusers', and in those of wrappers that copy a module."""
    without = EMA_PART.sub("", prefix, count=1)
    return without, EMA_PART.sub("model.", prefix, count=1), without.removeprefix("module.")


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
        yield _vae(prefix, layouts[prefix], names.under(prefix), shapes)


def _vae(prefix: str, layout: str, inside: list[str], shapes: Shapes) -> DetectedNetwork:
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
            usual = attention_name(name, layout)
            canonical = usual if keys.original(usual) else None
        else:
            usual = attention_name(name, layout)
            canonical = keys.canonical(usual) or repacked.canonical(usual)
        if canonical is not None and canonical not in names:
            names[canonical] = prefix + name
        elif _DROPPED.fullmatch(name):
            dropped.append(prefix + name)
        elif is_statistic(name):
            continue
        elif prefix or _VAE_ROOTS.fullmatch(name) or not _is_of_another_part(name, shapes):
            unexpected.append(prefix + name)
    averages = _averages_without_dots(prefix, names, keys.original, shapes)
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
        ema={canonical: name for canonical, name in averages.items() if name in shapes},
        averages=averages,
        in_layout=str if layout == "diffusers" else keys.original,
    )


def _averages_without_dots(
    prefix: str,
    names: Mapping[str, str],
    original: Callable[[str], str | None],
    shapes: Shapes,
) -> dict[str, str]:
    """A VAE's running averages in Lightning's way, whose names have no dots: diffusers' name -> the
    average's, whether the file has it or not; empty if it has none.

    They keep the original layout's names where the weights have been converted, and lie in the
    VAE's own ``model_ema.`` or in that of everything.
    """
    own = {canonical: name.removeprefix(prefix) for canonical, name in names.items()}
    before = {canonical: original(canonical) or "" for canonical in names}
    ways = [
        {k: f"{place}model_ema.{(inner + name).replace('.', '')}" for k, name in table.items()}
        for place, inner in (
            (prefix, ""),
            ("first_stage_model.", ""),
            ("", prefix),
            ("", "first_stage_model."),
        )
        for table in (own, before)
    ]
    counts = [sum(name in shapes for name in way.values()) for way in ways]
    return ways[counts.index(max(counts))] if max(counts, default=0) else {}


def _is_of_another_part(name: str, shapes: Shapes) -> bool:
    """Whether a name without a prefix belongs to another part of a whole checkpoint, or says
    something about the training."""
    return (
        name.startswith(_OTHER_PARTS)
        or EMA_PART.match(name) is not None
        or bool(_SCHEDULE.fullmatch(name))
        or is_extra(name, tuple(shapes[name]))
    )


def is_extra(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor next to a network without a prefix is not a weight: a mark such as
    ``v_pred``, a counter such as ``iteration``, or a number of the noise schedule."""
    if name == "scaled_fp8":  # which belongs to the weights
        return False
    alone = "." not in name and len(shape) <= 1
    return alone or is_statistic(name) or bool(_EXTRAS.fullmatch(name))


def is_constant(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is no weight but a number of the noise schedule, a statistic or a mark."""
    return is_extra(name, shape) or bool(_SCHEDULE.fullmatch(name))


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
            and (prefix or not _is_of_another_part(name, shapes))
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
        elif prefix or not _is_of_another_part(name, shapes):
            unexpected.append(prefix + name)
    averages = {canonical: ema_name(name) for canonical, name in names.items()}
    if layout == "diffusers" and not any(name in shapes for name in averages.values()):
        # converted from the original layout, whose names the averages still have
        averages = {
            canonical: ema_name(f"model.diffusion_model.{keys.original(canonical)}")
            for canonical in names
        }
    return DetectedNetwork(
        component="unet",
        kind="UNet2DConditionModel",
        layout=layout,
        prefix=prefix,
        names=names,
        dropped=(),
        unexpected=tuple(unexpected),
        ema={canonical: name for canonical, name in averages.items() if name in shapes},
        averages=averages,
        in_layout=str if layout == "diffusers" else keys.original,
    )
