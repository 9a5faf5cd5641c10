"""Names tensors for a single file of one layout, there and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch

from sdconv.checkpoint.identify.detected import DetectedNetwork
from sdconv.checkpoint.io.files import short
from sdconv.checkpoint.open import SourceView
from sdconv.checkpoint.save import original_tensors
from sdconv.checkpoint.whole import Renamed
from sdconv.config import Config
from sdconv.errors import CheckpointError

ORIGIN_KEY = "sdconv.original"
"""The metadata key for how the original of a file in diffusers' layout differed from the usual."""

PREFIXES: Mapping[str, Mapping[str, str]] = {
    "original": {"unet": "model.diffusion_model.", "vae": "first_stage_model."},
    "diffusers": {"unet": "unet.", "vae": "vae."},
}
"""The prefix of a component's names in a file of several components."""


@dataclass(kw_only=True)
class FileNames:
    """Names tensors for a single file of one layout.

    ``layout``: the file's. ``configs``: the networks', by component. ``component``: the only one in
    the file, or None for all. ``is_pipeline``: whether the tensors come from a pipeline's folder.
    ``is_alone``: whether one network is all that is written. ``origins``: by component, how the
    original's names and shapes differed from the usual ones.
    """

    layout: str
    configs: Mapping[str, Config]
    component: str | None
    is_pipeline: bool
    is_alone: bool
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, found: DetectedNetwork, view: SourceView) -> Renamed:
        """The new names and shapes, as ``whole.Renaming`` asks for them."""
        prefix = self._prefix(found)
        original = self.layout == "original"
        if found.layout == "diffusers" and not original:
            shapes = found.shapes(view.shapes)
            return {name: (prefix + name, shape) for name, shape in shapes.items()}
        usual = self._original(found, view)
        if found.layout == "original" and original:
            kept = found.prefix if self.component is None else ""
            result = {
                name: (kept + place.removeprefix(found.prefix), view.shapes[place])
                for name, place in found.names.items()
            }
            # an attention whose layers have diffusers' names or shapes, in the original's
            return result | {
                name: (kept + usual[name][0], usual[name][1])
                for name in result
                if found.component == "vae" and ".attentions." in name
            }
        if original:
            return _remembered(found.component, view, usual, prefix)
        if found.layout == "original":
            self._remember(found, view, usual)
        return {name: (prefix + name, shape) for name, shape in found.shapes(view.shapes).items()}

    def _prefix(self, found: DetectedNetwork) -> str:
        if self.component is not None or (
            not self.is_pipeline
            and (not found.prefix or (self.is_alone and self.layout == "diffusers"))
        ):
            return ""
        return PREFIXES[self.layout][found.component]

    def _original(self, found: DetectedNetwork, view: SourceView) -> Renamed:
        """diffusers' name -> name and shape in the usual original layout, without prefix."""
        shapes = found.shapes(view.shapes)
        on_meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        made = original_tensors(on_meta, self.configs[found.component])
        pairs = zip(on_meta, made.items(), strict=True)
        return {name: (original, tuple(one.shape)) for name, (original, one) in pairs}

    def _remember(self, found: DetectedNetwork, view: SourceView, usual: Renamed) -> None:
        own = {k: (v.removeprefix(found.prefix), view.shapes[v]) for k, v in found.names.items()}
        self.origins[found.component] = {
            "prefix": found.prefix if self.component is None else "",
            "unusual": {k: [v[0], list(v[1])] for k, v in own.items() if v != usual[k]},
        }


def _size(shape: tuple[int, ...]) -> int:
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError("no shape")
    return prod(shape)


def _remembered(component: str, view: SourceView, usual: Renamed, prefix: str) -> Renamed:
    """Names and shapes in the original layout: the usual ones, or those that the file once had."""
    text = view.source.metadata.get(ORIGIN_KEY, "{}")
    try:
        origin = json.loads(text).get(component, {"prefix": prefix, "unusual": {}})
        unusual = {k: (str(name), tuple(shape)) for k, (name, shape) in origin["unusual"].items()}
        names = {k: unusual.get(k, v) for k, v in usual.items()}
        if any(_size(names[k][1]) != _size(usual[k][1]) for k in usual):
            raise ValueError("a shape of another size")
        return {k: (origin["prefix"] + name, shape) for k, (name, shape) in names.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"its metadata {ORIGIN_KEY} does not fit its tensors",
            where=view.source.label,
            got=short(text),
            hint="remove it from the file's metadata",
        ) from error
