"""The kinds of adapters that merge: which tensors each has for a layer, and the updates they are.

How strong an update is, at scale 1:

- LoRA, LoHa, LoKr, GLoRA and LoRA's biases: alpha / rank. Without an alpha, PEFT's config gives one
  (over the rank's square root with ``use_rslora``); without either, alpha equals the rank. LyCORIS'
  ``rs_lora`` is in the alpha that it stores. LoKr of two whole matrices has no rank: 1, or the
  config's alpha over its ``r``.
- A ``scalar`` of its own multiplies the update; LyCORIS multiplies it into the matrices it saves.
- OFT and BOFT: alpha is the constraint on the rotation, none if it is 0.
- Differences, norms, biases of their own and (IA)3: as they are, without alpha.

Dropout and LyCORIS' bypass mode concern training and leave nothing in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from sdconv.errors import CheckpointError
from sdconv.lora.config import AdapterConfig
from sdconv.lora.products import Difference, GLoRA, LoHa, LoKr, LoRA
from sdconv.lora.rescaling import DoRA, Rescaling
from sdconv.lora.rotations import BOFT, OFT, ButterflyInputRotation, InputRotation
from sdconv.lora.updates import Update


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """What a file holds for one layer.

    ``layer``: the layer's name. ``tensors``: by role. ``shapes``: of the layer's own ``"weight"``
    and ``"bias"``. ``config``: PEFT's. ``where``: the file's name in messages.
    """

    layer: str
    tensors: Mapping[str, Tensor]
    shapes: Mapping[str, Sequence[int]]
    config: AdapterConfig
    where: str

    def only(self, *roles: str) -> dict[str, Tensor]:
        """The tensors of these roles that there are."""
        return {role: self.tensors[role] for role in roles if role in self.tensors}

    def factor(self, role: str | None) -> float:
        """Alpha over rank, times ``scalar``.

        Args:
            role: the tensor whose first size is the rank; None if there is no rank.

        Raises:
            CheckpointError: it has none, or alpha is 0 or not a number.
        """
        rank: int | None = None
        if role is not None:
            of = self.tensors.get(role)
            rank = of.shape[0] if of is not None and of.ndim else 0
            if not rank:
                raise self.error("has no rank")
        scalar = self.number("scalar")
        alpha = self.number("alpha")
        if alpha is None:
            factor = self.config.factor(self.layer, rank)
        elif rank is None:
            factor = 1.0
        elif alpha == 0:
            raise self.error(
                "has an alpha of 0, which training scripts take for the rank and others for none"
            )
        else:
            factor = alpha / rank
        return factor if scalar is None else factor * scalar

    def number(self, role: str) -> float | None:
        """The value of a tensor with one element; None if it does not exist."""
        tensor = self.tensors.get(role)
        if tensor is None:
            return None
        if tensor.numel() != 1:
            raise self.error(f"has a {role} that is not a single number")
        return float(tensor.item())

    def error(self, what: str, expected: str | None = None) -> CheckpointError:
        return CheckpointError(
            f"the LoRA of {self.layer} {what}",
            where=self.where,
            expected=expected,
            got=", ".join(f"{role} {tuple(one.shape)}" for role, one in self.tensors.items()),
        )


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of update.

    ``parameter``: of the layer, that it changes. ``forms``: the sets of tensors it may have.
    ``options``: tensors that may be added to each. ``read``: makes the update; None where there is
    nothing to change.
    """

    name: str
    parameter: str
    forms: tuple[frozenset[str], ...]
    read: Callable[[_Kind, LayerPart], Update | None]
    options: frozenset[str] = frozenset()

    @property
    def roles(self) -> frozenset[str]:
        return frozenset().union(*self.forms)


def updates_of(part: LayerPart) -> dict[str, Update]:
    """The updates of a layer, by ``"weight"`` or ``"bias"``; whether they fit is not checked.

    Raises:
        CheckpointError: tensors lack, or have no meaning together, or hold NaN or infinity.
    """
    for role, tensor in part.tensors.items():
        _check_values(part, role, tensor)
    used: set[str] = set()
    updates: dict[str, Update] = {}
    for kind in _KINDS:
        present = kind.roles & part.tensors.keys()
        if not present:
            continue
        if present not in kind.forms:
            nearest = min(kind.forms, key=lambda form: len(form ^ present))
            raise CheckpointError(
                f"the {kind.name} of {part.layer} lacks a matrix",
                where=part.where,
                expected=" and ".join(sorted(nearest)),
                got="only " + " and ".join(sorted(part.tensors)),
            )
        used |= present | (kind.options & part.tensors.keys())
        update = kind.read(kind, part)
        if update is not None and kind.parameter in updates:
            raise part.error(f"has two updates of its {kind.parameter}")
        if update is not None:
            updates[kind.parameter] = update
    if stray := part.tensors.keys() - used:
        what = " and ".join(sorted(stray))
        if not used:
            raise CheckpointError(
                f"the LoRA of {part.layer} lacks a matrix",
                where=part.where,
                expected="down and up (lora_A and lora_B), or those of another kind",
                got=f"only {what}",
            )
        raise part.error(f"has {what}, which mean nothing with its other tensors")
    if part.config.decomposes and "down" in part.tensors and "magnitude" not in part.tensors:
        raise part.error("lacks lora_magnitude_vector, although its config says use_dora")
    return updates


