"""Recognises quantised weights by the names of what lies next to them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Self

import torch

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.io.dequantise import misfit, spread_scale
from sdconv.checkpoint.io.files import short
from sdconv.errors import WeightsMismatchError

# what a weight `X.weight` is multiplied by, in the order of preference
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# what else a scaled fp8 layer has: scales for its input and output, which only 8-bit arithmetic
# needs, and the format in words
_OTHERS = (
    *("scale_input", "input_scale", "activation_scale", "scale_output", "output_scale"),
    "comfy_quant",
)
_LEAF = re.compile(rf"(?P<module>.+)\.(?P<leaf>{'|'.join((*_SCALES, *_OTHERS))})")
_MARKER = "scaled_fp8"
_FORMATS_KEY = "_quantization_metadata"
_ONE_BYTE = ("F8", "I8", "U8")

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
    """Weights that are scaled fp8.

    ``scales``: a weight's name in the file -> its scale's name. ``companions``: every name that
    describes them and is not a weight itself. ``unscaled``: one-byte weights without a
    scale among others that have one.
    """

    scales: Mapping[str, str] = field(default_factory=dict)
    companions: frozenset[str] = frozenset()
    unscaled: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """Weights that may be quantised, and what lies next to them in the file.

    ``what``: what they are, for messages. ``prefix``: of their names. ``weights``: their names in
    the file. ``others``: other names under the prefix.
    """

    what: str
    prefix: str
    weights: frozenset[str]
    others: tuple[str, ...]

    @classmethod
    def of(cls, found: DetectedNetwork) -> Self:
        """A network's."""
        return cls(
            what=found.component,
            prefix=found.prefix,
            weights=frozenset(found.names.values()),
            others=found.unexpected,
        )

    @property
    def companions(self) -> dict[str, str]:
        """Names that describe the weights' scales -> the weight's name, or an empty text for the
        marker ``scaled_fp8`` of all of them."""
        result = {}
        for name in self.others:
            root = name.removesuffix(_MARKER)
            if root != name and (root == self.prefix or root.endswith(".")):
                if any(weight.startswith(root) for weight in self.weights):
                    result[name] = ""
            elif (match := _LEAF.fullmatch(name)) and f"{match['module']}.weight" in self.weights:
                result[name] = f"{match['module']}.weight"
        return result


def check_quantised(
    these: Weighed,
    dtype: Callable[[str], str],
    metadata: Mapping[str, str],
    where: object,
) -> None:
    """Refuses weights that were quantised in a way that sdconv does not undo.

    Raises:
        WeightsMismatchError: they were; the message names the way.
    """
    for name in (*these.others, *these.weights):
        for pattern, what in _REFUSED:
            if pattern.fullmatch(name.removeprefix(these.prefix)):
                raise _refused(these.what, what, short(name), where)
    for stored in these.weights:
        if stored.endswith(".weight") and dtype(stored) in ("F4", "F6_E2M3", "F6_E3M2"):
            raise _refused(these.what, "4-bit or 6-bit floats", f"{stored} {dtype(stored)}", where)
    for layer, said in formats_in(metadata).items():
        if said not in _FLOAT8 and f"{layer}.weight" in these.weights:
            raise _refused(these.what, f"ComfyUI's format {said!r}", layer, where)
    known = these.companions
    for name in these.others:
        module, _, leaf = name.rpartition(".")
        if name in known or leaf == "bias":
            continue
        for weight in (f"{module}.weight", module):
            if weight in these.weights and _is_small(dtype(weight)):
                raise _refused(
                    these.what,
                    "scaled fp8 or the like, but with names that sdconv does not know",
                    f"{short(name)} next to {short(weight)} {dtype(weight)}",
                    where,
                )


def _is_small(dtype: str) -> bool:
    return dtype.startswith(_ONE_BYTE)


def formats_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """The formats of a file's layers, as ComfyUI's metadata name them; empty without them."""
    try:
        layers = json.loads(metadata[_FORMATS_KEY])["layers"]
        return {str(layer): str(one["format"]) for layer, one in layers.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        return {}


def without_formats(metadata: Mapping[str, str], dequantised: Collection[str]) -> dict[str, str]:
    """A file's metadata without the formats of weights that are not quantised any more.

    Args:
        dequantised: the weights' names.
    """
    result = dict(metadata)
    gone = {layer for layer in formats_in(metadata) if f"{layer}.weight" in dequantised}
    if gone:
        content = json.loads(metadata[_FORMATS_KEY])
        kept = {layer: one for layer, one in content["layers"].items() if layer not in gone}
        result[_FORMATS_KEY] = json.dumps({**content, "layers": kept})
        if not kept:
            del result[_FORMATS_KEY]
    return result


def scaled_weights(
    these: Weighed,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: Callable[[str], str],
    read: Callable[[str], bytes],
    where: object,
) -> ScaledWeights:
    """The scaled fp8 weights among some, checked.

    Args:
        shapes, dtype: of the file's tensors.
        read: gives the bytes of a small tensor, for ``comfy_quant``.

    Raises:
        WeightsMismatchError: a scale is missing or does not fit, or the format is another one.
    """
    companions = these.companions
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
                raise _refused(these.what, f"ComfyUI's format {said!r}", name, where)
            if weight not in scales:
                raise _confused(f"{weight} has no scale", [name], where)
    for weight, scale in scales.items():
        kind = dtype(weight)
        if kind in ("I8", "U8"):
            raise _refused(these.what, "int8", f"{weight} {kind}", where)
        if not kind.startswith("F8"):
            raise _confused(f"{weight} is {kind}, but has a scale", [scale], where)
        if not dtype(scale).startswith(("F", "BF")):
            raise _refused(these.what, f"scales in {dtype(scale)}", scale, where)
        if not _fits(shapes[scale], shapes[weight]):
            raise misfit(weight, shapes[weight], scale, shapes[scale], where)
    small = [
        name
        for name in these.weights
        if dtype(name).startswith("F8") and len(shapes[name]) > 1 and name not in scales
    ]
    if small and not scales:
        raise _confused(
            f"none of {len(small)} one-byte weights has a scale",
            [*list(companions)[:1], *sorted(small)[:3]],
            where,
        )
    return ScaledWeights(
        scales=scales,
        # without any scale the marker says nothing: it is carried over like any other tensor
        companions=frozenset(companions) if scales else frozenset(),
        unscaled=tuple(sorted(small)),
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
