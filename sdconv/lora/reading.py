"""A LoRA file as the updates of a network's layers: every key used, or named in an error."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.checkpoint.io.files import os_errors, read_json, short
from sdconv.checkpoint.io.source import Source, open_source
from sdconv.checkpoint.open import Weights
from sdconv.errors import CheckpointError, WeightsMismatchError
from sdconv.lora.names import LoraKey, is_of_text_encoder, parsed, spellings

# by what in a key shows it: methods whose updates are no product of two matrices
_OTHER_METHODS: Mapping[str, str] = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".diff": "a full difference",
    ".w_norm": "LyCORIS with trained norms",
}
# width of the text that attn2.to_k reads
_TEXT_WIDTHS: Mapping[int, str] = {768: "SD1", 1024: "SD2", 1280: "the SDXL refiner", 2048: "SDXL"}
_METADATA_KEY = "lora_adapter_metadata"


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a LoRA adds to one weight: ``factor`` times the product of its matrices.

    ``up`` is ``(out, rank)`` and ``down`` ``(rank, in)``, with a kernel's rows and columns behind
    the latter for a convolution; or the kernel is in ``mid``, ``(rank, rank, rows, columns)``.
    ``factor``: alpha over rank.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    factor: float

    def delta(self, weight: Tensor, scale: float) -> Tensor:
        """``scale`` times the update, in the shape, the dtype and on the device of ``weight``.

        LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; with ``mid``: the CP decomposition
        of LyCORIS' LoCon.
        """
        down, up = (one.to(weight).flatten(1) for one in (self.down, self.up))
        up = up * (self.factor * scale)  # much smaller than the product
        if self.mid is None:
            return (up @ down).reshape(weight.shape)
        mid = self.mid.to(weight).flatten(2)
        return torch.einsum("oi,ijk,jc->ock", up, mid, down).reshape(weight.shape)

    @property
    def shapes(self) -> str:
        """Of its matrices, for messages."""
        there = (one for one in (self.up, self.mid, self.down) if one is not None)
        return ", ".join(str(tuple(one.shape)) for one in there)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether it can be added to a weight of this shape."""
        if len(shape) < 2:
            return False
        rank = self.down.shape[0]
        point, kernel = (1,) * len(shape[2:]), tuple(shape[2:])
        if self.mid is None:
            return _is(self.up, (shape[0], rank), point) and _is(
                self.down, (rank, shape[1]), kernel
            )
        return (
            _is(self.up, (shape[0], *self.mid.shape[:1]), point)
            and _is(self.mid, (*self.mid.shape[:1], rank), kernel)
            and _is(self.down, (rank, shape[1]), point)
        )


def _is(matrix: Tensor, sides: tuple[int, ...], kernel: tuple[int, ...]) -> bool:
    """Whether a matrix has these sides and kernel; a kernel of 1x1 may be left out, or too
    many."""
    own = tuple(matrix.shape[2:])
    return tuple(matrix.shape[:2]) == sides and (
        own == kernel or math.prod(own) == math.prod(kernel) == 1
    )


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA for one network. ``updates``: by the layer's name in it. ``skipped``: keys of text
    encoders, and those that repeat others."""

    label: str
    updates: Mapping[str, Update]
    skipped: tuple[str, ...]


def read_lora(lora: Weights, shapes: Mapping[str, tuple[int, ...]], network: str) -> Lora:
    """Reads a LoRA, and checks that all of it belongs to a network.

    Args:
        lora: a file, PEFT's folder of an adapter, or a state dict.
        shapes: of the network's weights, by the layer's name.
        network: what it is called in messages.

    Raises:
        CheckpointError: it cannot be read, is no LoRA, or lacks a matrix.
        WeightsMismatchError: layers that the network has not, or matrices that do not fit.
    """
    with open_source(lora) as source:
        names = [name for name in source.entries if not is_of_text_encoder(name)]
        skipped = [name for name in source.entries if is_of_text_encoder(name)]
        keys = {name: key for name in names if (key := parsed(name)) is not None}
        _check_keys(source, names, keys)
        table = spellings(shapes)
        _check_layers(source, keys, table, shapes, network)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, key in keys.items():
            own, tensor = parts.setdefault(table[key.layer], {}), source.tensor(name)
            if key.role in own:
                _check_same(source, name, own[key.role], tensor)
                skipped.append(name)
            own.setdefault(key.role, tensor)
        alphas = _Alphas(lora, source)
        updates = {layer: _update(source, layer, own, alphas) for layer, own in parts.items()}
        _check_shapes(source, updates, shapes, network)
        return Lora(label=source.label, updates=updates, skipped=tuple(skipped))


def _check_keys(source: Source, names: Sequence[str], keys: Mapping[str, LoraKey]) -> None:
    strange = [name for name in names if name not in keys]
    if strange or not keys:
        others = {m for sign, m in _OTHER_METHODS.items() if any(sign in k for k in strange)}
        raise CheckpointError(
            "holds keys that are none of a LoRA" if strange else "holds no LoRA for this network",
            where=source.label,
            expected="names that end in .lora_down.weight, .lora_up.weight, .lora_mid.weight, "
            ".alpha, .lora_A.weight, .lora_B.weight, .lora.down.weight or .lora.up.weight",
            got=_some(strange) or f"{len(source.entries)} keys of text encoders",
            hint=f"this looks like {' and '.join(sorted(others))}, which is not merged here"
            if others
            else None,
        )


def _check_layers(
    source: Source,
    keys: Mapping[str, LoraKey],
    table: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    network: str,
) -> None:
    lost = [name for name, key in keys.items() if key.layer not in table]
    if lost:
        downs = {k.layer: source.entries[n].shape for n, k in keys.items() if k.role == "down"}
        raise WeightsMismatchError(
            f"{len(lost)} of {len(keys)} keys are of layers that this network has not"
            + _meant_for(downs),
            where=source.label,
            expected=f"layers of the {network}{_reads(shapes)}",
            got=_some(lost),
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
        came = [f"{layer}: {updates[layer].shapes}" for layer in wrong]
        downs = {layer: tuple(update.down.shape) for layer, update in updates.items()}
        raise WeightsMismatchError(
            f"the matrices of {len(wrong)} of {len(updates)} layers do not fit the {network}"
            + _reads(shapes)
            + _meant_for(downs),
            where=source.label,
            expected=_some([f"{layer}: {shapes[layer]}" for layer in wrong]),
            got=_some(came),
            hint="check that the LoRA was trained on a model of the same family",
        )


def _meant_for(downs: Mapping[str, tuple[int, ...]]) -> str:
    reads = _reads(downs)
    return f"; the LoRA is for one{reads}" if reads else ""


def _reads(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What text a network's layers, or a LoRA's, read."""
    for layer, shape in shapes.items():
        if layer.endswith(("attn2.to_k", "attn2_to_k")) and len(shape) > 1:
            family = f", as in {_TEXT_WIDTHS[shape[1]]}" if shape[1] in _TEXT_WIDTHS else ""
            return f" that reads text {shape[1]} wide{family}"
    return ""


