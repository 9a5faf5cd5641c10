"""Reading a LoRA file as updates of a network's layers; a key that cannot be used is an error."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.checkpoint.identify.find import find_networks
from sdconv.checkpoint.io.files import os_errors, read_json, short
from sdconv.checkpoint.io.source import Source, open_source
from sdconv.checkpoint.keys.adapters import adapter_kinds
from sdconv.checkpoint.open import Weights
from sdconv.errors import (
    CheckpointError,
    SdconvWarning,
    UnknownNetworkError,
    WeightsMismatchError,
)
from sdconv.lora.names import LoraKey, is_text_encoder_key, layer_spellings, parse_key

# width of the prompt embeddings, which is the input width of attn2.to_k -> the family
_PROMPT_WIDTHS: Mapping[int, str] = {
    768: "SD1",
    1024: "SD2",
    1280: "the SDXL refiner",
    2048: "SDXL",
}
_METADATA_KEY = "lora_adapter_metadata"
_CONFIG_FILE = "adapter_config.json"
# in PEFT's names, alphas are in a config, which may be lost; kohya's files without an alpha mean
# that it equals the rank
_PEFT_UP = re.compile(r"\.lora_B(?:\.\w+)?\.weight$")
# PEFT's initialisations that also change the weights of the network, which such an adapter needs
_CHANGES_THE_NETWORK = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True, kw_only=True)
class Update:
    """A LoRA's update of one weight: ``factor``, which is alpha over rank, times ``up @ down``.

    ``up`` is ``(out, rank)``. ``down`` is ``(rank, in)``, for a convolution ``(rank, in, kH, kW)``,
    unless the kernel is in ``mid``, ``(rank, rank, kH, kW)``.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    factor: float

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        """``scale`` times the update, with the shape, dtype and device of ``weight``.

        LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; with ``mid``: the CP decomposition
        of LyCORIS' LoCon.
        """
        down, up = (one.to(weight).flatten(1) for one in (self.down, self.up))
        up = up * (self.factor * scale)  # cheaper than scaling the product
        if self.mid is None:
            return (up @ down).reshape(weight.shape)
        mid = self.mid.to(weight).flatten(2)
        return torch.einsum("oi,ijk,jc->ock", up, mid, down).reshape(weight.shape)

    @property
    def shapes(self) -> str:
        """The shapes of its matrices, for error messages."""
        matrices = (one for one in (self.up, self.mid, self.down) if one is not None)
        return ", ".join(str(tuple(one.shape)) for one in matrices)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it can be added to a weight of this shape."""
        if len(shape) < 2:
            return False
        rank = self.down.shape[0]
        point, kernel = (1,) * len(shape[2:]), tuple(shape[2:])
        if self.mid is None:
            return _has_shape(self.up, (shape[0], rank), point) and _has_shape(
                self.down, (rank, shape[1]), kernel
            )
        return (
            _has_shape(self.up, (shape[0], *self.mid.shape[:1]), point)
            and _has_shape(self.mid, (*self.mid.shape[:1], rank), kernel)
            and _has_shape(self.down, (rank, shape[1]), point)
        )


def _has_shape(matrix: Tensor, sides: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether a matrix has these sides and this kernel; any two kernels of one element match."""
    own = tuple(matrix.shape[2:])
    return tuple(matrix.shape[:2]) == sides and (
        own == kernel or math.prod(own) == math.prod(kernel) == 1
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA for one network. ``label``: the file's name in messages. ``updates``: by the layer's
    name. ``skipped``: keys that belong to text encoders or repeat other keys."""

    label: str
    updates: Mapping[str, Update]
    skipped: tuple[str, ...]


def read_lora(lora: Weights, shapes: Mapping[str, tuple[int, ...]], network: str) -> Lora:
    """Reads a LoRA and checks that all of it belongs to a network.

    Args:
        lora: a file, the folder of a PEFT adapter, or a state dict.
        shapes: the shapes of the network's weights, by layer.
        network: the network's name in error messages.

    Raises:
        CheckpointError: it cannot be read, is not a LoRA, or lacks a matrix.
        WeightsMismatchError: the network lacks a layer, or a matrix has the wrong shape.
    """
    with open_source(lora) as source:
        names = [name for name in source.entries if not is_text_encoder_key(name)]
        skipped = [name for name in source.entries if is_text_encoder_key(name)]
        keys = {name: key for name in names if (key := parse_key(name)) is not None}
        _check_keys(source, names, keys)
        spellings = layer_spellings(shapes)
        _check_layers(source, keys, spellings, shapes, network)
        by_layer: dict[str, dict[str, Tensor]] = {}
        for name, key in keys.items():
            tensors, tensor = by_layer.setdefault(spellings[key.layer], {}), source.tensor(name)
            if key.role in tensors:
                _check_equal(source, name, tensors[key.role], tensor)
                skipped.append(name)
            tensors.setdefault(key.role, tensor)
        config = _AdapterConfig(lora, source)
        updates = {
            layer: _update(source, layer, tensors, config) for layer, tensors in by_layer.items()
        }
        _check_shapes(source, updates, shapes, network)
        named_by_peft = any(_PEFT_UP.search(name) for name in names)
        if isinstance(lora, str | Path) and named_by_peft and not config.gives_alpha:
            _warn_without_alpha(source, [k for k, v in by_layer.items() if "alpha" not in v])
        return Lora(label=source.label, updates=updates, skipped=tuple(skipped))


def _check_keys(source: Source, names: Sequence[str], keys: Mapping[str, LoraKey]) -> None:
    unknown = [name for name in names if name not in keys]
    if unknown or not keys:
        others = adapter_kinds(names)
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
            expected="names that end in .lora_down.weight, .lora_up.weight, .lora_mid.weight, "
            ".alpha, .lora_A.weight, .lora_B.weight, .lora.down.weight or .lora.up.weight",
            got=_first(unknown) or f"only {len(source.entries)} keys of text encoders",
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
    spellings: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
) -> None:
    unknown = [name for name, key in keys.items() if key.layer not in spellings]
    if unknown:
        downs = {k.layer: source.entries[n].shape for n, k in keys.items() if k.role == "down"}
        raise WeightsMismatchError(
            f"{len(unknown)} of {len(keys)} keys name layers that this network does not have"
            + _intended_for(downs),
            where=source.label,
            expected=f"layers of the {network}{_prompt_width(shapes)}",
            got=_first(unknown),
            hint="check that the LoRA was trained on a model of the same family",
        )


def _check_shapes(
    source: Source,
    updates: Mapping[str, Update],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
) -> None:
    wrong = [layer for layer, update in updates.items() if not update.fits(shapes[layer])]
    if wrong:
        downs = {layer: tuple(update.down.shape) for layer, update in updates.items()}
        raise WeightsMismatchError(
            f"the matrices of {len(wrong)} of {len(updates)} layers do not fit the {network}"
            + _prompt_width(shapes)
            + _intended_for(downs),
            where=source.label,
            expected=_first([f"{layer}: {shapes[layer]}" for layer in wrong]),
            got=_first([f"{layer}: {updates[layer].shapes}" for layer in wrong]),
            hint="check that the LoRA was trained on a model of the same family",
        )


def _intended_for(downs: Mapping[str, tuple[int, ...]]) -> str:
    width = _prompt_width(downs)
    return f"; the LoRA is for a network{width}" if width else ""


def _prompt_width(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The width of the prompt embeddings that a network, or the network of a LoRA, takes."""
    for layer, shape in shapes.items():
        if layer.endswith(("attn2.to_k", "attn2_to_k")) and len(shape) > 1:
            family = f", as in {_PROMPT_WIDTHS[shape[1]]}" if shape[1] in _PROMPT_WIDTHS else ""
            return f" with prompt embeddings {shape[1]} wide{family}"
    return ""


def _check_equal(source: Source, name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or not torch.equal(one, other):
        raise CheckpointError(
            f"{name} repeats another key with other values",
            where=source.label,
            expected="one LoRA",
            hint="remove one of the two from the file",
        )


def _update(
    source: Source, layer: str, tensors: Mapping[str, Tensor], config: _AdapterConfig
) -> Update:
    if {"down", "up"} - set(tensors):
        raise CheckpointError(
            f"the LoRA of {layer} lacks a matrix",
            where=source.label,
            expected="down and up (lora_A and lora_B)",
            got="only " + " and ".join(sorted(tensors)),
        )
    for role, tensor in tensors.items():
        if tensor.is_complex() or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"the LoRA's {role} of {layer} has values that are not finite real numbers",
                where=source.label,
                got=f"{tensor.dtype}, with NaN or infinity"
                if tensor.is_floating_point()
                else tensor.dtype,
            )
    rank = tensors["down"].shape[0] if tensors["down"].ndim else 0
    if not rank or ("alpha" in tensors and tensors["alpha"].numel() != 1):
        raise CheckpointError(
            f"the LoRA of {layer} has no rank, or an alpha that is not a single number",
            where=source.label,
            got=", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in tensors.items()),
        )
    return Update(
        down=tensors["down"],
        up=tensors["up"],
        mid=tensors.get("mid"),
        factor=tensors["alpha"].item() / rank if "alpha" in tensors else config.factor(layer, rank),
    )


def _warn_without_alpha(source: Source, layers: Sequence[str]) -> None:
    """Warns of layers for which neither the file nor a config gives an alpha."""
    if layers:
        what = (
            f"{source.label}: alpha is unknown for {len(layers)} layers: the file has PEFT's "
            "names, no alphas and no config. It is taken to equal the rank, so that the LoRA may "
            f"be merged too strongly or weakly. hint: put {_CONFIG_FILE} next to "
            "adapter_model.safetensors, or divide alpha by the rank and pass scale="
        )
        warnings.warn(SdconvWarning(what), stacklevel=4)  # the caller of merge_lora


_PEFT_TYPES = {"IA3": "(IA)3", "LOHA": "LoHa", "LOKR": "LoKr", "VERA": "VeRA"}


class _AdapterConfig:
    """PEFT's config of an adapter, from its folder or from the file's metadata: the scaling of
    layers without an ``.alpha`` key."""

    def __init__(self, lora: Weights, source: Source) -> None:
        self._where = source.label
        self._config = self._read(lora, source)
        flags = ("use_dora", "fan_in_fan_out", "lora_bias")
        unsupported = [flag for flag in flags if self._config.get(flag)]
        kind = str(self._config.get("peft_type") or "LORA")
        if kind.upper() != "LORA":
            unsupported.append(_PEFT_TYPES.get(kind.upper(), kind))
        initial = str(self._config.get("init_lora_weights") or "").lower()
        if initial.startswith(_CHANGES_THE_NETWORK):
            unsupported.append(f"init_lora_weights={initial!r} (it changes the network's weights)")
        if unsupported:
            raise CheckpointError(
                f"its config says {' and '.join(unsupported)}, which sdconv does not merge",
                where=self._where,
                expected="LoRA",
            )

    @property
    def gives_alpha(self) -> bool:
        """Whether it says anything about alpha."""
        return self._config.get("lora_alpha") is not None

    def factor(self, layer: str, rank: int) -> float:
        """Alpha over rank, for rank-stabilised LoRA over its square root, as in PEFT; 1 without an
        alpha."""
        alpha = self._config.get("lora_alpha")
        patterns = self._config.get("alpha_pattern") or {}
        try:
            for pattern, own in patterns.items():
                if re.match(rf"(.*\.)?({pattern})$", layer):
                    alpha = own
                    break
            if alpha is None:
                return 1.0
            factor = alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)
            if not math.isfinite(factor):
                raise ValueError(factor)
        except (ArithmeticError, AttributeError, TypeError, ValueError, re.error) as error:
            raise CheckpointError(
                f"its config has no valid alpha for {layer}",
                where=self._where,
                expected="lora_alpha, a number, and alpha_pattern, numbers by pattern",
                got=short({"lora_alpha": alpha, "alpha_pattern": patterns}),
            ) from error
        return float(factor)

    def _read(self, lora: Weights, source: Source) -> Mapping[str, Any]:
        if isinstance(lora, str | Path):
            path = Path(lora)
            with os_errors(path):
                file = path / _CONFIG_FILE if path.is_dir() else path.with_name(_CONFIG_FILE)
                # next to a file of another name, it may belong to another file
                exists = (path.is_dir() or path.stem == "adapter_model") and file.exists()
            if exists:
                return read_json(file)
        try:
            content = json.loads(source.metadata.get(_METADATA_KEY, "{}"))
            # names begin with the component: unet.lora_alpha
            return {
                k.removeprefix("unet."): v
                for k, v in content.items()
                if not k.startswith(("text_encoder.", "text_encoder_2."))
            }
        except (AttributeError, RecursionError, ValueError) as error:
            raise CheckpointError(
                f"its metadata {_METADATA_KEY} is not a JSON object", where=self._where
            ) from error


def _first(names: Sequence[str]) -> str:
    """At most ten names, and how many more there are."""
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
