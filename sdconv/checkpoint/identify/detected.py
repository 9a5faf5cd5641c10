"""A network that was found in a checkpoint: where its tensors are, under which names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

Shapes = Mapping[str, tuple[int, ...]]

_EMBEDDINGS = ("add_embedding.linear_", "class_embedding.linear_")
_ATTENTION_LINEAR = re.compile(r".+\.attentions\.[0-9]{1,4}\.to_(q|k|v|out\.0)\.weight")


@dataclass(frozen=True, kw_only=True)
class DetectedNetwork:
    """One network in a checkpoint.

    ``component``: ``"vae"`` or ``"unet"``. ``kind``: the name of the network's class. ``layout``:
    ``"diffusers"`` or ``"original"``. ``prefix``: of each of its names in the file. ``names``:
    diffusers' name -> the name in the file. ``dropped``: names under the prefix that are
    deliberately not loaded (losses, EMA copies). ``unexpected``: other names under the prefix that
    the network does not have. ``ema``: diffusers' name -> the name of its running average, if the
    file has one. ``averages``: the same for every tensor, whether the file has it or not, if the
    names are known. ``in_layout``: diffusers' name -> the layout's, without the prefix; None if the
    network has no such tensor.
    """

    component: str
    kind: str
    layout: str
    prefix: str
    names: Mapping[str, str]
    dropped: tuple[str, ...]
    unexpected: tuple[str, ...]
    ema: Mapping[str, str] = field(default_factory=dict)
    averages: Mapping[str, str] = field(default_factory=dict)
    in_layout: Callable[[str], str | None] = field(compare=False, repr=False)

    def shapes(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """The shapes of the network's tensors by diffusers' names; attention weights that a file
        stores as 1x1 convolutions have their linear shape."""
        return {k: linear_shape(k, tuple(shapes[name])) for k, name in self.names.items()}

    def with_label(self, is_added: bool) -> DetectedNetwork:
        """The same U-Net with the right name for the layers of its added embedding.

        The original layout has one name for two kinds of embedding.

        Args:
            is_added: True for SDXL's text and sizes, False for unCLIP's image.
        """
        ours, other = _EMBEDDINGS if is_added else _EMBEDDINGS[::-1]
        if self.layout == "diffusers" or any(name.startswith(ours) for name in self.names):
            return self
        names, ema = (
            {name.replace(other, ours, 1): stored for name, stored in table.items()}
            for table in (self.names, self.ema)
        )
        return replace(self, names=names, ema=ema)

    def name_in_file(self, canonical: str) -> str:
        """A tensor's name in this file, or the one that it would have, for messages; followed
        by diffusers' name if that is different."""
        name = self.prefix + (self.in_layout(canonical) or canonical)
        return name if name.endswith(canonical) else f"{name} ({canonical})"


def linear_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """``(out, in)`` for a VAE's attention projection that is stored as a 1x1 convolution, of images
    or of sequences; any other shape unchanged."""
    if len(shape) in (3, 4) and set(shape[2:]) == {1} and is_vae_projection(canonical):
        return shape[:2]
    return shape


def is_vae_projection(canonical: str) -> bool:
    """Whether the tensor is the weight of one of the four projections in a VAE's attention."""
    return canonical.startswith(("encoder.", "decoder.")) and bool(
        _ATTENTION_LINEAR.fullmatch(canonical)
    )
