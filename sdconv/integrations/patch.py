"""Patching a diffusers pipeline with sdconv's blocks, and removing the patch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdconv.backends import check_backend, own_backend, set_backend
from sdconv.errors import InputError


@dataclass(frozen=True)
class PatchSummary:
    """What ``apply_patch`` did; ``print`` shows it.

    ``replaced``: the names of the replaced blocks, by the name of their new class. ``left``: for
    each block that keeps diffusers' code, its class and the reason. ``already``: how many blocks
    had been replaced before. ``switched``: the names of those among them that had another backend.
    ``backend``: the one that all replaced blocks have now.
    """

    replaced: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]
    already: int
    switched: tuple[str, ...] = ()
    backend: str = "reference"

    def __str__(self) -> str:
        total = sum(map(len, self.replaced.values()))
        before = f" ({self.already} had been replaced before)" if self.already else ""
        lines = [f"replaced {total} blocks{before}"]
        if self.switched:
            lines.append(f"switched {len(self.switched)} of those to the {self.backend} backend")
        lines += [
            f"  {len(names):4} {kind:24} {_range(names)}" for kind, names in self.replaced.items()
        ]
        if self.left:
            lines.append(f"left {len(self.left)} blocks unchanged")
            lines += [
                f"  {len(names):4} {reason}: {_range(names)}"
                for reason, names in _inverted(self.left).items()
            ]
        return "\n".join(lines)


def apply_patch(target: Any, backend: str = "reference") -> PatchSummary:
    """Makes the convolutional blocks of a diffusers pipeline compute with sdconv's code.

    ``ResnetBlock2D``, ``Downsample2D``, ``Upsample2D``, the VAE's attention, encoder and decoder
    are replaced in place: the objects, their parameters, names, order, hooks and LoRA layers stay
    the same. Blocks that sdconv does not support keep diffusers' code and are listed with the
    reason. Blocks that are already replaced stay replaced.

    Args:
        target: a diffusers pipeline, whose components are all searched, or any module.
        backend: the backend of the replaced blocks, including those replaced before. With
            ``"reference"`` results stay the same bit for bit; see ``sdconv.backend``.

    Returns:
        What was replaced, what was not, and which blocks changed their backend.

    Raises:
        InputError: ``target`` is neither a pipeline nor a module, or the backend is unknown.
    """
    from sdconv.integrations.replacements import is_patched, replacement_for, set_class

    check_backend(backend)
    replaced: defaultdict[str, list[str]] = defaultdict(list)
    left: dict[str, str] = {}
    blocks = [*_named_modules(target, "apply_patch")]
    before = {name: own_backend(block) for name, block in blocks if is_patched(block)}
    for name, block in blocks:
        kind = replacement_for(block)
        if isinstance(kind, str):
            left[name] = f"{type(block).__name__}: {kind}"
        elif kind is not None:
            set_class(block, kind)
            replaced[kind.__name__].append(name)
        if is_patched(block):
            set_backend(block, backend)
    return PatchSummary(
        replaced={kind: tuple(names) for kind, names in replaced.items()},
        left=left,
        already=len(before),
        switched=tuple(name for name, own in before.items() if own != backend),
        backend=backend,
    )


def remove_patch(target: Any) -> tuple[str, ...]:
    """Makes the blocks that ``apply_patch`` replaced compute with diffusers' code again.

    The blocks are the same objects as before the patch, with everything added to them since, such
    as a LoRA. Without a patch, nothing happens.

    Args:
        target: a diffusers pipeline or any module, also a part of what was patched.

    Returns:
        The names of the blocks.

    Raises:
        InputError: ``target`` is neither a pipeline nor a module.
    """
    from sdconv.integrations.replacements import is_patched, restore_class

    names = []
    for name, block in _named_modules(target, "remove_patch"):
        if is_patched(block):
            restore_class(block)
            set_backend(block, "reference")
            names.append(name)
    return tuple(names)


def _named_modules(target: Any, where: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a pipeline's components or of a module, once, with its name."""
    components = getattr(target, "components", None)
    if isinstance(target, nn.Module):
        yield from target.named_modules()
    elif isinstance(components, Mapping):
        seen: set[nn.Module] = set()
        for name, component in components.items():
            if isinstance(component, nn.Module):
                yield from component.named_modules(memo=seen, prefix=name)
    else:
        raise InputError(
            "not a pipeline or a module",
            where=where,
            expected="a diffusers pipeline or a torch module",
            got=type(target).__name__,
        )


def _inverted(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    keys = defaultdict(list)
    for key, value in mapping.items():
        keys[value].append(key)
    return keys


def _range(names: Sequence[str]) -> str:
    """The first and the last of some names."""
    shown = [name or "the module itself" for name in names]
    return shown[0] if len(shown) == 1 else f"{shown[0]} ... {shown[-1]}"
