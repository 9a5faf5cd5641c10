"""Compares a network's tensors with a checkpoint's: none missing, none unexpected, right shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdconv.checkpoint.identify.detected import Shapes
from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.identify.shapes import Shape
from sdconv.errors import WeightsMismatchError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The result of a comparison: the reasons why a network cannot be loaded, if there are any.

    ``missing``: diffusers' names. The others are by the names in the file: ``unexpected``;
    ``misshapen``, with the expected and the actual shape; ``not_floating``, with the dtype of
    weights that are stored as integers.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]
    not_floating: Mapping[str, str]

    @property
    def summary(self) -> str:
        """The numbers of misfits, such as ``1 missing; 2 of the wrong shape``; empty if all fit."""
        parts = (
            (self.missing, "missing"),
            (self.unexpected, "unexpected"),
            (self.misshapen, "of the wrong shape"),
            (self.not_floating, "not floating-point"),
        )
        return "; ".join(f"{len(names)} {what}" for names, what in parts if names)

    def check(self, identified: Identified, where: object) -> None:
        """Raises an error unless everything fits.

        Args:
            identified: the network.
            where: the checkpoint's name, for messages.

        Raises:
            WeightsMismatchError: a tensor is missing, unexpected, of the wrong shape or not
                floating-point.
        """
        if not self.summary:
            return
        contradicted = "; ".join(identified.contradicted)
        said = f", whose config says {contradicted}" if contradicted else ""
        wanted = [f"{name} {shape}" for name, (shape, _) in self.misshapen.items()]
        actual = [f"{name} {shape}" for name, (_, shape) in self.misshapen.items()]
        integers = [f"{name} {dtype}" for name, dtype in self.not_floating.items()]
        missing = [identified.found.name_in_file(name) for name in self.missing]
        expected = [*wanted, *missing, *(["floating-point weights"] if integers else [])]
        raise WeightsMismatchError(
            f"the weights do not fit the {identified.component}{said}: {self.summary}",
            where=where,
            expected=_some(expected) or "nothing more than the network's own tensors",
            got=_some([*actual, *integers, *self.unexpected]) or "nothing under these names",
            hint=self._hint,
        )

    @property
    def _hint(self) -> str:
        """What to do; that the file may be incomplete is said only where a tensor is missing."""
        if self.not_floating:
            return "dequantise the weights with the software that wrote them"
        if self.missing and not self.unexpected and not self.misshapen:
            return "check that the file is whole; `sdconv inspect` lists its tensors"
        if self.missing and self.unexpected:
            return (
                "some names are of a layout that sdconv does not know, or of another network; "
                "`sdconv inspect` lists all tensors"
            )
        if self.missing:
            return (
                "check that the file is whole and of one network; `sdconv inspect` lists its "
                "tensors"
            )
        return (
            "these are the weights of another kind of network, or of more than one; "
            "`sdconv inspect` lists them"
        )


def fit(
    identified: Identified,
    shapes: Shapes,
    dtype: Callable[[str], str],
    wanted: Shapes | None = None,
) -> Fit:
    """Compares a network's tensors in a checkpoint with those that it needs.

    Args:
        identified: the network.
        shapes: of every tensor in the checkpoint.
        dtype: returns safetensors' name of a tensor's dtype.
        wanted: the shapes in the network's ``state_dict()``; None if it has not been built,
            and then only unexpected and integer tensors are found.
    """
    found = identified.found
    have = found.shapes(shapes)
    needs = have if wanted is None else wanted
    # a counter of training batches, which nothing computes with
    optional = {name for name in {*needs, *have} if name.endswith("num_batches_tracked")}
    return Fit(
        missing=tuple(name for name in needs if name not in have and name not in optional),
        unexpected=(
            *(found.names[name] for name in have if name not in needs),
            *found.unexpected,
        ),
        misshapen={
            found.names[name]: (needs[name], have[name])
            for name in needs
            if have.get(name, needs[name]) != needs[name]
        },
        not_floating={
            stored: dtype(stored)
            for name, stored in found.names.items()
            # safetensors' names of floats: F32, BF16, F8_E4M3, ...
            if name not in optional and not dtype(stored).startswith(("F", "BF"))
        },
    )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")
