"""Reading a LoRA file as updates of a network's layers; a key that cannot be used is an error."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.io.source import Source, open_source
from sdconv.checkpoint.keys.adapters import refused_kinds
from sdconv.checkpoint.open import Weights
from sdconv.errors import (
    CheckpointError,
    SdconvWarning,
    UnknownNetworkError,
    WeightsMismatchError,
)
from sdconv.lora.config import CONFIG_FILE, AdapterConfig
from sdconv.lora.kinds import LayerPart, updates_of
from sdconv.lora.names import (
    LoraKey,
    is_text_encoder_key,
    layer_spellings,
    split_keys,
    without_prefix,
)
from sdconv.lora.updates import Update

# width of the prompt embeddings, which is the input width of attn2.to_k -> the family
_PROMPT_WIDTHS: Mapping[int, str] = {
    768: "SD1",
    1024: "SD2",
    1280: "the SDXL refiner",
    2048: "SDXL",
}
# in PEFT's names, alphas are in a config, which may be lost; kohya's and LyCORIS' files without an
# alpha mean that it equals the rank
_PEFTS = re.compile(r".+\.lora_B(?:\.\w+)?\.weight|base_model\.model\..+\.(?:hada|lokr)_w1\w*")
# tensors whose second size is a linear layer's input width
_WIDTHS = frozenset({"down", "hada_w1_b", "diff"})


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA for one network. ``label``: the file's name in messages. ``updates``: by the name of
    the parameter, such as ``"conv_in.weight"``. ``skipped``: keys that belong to text encoders or
    repeat other keys."""

    label: str
    updates: Mapping[str, Update]
    skipped: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that it changes."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.updates))


def read_lora(lora: Weights, shapes: Mapping[str, tuple[int, ...]], network: str) -> Lora:
    """Reads a LoRA and checks that all of it belongs to a network.

    Args:
        lora: a file, the folder of a PEFT adapter, or a state dict.
        shapes: the shapes of the network's parameters, by name, with diffusers' names.
        network: the network's name in error messages.

    Raises:
        CheckpointError: it cannot be read, is not a LoRA, or lacks a matrix.
        WeightsMismatchError: the network lacks a layer, or a matrix has the wrong shape.
    """
    with open_source(lora) as source:
        names = [name for name in source.entries if not is_text_encoder_key(name)]
        skipped = [name for name in source.entries if is_text_encoder_key(name)]
        keys = {
            name: LoraKey(without_prefix(key.layer), key.role)
            for name, key in split_keys(names).items()
        }
        check_keys(source, names, keys)
        spellings = layer_spellings(_by_layer(shapes))
        layers = {name: spellings.get(key.layer) for name, key in keys.items()}
        config = AdapterConfig.read(lora, source)
        part = read_part(source, keys, layers, shapes, network, config)
        if isinstance(lora, str | Path):
            warn_without_alpha(source, part.without_alpha)
        skipped += part.repeated
        return Lora(label=source.label, updates=part.updates, skipped=tuple(skipped))


@dataclass(frozen=True, kw_only=True)
class LoraPart:
    """What a file has for one network. ``updates``: by the name of the parameter. ``repeated``:
    keys that repeat others. ``without_alpha``: the layers whose alpha neither the file nor a config
    gives although one is usual there."""

    updates: Mapping[str, Update]
    repeated: tuple[str, ...]
    without_alpha: tuple[str, ...]


def read_part(
    source: Source,
    keys: Mapping[str, LoraKey],
    layers: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
    config: AdapterConfig,
) -> LoraPart:
    """Reads what a file has for one network.

    Args:
        source: the file.
        keys: its keys for this network, parsed.
        layers: each key's layer, by diffusers' or transformers' name; None for one that the network
            does not have.
        shapes: the shapes of the network's parameters, by name.
        network: the network's name in error messages.
        config: PEFT's.

    Raises:
        CheckpointError: a matrix is missing, or is not of finite numbers.
        WeightsMismatchError: the network lacks a layer, or a matrix has the wrong shape.
    """
    _check_layers(source, keys, layers, shapes, network)
    by_layer: dict[str, dict[str, Tensor]] = {}
    repeated = []
    for name, key in keys.items():
        layer = layers[name]
        assert layer is not None  # see _check_layers
        tensors, tensor = by_layer.setdefault(layer, {}), source.tensor(name)
        if key.role in tensors:
            _check_equal(source, name, tensors[key.role], tensor)
            repeated.append(name)
        tensors.setdefault(key.role, tensor)
    config.check_roles({key.role for key in keys.values()})
    of_layers = _by_layer(shapes)
    updates = {
        f"{layer}.{parameter}": update
        for layer, tensors in by_layer.items()
        for parameter, update in updates_of(
            LayerPart(
                layer=layer,
                tensors=tensors,
                shapes=of_layers[layer],
                config=config,
                where=source.label,
            )
        ).items()
    }
    _check_shapes(source, updates, shapes, network)
    named_by_peft = any(_PEFTS.fullmatch(name) for name in keys)
    unsaid = named_by_peft and not config.gives_alpha
    without_alpha = [k for k, v in by_layer.items() if unsaid and "alpha" not in v]
    return LoraPart(updates=updates, repeated=tuple(repeated), without_alpha=tuple(without_alpha))


