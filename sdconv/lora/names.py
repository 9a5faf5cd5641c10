"""Key names in LoRA files.

Four kinds are in use, each with diffusers' or with the original layout's names of the layers:

- kohya's, with underscores: ``lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight``, with
  ``.lora_up``, ``.lora_mid`` and ``.alpha``;
- PEFT's: ``unet.down_blocks.0.resnets.0.conv1.lora_A.weight`` and ``.lora_B``, sometimes after
  ``base_model.model.``;
- diffusers': ``unet....to_q.lora.down.weight``, or ``.lora_linear_layer.down``;
- diffusers' attention processors': ``unet....attn1.processor.to_q_lora.down.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sdconv.checkpoint.keys.prefixes import how_many, modules_of
from sdconv.checkpoint.keys.unet import keys_of_canonical
from sdconv.checkpoint.keys.vae import vae_keys

_MATRIX = re.compile(
    r"(?P<layer>.+?)"
    r"(?:\.lora_(?P<one>down|up|mid|A|B)(?:\.\w+)?|(?:[._]lora|\.lora_linear_layer)\.(?P<two>down|up))"
    r"\.weight"
)
_ALPHA = re.compile(r"(?P<layer>.+)\.alpha")
_PEFT_ROLES: Mapping[str, str] = {"A": "down", "B": "up"}
_WRAPPER = re.compile(r"base_model\.model\.")
_PREFIX = re.compile(
    r"unet\.|vae\.|model\.diffusion_model\.|diffusion_model\.|first_stage_model\."
    r"|lora_unet_|lora_vae_|lycoris_"
)
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))")
# text encoders, and embeddings that were trained with them
_TEXT_ENCODER = re.compile(
    r"(?:lora_(?:te\d*|prior_te|text_encoders?(?:_\d+)?|clip_[lg]|t5xxl)_"
    r"|(?:text_encoders?(?:_\d+)?|te\d*|clip_[lgh]|t5xxl|cond_stage_model|conditioner)[._]"
    r"|lycoris_(?:te\d*_)?(?:text_model|text_encoder|te\d+)_"
    r"|(?:transformer\.)?text_model\.|bundle_emb\.).+|emb_params|clip_[lg]|string_to_param\..+"
)


@dataclass(frozen=True)
class LoraKey:
    """A parsed key: the layer it belongs to, and its role there, ``"down"``, ``"up"``, ``"mid"`` or
    ``"alpha"``."""

    layer: str
    role: str


def parse_key(name: str) -> LoraKey | None:
    """Parses a key of a LoRA file; None if it is not a LoRA's.

    The layer's name is without prefix, in the layout and spelling of the file.
    """
    if match := _MATRIX.fullmatch(name):
        role = match["one"] or match["two"]
    elif match := _ALPHA.fullmatch(name):
        role = "alpha"
    else:
        return None
    layer = _without(_PREFIX, _without(_WRAPPER, match["layer"]))
    if old := _PROCESSOR.fullmatch(layer.removesuffix("_lora")):
        layer = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    return LoraKey(layer, _PEFT_ROLES.get(role, role))


def is_text_encoder_key(name: str) -> bool:
    """Whether a key of a LoRA file belongs to a text encoder, or is an embedding for one."""
    return bool(_TEXT_ENCODER.fullmatch(_without(_WRAPPER, name)))


def layer_spellings(layers: Collection[str]) -> dict[str, str]:
    """Every spelling of a network's layer names.

    Args:
        layers: diffusers' names of all modules with a weight.

    Returns:
        diffusers' and the original layout's names, with dots and with underscores, each mapped to
        diffusers' name.
    """
    tensors = {f"{layer}.weight" for layer in layers}
    levels = how_many("decoder.up_blocks.{}", modules_of(tensors))
    maps = (keys_of_canonical(tensors), vae_keys(levels))
    table: dict[str, str] = {}
    for layer in layers:
        originals = [keys.original(f"{layer}.weight") for keys in maps]
        for name in (layer, *(o.removesuffix(".weight") for o in originals if o)):
            table.setdefault(name, layer)
            table.setdefault(name.replace(".", "_"), layer)
    return table


def _without(prefix: re.Pattern[str], name: str) -> str:
    match = prefix.match(name)
    return name[match.end() :] if match else name
