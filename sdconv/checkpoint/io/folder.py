"""Which files of a folder are the weights: one file, or the shards that an index lists."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sdconv.checkpoint.io.files import AGAIN, as_path, os_errors, read_json, short
from sdconv.errors import CheckpointError

DIFFUSERS_NAME = "diffusion_pytorch_model"
"""What diffusers calls the weights of a component; it goes before any other name in a folder."""

_SAFETENSORS = ("safetensors", "sft")
_PICKLES = ("bin", "ckpt", "pt", "pth")
_NAME = re.compile(
    r"(?P<base>[^.]+)(\.(?P<variant>.+?))?"
    rf"\.(?P<kind>{'|'.join(_SAFETENSORS + _PICKLES)})"
    r"((?P<index>\.index)(\.(?P<late_variant>.+))?\.json)?",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-\d{5,}-of-\d{5,}")


@dataclass(frozen=True, kw_only=True)
class FolderWeights:
    """The files that hold a folder's weights; ``weight_map`` is an index's tensor -> file."""

    files: tuple[Path, ...]
    weight_map: Mapping[str, Path] | None

    def check(self, entries: Mapping[Path, Collection[str]], where: Path) -> None:
        """Refuses an index that says otherwise of a tensor than the shards do.

        Args:
            entries: the names of each file's tensors. where: what was opened, for messages.

        Raises:
            CheckpointError: it does.
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


def components_in(folder: str | Path) -> dict[str, Path]:
    """The subfolders of a pipeline's folder that hold weights: ``{"vae": .../vae, ...}``, by name.

    Raises:
        CheckpointError: the folder, or one in it, is absent or may not be listed.
        InputError: ``folder`` is no path.
    """
    children = _children(as_path(folder))
    with os_errors(as_path(folder)):
        folders = [child for child in children if child.is_dir()]
    return {child.name: child for child in folders if _candidates(_children(child))}


def is_pipeline(folder: Path) -> bool:
    """Whether a folder says of itself that its subfolders are a pipeline's components.

    Raises:
        CheckpointError: it is absent or may not be listed.
    """
    return folder / "model_index.json" in _children(folder)


def weights_in(folder: Path) -> FolderWeights:
    """The weights of a folder that holds one component.

    Safetensors files go before pickles, diffusers' own file name before others, a plain name
    before its variants (``.fp16``), and an index before a file of the same name.

    Raises:
        CheckpointError: there are none, or several that nothing chooses between, or the index is
            no index of files in this folder.
    """
    children = _children(folder)
    candidates = _candidates(children)
    for kinds in (_SAFETENSORS, _PICKLES):
        if group := [c for c in candidates if c.kind in kinds]:
            chosen = _choose(folder, group)
            if chosen.is_index:
                return _indexed(folder, chosen)
            return FolderWeights(files=(chosen.path,), weight_map=None)
    raise CheckpointError(
        "holds no weights",
        where=folder,
        expected="a .safetensors file, or one that ends in .ckpt, .pth, .pt or .bin",
        got=f"{short([child.name for child in children])}" if children else "an empty folder",
        hint="name the folder or the file that holds the weights",
    )


def weights_of_index(file: Path) -> FolderWeights | None:
    """The shards that an index lists; None for a file whose name is not an index's.

    Raises:
        CheckpointError: it is no index of files in its folder.
    """
    match _candidates([file]):
        case [_Candidate(is_index=True) as index]:
            return _indexed(file.parent, index)
    return None


def config_in(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's ``config.json``; None where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    config = folder / "config.json"
    with os_errors(config):
        there = config.exists()
    return read_json(config) if there else None


def config_beside(files: Sequence[Path]) -> dict[str, Any] | None:
    """The ``config.json`` of a component's folder whose weights are named one by one: files of one
    folder, with diffusers' name.

    Raises:
        CheckpointError: it cannot be read.
    """
    folders = {file.parent for file in files}
    if len(folders) > 1 or not all(file.name.startswith(DIFFUSERS_NAME) for file in files):
        return None
    return config_in(folders.pop())


def _children(folder: Path) -> list[Path]:
    """What a folder holds, sorted, without hidden entries."""
    with os_errors(folder):
        if folder.exists() and not folder.is_dir():
            raise CheckpointError("is a file", where=folder, expected="a folder", hint="name it")
        return sorted(child for child in folder.iterdir() if not child.name.startswith("."))


def _candidates(children: list[Path]) -> list[_Candidate]:
    found = []
    for child in children:
        match = _NAME.fullmatch(child.name)
        with os_errors(child):
            if match is None or child.is_dir():
                continue
        found.append(
            _Candidate(
                path=child,
                base=match["base"],
                variant=match["variant"] or match["late_variant"] or "",
                kind=match["kind"].lower(),
                is_index=match["index"] is not None,
            )
        )
    return found


def _choose(folder: Path, group: list[_Candidate]) -> _Candidate:
    whole = [c for c in group if c.is_index or not _SHARD.search(c.path.name)]
    if not whole:
        raise CheckpointError(
            "holds shards without the index that lists them",
            where=folder,
            expected="a file that ends in .index.json",
            got=short([c.path.name for c in group]),
            hint="fetch the index too, or give all shards as a list of files",
        )
    pool = [c for c in whole if c.base == DIFFUSERS_NAME] or whole
    plain = [c for c in pool if not c.variant] or pool
    best = [c for c in plain if c.is_index] or plain
    if len(best) > 1 or len({c.base for c in pool}) > 1:
        raise CheckpointError(
            "holds several files of weights, and nothing says which one is meant",
            where=folder,
            expected="one file, or one whose name is another's without .fp16 or the like",
            got=short([c.path.name for c in pool]),
            hint="name the file, or give a list of files that belong together",
        )
    return best[0]


def _indexed(folder: Path, index: _Candidate) -> FolderWeights:
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
                "names a shard that is no file of this folder",
                where=index.path,
                expected=f"a relative name without '..' that ends in .{index.kind}",
                got=short(shard),
                hint="do not use this index; give the shards as a list of files",
            )
    shards = {shard: folder / shard for shard in sorted(set(listed.values()))}
    with os_errors(folder):
        absent = [shard for shard, path in shards.items() if not path.exists()]
    if absent:
        raise CheckpointError(
            f"names {len(absent)} of {len(shards)} shards that are absent",
            where=index.path,
            expected="every shard beside the index",
            got=f"no {short(absent)}",
            hint="download the absent files too",
        )
    return FolderWeights(
        files=tuple(shards.values()),
        weight_map={name: shards[shard] for name, shard in listed.items()},
    )


def _inside(shard: object) -> bool:
    """Whether a name stays in its folder on every system; a symbolic link may lead elsewhere."""
    if not isinstance(shard, str) or "\0" in shard or "\\" in shard:
        return False
    posix, windows = PurePosixPath(shard), PureWindowsPath(shard)
    return not posix.is_absolute() and not windows.anchor and ".." not in posix.parts
