"""Key names in LoRA files.

Four kinds are in use for LoRA, each with diffusers' or with the original layout's names of the
layers:

- kohya's, with underscores: ``lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight``, with
  ``.lora_up``, ``.lora_mid`` and ``.alpha``;
- PEFT's: ``unet.down_blocks.0.resnets.0.conv1.lora_A.weight`` and ``.lora_B``, sometimes after
  ``base_model.model.``;
- diffusers': ``unet....to_q.lora.down.weight``, or ``.lora_linear_layer.down``;
- diffusers' attention processors': ``unet....attn1.processor.to_q_lora.down.weight``.

Other kinds have LyCORIS' names (``lycoris_....hada_w1_a``) or PEFT's, which differ little.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from sdconv.checkpoint.keys.prefixes import how_many, modules_of
from sdconv.checkpoint.keys.unet import keys_of_canonical
from sdconv.checkpoint.keys.vae import vae_keys

# how a key ends -> the role of its tensor; {} is what the group matched. PEFT's names may hold an
# adapter's name, often `default`
_ADAPTER = r"(?:\.\w+)?"
_ENDINGS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(rf"(?P<stem>.+?)(?:{ending})"), role)
    for ending, role in (
        (rf"\.lora_(?:down|A){_ADAPTER}\.weight", "down"),
        (rf"\.lora_(?:up|B){_ADAPTER}\.weight", "up"),
        (rf"\.lora_mid{_ADAPTER}\.weight", "mid"),
        (r"(?:[._]lora|\.lora_linear_layer)\.(down|up)\.weight", "{}"),
        (rf"\.lora_(?:up|B){_ADAPTER}\.bias|(?:[._]lora|\.lora_linear_layer)\.up\.bias", "up_bias"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (
            rf"\.(hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|boft_[Rs]|ia3_l)"
            rf"{_ADAPTER}",
            "{}",
        ),
        (rf"\.oft_R{_ADAPTER}\.weight", "oft_R"),
        (r"\.(alpha|scalar|dora_scale|oft_blocks|rescale|diff|diff_b|[wb]_norm|on_input)", "{}"),
        (r"\.([ab][12]|bm)\.weight", "{}"),
    )
)
_IA3_WEIGHT = re.compile(r"(?P<stem>.+)\.weight")  # with an `on_input` of the same layer only
_WRAPPER = re.compile(r"base_model\.model\.")
_PREFIX = re.compile(
    r"unet\.|vae\.|model\.diffusion_model\.|diffusion_model\.|first_stage_model\."
    r"|lora_unet[._]|lora_vae[._]|lycoris_|oft_unet_"
)
_PROCESSOR = re.compile(r"(.+)\.processor\.(to_(?:q|k|v|out))")
# text encoders, and embeddings that were trained with them
_TEXT_ENCODER = re.compile(
    r"(?:lora_(?:te\d*|prior_te|text_encoders?(?:_\d+)?|clip_[lg]|t5xxl)[._]"
    r"|(?:text_encoders?(?:_\d+)?|te\d*|clip_[lgh]|t5xxl|cond_stage_model|conditioner)[._]"
    r"|lycoris_(?:te\d*_)?(?:text_model|text_encoder|te\d+)_"
    r"|(?:transformer\.)?text_model\.|bundle_emb\.).+|emb_params|clip_[lg]|string_to_param\..+"
)


@dataclass(frozen=True)
class LoraKey:
    """A parsed key: the layer it belongs to, and its tensor's role there, such as ``"down"``,
    ``"up"``, ``"alpha"``, ``"hada_w1_a"`` or ``"diff_b"``."""

    layer: str
    role: str


def split_key(name: str) -> LoraKey | None:
    """Parses a key of a LoRA file; None if it is not a LoRA's.

    The layer's name is as it is in the file, with its prefix.
    """
    for pattern, role in _ENDINGS:
        if match := pattern.fullmatch(name):
            return LoraKey(match["stem"], role.format(*match.groups()[1:]))
    return None


def split_keys(names: Collection[str]) -> dict[str, LoraKey]:
    """The keys of a LoRA file, parsed as by ``split_key``; other names are left out.

    LyCORIS' (IA)3 has a ``.weight``, which is a LoRA's only next to an ``.on_input``.
    """
    found = {name: key for name in names if (key := split_key(name)) is not None}
    scaled = {key.layer for key in found.values() if key.role == "on_input"}
    for name in names:
        if name not in found and (match := _IA3_WEIGHT.fullmatch(name)):
            if match["stem"] in scaled:
                found[name] = LoraKey(match["stem"], "weight")
    return found


def without_prefix(layer: str) -> str:
    """A layer's name in a LoRA file without the prefix of the U-Net or VAE, in the layout and
    spelling of the file; attention processors' names become layers'."""
    layer = _without(_PREFIX, _without(_WRAPPER, layer))
    if old := _PROCESSOR.fullmatch(layer.removesuffix("_lora")):
        layer = f"{old[1]}.{old[2]}" + (".0" if old[2] == "to_out" else "")
    return layer


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
