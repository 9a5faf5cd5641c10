"""Extracting a LoRA from the difference of two checkpoints, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconv.checkpoint.changes import same_values
from sdconv.checkpoint.components import Component, components_in
from sdconv.checkpoint.io.computed import Computed, ComputedFile
from sdconv.checkpoint.io.narrow import STORAGE_ONLY, Caster, check_dtype
from sdconv.checkpoint.io.stream import OnTensor, OutputTensor, stream
from sdconv.checkpoint.io.tensor_files import DTYPE_NAMES, TORCH_DTYPES
from sdconv.checkpoint.io.write import output_path
from sdconv.checkpoint.keys.unet import keys_of_canonical
from sdconv.checkpoint.open import Weights
from sdconv.checkpoint.whole import Checkpoint, opened
from sdconv.errors import InputError, WeightsMismatchError

NAMES = ("kohya", "peft")
"""Whose names an extracted LoRA can have."""

_AT_MOST = 4  # names in a message
_EMBEDDINGS = ("token_embedding", "position_embedding", "class_embedding")


@dataclass(kw_only=True)
class Energy:
    """How much of a component's difference a LoRA holds.

    ``layers``: the number of layers in the LoRA. ``total``: the sum of the squares of all
    differences. ``lost``: the same of what the LoRA leaves. ``left_out``: the names of tensors that
    differ and that it cannot hold (norms, biases, embeddings), or was not asked for.
    """

    layers: int = 0
    total: float = 0.0
    lost: float = 0.0
    left_out: list[str] = field(default_factory=list)

    @property
    def kept(self) -> float:
        """The share of the energy that the LoRA keeps, at most 1."""
        return 1 - self.lost / self.total if self.total else 1.0

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv extract-lora --json`` prints."""
        return {"layers": self.layers, "kept": self.kept, "left_out": self.left_out}


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """A summary of what ``extract_lora`` wrote: the ``file``, its ``dtype``, and the energy that it
    keeps by component, of the components that differ."""

    file: Path
    dtype: torch.dtype
    components: Mapping[str, Energy]


def extract_lora(
    base: Weights,
    tuned: Weights,
    out: str | Path,
    rank: int,
    conv_rank: int | None = None,
    *,
    names: str = "kohya",
    dtype: torch.dtype | None = None,
    on_tensor: OnTensor = lambda name, done, total: None,
) -> Extracted:
    """Writes the LoRA that makes ``tuned`` of ``base``, as far as its rank allows.

    Each linear layer and convolution whose weights differ gets the best approximation of the
    difference of that rank: its truncated singular value decomposition (Eckart and Young 1936),
    from the eigenvectors of its smaller Gram matrix in float64. Alpha is ``rank`` in every layer;
    where a layer has another rank, its matrices make up for it. Both checkpoints are read one layer
    at a time, in any layout, dtype and form.

    Args:
        base: a file or folder of a network or of a whole model.
        tuned: the same networks and text encoders with other weights. What only one of the two has
            is left out; a component must have the same tensors in both.
        out: a file whose name ends in ``.safetensors``.
        rank: of linear layers and 1x1 convolutions, at least 1; a layer's smaller side limits it.
        conv_rank: of larger convolutions; None for ``rank``, 0 to leave them out.
        names: ``"kohya"`` (the original layout's layers for SDXL, as its scripts have it) or
            ``"peft"`` (diffusers' and PEFT's, with the config in the metadata).
        dtype: the file's; None for that of ``tuned``'s weights, float16 if that is fp8.
        on_tensor: called before each tensor with its name, the bytes done so far and all bytes.

    Raises:
        CheckpointError: something cannot be read or written, or a value is too large for the dtype.
        UnknownNetworkError: a checkpoint has no network that sdconv knows and no text encoder.
        WeightsMismatchError: the checkpoints are of different models, or nothing differs.
        InputError: an argument has a value that is not allowed.
    """
    path, is_file = output_path(out)
    if not is_file:
        raise InputError(
            "a LoRA is a single file", where=path, expected="a name that ends in .safetensors"
        )
    if names not in NAMES:
        raise InputError("unknown names", where="names", expected=" or ".join(NAMES), got=names)
    check_dtype(dtype)
    ranks = (
        _checked(rank, "rank", 1),
        _checked(rank if conv_rank is None else conv_rank, "conv_rank", 0),
    )
    with ExitStack() as stack:
        first, second = (opened(one, stack) for one in (base, tuned))
        pairs = _pairs(first, second)
        dtype = dtype or _usual_dtype([other for _, other in pairs])
        caster = Caster(path)
        energies: dict[str, Energy] = {}
        layers: list[_Layer] = []
        for one, other in pairs:
            energy = Energy()
            layers += _differing(one, other, ranks, dtype, caster, energy)
            if energy.layers or energy.left_out:
                energies[one.name] = energy
        if not layers:
            raise WeightsMismatchError(
                "there is nothing to extract",
                where=f"{first.label} and {second.label}",
                expected="weights of linear layers or convolutions that differ",
                got="no difference"
                if not energies
                else "only what a LoRA does not hold: "
                + ", ".join(n for one in energies.values() for n in one.left_out[:_AT_MOST]),
            )
        spelled = _Names(names, pairs)
        entries = [entry for layer in layers for entry in layer.entries(spelled)]
        stream(entries, path, spelled.metadata(layers, ranks), caster=caster, on_tensor=on_tensor)
    return Extracted(file=path, dtype=dtype, components=energies)


