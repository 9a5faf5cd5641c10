"""Decides which files of a folder are the weights: one file, or the shards that an index lists."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdconv.checkpoint.io.files import AGAIN, as_path, os_errors, read_json, short, weights_path
from sdconv.errors import CheckpointError

DIFFUSERS_NAME = "diffusion_pytorch_model"
"""diffusers' name for the weights of a component; it is preferred to any other name."""

_SAFETENSORS = ("safetensors", "sft")
_PICKLES = ("bin", "ckpt", "pt", "pth")
_NAME = re.compile(
    r"(?P<base>[^.]+)(\.(?P<variant>.+?))?"
    rf"\.(?P<kind>{'|'.join(_SAFETENSORS + _PICKLES)})"
    r"((\.(?P<mid_variant>[^.]+))??(?P<index>\.index)(\.(?P<late_variant>.+))?\.json)?",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-\d+-of-\d+", re.IGNORECASE)
# an index whose name does not say of which kind its shards are; a pipeline's index is another thing
_BARE_INDEX = re.compile(r"(?!model_index\.json)(?:.+[._-])?index\.json", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class FolderWeights:
    """The files with a folder's weights; ``weight_map``: tensor -> file, if there is an index."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None

    def check(self, entries: Mapping[Path, Collection[str]], where: Path) -> None:
        """Checks that the index and the shards agree.

        Args:
            entries: the names of each file's tensors.
            where: what was opened, for messages.

        Raises:
            CheckpointError: they disagree.
        """
        hint = "download index and shards again, from the same revision"
        if self.weight_map is None:
            return
        for name, path in self.weight_map.items():
            if name not in entries[path]:
                raise CheckpointError(
                    f"its index puts tensor {short(name)} into a shard that does not hold it",
                    where=where,
                    expected=f"{short(name)} in {path.name}",
                    hint=hint,
                )
        for path, names in entries.items():
            for name in names:
                if self.weight_map.get(name) != path:
                    raise CheckpointError(
                        f"a shard holds tensor {short(name)}, which its index does not put there",
                        where=where,
                        expected=f"{short(name)} listed for {path.name}",
                        hint=hint,
                    )


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    path: Path
    base: str
    variant: str
    kind: str
    is_index: bool

    @property
    def is_shard(self) -> bool:
        return not self.is_index and _SHARD.search(self.path.name) is not None

    @property
    def is_diffusers(self) -> bool:
        return self.base.lower() == DIFFUSERS_NAME


@dataclass(frozen=True)
class Folder:
    """A folder and what it holds: sorted, without hidden entries."""

    path: Path
    children: tuple[Path, ...]

    @property
    def is_pipeline(self) -> bool:
        """Whether ``model_index.json`` says that the subfolders are a pipeline's components."""
        return self.path / "model_index.json" in self.children

    @cached_property
    def components(self) -> dict[str, Folder]:
        """The subfolders that hold weights, by name.

        Raises:
            CheckpointError: a subfolder cannot be listed.
        """
        with os_errors(self.path):
            folders = [_listed(child) for child in self.children if child.is_dir()]
        return {one.path.name: one for one in folders if _candidates(one.children)}

    def weights(self) -> FolderWeights:
        """The weights, if the folder holds one component.

        safetensors files are preferred to pickles, diffusers' own file name to others, a plain name
        to its variants (``.fp16``), and an index to a file of the same name.

        Raises:
            CheckpointError: there are no weights, or several and no way to choose, or the index
                does not list files in this folder.
        """
        candidates = _candidates(self.children)
        for kinds in (_SAFETENSORS, _PICKLES):
            if group := [c for c in candidates if c.kind in kinds]:
                if all(c.is_shard for c in group):  # their index may be named after another kind
                    group += [c for c in candidates if c.is_index]
                chosen = _choose(self.path, group)
                if chosen.is_index:
                    return _indexed(self.path, chosen, _same_but_whole(chosen, candidates))
                return FolderWeights(files=(chosen.path,), weight_map=None)
        names = [child.name for child in self.children]
        raise CheckpointError(
            "holds no weights",
            where=self.path,
            expected="a .safetensors file, or one that ends in .ckpt, .pth, .pt or .bin",
            got=short(names) if names else "an empty folder",
            hint="name the folder or the file that holds the weights",
        )


def folder_at(path: object) -> Folder | None:
    """The folder at a path; None for anything else, such as a file or a state dict.

    Raises:
        CheckpointError: the path cannot be read.
    """
    if not isinstance(path, str | Path):
        return None
    folder = weights_path(path)
    with os_errors(folder):
        if not folder.is_dir():
            return None
    return _listed(folder)


def components_in(folder: str | Path) -> dict[str, Path]:
    """The subfolders of a pipeline's folder that hold weights: ``{"vae": .../vae, ...}``.

    Raises:
        CheckpointError: the folder, or one in it, does not exist or cannot be listed.
        InputError: ``folder`` is not a path.
    """
    found = _listed(as_path(folder)).components
    return {name: component.path for name, component in found.items()}


def weights_of_index(file: Path) -> FolderWeights | None:
    """The shards that an index lists; None if the file's name is not an index's.

    Raises:
        CheckpointError: the index does not list files in its folder.
    """
    match _candidates([file]):
        case [_Candidate(is_index=True) as index]:
            return _indexed(file.parent, index)
    return None


def config_in(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's ``config.json``; None if there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    config = folder / "config.json"
    with os_errors(config):
        there = config.exists()
    return read_json(config) if there else None


def config_next_to(files: Sequence[Path]) -> dict[str, Any] | None:
    """The ``config.json`` next to files of one folder that have diffusers' name; None for others.

    Raises:
        CheckpointError: it cannot be read.
    """
    folders = {file.parent for file in files}
    if len(folders) > 1 or not all(file.name.lower().startswith(DIFFUSERS_NAME) for file in files):
        return None
    return config_in(folders.pop())


def _listed(path: Path) -> Folder:
    with os_errors(path):
        if path.exists() and not path.is_dir():
            raise CheckpointError("is a file", where=path, expected="a folder", hint="name it")
        visible = (child for child in path.iterdir() if not child.name.startswith("."))
        return Folder(path, tuple(sorted(visible)))


def _candidates(children: Iterable[Path]) -> list[_Candidate]:
    found = []
    for child in children:
        match = _NAME.fullmatch(child.name)
        with os_errors(child):
            if child.is_dir():
                continue
        if match is None:
            found += _bare_index(child)
            continue
        found.append(
            _Candidate(
                path=child,
                base=match["base"],
                variant=match["variant"] or match["mid_variant"] or match["late_variant"] or "",
                kind=match["kind"].lower(),
                is_index=match["index"] is not None,
            )
        )
    return found


def _bare_index(path: Path) -> list[_Candidate]:
    """A file as an index whose name does not say the kind of its shards, which they say; nothing if
    it is not an index."""
    if not _BARE_INDEX.fullmatch(path.name):
        return []
    try:
        listed = read_json(path).get("weight_map")
    except CheckpointError:
        return []
    shards = list(listed.values()) if isinstance(listed, dict) else []
    kind = PurePosixPath(str(shards[0])).suffix[1:].lower() if shards else ""
    if kind not in _SAFETENSORS + _PICKLES:
        return []
    return [_Candidate(path=path, base=path.name, variant="", kind=kind, is_index=True)]


def variant_in(folder: Folder, variant: str) -> Path | None:
    """The file or the index with a folder's weights of a variant, such as ``fp16``; None if it has
    none."""
    found = [
        one for one in _candidates(folder.children) if one.variant == variant and not one.is_shard
    ]
    found.sort(key=lambda one: (not one.is_diffusers, one.kind in _PICKLES, not one.is_index))
    return found[0].path if found else None


def _choose(folder: Path, group: list[_Candidate]) -> _Candidate:
    whole = [c for c in group if not c.is_shard]
    if not whole:
        raise CheckpointError(
            "holds shards without the index that lists them",
            where=folder,
            expected="a file that ends in .index.json",
            got=short([c.path.name for c in group]),
            hint="fetch the index too, or give all shards as a list of files",
        )
    pool = [c for c in whole if c.is_diffusers] or whole
    plain = [c for c in pool if not c.variant] or pool
    best = [c for c in plain if c.is_index] or plain
    if len(best) > 1 or len({c.base for c in pool}) > 1:
        raise CheckpointError(
            "holds several files of weights, and it is unclear which one is meant",
            where=folder,
            expected="one file, or one whose name is another's without .fp16 or the like",
            got=short([c.path.name for c in pool]),
            hint="name the file, or give a list of files that belong together",
        )
    return best[0]


def _same_but_whole(index: _Candidate, candidates: list[_Candidate]) -> Path | None:
    """The file that holds all of an index's weights, going by the names: the one of its own name,
    or else one of another variant, kind or name."""
    whole = [one for one in candidates if not one.is_index and not one.is_shard]
    whole.sort(
        key=lambda one: (
            one.base != index.base,
            one.kind != index.kind,
            one.variant != index.variant,
        )
    )
    return whole[0].path if whole else None


def _indexed(folder: Path, index: _Candidate, whole: Path | None = None) -> FolderWeights:
    listed = read_json(index.path).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(
            "is an index without a weight_map",
            where=index.path,
            expected="an object of file names by tensor name",
            got=short(listed),
            hint=AGAIN,
        )
    for shard in listed.values():
        if not _inside(shard) or not shard.lower().endswith(f".{index.kind}"):
            raise CheckpointError(
                "names a shard that is not a file in this folder",
                where=index.path,
                expected=f"a relative name without '..' that ends in .{index.kind}",
                got=short(shard),
                hint="do not use this index; give the shards as a list of files",
            )
    shards = {shard: folder / shard for shard in sorted(set(listed.values()))}
    with os_errors(folder):
        absent = [shard for shard, path in shards.items() if not path.exists()]
    if absent and whole is not None:
        raise CheckpointError(
            f"lists {len(shards)} shards, {len(absent)} of them missing, and lies next to a whole "
            f"file, {whole.name}",
            where=index.path,
            expected="either the index with all of its shards, or the whole file",
            got=f"no {short(absent)}",
            hint=f"if {whole.name} is what you want, delete {index.path.name}, or name the file; "
            "otherwise download the missing shards",
        )
    if absent:
        raise CheckpointError(
            f"lists {len(shards)} shards, {len(absent)} of them missing",
            where=index.path,
            expected="every shard next to the index",
            got=f"no {short(absent)}",
            hint="download the missing files too",
        )
    return FolderWeights(
        files=tuple(shards.values()),
        weight_map={name: shards[shard] for name, shard in listed.items()},
    )


def _inside(shard: object) -> bool:
    """Whether a name stays in its folder on every system; a symbolic link may still leave it."""
    if not isinstance(shard, str) or "\0" in shard or "\\" in shard:
        return False
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return not posix.is_absolute() and not windows.anchor and ".." not in posix.parts
