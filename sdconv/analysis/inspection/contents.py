"""What weights hold, from their headers alone: networks, and whatever lies beside them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from sdconv.analysis.inspection.places import Paths, open_all
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.io.header import TensorInfo
from sdconv.checkpoint.io.source import Source
from sdconv.checkpoint.open import SourceView
from sdconv.config import Config
from sdconv.errors import UnknownNetworkError, WeightsMismatchError
from sdconv.loading import build

# what else a checkpoint holds, by how its names begin; the first that fits
_BESIDE: Sequence[tuple[str, str]] = (
    ("text encoder", r"cond_stage_model\.|conditioner\.|text_encoders?(_\d+)?\.|text_model\."),
    ("EMA copy", r"model_ema\.|(first_stage_model\.)?ema\.|ema_"),
    ("training loss", r"(first_stage_model\.|vae\.)?loss\."),
    (
        "diffusion model",
        r"model\.diffusion_model\.|unet\.|transformer\.|(joint|double|single)_blocks\.",
    ),
    (
        "noise schedule",
        r"(((sqrt|log)_)?((one_minus|recip|recipm1)_)?alphas_cumprod(_prev)?|betas|posterior_\w+"
        r"|logvar|scale_factor|global_step|lvlb_weights|denoiser\..+|model_sampling\..+)$",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much there is: tensors, numbers in them, bytes, and tensors of each dtype (safetensors'
    names)."""

    tensors: int
    numbers: int
    nbytes: int
    dtypes: Mapping[str, int]

    @classmethod
    def of(cls, infos: Sequence[TensorInfo]) -> Amount:
        """That of these tensors together."""
        return cls(
            tensors=len(infos),
            numbers=sum(prod(info.shape) for info in infos),
            nbytes=sum(info.nbytes for info in infos),
            dtypes=dict(Counter(info.dtype for info in infos).most_common()),
        )


@dataclass(frozen=True, kw_only=True)
class NetworkFound:
    """A network that sdconv knows.

    ``prefix``: what stands before its names in the file. ``open_to``: the families among which
    nothing decided. ``parameters``: numbers that are learned (statistics are not).
    ``missing``, ``unexpected``, ``misshapen``, ``not_floating``: names of tensors that keep it from
    being loaded (of a U-Net only the second and the last are known before it is built).
    ``contradicted``: what a config that is written beside it says otherwise than its shapes.
    ``guess``: what was taken where nothing decided, in words.
    """

    component: str
    class_name: str
    family: str
    evidence: str
    open_to: tuple[str, ...]
    layout: str
    prefix: str
    config: Config
    amount: Amount
    parameters: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]
    not_floating: tuple[str, ...]
    contradicted: tuple[str, ...]
    guess: str | None

    @property
    def whole(self) -> bool:
        """Whether every tensor is there in its shape, of floating-point numbers, and none too
        many."""
        return not (self.missing or self.unexpected or self.misshapen or self.not_floating)