def _check_same(source: Source, name: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or not torch.equal(one, other):
        raise CheckpointError(
            f"{name} is of a layer that another key is of too, with other values",
            where=source.label,
            expected="one LoRA",
            hint="take one of the two out of the file",
        )


def _update(source: Source, layer: str, own: Mapping[str, Tensor], alphas: _Alphas) -> Update:
    absent = {"down", "up"} - set(own)
    if absent:
        raise CheckpointError(
            f"the LoRA of {layer} is not whole",
            where=source.label,
            expected="down and up (lora_A and lora_B)",
            got="only " + " and ".join(sorted(own)),
        )
    for role, tensor in own.items():
        if tensor.is_complex() or not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(
                f"the LoRA's {role} of {layer} is not made of finite numbers",
                where=source.label,
                got=f"{tensor.dtype}, with NaN or infinity"
                if tensor.is_floating_point()
                else tensor.dtype,
            )
    rank = own["down"].shape[0] if own["down"].ndim else 0
    if not rank or ("alpha" in own and own["alpha"].numel() != 1):
        raise CheckpointError(
            f"the LoRA of {layer} has no rank, or an alpha that is no number",
            where=source.label,
            got=", ".join(f"{role} {tuple(tensor.shape)}" for role, tensor in own.items()),
        )
    return Update(
        down=own["down"],
        up=own["up"],
        mid=own.get("mid"),
        factor=own["alpha"].item() / rank if "alpha" in own else alphas.factor(layer, rank),
    )


class _Alphas:
    """The scaling of layers without an ``.alpha`` of their own: what PEFT's config says, which is
    beside the file or in its metadata, or 1."""

    def __init__(self, lora: Weights, source: Source) -> None:
        self._where = source.label
        self._config = self._read(lora, source)
        if self._config.get("use_dora") or self._config.get("fan_in_fan_out"):
            raise CheckpointError(
                "is made with use_dora or fan_in_fan_out, which is not merged here",
                where=self._where,
            )

    def factor(self, layer: str, rank: int) -> float:
        """alpha over rank (over its root for rank-stabilised LoRA), as PEFT has it."""
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
                f"its config gives no alpha for {layer}",
                where=self._where,
                expected="lora_alpha, a number, and alpha_pattern, numbers by pattern",
                got=short({"lora_alpha": alpha, "alpha_pattern": patterns}),
            ) from error
        return float(factor)

    def _read(self, lora: Weights, source: Source) -> Mapping[str, Any]:
        if isinstance(lora, str | Path):
            beside = Path(lora) / "adapter_config.json"
            with os_errors(beside):
                there = Path(lora).is_dir() and beside.exists()
            if there:
                return read_json(beside)
        try:
            content = json.loads(source.metadata.get(_METADATA_KEY, "{}"))
            # by component: unet.lora_alpha
            return {
                k.removeprefix("unet."): v
                for k, v in content.items()
                if not k.startswith(("text_encoder.", "text_encoder_2."))
            }
        except (AttributeError, RecursionError, ValueError) as error:
            raise CheckpointError(
                f"its metadata {_METADATA_KEY} is not a JSON object", where=self._where
            ) from error


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
