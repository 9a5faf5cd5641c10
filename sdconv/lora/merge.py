"""LoRA added to a network's weights once, instead of in every step; and taken out again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.open import Weights
from sdconv.errors import InputError
from sdconv.lora.reading import Lora, read_lora


@dataclass(frozen=True, eq=False)
class _Scaled:
    """A LoRA and how strongly it is merged."""

    lora: Lora
    scale: float


@dataclass(frozen=True, eq=False)
class MergedLora:
    """A LoRA in a network. ``layers``: the names of those it changed. ``skipped``: keys of its file
    that are of text encoders, and those that repeat others. ``scale``: what it was merged with."""

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    scale: float
    _model: nn.Module = field(repr=False)
    _scaled: _Scaled = field(repr=False)

    def unmerge(self) -> None:
        """Takes it out: the weights are what they would be if it had never been merged, bit for
        bit. Whatever else was done to them since is lost.

        Raises:
            InputError: it is out already.
        """
        unmerge_lora(self._model, self)


def merge_lora(model: nn.Module, lora: Weights, scale: float = 1.0) -> MergedLora:
    """Adds a LoRA to a network's weights.

    ``weight + scale * alpha / rank * (up @ down)`` for linear layers and convolutions of any
    kernel, in float32 (or wider, as the weight), rounded once to the weight's dtype. Without an
    alpha it is the rank. Several may be merged at a time: their updates are added up before the
    rounding, so that order does not matter but for the last bit. Weights get new memory, and the
    old is kept for ``unmerge``: of weights that are mapped from a file it stays in the file.

    Args:
        model: sdconv's U-Net or VAE, or any module whose layers have diffusers' names.
        lora: a file with kohya's, PEFT's or diffusers' names, of either layout; PEFT's folder of
            an adapter, whose ``adapter_config.json`` is read; or a state dict.
        scale: how strongly; negative to take away.

    Returns:
        What was merged, with ``unmerge()``; its ``skipped`` names keys of text encoders.

    Raises:
        CheckpointError: it cannot be read, holds keys that are none of a LoRA, or lacks a matrix.
        WeightsMismatchError: it is for another network. InputError: an argument has no such value,
            or the sum is beyond the weights' dtype. Nothing is merged then.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "not a network",
            where="model",
            expected="a torch.nn.Module, such as pipe.unet",
            got=type(model).__name__,
        )
    if not isinstance(scale, Real) or not abs(scale) <= sys.float_info.max:
        raise InputError("not a scale", where="scale", expected="a finite number", got=short(scale))
    weights = _weights(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    read = read_lora(lora, shapes, type(model).__name__)
    for name in read.updates:
        if weights[name].is_meta or not weights[name].is_floating_point():
            raise InputError(
                "a weight has no floating-point values here to add to",
                where=f"{name}.weight",
                expected="a network with its weights in memory",
                got="the meta device" if weights[name].is_meta else weights[name].dtype,
                hint="merge before the network is offloaded or quantised",
            )
    scaled = _Scaled(read, float(scale))
    state = _MERGED.get(model) or _State()
    state.add(scaled, weights)
    _MERGED[model] = state
    return MergedLora(tuple(read.updates), read.skipped, float(scale), model, scaled)


def unmerge_lora(model: nn.Module, merged: MergedLora | None = None) -> None:
    """Takes merged LoRAs out of a network: the weights are bit for bit what they were. Whatever
    else was done to them since is lost.

    Args:
        model: what they were merged into.
        merged: the one to take out, while others stay; None for all.

    Raises:
        InputError: there is no such LoRA in it.
    """
    state = _MERGED.get(model) if isinstance(model, nn.Module) else None
    if state is None or (
        merged is not None and getattr(merged, "_scaled", None) not in state.loras
    ):
        raise InputError(
            "no LoRA to take out",
            where="unmerge_lora",
            expected="a network with what sdconv.merge_lora merged into it",
            got="nothing merged" if state is None else "a LoRA that is not in it (any more)",
        )
    state.remove(state.loras if merged is None else [merged._scaled], _weights(model))
    if not state.loras:
        del _MERGED[model]


@dataclass
class _State:
    """What is merged into one network, and the weights without it."""

    loras: list[_Scaled] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, lora: _Scaled, weights: Mapping[str, nn.Parameter]) -> None:
        names = lora.lora.updates
        before = {name: self.originals.get(name, weights[name].data) for name in names}
        _set([*self.loras, lora], before, weights)
        self.originals |= before
        self.loras.append(lora)

    def remove(self, gone: Sequence[_Scaled], weights: Mapping[str, nn.Parameter]) -> None:
        kept = [one for one in self.loras if one not in gone]
        names = {name for one in gone for name in one.lora.updates}
        _set(kept, {name: self.originals[name] for name in names}, weights)
        for name in names.difference(*(one.lora.updates for one in kept)):
            del self.originals[name]
        self.loras = kept


# what is merged stays as long as the network; it holds no reference to it
_MERGED: WeakKeyDictionary[nn.Module, _State] = WeakKeyDictionary()


@torch.no_grad()
def _set(
    loras: Sequence[_Scaled],
    originals: Mapping[str, Tensor],
    weights: Mapping[str, nn.Parameter],
) -> None:
    """Gives weights their originals' values and what LoRAs add; all are computed before the first
    is changed."""
    new = {name: _sum(loras, name, one, weights[name]) for name, one in originals.items()}
    for name, tensor in new.items():
        weights[name].data = tensor


def _sum(loras: Sequence[_Scaled], name: str, original: Tensor, weight: Tensor) -> Tensor:
    """An original with its updates, in the dtype and on the device that the weight has now."""
    own = [one for one in loras if name in one.lora.updates]
    if not own:
        return original.to(weight)
    wide = torch.float64 if original.dtype == torch.float64 else torch.float32
    total = original.to(weight.device, wide, copy=True)
    for one in own:
        total += one.lora.updates[name].delta(total, one.scale)
    rounded = total.to(weight.dtype)
    if not bool(torch.isfinite(rounded.to(wide)).all()):
        raise InputError(
            "with this added, a weight is not made of finite numbers",
            where=f"{name}.weight",
            expected=f"numbers that {weight.dtype} can hold",
            got=f"scale {' and '.join(f'{one.scale:g}' for one in own)}",
            hint="a smaller scale, or weights in a wider dtype",
        )
    return rounded


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of a network by their layers' names, also where PEFT has wrapped the layer or
    torch has compiled the network."""
    return {
        name.removesuffix(".weight").removeprefix("_orig_mod.").replace(".base_layer", ""): weight
        for name, weight in model.named_parameters()
        if name.endswith(".weight")
    }
