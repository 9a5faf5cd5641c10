"""The VAE's and the tiny autoencoder's names in the original layout and in diffusers'."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sdconv.checkpoint.keys.keymap import NUMBER, Fields, KeyMap, Rules, of_tensors

# names of a block's layers: diffusers' -> the original's
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

# modules: diffusers' name, the original's name (ldm/modules/diffusionmodules/model.py)
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

# FLUX.2's original file has the quant convolutions inside the halves, and batch-norm statistics
# outside them.
FLUX2_RULES: Rules = (
    *VAE_RULES[:-2],
    ("quant_conv", "encoder.quant_conv"),
    ("post_quant_conv", "decoder.post_quant_conv"),
    ("bn", "bn"),
)

_TAIL = "weight|bias|running_mean|running_var|num_batches_tracked"
_VAE_FIELDS: Fields = {
    **LEAVES,
    "half": "encoder|decoder",
    "level": NUMBER,
    "layer": NUMBER,
    "tail": _TAIL,
}


def vae_keys(levels: int, rules: Rules = VAE_RULES) -> KeyMap:
    """The key map of a VAE.

    Args:
        levels: of its decoder.
        rules: ``VAE_RULES`` or ``FLUX2_RULES``.
    """
    return KeyMap(of_tensors(rules), _VAE_FIELDS, levels)


# The original numbers each half's layers from 0; its decoder counts the clamp as layer 0.
TINY_KEYS = KeyMap(
    (
        ("encoder.layers.{layer}.{rest}", "encoder.{layer}.{rest}"),
        ("decoder.layers.{nth}.{rest}", "decoder.{nth}.{rest}"),
    ),
    {"layer": NUMBER, "rest": ".+"},
)

# Every name that converters have given to a layer of the attention, by diffusers' present one:
# diffusers' before 0.17, the original's, and those of ports to other libraries.
_ATTENTION_NAMES: Mapping[str, tuple[str, ...]] = {
    "to_q": ("to_q", "query", "q", "query_proj", "q_proj"),
    "to_k": ("to_k", "key", "k", "key_proj", "k_proj"),
    "to_v": ("to_v", "value", "v", "value_proj", "v_proj"),
    "to_out.0": ("to_out.0", "proj_attn", "proj_out", "to_out", "out_proj"),
    "group_norm": ("group_norm", "norm"),
}
_ATTENTION = re.compile(
    rf"(?P<block>.+\.(?:attn_1|attentions\.{NUMBER}))\."
    rf"(?P<leaf>{'|'.join(re.escape(n) for names in _ATTENTION_NAMES.values() for n in names)})"
    rf"\.(?P<tail>{_TAIL})"
)


def attention_name(name: str, layout: str) -> str:
    """A name with the layout's own name for a layer of an attention: ``query`` becomes ``to_q`` or
    ``q``, and so on; any other name unchanged."""
    match = _ATTENTION.fullmatch(name)
    if match is None:
        return name
    ours = next(key for key, names in _ATTENTION_NAMES.items() if match["leaf"] in names)
    leaf = ours if layout == "diffusers" else LEAVES["attention"][ours]
    return f"{match['block']}.{leaf}.{match['tail']}"