def _by_layer(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of each layer's own parameters."""
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = shape
    return layers


def check_keys(source: Source, names: Sequence[str], keys: Mapping[str, LoraKey]) -> None:
    unknown = [name for name in names if name not in keys]
    if unknown or not keys:
        others = refused_kinds(names)
        if not others and not keys and (networks := _networks(source)):
            raise CheckpointError(
                f"this is a whole checkpoint, not a LoRA: it has a {' and a '.join(networks)}",
                where=source.label,
                expected="names that end in .lora_down.weight, .lora_A.weight and the like",
                hint="open it with sdconv.load",
            )
        raise CheckpointError(
            "has keys that are not a LoRA's" if unknown else "has no LoRA for this network",
            where=source.label,
            expected="names that end in .lora_down.weight, .lora_up.weight, .lora_A.weight, "
            ".lora_B.weight, .lora.down.weight, or those of LyCORIS, such as .hada_w1_a and .diff",
            got=_first(unknown)
            or (
                f"only {len(source.entries)} keys of text encoders, or of embeddings for them"
                if source.entries
                else "no tensors"
            ),
            hint=f"this looks like {' and '.join(others)}, which sdconv does not merge"
            if others
            else None,
        )


def _networks(source: Source) -> list[str]:
    """The networks that a file has, by component."""
    try:
        found = find_networks({name: info.shape for name, info in source.entries.items()})
    except UnknownNetworkError:
        return []
    return [{"vae": "VAE", "unet": "U-Net"}[one.component] for one in found]


def _check_layers(
    source: Source,
    keys: Mapping[str, LoraKey],
    layers: Mapping[str, str | None],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
) -> None:
    unknown = [name for name in keys if layers[name] is None]
    if unknown:
        widths = {
            key.layer: shape[1]
            for name, key in keys.items()
            if key.role in _WIDTHS and len(shape := source.entries[name].shape) > 1
        }
        raise WeightsMismatchError(
            f"{len(unknown)} of {len(keys)} keys name layers that this network does not have"
            + _intended_for(widths),
            where=source.label,
            expected=f"layers of the {network}{_prompt_width(_widths(shapes))}",
            got=_first(unknown),
            hint="check that the LoRA was trained on a model of the same family",
        )


def _check_shapes(
    source: Source,
    updates: Mapping[str, Update],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
) -> None:
    wrong = [name for name, one in updates.items() if not one.fits(shapes.get(name, ()))]
    if wrong:
        widths = {
            name.removesuffix(".weight"): update.width
            for name, update in updates.items()
            if update.width is not None
        }
        raise WeightsMismatchError(
            f"the tensors for {len(wrong)} of {len(updates)} parameters do not fit the {network}"
            + _prompt_width(_widths(shapes))
            + _intended_for(widths),
            where=source.label,
            expected=_first([f"{name}: {shapes.get(name, 'which it lacks')}" for name in wrong]),
            got=_first([f"{name}: {updates[name].shapes}" for name in wrong]),
            hint="check that the LoRA was trained on a model of the same family",
        )


def _widths(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The second sizes of weights, by layer."""
    return {
        name.removesuffix(".weight"): shape[1]
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) > 1
    }


def _intended_for(widths: Mapping[str, int]) -> str:
    width = _prompt_width(widths)
    return f"; the LoRA is for a network{width}" if width else ""


def _prompt_width(widths: Mapping[str, int]) -> str:
    """The width of the prompt embeddings that a network, or the network of a LoRA, takes."""
    for layer, width in widths.items():
        if layer.endswith(("attn2.to_k", "attn2_to_k")):
            family = f", as in {_PROMPT_WIDTHS[width]}" if width in _PROMPT_WIDTHS else ""
            return f" with prompt embeddings {width} wide{family}"
    return ""


def _check_equal(source: Source, name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or not torch.equal(one, other):
        raise CheckpointError(
            f"{name} repeats another key with other values",
            where=source.label,
            expected="one LoRA",
            hint="remove one of the two from the file",
        )


def warn_without_alpha(source: Source, layers: Sequence[str]) -> None:
    """Warns of layers for which neither the file nor a config gives an alpha, and of kohya's
    metadata that have another alpha than the rank that is taken for it."""
    alpha, dim = (source.metadata.get(f"ss_network_{one}", "") for one in ("alpha", "dim"))
    if not layers and _number(alpha) not in (None, _number(dim)) and not _has_alphas(source):
        what = (
            f"{source.label}: the file has no alphas, but its metadata says ss_network_alpha "
            f"{alpha} for ss_network_dim {dim}. Alpha is taken to be the rank, as in other "
            "programs, so that the LoRA may be merged too strongly. hint: to follow the metadata, "
            "divide alpha by dim and pass scale="
        )
        warnings.warn(SdconvWarning(what), stacklevel=4)  # the caller of merge_lora
    if layers:
        what = (
            f"{source.label}: alpha is unknown for {len(layers)} layers: the file has PEFT's "
            "names, no alphas and no config. It is taken to equal the rank, so that the LoRA may "
            f"be merged too strongly or weakly. hint: put {CONFIG_FILE} next to "
            "adapter_model.safetensors, or divide alpha by the rank and pass scale="
        )
        warnings.warn(SdconvWarning(what), stacklevel=4)  # the caller of merge_lora


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _has_alphas(source: Source) -> bool:
    return any(name.endswith(".alpha") for name in source.entries)


def _first(names: Sequence[str]) -> str:
    """At most ten names, and how many more there are."""
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
