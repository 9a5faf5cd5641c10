"""What a capture or an edit is put around: a module, or a pipeline of several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdconv.errors import InputError
from sdconv.features.places import Place, places


@dataclass(frozen=True)
class Target:
    """The networks whose maps are meant, by what their points' names begin with.

    ``networks``: ``{"": network}`` of a bare one; ``{"unet.": ..., "vae.": ...}`` of a pipeline.
    ``pipeline``: None for a bare network.
    """

    networks: Mapping[str, nn.Module]
    pipeline: Any = None

    def places(self) -> dict[str, Place]:
        """Every place in it by name."""
        found: dict[str, Place] = {}
        for prefix, network in self.networks.items():
            found |= places(network, prefix)
        return found

    def network_of(self, place: Place) -> str:
        """The prefix of the network that a place is in."""
        prefix = place.name.partition(".")[0] + "."
        return prefix if prefix in self.networks else ""


def target_of(target: Any) -> Target:
    """A module or a pipeline, looked into.

    Raises:
        InputError: neither, or of TorchScript.
    """
    if isinstance(target, torch.jit.ScriptModule):
        raise InputError(
            "TorchScript calls no hooks, by which maps are read",
            where="target",
            expected="the module that was scripted or traced",
            got=type(target).__name__,
        )
    if isinstance(target, nn.Module):
        return Target({"": _uncompiled(target)})
    components = getattr(target, "components", None)
    if not isinstance(components, Mapping):
        raise InputError(
            "this has no feature maps",
            where="target",
            expected="a torch module or a diffusers pipeline",
            got=type(target).__name__,
        )
    return Target(dict(_modules(components)), target)


def _modules(components: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield f"{name}.", _uncompiled(component)


def _uncompiled(network: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` was given, whose modules have the names that are known."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network