def _check_values(part: LayerPart, role: str, tensor: Tensor) -> None:
    if tensor.is_complex() or not bool(torch.isfinite(tensor.float()).all()):
        raise CheckpointError(
            f"the LoRA's {role} of {part.layer} has values that are not finite real numbers",
            where=part.where,
            got=f"{tensor.dtype}, with NaN or infinity"
            if tensor.is_floating_point()
            else tensor.dtype,
        )
    if tensor.dtype in (torch.int8, torch.uint8) and tensor.ndim > 1:
        raise CheckpointError(
            f"the LoRA's {role} of {part.layer} is quantised, which sdconv does not undo",
            where=part.where,
            expected="floating-point numbers",
            got=tensor.dtype,
        )


def _product(
    of: type[LoRA] | type[LoHa] | type[LoKr] | type[GLoRA],
    factor: Callable[[LayerPart], float],
) -> Callable[[_Kind, LayerPart], Update]:
    """A reader of updates of a class, with DoRA's magnitude where there is one."""

    def read(kind: _Kind, part: LayerPart) -> Update:
        inner = of(kind=kind.name, tensors=part.only(*kind.roles), factor=factor(part))
        return _decomposed(inner, part)

    return read


def _decomposed(inner: Update, part: LayerPart) -> Update:
    """An update, in DoRA if there is a magnitude."""
    found = part.only("dora_scale", "magnitude")
    if not found:
        return inner
    if len(found) > 1:
        raise part.error("has two magnitudes")
    kind = "DoRA" if inner.kind == "LoRA" else f"{inner.kind} with DoRA"
    return DoRA(kind=kind, tensors={**inner.tensors, **found}, inner=inner)


def _read_difference(kind: _Kind, part: LayerPart) -> Update:
    return Difference(kind=kind.name, tensors=part.only(*kind.roles))


def _read_lora_bias(kind: _Kind, part: LayerPart) -> Update:
    factor = part.factor("down")
    return Difference(kind=kind.name, tensors=part.only("up_bias"), factor=factor)


def _lokr_factor(part: LayerPart) -> float:
    role = next((role for role in ("lokr_w2_b", "lokr_w1_b") if role in part.tensors), None)
    return part.factor(role)


def _glora_factor(part: LayerPart) -> float:
    a1, weight = part.tensors["a1"], part.shapes.get("weight", ())
    todays = len(weight) > 1 and a1.ndim > 0 and a1.shape[0] == weight[1]
    return part.factor("a2" if todays else "a1")


def _read_rotation(kind: _Kind, part: LayerPart) -> Update:
    tensors = part.only("oft_blocks", "rescale")
    constraint = part.number("alpha") or 0.0
    of, name = (BOFT, "BOFT") if tensors["oft_blocks"].ndim == 4 else (OFT, "OFT")
    return of(kind=name, tensors=tensors, constraint=constraint)


def _read_input_rotation(kind: _Kind, part: LayerPart) -> Update:
    triangles, config = part.tensors["oft_R"], part.config
    if not config:
        raise part.error("cannot be read without its config", "adapter_config.json next to it")
    try:
        size = round((1 + (1 + 8 * triangles.shape[-1]) ** 0.5) / 2) if triangles.ndim else 0
        neumann = bool(config.option("use_cayley_neumann", False))
        terms = int(config.option("num_cayley_neumann_terms", 5))
        if terms > _MOST_TERMS:
            raise ValueError(terms)
        return InputRotation(
            kind=kind.name,
            tensors=part.only("oft_R"),
            size=size,
            terms=terms if neumann else None,
            most=float(config.option("eps", 6e-5)) if config.option("coft") else None,
        )
    except (OverflowError, TypeError, ValueError) as error:
        raise part.error("has a config whose OFT options are not valid numbers") from error


