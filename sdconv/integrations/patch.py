"""sdconv's blocks in a running diffusers pipeline, and out of it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sdconv.backends import check_backend, set_backend
from sdconv.errors import InputError


@dataclass(frozen=True)
class PatchSummary:
    """What ``apply_patch`` did; ``print`` shows it.

    ``replaced``: by the name of the class, the names of the blocks. ``left``: for each block that
    keeps diffusers' code, its class and why. ``already``: how many had been replaced before.
    """

    replaced: Mapping[str, tuple[str, ...]]
    left: Mapping[str, str]
    already: int

    def __str__(self) -> str:
        total = sum(map(len, self.replaced.values()))
        before = f" ({self.already} were before)" if self.already else ""
        lines = [f"replaced {total} blocks{before}"]
        lines += [
            f"  {len(names):4} {kind:24} {_first(names)}" for kind, names in self.replaced.items()
        ]
        if self.left:
            lines.append(f"left {len(self.left)} as they are")
            lines += [
                f"  {len(names):4} {why}: {_first(names)}"
                for why, names in _inverted(self.left).items()
            ]
        return "\n".join(lines)


def apply_patch(target: Any, backend: str = "reference") -> PatchSummary:
    """Lets diffusers' convolutional blocks compute with sdconv's code.

    ``ResnetBlock2D``, ``Downsample2D``, ``Upsample2D``, the VAE's attention, encoder and decoder
    become sdconv's in place: the objects, their parameters, names, order, hooks and LoRA layers are
    the same ones as before. What sdconv's blocks do not cover is left alone and listed. What was
    replaced before stays so.

    Args:
        target: a diffusers pipeline, of which every component is looked through, or any module.
        backend: what the replaced blocks compute with, those replaced before too. With
            ``"reference"`` results stay the same; see ``sdconv.backend``.

    Returns:
        What was replaced, and what was not.

    Raises:
        InputError: neither a pipeline nor a module; unknown backend.
    """
    from sdconv.integrations import patched

    check_backend(backend)
    replaced: defaultdict[str, list[str]] = defaultdict(list)
    left: dict[str, str] = {}
    blocks = [*_blocks(target, "apply_patch")]
    already = sum(patched.is_patched(block) for _, block in blocks)
    for name, block in blocks:
        plan = patched.plan(block)
        if isinstance(plan, str):
            left[name] = f"{type(block).__name__}: {plan}"
        elif plan is not None:
            patched.put(block, plan)
            replaced[plan.__name__].append(name)
        if patched.is_patched(block):
            set_backend(block, backend)
    return PatchSummary({kind: tuple(names) for kind, names in replaced.items()}, left, already)


def remove_patch(target: Any) -> tuple[str, ...]:
    """Gives the blocks that ``apply_patch`` replaced diffusers' code back.

    They are the very objects that they were before, with all that came onto them meanwhile, such as
    a LoRA. Where nothing is patched, nothing happens.

    Args:
        target: a diffusers pipeline or any module; a part of what was patched will do.

    Returns:
        The names of the blocks.

    Raises:
        InputError: neither a pipeline nor a module.
    """
    from sdconv.integrations import patched

    names = []
    for name, block in _blocks(target, "remove_patch"):
        if patched.is_patched(block):
            patched.put_back(block)
            set_backend(block, "reference")
            names.append(name)
    return tuple(names)


def _blocks(target: Any, where: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module in a pipeline's components or in a module, once, with its name."""
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
            "this has no blocks to look through",
            where=where,
            expected="a diffusers pipeline or a torch module",
            got=type(target).__name__,
        )


def _inverted(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    names = defaultdict(list)
    for name, value in mapping.items():
        names[value].append(name)
    return names


def _first(names: tuple[str, ...] | list[str]) -> str:
    named = [name or "the module itself" for name in names]
    return named[0] if len(named) == 1 else f"{named[0]} ... {named[-1]}"
