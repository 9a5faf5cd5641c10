"""What weights contain, from their headers alone: networks, and all other tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from math import prod
from pathlib import Path
from typing import Any

from sdconv.analysis.inspection.notes import notes_on
from sdconv.checkpoint.identify.fit import fit
from sdconv.checkpoint.identify.infer import Identified
from sdconv.checkpoint.io.folder import folder_at
from sdconv.checkpoint.io.header import TensorInfo
from sdconv.checkpoint.io.source import Source, open_files, open_folder
from sdconv.checkpoint.open import SourceView, network_folders
from sdconv.config import Config
from sdconv.devices import on_meta
from sdconv.errors import UnknownNetworkError, WeightsMismatchError
from sdconv.loading import build

Paths = str | Path | Sequence[str | Path]
"""A file, a component's folder, a whole pipeline's folder, or several files of one network."""

# what else a checkpoint holds, by the beginnings of names; the first match counts
_OTHER_TENSORS: Sequence[tuple[str, str]] = (
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
    """The size of a group of tensors.

    ``tensors``: their number. ``numbers``: of values in them. ``nbytes``: in the file. ``dtypes``:
    safetensors' name of a dtype -> the number of tensors in it.
    """

    tensors: int
    numbers: int
    nbytes: int
    dtypes: Mapping[str, int]

    @classmethod
    def of(cls, infos: Sequence[TensorInfo]) -> Amount:
        """The amount of these tensors together."""
        return cls(
            tensors=len(infos),
            numbers=sum(prod(info.shape) for info in infos),
            nbytes=sum(info.nbytes for info in infos),
            dtypes=dict(Counter(info.dtype for info in infos).most_common()),
        )


@dataclass(frozen=True, kw_only=True)
class InspectedNetwork:
    """A network that sdconv knows.

    ``prefix``: of its tensors' names in the file. ``evidence``: what decided the family.
    ``open_to``: the families that remain possible if nothing did, and ``guess`` the choice made
    among them, in words. ``parameters``: the number of learned values, without statistics.
    ``missing``, ``unexpected``, ``misshapen``, ``not_floating``: names of tensors that keep it from
    being loaded (a U-Net's are known before it is built only for the second and the last).
    ``contradicted``: where its ``config.json`` contradicts its shapes.
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
        """Whether it can be loaded: every tensor is there in its shape and in floating point, and
        none is unexpected."""
        return not (self.missing or self.unexpected or self.misshapen or self.not_floating)


@dataclass(frozen=True, kw_only=True)
class OtherTensors:
    """Tensors that do not belong to a network that sdconv knows, and that share a prefix."""

    what: str
    prefix: str
    amount: Amount


@dataclass(frozen=True, kw_only=True)
class InspectedSource:
    """One file, several files of one network, or one folder of a pipeline.

    ``problem``: why no network was found in it; None if one was. ``notes``: what tensors next to a
    network's weights mean, in words.
    """

    name: str
    files: tuple[str, ...]
    amount: Amount
    metadata: Mapping[str, str]
    networks: tuple[InspectedNetwork, ...]
    unused: tuple[OtherTensors, ...]
    problem: str | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found under ``path``. A pipeline's folder has one part for each component."""

    path: str
    parts: tuple[InspectedSource, ...]

    @property
    def networks(self) -> tuple[InspectedNetwork, ...]:
        """The networks of all parts."""
        return tuple(network for part in self.parts for network in part.networks)

    @property
    def complaint(self) -> str | None:
        """Why something here cannot be loaded; None if there is a network and all are whole."""
        if not self.networks:
            return next(part.problem for part in self.parts if part.problem)
        broken = [one for one in self.networks if not one.whole]
        return "; ".join(map(_complaint, broken)) or None

    def network(self, component: str | None) -> InspectedNetwork:
        """The network of a component, or with None the only network.

        Raises:
            UnknownNetworkError: there is no such network, or with None there are several.
        """
        known = {one.component: one for one in self.networks}
        wanted = next(iter(known)) if component is None and len(known) == 1 else component
        if wanted in known:
            return known[wanted]
        if not known:
            raise UnknownNetworkError(self.complaint or "no network that sdconv knows")
        raise UnknownNetworkError(
            "several components" if component is None else "no such component",
            where=self.path,
            expected="one of " + ", ".join(known),
            got=component,
            hint=f"pass component={next(iter(known))!r}",
        )

    def to_json(self) -> dict[str, Any]:
        """What ``sdconv inspect --json`` prints."""
        return {
            "path": self.path,
            "parts": [_plain(part) for part in self.parts],
            "complaint": self.complaint,
        }


def inspect(paths: Paths, *, family: str | None = None, prefix: str | None = None) -> Inspection:
    """What weights contain, from their headers alone.

    Args:
        paths: a file, a component's folder, a whole pipeline's folder, or several files of one
            network.
        family: the family, if the caller knows it.
        prefix: that of a network's names, where a file has several copies.

    Raises:
        CheckpointError: something cannot be read as weights.
        InputError: ``paths`` is not a path, or the family is unknown.
    """
    with ExitStack() as stack:
        sources = open_all(paths, stack)
        return Inspection(
            path=str(paths) if isinstance(paths, str | Path) else ", ".join(map(str, paths)),
            parts=tuple(_inspect_source(name, one, family, prefix) for name, one in sources),
        )


def open_all(paths: Paths, stack: ExitStack) -> list[tuple[str, Source]]:
    """The sources under ``paths`` by name: one, or one for each folder of a pipeline."""
    if isinstance(paths, list | tuple) and len(paths) == 1:
        (paths,) = paths
    folder = folder_at(paths)
    if folder and (network_folders(folder) or (folder.is_pipeline and folder.components)):
        parts = folder.components.items()
        return [(name, stack.enter_context(open_folder(one))) for name, one in parts]
    source = stack.enter_context(open_files(paths) if folder is None else open_folder(folder))
    return [(source.label, source)]


def _inspect_source(
    name: str, source: Source, family: str | None, prefix: str | None
) -> InspectedSource:
    problem: str | None = None
    notes: tuple[str, ...] = ()
    identified: list[Identified] = []
    entries = {info.name: info for file in source.files for info in file.entries.values()}
    try:
        view = SourceView(source)
        identified = view.identify(family, prefix=prefix)
        entries = {name: _entry(view, name) for name in view.shapes}
        notes = notes_on(view, identified)
    except (UnknownNetworkError, WeightsMismatchError) as error:
        problem = str(error)
    taken = {name for one in identified for name in one.found.names.values()}
    taken |= {name for one in identified for name in one.found.unexpected}
    taken |= view.companions if identified else set()
    rest = [info for name, info in entries.items() if name not in taken]
    return InspectedSource(
        name=name,
        files=tuple(file.label for file in source.files),
        amount=Amount.of([info for file in source.files for info in file.entries.values()]),
        metadata=source.metadata,
        networks=tuple(_network(one, view, entries) for one in identified),
        unused=_unused(rest),
        problem=problem,
        notes=notes,
    )


def _entry(view: SourceView, name: str) -> TensorInfo:
    file, own = view.home(name)
    return file.entries[own]


def _network(
    one: Identified, view: SourceView, entries: Mapping[str, TensorInfo]
) -> InspectedNetwork:
    found = one.found
    wanted, learned = None, set(found.names)
    # a U-Net takes its transformers from diffusers, which is slow to import
    if one.component == "vae":
        with on_meta():
            network = build(one.config)
        wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        learned = {name for name, _ in network.named_parameters()}
    fits = fit(one, view.shapes, view.dtype, wanted)
    return InspectedNetwork(
        component=one.component,
        class_name=found.kind,
        family=one.family,
        evidence=one.evidence,
        open_to=one.open_to,
        layout=found.layout,
        prefix=found.prefix,
        config=one.config,
        amount=Amount.of([entries[name] for name in found.names.values()]),
        parameters=sum(
            prod(entries[own].shape) for name, own in found.names.items() if name in learned
        ),
        missing=fits.missing,
        unexpected=fits.unexpected,
        misshapen=tuple(fits.misshapen),
        not_floating=tuple(fits.not_floating),
        contradicted=one.contradicted,
        guess=one.guess,
    )


def _unused(infos: Sequence[TensorInfo]) -> tuple[OtherTensors, ...]:
    groups: dict[tuple[str, str], list[TensorInfo]] = defaultdict(list)
    for info in infos:
        groups[_group(info.name)].append(info)
    return tuple(
        OtherTensors(what=what, prefix=prefix, amount=Amount.of(group))
        for (what, prefix), group in sorted(groups.items())
    )


def _group(name: str) -> tuple[str, str]:
    """What a tensor belongs to, and the prefix that shows it."""
    for what, pattern in _OTHER_TENSORS:
        if match := re.match(pattern, name):
            return what, match[0] if match[0].endswith(".") else ""
    # up to the first number, which counts the layers of a stack
    return "unknown", re.split(r"\d", name, maxsplit=1)[0].rpartition(".")[0]


def _complaint(one: InspectedNetwork) -> str:
    parts = (
        ("missing", one.missing),
        ("unexpected", one.unexpected),
        ("of the wrong shape", one.misshapen),
        ("not floating-point", one.not_floating),
    )
    counts = ", ".join(f"{len(names)} {what}" for what, names in parts if names)
    config = "".join(f"; its config says {words}" for words in one.contradicted)
    return f"the {one.component} cannot be loaded: tensors {counts}{config}"


def _plain(value: Any) -> Any:
    """A value of dataclasses, tuples and mappings in JSON's types."""
    if isinstance(value, Config):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
