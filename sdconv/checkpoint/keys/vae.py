"""The VAE's and the tiny autoencoder's names in the original layout and in diffusers'."""

from __future__ import annotations

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

# what diffusers called the projections of its own layout before 0.17
_OLD_ATTENTION = KeyMap(
    of_tensors([("{block}.attentions.{layer}.{old}", "{block}.attentions.{layer}.{old}")]),
    {
        "block": ".+",
        "layer": NUMBER,
        "old": {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"},
        "tail": _TAIL,
    },
)


def modern_attention(name: str) -> str:
    """Replaces the attention's old names in diffusers' layout: ``query`` becomes ``to_q``, and so
    on."""
    return _OLD_ATTENTION.canonical(name) or name
