"""Merging LoRAs into a network's weights, and unmerging them bit for bit."""

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
from sdconv.lora.updates import merged as merged_parameter


@dataclass(frozen=True, eq=False)
class _ScaledLora:
    """A LoRA and the scale it is merged with."""

    lora: Lora
    scale: float


@dataclass(frozen=True, eq=False)
class MergedLora:
    """A LoRA that is merged into a network.

    ``layers``: the names of the layers it changed. ``skipped``: keys of its file that belong to
    text encoders or repeat other keys. ``scale``: the scale it was merged with.
    """

    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    scale: float
    _model: nn.Module = field(repr=False)
    _scaled: _ScaledLora = field(repr=False)

    def unmerge(self) -> None:
        """Restores the weights bit for bit to what they would be without this LoRA. Any other
        change made to them since is lost.

        Raises:
            InputError: it has been unmerged already.
        """
        unmerge_lora(self._model, self)


def merge_lora(model: nn.Module, lora: Weights, scale: float = 1.0) -> MergedLora:
    """Adds a LoRA, or one of its relatives, to a network's weights.

    The weights of linear layers and of convolutions with any kernel become ``weight + scale * alpha
    / rank * (up @ down)``, computed in float32 (in float64 for float64 weights) and rounded once to
    the weight's dtype. A missing alpha equals the rank. LoHa, LoKr, DoRA, OFT, BOFT, GLoRA, (IA)3,
    whole differences, norms and biases merge too; their formulas, and what ``scale`` means for
    each, are in docs/lora.md. Several can be merged: each is computed from the original weight, and
    they are summed before rounding, so their order changes at most the last bit. Merged weights
    take new memory, and the originals are kept for ``unmerge``; those mapped from a file stay in
    the file.

    Args:
        model: sdconv's U-Net or VAE, or any module whose layers have diffusers' names.
        lora: a file with kohya's, LyCORIS', PEFT's or diffusers' names, in either layout; the
            folder of a PEFT adapter, whose ``adapter_config.json`` is read; or a state dict.
        scale: the strength; negative to subtract the LoRA.

    Returns:
        The merged LoRA, with ``unmerge()``; its ``skipped`` lists the text encoders' keys.

    Raises:
        CheckpointError: the file cannot be read, has keys that are not a LoRA's, or lacks a matrix.
        WeightsMismatchError: the LoRA is for another network.
        InputError: an argument has a wrong value, or a merged weight overflows its dtype.
        No weight is changed if an error is raised.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "not a network",
            where="model",
            expected="a torch.nn.Module, such as pipe.unet",
            got=type(model).__name__,
        )
    strength = checked_scale(scale)
    weights = _parameters(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    read = read_lora(lora, shapes, type(model).__name__)
    for name in read.updates:
        if weights[name].is_meta or not weights[name].is_floating_point():
            raise InputError(
                "a LoRA cannot be added to this weight",
                where=name,
                expected="floating-point values in memory",
                got="a tensor on the meta device" if weights[name].is_meta else weights[name].dtype,
                hint="merge before the network is offloaded or quantised",
            )
    scaled = _ScaledLora(read, strength)
    state = _MERGED.get(model) or _MergeState()
    state.add(scaled, weights)
    _MERGED[model] = state
    return MergedLora(read.layers, read.skipped, strength, model, scaled)


def checked_scale(scale: float) -> float:
    """A LoRA's strength.

    Raises:
        InputError: it is not a finite number.
    """
    if not isinstance(scale, Real) or not abs(scale) <= sys.float_info.max:
        raise InputError(
            "not a finite number", where="scale", expected="a finite number", got=short(scale)
        )
    return float(scale)


def unmerge_lora(model: nn.Module, merged: MergedLora | None = None) -> None:
    """Restores a network's weights bit for bit to what they were without the merged LoRAs. Any
    other change made to them since is lost.

    Args:
        model: the network that they were merged into.
        merged: the only one to unmerge; None unmerges all.

    Raises:
        InputError: nothing is merged into the network, or not this LoRA.
    """
    state = _MERGED.get(model) if isinstance(model, nn.Module) else None
    if state is None or (
        merged is not None and getattr(merged, "_scaled", None) not in state.loras
    ):
        raise InputError(
            "no LoRA to unmerge",
            where="unmerge_lora",
            expected="a network and a LoRA that sdconv.merge_lora merged into it",
            got="nothing merged" if state is None else "a LoRA that is not, or no longer, merged",
        )
    state.remove(state.loras if merged is None else [merged._scaled], _parameters(model))
    if not state.loras:
        del _MERGED[model]


@dataclass
class _MergeState:
    """The LoRAs merged into one network, and the original weights of the layers they change."""

    loras: list[_ScaledLora] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def add(self, lora: _ScaledLora, weights: Mapping[str, nn.Parameter]) -> None:
        names = lora.lora.updates
        originals = {name: self.originals.get(name, weights[name].data) for name in names}
        _set_weights(weights, originals, [*self.loras, lora])
        self.originals |= originals
        self.loras.append(lora)

    def remove(self, removed: Sequence[_ScaledLora], weights: Mapping[str, nn.Parameter]) -> None:
        kept = [one for one in self.loras if one not in removed]
        names = {name for one in removed for name in one.lora.updates}
        _set_weights(weights, {name: self.originals[name] for name in names}, kept)
        for name in names.difference(*(one.lora.updates for one in kept)):
            del self.originals[name]
        self.loras = kept


# entries go with their network, to which they hold no reference
_MERGED: WeakKeyDictionary[nn.Module, _MergeState] = WeakKeyDictionary()


@torch.no_grad()
def _set_weights(
    weights: Mapping[str, nn.Parameter],
    originals: Mapping[str, Tensor],
    loras: Sequence[_ScaledLora],
) -> None:
    """Sets weights to their originals plus the updates of ``loras``; all sums are computed before
    the first weight changes."""
    merged = {name: _merged(name, one, loras, weights[name]) for name, one in originals.items()}
    for name, tensor in merged.items():
        weights[name].data = tensor


def _merged(name: str, original: Tensor, loras: Sequence[_ScaledLora], weight: Tensor) -> Tensor:
    """An original plus its updates, with the current dtype and device of ``weight``."""
    updates = [(one.lora.updates[name], one.scale) for one in loras if name in one.lora.updates]
    if not updates:
        return original.to(weight)
    return merged_parameter(name, original.to(weight.device), updates, weight.dtype)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A network's weights and biases by name, without the wrappers of PEFT and of
    ``torch.compile``."""
    return {
        name.removeprefix("_orig_mod.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if name.endswith((".weight", ".bias"))
    }