def _checked(rank: int, where: str, least: int) -> int:
    if type(rank) is not int or rank < least:
        raise InputError(
            "not a rank", where=where, expected=f"a whole number from {least} on", got=repr(rank)
        )
    return rank


def _pairs(first: Checkpoint, second: Checkpoint) -> list[tuple[Component, Component]]:
    """The components that both have.

    Raises:
        WeightsMismatchError: there are none, or one has other tensors in the two.
    """
    ours = {one.name: one for one in components_in(first)}
    theirs = {one.name: one for one in components_in(second)}
    pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
    if not pairs:
        raise WeightsMismatchError(
            "the checkpoints have no component in common",
            where=second.label,
            expected=" or ".join(ours),
            got=", ".join(theirs),
        )
    for one, other in pairs:
        a, b = one.shapes, other.shapes
        wrong = [
            f"{k} {a.get(k, '(none)')} and {b.get(k, '(none)')}"
            for k in {**a, **b}
            if a.get(k) != b.get(k)
        ]
        if wrong:
            raise WeightsMismatchError(
                f"the {one.name} of {second.label} is of another model: {len(wrong)} tensors are "
                "of another shape, or in one of the two only",
                where=first.label,
                expected="the same tensors in the same shapes",
                got="; ".join(wrong[:_AT_MOST]),
                hint="`sdconv diff` lists everything",
            )
    return pairs


def _usual_dtype(components: list[Component]) -> torch.dtype:
    """The dtype of most weights."""
    counts: dict[torch.dtype, int] = {}
    for one in components:
        for stored in one.tensors.values():
            dtype = TORCH_DTYPES.get(one.part.view.dtype(stored.name))
            if dtype is not None and dtype.is_floating_point:
                counts[dtype] = counts.get(dtype, 0) + 1
    most = max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
    return torch.float16 if most in STORAGE_ONLY else most


