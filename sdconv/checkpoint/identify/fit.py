"""Whether a checkpoint holds a network's tensors: all of them, in their shapes, and no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdconv.checkpoint.identify.find import Shapes
from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.identify.shapes import Shape
from sdconv.errors import WeightsMismatchError


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What keeps a network from being loaded.

    ``missing``: diffusers' names. By the names in the file, ``unexpected``; ``misshapen``: the
    shapes that are needed and there; ``not_floating``: dtypes of weights that nothing computes with
    before what wrote them turns them back.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[Shape, Shape]]
    not_floating: Mapping[str, str]

    @property
    def words(self) -> str:
        """How many of each, such as ``1 missing; 2 of the wrong shape``; empty where it fits."""
        parts = (
            (self.missing, "missing"),
            (self.unexpected, "unexpected"),
            (self.misshapen, "of the wrong shape"),
            (self.not_floating, "of no floating-point numbers"),
        )
        return "; ".join(f"{len(names)} {what}" for names, what in parts if names)

    def check(self, chosen: Identified, where: object) -> None:
        """Refuses what does not fit.

        Args:
            chosen: the network. where: the checkpoint's name, for messages.

        Raises:
            WeightsMismatchError: a tensor is missing, unexpected, of the wrong shape or of no
                floating-point numbers.
        """
        if not self.words:
            return
        said = f", whose config says {'; '.join(chosen.contradicted)}" * bool(chosen.contradicted)
        wanted = [f"{name} {shape}" for name, (shape, _) in self.misshapen.items()]
        came = [f"{name} {shape}" for name, (_, shape) in self.misshapen.items()]
        integers = [f"{name} {dtype}" for name, dtype in self.not_floating.items()]
        missing = [chosen.found.place(name) for name in self.missing]
        expected = [*wanted, *missing, *(["floating-point weights"] if integers else [])]
        raise WeightsMismatchError(
            f"the weights do not fit the {chosen.component}{said}: {self.words}",
            where=where,
            expected=_some(expected) or "nothing more than the network's own tensors",
            got=_some([*came, *integers, *self.unexpected]) or "nothing under these names",
            hint="quantised and integer weights have to be turned back by what wrote them"
            if integers
            else "check that the file is whole and of one network; `sdconv inspect` lists what it "
            "holds",
        )


def fit(
    chosen: Identified, shapes: Shapes, dtype: Callable[[str], str], wanted: Shapes | None = None
) -> Fit:
    """Compares a network's tensors in a checkpoint with those that it needs.

    Args:
        chosen: the network.
        shapes: of every tensor of the checkpoint. dtype: gives a tensor's, in safetensors' words.
        wanted: shapes of its ``state_dict()``; None where it was not built, and only what is
            unexpected or of no floating-point numbers is to be known.
    """
    found = chosen.found
    have = found.shapes(shapes)
    needs = have if wanted is None else wanted
    # counts training batches: nothing computes with it
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
            place: dtype(place)
            for name, place in found.names.items()
            # safetensors' names of floats: F32, BF16, F8_E4M3, ...
            if name not in optional and not dtype(place).startswith(("F", "BF"))
        },
    )


def _some(names: Sequence[str]) -> str:
    rest = len(names) - 5
    return ", ".join(names[:5]) + (f" and {rest} more" if rest > 0 else "")