def _read_butterfly(kind: _Kind, part: LayerPart) -> Update:
    return ButterflyInputRotation(kind=kind.name, tensors=part.only("boft_R", "boft_s"))


def _read_lycoris_ia3(kind: _Kind, part: LayerPart) -> Update:
    axis = 1 if part.number("on_input") else 0
    return Rescaling(kind=kind.name, tensors=part.only("weight"), axis=axis, neutral=0.0)


def _read_peft_ia3(kind: _Kind, part: LayerPart) -> Update:
    return Rescaling(kind=kind.name, tensors=part.only("ia3_l"), axis=_ia3_axis(part), neutral=1.0)


def _read_peft_ia3_bias(kind: _Kind, part: LayerPart) -> Update | None:
    if "bias" not in part.shapes or _ia3_axis(part) == 1:
        return None
    return Rescaling(kind=kind.name, tensors=part.only("ia3_l"), axis=0, neutral=1.0)


def _ia3_axis(part: LayerPart) -> int:
    """The axis of PEFT's vector: in a linear layer ``(out, 1)`` or ``(1, in)``; in a convolution
    always ``(1, n, 1, 1)``, so that the config or the sizes decide."""
    vector, weight = part.tensors["ia3_l"], part.shapes.get("weight", ())
    if vector.ndim == 2:
        return 0 if vector.shape[0] == vector.numel() else 1
    if part.config.option("feedforward_modules") is not None:
        return 1 if part.config.names("feedforward_modules", part.layer) else 0
    if len(weight) > 1 and weight[0] == weight[1]:
        raise part.error(
            "may be of the layer's inputs or outputs",
            "adapter_config.json with feedforward_modules",
        )
    return 1 if len(weight) > 1 and vector.numel() == weight[1] else 0


def _forms(*forms: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(form.split()) for form in forms)


_MOST_TERMS = 1000  # of a series of which a dozen matter
_RANKED = frozenset({"alpha", "scalar"})
_MAGNITUDES = frozenset({"dora_scale", "magnitude"})
_HADA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"

_KINDS: tuple[_Kind, ...] = (
    _Kind(
        name="LoRA",
        parameter="weight",
        forms=_forms("down up", "down mid up"),
        read=_product(LoRA, lambda part: part.factor("down")),
        options=_RANKED | _MAGNITUDES,
    ),
    _Kind(
        name="LoHa",
        parameter="weight",
        forms=_forms(_HADA, f"{_HADA} hada_t1 hada_t2"),
        read=_product(LoHa, lambda part: part.factor("hada_w1_b")),
        options=_RANKED | _MAGNITUDES,
    ),
    _Kind(
        name="LoKr",
        parameter="weight",
        forms=_forms(
            *(
                f"{left} {right}"
                for left, right in product(
                    ("lokr_w1", "lokr_w1_a lokr_w1_b"),
                    ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_w2_a lokr_w2_b lokr_t2"),
                )
            )
        ),
        read=_product(LoKr, _lokr_factor),
        options=_RANKED | _MAGNITUDES,
    ),
    _Kind(
        name="GLoRA",
        parameter="weight",
        forms=_forms("a1 a2 b1 b2", "a1 a2 b1 b2 bm"),
        read=_product(GLoRA, _glora_factor),
        options=_RANKED,
    ),
    _Kind(
        name="OFT",
        parameter="weight",
        forms=_forms("oft_blocks", "oft_blocks rescale"),
        read=_read_rotation,
        options=frozenset({"alpha"}),
    ),
    _Kind(name="OFT", parameter="weight", forms=_forms("oft_R"), read=_read_input_rotation),
    _Kind(name="BOFT", parameter="weight", forms=_forms("boft_R boft_s"), read=_read_butterfly),
    _Kind(
        name="(IA)3",
        parameter="weight",
        forms=_forms("on_input weight"),
        read=_read_lycoris_ia3,
    ),
    _Kind(name="(IA)3", parameter="weight", forms=_forms("ia3_l"), read=_read_peft_ia3),
    _Kind(name="(IA)3", parameter="bias", forms=_forms("ia3_l"), read=_read_peft_ia3_bias),
    _Kind(name="difference", parameter="weight", forms=_forms("diff"), read=_read_difference),
    _Kind(name="difference", parameter="bias", forms=_forms("diff_b"), read=_read_difference),
    _Kind(name="norm", parameter="weight", forms=_forms("w_norm"), read=_read_difference),
    _Kind(name="norm", parameter="bias", forms=_forms("b_norm"), read=_read_difference),
    _Kind(name="LoRA's bias", parameter="bias", forms=_forms("up_bias"), read=_read_lora_bias),
)
