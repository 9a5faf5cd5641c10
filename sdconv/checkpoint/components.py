"""The components that a checkpoint's tensors belong to: networks, text encoders, and the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from sdconv.checkpoint.identify.detected import is_vae_projection, linear_shape
from sdconv.checkpoint.identify.find import main_network
from sdconv.checkpoint.identify.quantised import Weighed
from sdconv.checkpoint.keys.clip import clip_names
from sdconv.checkpoint.keys.prefixes import SortedNames, prefixes
from sdconv.checkpoint.whole import Checkpoint, Part
from sdconv.errors import UnknownNetworkError

# tensors that only a text encoder has, in transformers' layout and in OpenCLIP's
_ANCHORS = ("embeddings.token_embedding.weight", "token_embedding.weight")
_TEXT_PARTS = ("", "text_encoder", "text_encoder_2")
# SDXL's second encoder, as files call it, which is the refiner's only one
_SECOND = re.compile(r"(?:.*\.)?(?:text_encoder_2|te2|clip_g|embedders\.1)\..*")
_REFINERS = "conditioner.embedders.0.model."


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a file has a tensor: the ``name`` of the one that holds it, the ``third`` of its rows
    (0, 1 or 2, where three are one in the file; else None), and whether it is ``transposed``
    there."""

    name: str
    third: int | None = None
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Component:
    """A network or a CLIP text encoder in a checkpoint.

    ``name``: ``"unet"``, ``"vae"``, ``"text_encoder"`` or ``"text_encoder_2"``. ``tensors``:
    diffusers' or transformers' name (with ``text_model.``) -> where the file has it. ``prefix``: of
    a text encoder's names in the file.
    """

    name: str
    part: Part
    tensors: Mapping[str, Stored]
    prefix: str = ""

    @property
    def is_network(self) -> bool:
        """Whether it is a network of sdconv's, and not a text encoder."""
        return self.name in ("unet", "vae")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors' shapes in diffusers' or transformers' layout."""
        return {name: self._shape(name, stored) for name, stored in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor in diffusers' or transformers' layout, in the file's dtype."""
        stored = self.tensors[name]
        return self.slice(name, self.part.view.tensor(stored.name))

    def slice(self, name: str, stored: Tensor) -> Tensor:
        """A view of a stored tensor: the part of it that has this name, in this layout."""
        where = self.tensors[name]
        if where.third is not None:
            stored = stored.chunk(3)[where.third]
        if where.transposed:
            stored = stored.T
        is_point = stored.ndim > 2 and self.name == "vae" and is_vae_projection(name)
        return stored.flatten(1) if is_point else stored

    def _shape(self, name: str, stored: Stored) -> tuple[int, ...]:
        shape = self.part.view.shapes[stored.name]
        if stored.third is not None:
            return (shape[0] // 3, *shape[1:])
        if self.name == "vae":
            return linear_shape(name, shape)
        return shape[::-1] if stored.transposed else shape


def components_in(checkpoint: Checkpoint) -> list[Component]:
    """The networks and the text encoders of a checkpoint; scaled fp8 weights are multiplied.

    Raises:
        UnknownNetworkError: there is none, or there are several networks of one kind.
        WeightsMismatchError: one of them is quantised in a way that is not undone.
    """
    found = list(checkpoint.networks())
    result = []
    for kind in ("unet", "vae"):
        several = [(part, one) for part, one in found if one.component == kind]
        if not several:
            continue
        chosen = several[0][1] if len(several) == 1 else main_network([one for _, one in several])
        if chosen is None:
            raise UnknownNetworkError(
                f"several networks that could be the {kind}",
                where=checkpoint.label,
                expected="one",
                got=", ".join(one.prefix or "no prefix" for _, one in several),
                hint="`sdconv convert --component --prefix` takes one of them out",
            )
        part = next(part for part, one in several if one is chosen)
        part.view.check_quantised(Weighed.of(chosen))
        network = part.view.dequantise(chosen)
        tensors = {name: Stored(name=stored) for name, stored in network.names.items()}
        result.append(Component(name=kind, part=part, tensors=tensors))
    for encoder in text_encoders(checkpoint):
        these = _weighed(encoder)
        encoder.part.view.check_quantised(these)
        encoder.part.view.multiply(these)
        result.append(encoder)
    if not result:
        raise UnknownNetworkError(
            "no network that sdconv knows, and no CLIP text encoder",
            where=checkpoint.label,
            expected="a U-Net, a VAE or a CLIP text encoder",
            hint="check that this is the right file; `sdconv inspect` lists a file's tensors",
        )
    return result


def text_encoders(checkpoint: Checkpoint) -> Iterator[Component]:
    """The CLIP text encoders of a checkpoint, in transformers' or OpenCLIP's layout."""
    for part in checkpoint.parts:
        if part.name not in _TEXT_PARTS:
            continue
        names = SortedNames(part.view.shapes)
        roots = {
            # `text_model.embeddings.` is in the encoder that begins before it
            re.sub(r"(?:text_model\.)?(?:embeddings\.)?\Z", "", prefix)
            for prefix in prefixes(part.view.shapes, *_ANCHORS)
        }
        for root in sorted(roots):
            tensors = {
                own: Stored(name=root + name, third=third, transposed=transposed)
                for own, (name, third, transposed) in clip_names(names.under(root)).items()
            }
            is_second = root == _REFINERS or _SECOND.fullmatch(root) is not None
            name = part.name or ("text_encoder_2" if is_second else "text_encoder")
            yield Component(name=name, part=part, tensors=tensors, prefix=root)


def _weighed(encoder: Component) -> Weighed:
    """A text encoder's weights, and what lies next to them."""
    weights = frozenset(stored.name for stored in encoder.tensors.values())
    under = (name for name in encoder.part.view.shapes if name.startswith(encoder.prefix))
    others = tuple(name for name in under if name not in weights)
    return Weighed(what=encoder.name, prefix=encoder.prefix, weights=weights, others=others)


def dequantise_rest(checkpoint: Checkpoint) -> None:
    """Multiplies scaled fp8 weights outside of the networks: text encoders', and those of networks
    that sdconv does not know.

    Raises:
        WeightsMismatchError: scales do not fit, or weights are quantised in a way that is not
            undone.
    """
    own = {id(part): set(found.names.values()) for part, found in checkpoint.networks()}
    for part in checkpoint.parts:
        groups: dict[str, list[str]] = {}
        for name in part.view.shapes:
            if name not in own.get(id(part), ()) and name not in part.view.companions:
                groups.setdefault(name.partition(".")[0] if "." in name else "", []).append(name)
        for first, names in groups.items():
            weights = frozenset(name for name in names if name.endswith(".weight"))
            others = tuple(name for name in names if name not in weights)
            these = Weighed(what=part.name or first, prefix="", weights=weights, others=others)
            part.view.check_quantised(these)
            part.view.multiply(these)


def components_of(checkpoint: Checkpoint) -> dict[tuple[str, str], str]:
    """The component of every tensor, by the part's and the tensor's name.

    ``unet`` and ``vae`` with their running averages, ``text_encoder`` and ``text_encoder_2``; any
    other tensor belongs to its part of the pipeline, or to the first word of its name.
    """
    result: dict[tuple[str, str], str] = {}
    for encoder in text_encoders(checkpoint):
        for stored in encoder.tensors.values():
            result[encoder.part.name, stored.name] = encoder.name
    for part, found in checkpoint.networks():
        for name in (*found.names.values(), *found.ema.values(), *found.dropped):
            result[part.name, name] = found.component
    for part in checkpoint.parts:
        for name in part.view.shapes:
            first = name.partition(".")[0] if "." in name else "other"
            result.setdefault((part.name, name), part.name or first)
    return result
