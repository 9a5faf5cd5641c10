"""Recognises quantised weights by the names of what lies next to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from sdconv.checkpoint.identify.find import DetectedNetwork
from sdconv.checkpoint.io.dequantise import misfit, spread_scale
from sdconv.checkpoint.io.files import short
from sdconv.errors import WeightsMismatchError

# what a weight `X.weight` is multiplied by, in the order of preference
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# what else a scaled fp8 layer has: scales for its input, which only 8-bit arithmetic needs, and the
# format in words
_OTHERS = ("scale_input", "input_scale", "comfy_quant")
_LEAF = re.compile(rf"(?P<module>.+)\.(?P<leaf>{'|'.join((*_SCALES, *_OTHERS))})")
_MARKER = "scaled_fp8"

# names that only other kinds of quantised files have, as parts of a tensor's name
_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r".+\.quant_state\.bitsandbytes__(nf4|fp4)"), "bitsandbytes NF4 or FP4"),
    (re.compile(r".+\.weight\.(absmax|quant_map|nested_\w+)"), "bitsandbytes NF4 or FP4"),
    (re.compile(r".+\.(SCB|weight_format)"), "bitsandbytes int8"),
    (re.compile(r".+\.weight_scale_2"), "NVFP4"),
    (re.compile(r".+\.(qweight|qzeros|g_idx)"), "GPTQ or AWQ"),
    (re.compile(r".+\.(wscales|wtscale|smooth_factor\w*)"), "SVDQuant"),
    (re.compile(r".+\.weight\.(_data|_scale|_shift)"), "optimum-quanto"),
)
_FLOAT8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3", "fp8")
_HINT = "get the weights in float16 or bfloat16, or convert them with the software that wrote them"


@dataclass(frozen=True, kw_only=True)
class ScaledWeights:
    """The scaled fp8 weights of a network.

    ``scales``: a weight's name in the file -> its scale's name. ``companions``: every name that
    describes them and is not a tensor of the network. ``unscaled``: one-byte weights without a
    scale among others that have one.
    """

    scales: Mapping[str, str] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()
    unscaled: tuple[str, ...] = ()


def companions_of(found: DetectedNetwork) -> dict[str, str]:
    """Names next to a network's weights that describe their scales -> the weight's name, or an
    empty text for the marker ``scaled_fp8`` of a whole network."""
    weights = set(found.names.values())
    result = {}
    for name in found.unexpected:
        if name == found.prefix + _MARKER:
            result[name] = ""
        elif (match := _LEAF.fullmatch(name)) and f"{match['module']}.weight" in weights:
            result[name] = f"{match['module']}.weight"
    return result


def check_quantised(
    component: str, found: DetectedNetwork, dtype: Callable[[str], str], where: object
) -> None:
    """Refuses weights that were quantised in a way that sdconv does not undo.

    Raises:
        WeightsMismatchError: they were; the message names the way.
    """
    for name in (*found.unexpected, *found.names.values()):
        for pattern, what in _REFUSED:
            if pattern.fullmatch(name.removeprefix(found.prefix)):
                raise _refused(component, what, short(name), where)
    for stored in found.names.values():
        if stored.endswith(".weight") and dtype(stored) in ("F4", "F6_E2M3", "F6_E3M2"):
            raise _refused(component, "4-bit or 6-bit floats", f"{stored} {dtype(stored)}", where)


def scaled_weights(
    found: DetectedNetwork,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Callable[[str], str],
    read: Callable[[str], bytes],
    where: object,
) -> ScaledWeights:
    """The scaled fp8 weights of a network, checked.

    Args:
        shapes, dtype: of the file's tensors.
        read: gives the bytes of a small tensor, for ``comfy_quant``.

    Raises:
        WeightsMismatchError: a scale is missing or does not fit, or the format is another one.
    """
    companions = companions_of(found)
    if not companions:
        return ScaledWeights()
    scales: dict[str, str] = {}
    for leaf in _SCALES:
        for name, weight in companions.items():
            if weight and name.endswith(f".{leaf}"):
                if weight in scales:
                    raise _confused(f"{weight} has two scales", [scales[weight], name], where)
                scales[weight] = name
    for name, weight in companions.items():
        if name.endswith(".comfy_quant"):
            said = _format(read(name))
            if said not in _FLOAT8:
                raise _refused(found.component, f"ComfyUI's format {said!r}", name, where)
            if weight not in scales:
                raise _confused(f"{weight} has no scale", [name], where)
    for weight, scale in scales.items():
        kind = dtype(weight)
        if kind in ("I8", "U8"):
            raise _refused(found.component, "int8", f"{weight} {kind}", where)
        if not kind.startswith("F8"):
            raise _confused(f"{weight} is {kind}, but has a scale", [scale], where)
        if not dtype(scale).startswith(("F", "BF")):
            raise _refused(found.component, f"scales in {dtype(scale)}", scale, where)
        if not _fits(shapes[scale], shapes[weight]):
            raise misfit(weight, shapes[weight], scale, shapes[scale], where)
    small = [
        name
        for name in found.names.values()
        if dtype(name).startswith("F8") and len(shapes[name]) > 1 and name not in scales
    ]
    if small and not scales:
        raise _confused(
            f"none of {len(small)} one-byte weights has a scale",
            [*list(companions)[:1], *small[:3]],
            where,
        )
    return ScaledWeights(
        scales=scales,
        # without any scale the marker says nothing: it is carried over like any other tensor
        companions=frozenset(companions) if scales else frozenset(),
        unscaled=tuple(small),
    )


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    blank = torch.empty(scale, device="meta")
    blocks = spread_scale(blank, weight)
    if blocks is None:
        return False
    return not blocks.ndim or all(
        count in (1, length) for count, length in zip(blocks.shape, weight, strict=True)
    )


def _format(raw: bytes) -> str:
    """The format that a ``comfy_quant`` tensor names; its text if it is not such an object."""
    try:
        return str(json.loads(raw.rstrip(b"\0").decode("utf-8"))["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return short(raw[:60])


def _refused(component: str, what: str, got: object, where: object) -> WeightsMismatchError:
    return WeightsMismatchError(
        f"the {component} is quantised ({what}), which sdconv does not undo",
        where=where,
        expected="floating-point weights, plain or as scaled fp8",
        got=got,
        hint=_HINT,
    )


def _confused(what: str, got: list[str], where: object) -> WeightsMismatchError:
    return WeightsMismatchError(
        f"scaled fp8 weights that do not fit together: {what}",
        where=where,
        expected="one-byte floats, each with one scale",
        got=", ".join(got),
        hint=_HINT,
    )
