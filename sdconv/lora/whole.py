"""Reading what a LoRA file has for all components of a model: networks and text encoders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sdconv.checkpoint.io.source import Source, open_source
from sdconv.checkpoint.open import Weights
from sdconv.lora.config import AdapterConfig
from sdconv.lora.names import (
    LoraKey,
    is_text_encoder_key,
    layer_spellings,
    split_keys,
    without_prefix,
)
from sdconv.lora.reading import check_keys, read_part, warn_without_alpha
from sdconv.lora.text_names import (
    FIRST,
    SECOND,
    text_encoder_of,
    text_layer,
    text_layer_spellings,
)
from sdconv.lora.updates import Update

Shapes = Mapping[str, tuple[int, ...]]
_VAES = re.compile(r"(?:base_model\.model\.)?(?:lora_vae[._]|vae\.|first_stage_model\.).+")
_NAMES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    FIRST: "text encoder",
    SECOND: "second text encoder",
}


@dataclass(frozen=True, kw_only=True)
class WholeLora:
    """A LoRA for the components of a model. ``label``: the file's name in messages. ``updates``: by
    component and by the parameter's name. ``skipped``: keys of components that the model does not
    have, of embeddings, and such as repeat others. ``source``: the file, whose tensors may still be
    mapped from it."""

    label: str
    updates: Mapping[tuple[str, str], Update]
    skipped: tuple[str, ...]
    source: Source


def read_whole_lora(lora: Weights, components: Mapping[str, Shapes]) -> WholeLora:
    """Reads a LoRA and checks that all of it belongs to a model, as far as that has its components.

    Args:
        lora: a file, the folder of a PEFT adapter, or a state dict.
        components: the shapes of the parameters of ``"unet"``, ``"vae"``, ``"text_encoder"`` and
            ``"text_encoder_2"``, of those that there are; by diffusers' and transformers' names.

    Raises:
        CheckpointError: it cannot be read, is not a LoRA, or lacks a matrix.
        WeightsMismatchError: a component lacks a layer, or a matrix has the wrong shape.

    Warns:
        SdconvWarning: alpha is unknown.
    """
    with open_source(lora) as source:
        names = list(source.entries)
        keys = split_keys(names)
        networks = [name for name in names if not is_text_encoder_key(name)]
        if networks or not keys:
            check_keys(source, networks, {k: v for k, v in keys.items() if k in set(networks)})
        groups: dict[str, dict[str, LoraKey]] = {}
        skipped = [name for name in names if name not in keys]
        for name, key in keys.items():
            component = _component(name, key, components)
            if component is None:
                skipped.append(name)
            else:
                groups.setdefault(component, {})[name] = key
        updates: dict[tuple[str, str], Update] = {}
        without_alpha: list[str] = []
        for component, own in groups.items():
            shapes = components[component]
            part = read_part(
                source,
                own,
                _layers(component, own, shapes),
                shapes,
                _NAMES[component],
                AdapterConfig.read(lora, source, component),
            )
            updates |= {(component, name): update for name, update in part.updates.items()}
            skipped += part.repeated
            without_alpha += part.without_alpha
        if isinstance(lora, str | Path):
            warn_without_alpha(source, without_alpha)
        return WholeLora(label=source.label, updates=updates, skipped=tuple(skipped), source=source)


def _component(name: str, key: LoraKey, components: Mapping[str, Shapes]) -> str | None:
    """The component that a key belongs to; None if the model does not have it."""
    if is_text_encoder_key(name):
        wanted = text_encoder_of(key.layer)
        if wanted is None or wanted in components:
            return wanted
        # of an only text encoder, which file calls it the second or not
        is_numbered = re.search(r"te[12]|encoder_2|clip|embedders", key.layer) is not None
        only = [one for one in (FIRST, SECOND) if one in components]
        return only[0] if len(only) == 1 and not is_numbered else None
    if _VAES.fullmatch(name) or "unet" not in components:
        return "vae" if "vae" in components else None
    return "unet"


def _layers(component: str, keys: Mapping[str, LoraKey], shapes: Shapes) -> dict[str, str | None]:
    """Each key's layer by diffusers' or transformers' name; None if the component lacks it."""
    layers = {name.rpartition(".")[0] for name in shapes}
    if component in (FIRST, SECOND):
        spellings = text_layer_spellings(layers)
        return {name: text_layer(key.layer, spellings) for name, key in keys.items()}
    spellings = layer_spellings(layers)
    return {name: spellings.get(without_prefix(key.layer)) for name, key in keys.items()}
