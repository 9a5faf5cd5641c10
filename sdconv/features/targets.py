"""The target of a capture or an edit: a module, or a pipeline with several networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sdconv.errors import InputError, SdconvError
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

    def check_whole(self, names: Iterable[str]) -> None:
        """Refuse hook points inside an autoencoder that computes in strips or in tiles: it calls
        its layers with parts of an image, or not at all.

        Raises:
            SdconvError: streaming or tiling is on, and a name lies inside that autoencoder.
        """
        names = list(names)
        for prefix, network in self.networks.items():
            for path, module in network.named_modules():
                if (how := _in_parts(module)) is None:
                    continue
                inside = prefix + (f"{path}." if path else "")
                hidden = next((name for name in names if name.startswith(inside)), None)
                if hidden is not None:
                    words, method = how
                    raise SdconvError(
                        f"{words} is on, so this layer never sees a whole feature map",
                        where=hidden,
                        expected="an autoencoder that computes whole images",
                        got=f"{type(module).__name__} with {words}",
                        hint=f"call {method}() of {inside.rstrip('.') or 'the network'} before the "
                        "block, and switch it on again after it",
                    )


def _in_parts(module: nn.Module) -> tuple[str, str] | None:
    """What makes a module compute an image in parts, and the method that ends it."""
    if getattr(module, "streaming", None) not in (None, False):
        return "streaming", "disable_streaming"
    if getattr(module, "use_tiling", False) is True:
        return "tiling", "disable_tiling"
    return None


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
