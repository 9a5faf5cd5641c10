"""Finds tiny autoencoders in a set of named shapes, whole or one half of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial

from sdconv.checkpoint.identify.detected import DetectedNetwork, Shapes
from sdconv.checkpoint.identify.other_names import is_of_another_part
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.keys.prefixes import SortedNames, sorted_prefixes
from sdconv.checkpoint.keys.vae import TINY_KEYS
from sdconv.errors import UnknownNetworkError

# a tiny autoencoder's scale, which some files store next to its halves
_TINY_SCALARS = frozenset({"vae_scale", "vae_shift"})
_TINY_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?)(?P<half>(?:taesd_)?(?:encoder|decoder)\.)(?P<layers>layers\.)?(?P<rest>[0-9]{1,4}\..+)"
)
_BARE = re.compile(
    r"[0-9]{1,4}\.(weight|bias|conv\.[024]\.(weight|bias)|pool\.[013]\.(weight|bias)|skip\.weight)"
)


def find_tiny(shapes: Shapes, names: SortedNames, where: object) -> Iterable[DetectedNetwork]:
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
            and (prefix or not is_of_another_part(name, shapes))
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
