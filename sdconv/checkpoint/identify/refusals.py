"""Refuses what was found in a checkpoint but is not a network that sdconv builds, by its name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sdconv.checkpoint.identify.detected import DetectedNetwork, Shapes
from sdconv.checkpoint.identify.find import OWN
from sdconv.checkpoint.identify.other_names import EMA_PART
from sdconv.checkpoint.identify.others import other_kind, other_unet
from sdconv.checkpoint.io.files import short
from sdconv.errors import UnknownNetworkError, WeightsMismatchError


def under(found: Sequence[DetectedNetwork], prefix: str, where: object) -> list[DetectedNetwork]:
    """The networks under the prefix that the caller names."""
    wanted = f"{prefix}." if prefix and not prefix.endswith(".") else prefix
    if chosen := [one for one in found if one.prefix == wanted]:
        return chosen
    raise UnknownNetworkError(
        f"there is no network under the prefix {prefix!r}",
        where=where,
        expected=" or ".join(repr(one.prefix) for one in found[:8]) or "a network",
        got=repr(prefix),
        hint="running averages are loaded with ema=True" if EMA_PART.search(wanted) else None,
    )


def not_found(
    shapes: Shapes, everything: Sequence[DetectedNetwork], component: str | None, where: object
) -> UnknownNetworkError:
    """The error for a checkpoint without the network that is asked for, which names what it holds
    instead."""
    kind = other_kind(shapes) if component in (None, "vae") or not everything else None
    if kind is not None:
        return UnknownNetworkError(
            f"no network that sdconv knows: this is {kind}",
            where=where,
            expected="a VAE or a tiny autoencoder for images, or a U-Net",
            got=_glimpse(list(shapes)),
            hint="run it with diffusers, or with the code that it was trained with",
        )
    if everything:
        return UnknownNetworkError(
            f"there is no component {component!r}",
            where=where,
            expected=repr(component),
            got=", ".join(sorted({one.component for one in everything})),
        )
    only_averages = bool(shapes) and all(EMA_PART.search(name) for name in shapes)
    return UnknownNetworkError(
        "no network that sdconv knows"
        + (": only running averages, whose names have lost their dots" if only_averages else ""),
        where=where,
        expected="a VAE, a tiny autoencoder or a U-Net, in diffusers' or the original layout",
        got=_glimpse(list(shapes)),
        hint="get the file that has the weights too: their names say what the averages are of"
        if only_averages
        else "check that this is the right file; `sdconv inspect` lists a file's tensors",
    )


def check_unet(found: DetectedNetwork, where: object) -> None:
    """Refuses a U-Net with modules that sdconv does not build, and names it."""
    if kind := other_unet(name.removeprefix(found.prefix) for name in found.unexpected):
        raise UnknownNetworkError(
            f"the unet is {kind[0]}, which sdconv does not build",
            where=where,
            expected="the U-Net of Stable Diffusion 1, 2 or XL, or one distilled from it",
            got=short(kind[1]),
            hint="run it with diffusers, or with the code that it was trained with",
        )


def check_first_stage(shapes: Shapes, found: Sequence[DetectedNetwork], where: object) -> None:
    """Refuses a copy of a VAE somewhere else in a file whose own VAE is for videos."""
    others = [one.prefix for one in found if one.component == "vae"]
    for first in (*OWN["vae"], "") if others else ():
        if first in others:
            return
        video = re.compile(re.escape(first) if first else r"(?:encoder|decoder)\.")
        if not any(len(shape) == 5 and video.match(name) for name, shape in shapes.items()):
            continue
        raise UnknownNetworkError(
            f"the vae under {first or 'no prefix'} is {other_kind(shapes, first) or 'for videos'}, "
            "which sdconv does not build",
            where=where,
            expected="a VAE for images",
            got=f"another VAE under {others[0] or 'no prefix'}, which is not the file's own",
            hint=f"to use that one, pass prefix={others[0]!r}",
        )


def check_halves(
    chosen: DetectedNetwork, several: Sequence[DetectedNetwork], shapes: Shapes, where: object
) -> None:
    """Refuses half of a VAE, and says where a whole one lies."""
    if chosen.kind not in ("AutoencoderKL", "AutoencoderKLFlux2"):
        return
    halves = {half: _has_half(chosen, half) for half in ("encoder", "decoder")}
    if all(halves.values()):
        return
    there, gone = ("decoder", "encoder") if halves["decoder"] else ("encoder", "decoder")
    whole = [
        one
        for one in several
        if one is not chosen and _has_half(one, "encoder") and _has_half(one, "decoder")
    ]
    raise WeightsMismatchError(
        f"the VAE is incomplete: under {chosen.prefix or 'no prefix'} there is the {there} alone, "
        f"and its {gone} is missing",
        where=where,
        expected="an encoder and a decoder",
        got=f"{len(chosen.names)} tensors of the {there}",
        hint=f"a whole VAE lies under {whole[0].prefix or 'no prefix'}: pass "
        f"prefix={whole[0].prefix!r}"
        if whole
        else "load a file with the whole VAE",
    )


_QUANT_CONV = re.compile(r"(?P<prefix>(?:.*\.)?)(?P<own>(?:post_)?quant_conv)\.weight")


def check_quant_convs(
    chosen: DetectedNetwork, everything: Sequence[DetectedNetwork], shapes: Shapes, where: object
) -> None:
    """Refuses a VAE without quant convolutions where the file has some that are no network's."""
    if chosen.kind != "AutoencoderKL":
        return
    claimed = {name for one in everything for name in (*one.names.values(), *one.ema.values())} | {
        name for one in everything for name in one.unexpected
    }
    for name in shapes:
        match = _QUANT_CONV.fullmatch(name)
        # those of another network, under another prefix, are its own affair
        if match is None or name in claimed or not chosen.prefix.startswith(match["prefix"]):
            continue
        if f"{match['own']}.weight" not in chosen.names:
            raise WeightsMismatchError(
                f"the VAE under {chosen.prefix or 'no prefix'} has no {match['own']}, but the file "
                "has one elsewhere",
                where=where,
                expected=f"{chosen.prefix}{match['own']}.weight",
                got=short(name),
                hint="rename it, or leave it out of the file if it belongs to something else",
            )


def _has_half(found: DetectedNetwork, half: str) -> bool:
    return any(name.startswith(f"{half}.") for name in found.names)


def _glimpse(names: list[str]) -> str:
    return f"{len(names)} tensors: {short(sorted(names)[:4])}" if names else "no tensors"