@dataclass(eq=False, kw_only=True)
class _Layer:
    """A layer that differs, and its two matrices, which are computed once for both."""

    name: str
    base: Component
    tuned: Component
    shape: tuple[int, ...]
    rank: int
    alpha: int
    dtype: torch.dtype
    caster: Caster
    energy: Energy
    _matrices: dict[str, Tensor] = field(default_factory=dict)
    _is_counted: bool = False

    def entries(self, names: _Names) -> Iterator[OutputTensor]:
        """The tensors of the file."""
        kernel = self.shape[2:]
        shapes = {
            "down": (self.rank, *self.shape[1:]),
            "up": (self.shape[0], self.rank, *(1 for _ in kernel)),
        }
        tensors = {
            names.key(self, role): Computed(
                shape=shape,
                dtype=DTYPE_NAMES[self.dtype],
                places=(self._place(self.base), self._place(self.tuned)),
                compute=partial(self._matrix, role, shape),
            )
            for role, shape in shapes.items()
        }
        if (alpha := names.key(self, "alpha")) is not None:
            tensors[alpha] = Computed(
                shape=(),
                dtype=DTYPE_NAMES[self.dtype],
                places=(),
                compute=lambda: torch.tensor(float(self.alpha), dtype=self.dtype),
            )
        file = ComputedFile(self.name, {k: v for k, v in tensors.items() if k is not None})
        for name, entry in file.entries.items():
            yield OutputTensor(name=name, shape=entry.shape, pieces=((file, name),))

    def _place(self, component: Component) -> Any:
        return component.part.view.home(component.tensors[self.name].name)

    def _matrix(self, role: str, shape: tuple[int, ...]) -> Tensor:
        if role not in self._matrices:
            self._matrices = self._decompose()
        return self._matrices.pop(role).reshape(shape)

    def _decompose(self) -> dict[str, Tensor]:
        difference = _difference(self.base, self.tuned, self.name).flatten(1)
        down, up = (
            self.caster.cast(one * (self.rank / self.alpha) ** 0.5, self.dtype, self.name)
            for one in truncated(difference, self.rank)
        )
        if not self._is_counted:
            self._is_counted = True
            rest = difference - up.double() @ down.double() * (self.alpha / self.rank)
            self.energy.total += float(difference.square().sum())
            self.energy.lost += float(rest.square().sum())
        return {"down": down, "up": up}


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a matrix of a rank, as the product of two.

    Args:
        matrix: ``(m, n)`` in float64.
        rank: at most the smaller side.

    Returns:
        ``down``, ``(rank, n)``, and ``up``, ``(m, rank)``, whose product ``up @ down`` it is; the
        singular values are divided equally between them.
    """
    if matrix.shape[0] > matrix.shape[1]:
        down, up = truncated(matrix.T, rank)
        return up.T.contiguous(), down.T.contiguous()
    values, vectors = torch.linalg.eigh(matrix @ matrix.T)  # ascending: the squares
    basis = vectors[:, -rank:].flip(1)
    roots = values[-rank:].flip(0).clamp_min(0).sqrt().sqrt()
    projected = basis.T @ matrix
    safe = roots.clamp_min(torch.finfo(matrix.dtype).tiny)
    down = torch.where(roots[:, None] > 0, projected / safe[:, None], 0.0)
    return down, basis * roots


def _difference(base: Component, tuned: Component, name: str) -> Tensor:
    return tuned.tensor(name).double() - base.tensor(name).double()


def _differing(
    base: Component,
    tuned: Component,
    ranks: tuple[int, int],
    dtype: torch.dtype,
    caster: Caster,
    energy: Energy,
) -> Iterator[_Layer]:
    """The layers that differ and that a LoRA holds; everything else goes to ``energy``."""
    for name, shape in base.shapes.items():
        one, other = base.tensor(name), tuned.tensor(name)
        if not one.is_floating_point() or same_values(one, other):
            continue
        rank = ranks[1] if any(side > 1 for side in shape[2:]) else ranks[0]
        layer = name.removesuffix(".weight")
        if layer == name or len(shape) not in (2, 4) or layer.endswith(_EMBEDDINGS) or not rank:
            lost = float((other.double() - one.double()).square().sum())
            energy.total += lost
            energy.lost += lost
            energy.left_out.append(name)
            continue
        energy.layers += 1
        yield _Layer(
            name=name,
            base=base,
            tuned=tuned,
            shape=shape,
            rank=min(rank, shape[0], one[0].numel()),
            alpha=ranks[0],  # of all layers: diffusers ignores those of single ones in some files
            dtype=dtype,
            caster=caster,
            energy=energy,
        )


_ROLES = {
    "kohya": {"down": "lora_down", "up": "lora_up"},
    "peft": {"down": "lora_A", "up": "lora_B"},
}


class _Names:
    """The names of a LoRA file's tensors, and its metadata."""

    def __init__(self, style: str, pairs: list[tuple[Component, Component]]) -> None:
        self._style = style
        present = {one.name: one for one, _ in pairs}
        unet = present.get("unet")
        self._originals = None
        # kohya's scripts call SDXL's layers by the original layout's names
        if unet is not None and "add_embedding.linear_1.weight" in unet.tensors:
            self._originals = keys_of_canonical(unet.tensors)
        second = "text_encoder_2" in present
        self._prefixes = {
            "unet": "lora_unet_",
            "vae": "lora_vae_",
            "text_encoder": "lora_te1_" if second else "lora_te_",
            "text_encoder_2": "lora_te2_",
        }

    def key(self, layer: _Layer, role: str) -> str | None:
        """A tensor's name; None for PEFT's alphas, which are in the metadata."""
        component, name = layer.base.name, layer.name.removesuffix(".weight")
        if self._style == "peft":
            own = _ROLES["peft"].get(role)
            return None if own is None else f"{component}.{name}.{own}.weight"
        if component == "unet" and self._originals is not None:
            name = (self._originals.original(layer.name) or layer.name).removesuffix(".weight")
        stem = self._prefixes[component] + name.replace(".", "_")
        return f"{stem}.alpha" if role == "alpha" else f"{stem}.{_ROLES['kohya'][role]}.weight"

    def metadata(self, layers: list[_Layer], ranks: tuple[int, int]) -> dict[str, str]:
        """The file's metadata, as kohya's scripts or diffusers write it."""
        if self._style == "kohya":
            return {
                "format": "pt",
                "ss_network_module": "networks.lora",
                "ss_network_dim": str(ranks[0]),
                "ss_network_alpha": str(ranks[0]),
                "ss_network_args": json.dumps({"conv_dim": ranks[1], "conv_alpha": ranks[0]}),
            }
        content: dict[str, Any] = {}
        for component in dict.fromkeys(layer.base.name for layer in layers):
            # without `text_model.`, which transformers has or has not; PEFT compares the ends
            own = {
                one.name.removesuffix(".weight").removeprefix("text_model."): one.rank
                for one in layers
                if one.base.name == component
            }
            fields = {
                "r": ranks[0],
                "lora_alpha": ranks[0],
                "rank_pattern": {name: rank for name, rank in own.items() if rank != ranks[0]},
                "target_modules": list(own),
            }
            content |= {f"{component}.{key}": value for key, value in fields.items()}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(content)}
