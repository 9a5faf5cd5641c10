"""Key maps as data: what each tensor is called in the original layout and in diffusers', both ways.

A rule pairs two templates for a module's name. Fields in braces stand for what varies:

- ``{half}``: ``encoder`` or ``decoder``; ``{level}``, ``{layer}``: numbers that are the same on
  both sides;
- ``{up}``: a level that is counted from the other end (original ``decoder.up.i`` is
  ``up_blocks.(n-1-i)``);
- ``{nth}``: a number that the original counts from 1;
- ``{resnet}``, ``{attention}``: a leaf that is named differently on each side, from the tables
  below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

# leaf names: diffusers' -> the original's
LEAVES: Mapping[str, Mapping[str, str]] = {
    "resnet": {
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "conv_shortcut": "nin_shortcut",
    },
    "attention": {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    },
}

_FIELDS: Mapping[str, str] = {
    "half": "encoder|decoder",
    "level": r"[0-9]{1,4}",
    "layer": r"[0-9]{1,4}",
    "up": r"[0-9]{1,4}",
    "nth": r"[0-9]{1,4}",
}

Rules = tuple[tuple[str, str], ...]

# diffusers' name, the original's name (ldm/modules/diffusionmodules/model.py)
VAE_RULES: Rules = (
    ("{half}.conv_in", "{half}.conv_in"),
    ("{half}.conv_norm_out", "{half}.norm_out"),
    ("{half}.conv_out", "{half}.conv_out"),
    (
        "encoder.down_blocks.{level}.resnets.{layer}.{resnet}",
        "encoder.down.{level}.block.{layer}.{resnet}",
    ),
    ("encoder.down_blocks.{level}.downsamplers.0.conv", "encoder.down.{level}.downsample.conv"),
    ("decoder.up_blocks.{up}.resnets.{layer}.{resnet}", "decoder.up.{up}.block.{layer}.{resnet}"),
    ("decoder.up_blocks.{up}.upsamplers.0.conv", "decoder.up.{up}.upsample.conv"),
    ("{half}.mid_block.resnets.{nth}.{resnet}", "{half}.mid.block_{nth}.{resnet}"),
    ("{half}.mid_block.attentions.0.{attention}", "{half}.mid.attn_1.{attention}"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
)

# the original FLUX.2 file keeps the quant convolutions inside the halves, and batch-norm statistics
# beside them
FLUX2_RULES: Rules = (
    *VAE_RULES[:-2],
    ("quant_conv", "encoder.quant_conv"),
    ("post_quant_conv", "decoder.post_quant_conv"),
    ("bn", "bn"),
)

# names that diffusers gave to the attention's projections before 0.17, in its own layout
OLD_ATTENTION: Mapping[str, str] = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}

_TAIL = re.compile(r"(.+)\.(weight|bias|running_mean|running_var|num_batches_tracked)")
_OLD = re.compile(rf"(.+\.attentions\.[0-9]{{1,4}})\.({'|'.join(OLD_ATTENTION)})")


@dataclass(frozen=True)
class KeyMap:
    """One network's names, both ways.

    Args:
        rules: pairs of templates, diffusers' first.
        levels: how many levels the network has, which ``{up}`` is counted against.
    """

    rules: Rules
    levels: int

    def canonical(self, original: str) -> str | None:
        """diffusers' name for what the original layout calls ``original``, or None."""
        return self._translate(original, self._from_original, 0)

    def original(self, canonical: str) -> str | None:
        """The original layout's name for diffusers' ``canonical``; None where no rule fits."""
        return self._translate(canonical, self._from_canonical, 1)

    @cached_property
    def _from_original(self) -> list[tuple[re.Pattern[str], tuple[str, str]]]:
        return [(_pattern(rule[1], 1), rule) for rule in self.rules]

    @cached_property
    def _from_canonical(self) -> list[tuple[re.Pattern[str], tuple[str, str]]]:
        return [(_pattern(rule[0], 0), rule) for rule in self.rules]

    def _translate(
        self, name: str, patterns: list[tuple[re.Pattern[str], tuple[str, str]]], target: int
    ) -> str | None:
        tail = _TAIL.fullmatch(name)
        if tail is None:
            return None
        for pattern, rule in patterns:
            if match := pattern.fullmatch(tail[1]):
                fields = {k: self._field(k, v, target) for k, v in match.groupdict().items()}
                return f"{rule[target].format(**fields)}.{tail[2]}"
        return None

    def _field(self, field: str, value: str, target: int) -> str:
        if field == "up":
            return str(self.levels - 1 - int(value))
        if field == "nth":
            return str(int(value) + (1 if target else -1))
        if field in LEAVES:
            table = LEAVES[field]
            return table[value] if target else {v: k for k, v in table.items()}[value]
        return value


def _pattern(template: str, side: int) -> re.Pattern[str]:
    """A regular expression for names on one side (0 diffusers', 1 the original's) of a rule."""
    expression = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for field in re.findall(r"\{(\w+)\}", template):
        if field in LEAVES:
            table = LEAVES[field]
            choices = "|".join(map(re.escape, table.values() if side else table))
        else:
            choices = _FIELDS[field]
        expression = expression.replace(f"{{{field}}}", f"(?P<{field}>{choices})", 1)
    return re.compile(expression)


def modern_attention(name: str) -> str:
    """A name in diffusers' layout with the attention's present names: ``query`` becomes ``to_q``,
    and so on."""
    tail = _TAIL.fullmatch(name)
    if tail and (old := _OLD.fullmatch(tail[1])):
        return f"{old[1]}.{OLD_ATTENTION[old[2]]}.{tail[2]}"
    return name


def tiny_layer(canonical: str) -> tuple[str, int, str] | None:
    """``decoder.layers.3.conv.0.weight`` as ``("decoder", 3, "conv.0.weight")``, or None."""
    match = re.fullmatch(r"(encoder|decoder)\.layers\.([0-9]{1,4})\.(.+)", canonical)
    return (match[1], int(match[2]), match[3]) if match else None


def tiny_original(canonical: str) -> tuple[str, str] | None:
    """The half, and the name within its own file: the decoder counts its clamp as layer 0."""
    if (split := tiny_layer(canonical)) is None:
        return None
    half, number, rest = split
    return half, f"{number + (half == 'decoder')}.{rest}"


def tiny_canonical(half: str, original: str) -> str | None:
    """diffusers' name for a tensor of one half's own file, or None."""
    number, _, rest = original.partition(".")
    layer = int(number) - (half == "decoder") if re.fullmatch("[0-9]{1,4}", number) else -1
    return f"{half}.layers.{layer}.{rest}" if layer >= 0 and rest else None
