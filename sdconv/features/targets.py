"""The target of a capture or an edit: a module, or a pipeline with several networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdconv.errors import InputError
from sdconv.features.calls import CallCounter
from sdconv.features.hook_points import HookPoint, hook_points


@dataclass(frozen=True)
class Target:
    """The networks of a target, by the prefix of their hook points' names.

    Attributes:
        networks: ``{"": network}`` for a bare network, ``{"unet.": ..., "vae.": ...}`` for a
            pipeline.
        pipeline: None for a bare network.
    """

    networks: Mapping[str, nn.Module]
    pipeline: Any = None

    def hook_points(self) -> dict[str, HookPoint]:
        """The hook points of all networks by name."""
        found: dict[str, HookPoint] = {}
        for prefix, network in self.networks.items():
            found |= hook_points(network, prefix)
        return found

    def counters(self) -> dict[str, CallCounter]:
        """A new call counter for each network, by prefix."""
        return {
            prefix: CallCounter(network, self.pipeline, denoiser=prefix == "unet.")
            for prefix, network in self.networks.items()
        }

    def prefix_of(self, point: HookPoint) -> str:
        """The prefix of the network that a hook point belongs to."""
        prefix = point.name.partition(".")[0] + "."
        return prefix if prefix in self.networks else ""


def target_of(target: Any) -> Target:
    """The networks of a module or a pipeline.

    Raises:
        InputError: it is neither, or a TorchScript module.
    """
    if isinstance(target, torch.jit.ScriptModule):
        raise InputError(
            "TorchScript modules call no hooks, through which feature maps are read",
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


def unet_of(target: Any) -> tuple[str, nn.Module]:
    """The prefix of the U-Net's hook points and the U-Net: ``target`` itself, or a pipeline's.

    Raises:
        InputError: there is no U-Net.
    """
    found = target_of(target)
    prefix = "" if found.pipeline is None else "unet."
    network = found.networks.get(prefix)
    levels = [getattr(network, f"{path}_blocks", None) for path in ("down", "up")]
    if network is None or not all(isinstance(level, nn.ModuleList) for level in levels):
        raise InputError(
            "this recipe needs a U-Net",
            where="target",
            expected="a U-Net, or a pipeline that has one",
            got=type(target).__name__,
        )
    return prefix, network


def _modules(components: Mapping[str, Any]) -> Iterator[tuple[str, nn.Module]]:
    for name, component in components.items():
        if isinstance(component, nn.Module):
            yield f"{name}.", _uncompiled(component)


def _uncompiled(network: nn.Module) -> nn.Module:
    """The network inside the wrapper of ``torch.compile``: its modules have the usual names."""
    inner = getattr(network, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else network
