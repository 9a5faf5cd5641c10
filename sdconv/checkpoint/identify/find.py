"""Finds the networks in a set of named shapes: their kind, layout and prefix, from names alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from sdconv.checkpoint.identify.detected import DetectedNetwork, Shapes
from sdconv.checkpoint.identify.find_tiny import find_tiny
from sdconv.checkpoint.identify.other_names import EMA_PART, is_of_another_part
from sdconv.checkpoint.identify.statistics import is_statistic
from sdconv.checkpoint.keys.prefixes import SortedNames, prefixes, sorted_prefixes
from sdconv.checkpoint.keys.unet import ema_name, keys_of_canonical, keys_of_original
from sdconv.checkpoint.keys.vae import FLUX2_RULES, VAE_RULES, attention_name, vae_keys

# the beginnings of the names in a VAE's levels
_VAE_LEVELS: Mapping[str, Collection[str]] = {
    "diffusers": ("encoder.down_blocks.", "decoder.up_blocks."),
    "original": ("encoder.down.", "decoder.up."),
}
# only in FLUX.2's VAE: statistics, and in its original file quant convolutions inside the halves
_ONLY_IN_FLUX2 = ("bn.running_", "encoder.quant_conv.", "decoder.post_quant_conv.")
# under a VAE's prefix: the discriminator and the perceptual network of its training, and EMA copies
_DROPPED = re.compile(r"(loss|model_ema)\..*|logvar")
_VAE_ROOTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|bn)\..*")


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
            *find_tiny(shapes, names, where),
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
    # one without a prefix next to it is as likely the checkpoint's own
    own += [one for one in several if own and not one.prefix]
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
        elif prefix or _VAE_ROOTS.fullmatch(name) or not is_of_another_part(name, shapes):
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
        elif prefix or not is_of_another_part(name, shapes):
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