@dataclass(frozen=True, kw_only=True)
class Unused:
    """Tensors of no network that sdconv knows, by how their names begin."""

    what: str
    prefix: str
    amount: Amount


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file, several files of one network, or one folder of a pipeline.

    ``problem``: why no network was found in it, in sdconv's words; None where one was.
    """

    name: str
    files: tuple[str, ...]
    amount: Amount
    metadata: Mapping[str, str]
    networks: tuple[NetworkFound, ...]
    unused: tuple[Unused, ...]
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found under ``path``; a pipeline's folder has one part for each component."""

    path: str
    parts: tuple[Part, ...]

    @property
    def networks(self) -> tuple[NetworkFound, ...]:
        """Of all parts."""
        return tuple(network for part in self.parts for network in part.networks)

    @property
    def complaint(self) -> str | None:
        """Why something here cannot be loaded; None where all networks are whole, and there is
        one."""
        if not self.networks:
            return next(part.problem for part in self.parts if part.problem)
        broken = [one for one in self.networks if not one.whole]
        return "; ".join(map(_lacks, broken)) or None

    def network(self, component: str | None) -> NetworkFound:
        """The network of that component, or the only one there is.

        Raises:
            UnknownNetworkError: there is none, or none was named and there are several.
        """
        known = {one.component: one for one in self.networks}
        wanted = next(iter(known)) if component is None and len(known) == 1 else component
        if wanted in known:
            return known[wanted]
        if not known:
            raise UnknownNetworkError(self.complaint or "no network that sdconv knows")
        raise UnknownNetworkError(
            "one component must be chosen" if component is None else "there is no such component",
            where=self.path,
            expected="one of " + ", ".join(known),
            got=component,
            hint=f"pass --component {next(iter(known))}",
        )

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv inspect --json`` prints."""
        return {
            "path": self.path,
            "parts": [_plain(part) for part in self.parts],
            "complaint": self.complaint,
        }


def inspect(paths: Paths, *, family: str | None = None) -> Inspection:
    """What weights hold, from their headers alone.

    Args:
        paths: a file, a component's folder, a whole pipeline's folder, or several files of one
            network.
        family: the family, where the caller knows it.

    Raises:
        CheckpointError: something cannot be read as weights.
        InputError: ``paths`` is no path, or there is no such family.
    """
    with ExitStack() as stack:
        sources = open_all(paths, stack)
        return Inspection(
            path=str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths)),
            parts=tuple(_part(name, one, family) for name, one in sources),
        )


def _part(name: str, source: Source, family: str | None) -> Part:
    problem: str | None = None
    identified: list[Identified] = []
    entries = {info.name: info for file in source.files for info in file.entries.values()}
    try:
        view = SourceView(source)
        identified = view.identify(family)
        entries = {name: _entry(view, name) for name in view.shapes}
    except (UnknownNetworkError, WeightsMismatchError) as error:
        problem = str(error)
    places = {place for one in identified for place in one.found.names.values()}
    places |= {place for one in identified for place in one.found.unexpected}
    rest = [info for place, info in entries.items() if place not in places]
    return Part(
        name=name,
        files=tuple(file.label for file in source.files),
        amount=Amount.of([info for file in source.files for info in file.entries.values()]),
        metadata=source.metadata,
        networks=tuple(_network(one, view, entries) for one in identified),
        unused=_unused(rest),
        problem=problem,
    )


def _entry(view: SourceView, name: str) -> TensorInfo:
    file, own = view.home(name)
    return file.entries[own]


def _network(one: Identified, view: SourceView, entries: Mapping[str, TensorInfo]) -> NetworkFound:
    found = one.found
    wanted, learned = None, set(found.names)
    # a U-Net takes its transformers from diffusers: too slow to import for a look at a header
    if one.component == "vae":
        with torch.device("meta"):
            network = build(one.config)
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        learned = {name for name, _ in network.named_parameters()}
    fits = fit(one, view.shapes, view.dtype, wanted)
    return NetworkFound(
        component=one.component,
        class_name=found.kind,
        family=one.family,
        evidence=one.evidence,
        open_to=one.open_to,
        layout=found.layout,
        prefix=found.prefix,
        config=one.config,
        amount=Amount.of([entries[place] for place in found.names.values()]),
        parameters=sum(
            prod(entries[place].shape) for name, place in found.names.items() if name in learned
        ),
        missing=fits.missing,
        unexpected=fits.unexpected,
        misshapen=tuple(fits.misshapen),
        not_floating=tuple(fits.not_floating),
        contradicted=one.contradicted,
        guess=one.guess,
    )


def _unused(infos: Sequence[TensorInfo]) -> tuple[Unused, ...]:
    groups: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
    for info in infos:
        groups[_group(info.name)].append(info)
    return tuple(
        Unused(what=what, prefix=prefix, amount=Amount.of(group))
        for (what, prefix), group in sorted(groups.items())
    )


def _group(name: str) -> tuple[str, str]:
    """What a tensor belongs to, and the prefix that says so."""
    for what, pattern in _BESIDE:
        if match := re.match(pattern, name):
            return what, match[0] if match[0].endswith(".") else ""
    # up to the first number: where a stack of layers begins
    return "unknown", re.split(r"\d", name, maxsplit=1)[0].rpartition(".")[0]


def _lacks(one: NetworkFound) -> str:
    parts = (
        ("missing", one.missing),
        ("unexpected", one.unexpected),
        ("of the wrong shape", one.misshapen),
        ("not floating-point", one.not_floating),
    )
    counts = ", ".join(f"{len(names)} {what}" for what, names in parts if names)
    config = "".join(f"; its config says {told}" for told in one.contradicted)
    return f"the {one.component} cannot be loaded: tensors {counts}{config}"


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON has them."""
    if isinstance(value, Config):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
