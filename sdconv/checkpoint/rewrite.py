"""Writes a checkpoint again in the form that it has, with some new tensors.

What is new has been put into the checkpoint's views before (``SourceView.substitute``).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sdconv.checkpoint.io.files import os_errors
from sdconv.checkpoint.io.stream import OnTensor, OutputTensor, stream
from sdconv.checkpoint.io.write import CONFIG_KEY, made_folder, output_path
from sdconv.checkpoint.open import COMPONENTS
from sdconv.checkpoint.whole import Checkpoint, Part
from sdconv.errors import CheckpointError, InputError

_SHARD = re.compile(r"-\d{5,}-of-\d{5,}")
# files of weights, also of other frameworks, and their indices: those of before
_WEIGHTS = re.compile(
    r".*\.(?:safetensors|sft|bin|ckpt|pth?|msgpack|h5|onnx(?:_data)?|pb|gguf|index(?:\.[^.]+)?\.json)",
    re.IGNORECASE,
)


def check_form(checkpoint: Checkpoint, out: str | Path) -> tuple[Path, bool]:
    """The path to write to, and whether it is a single file; a folder is written of a folder only.

    Raises:
        InputError: it names a kind of file that is not written, or a folder, and the checkpoint is
            a file.
    """
    path, is_file = output_path(out)
    if not is_file and checkpoint.folder is None:
        raise InputError(
            "a file is written again as a file",
            where=path,
            expected="a name that ends in .safetensors",
            got=path.name,
            hint="`sdconv convert` makes a folder of it afterwards",
        )
    return path, is_file


def rewrite(
    checkpoint: Checkpoint, out: str | Path, on_tensor: OnTensor = lambda name, done, total: None
) -> list[Path]:
    """Writes a whole checkpoint, one tensor after another; the output gets its name once complete.

    Every tensor keeps its name, and every file its metadata. Of a folder, the weights of each
    component go to one file, under the name that diffusers and transformers read, and all other
    files are copied (configs, tokenizers, schedulers), but not the weights of other frameworks or
    variants, which would be those of before. A folder can also be written as a single file in
    diffusers' layout; a pipeline's tensors then have their component's name as a prefix.

    Args:
        checkpoint: open.
        out: as ``check_form`` takes it.
        on_tensor: called before each tensor.

    Returns:
        The files with weights.

    Raises:
        InputError: as ``check_form``. CheckpointError: something cannot be read or written.
    """
    path, is_file = check_form(checkpoint, out)
    if is_file:
        stream(
            [one for part in checkpoint.parts for one in _tensors(part, prefixed=True)],
            path,
            _metadata(checkpoint),
            on_tensor=on_tensor,
        )
        return [path]
    assert checkpoint.folder is not None
    return _folder(checkpoint, checkpoint.folder, path, on_tensor)


def _tensors(part: Part, *, prefixed: bool) -> list[OutputTensor]:
    prefix = f"{part.name}." if part.name and prefixed else ""
    names = (name for name in part.view.shapes if name not in part.view.companions)
    return [part.entry(prefix + name, [name]) for name in names]


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """A single file's metadata: its own, or of a folder the configs of its networks."""
    first, *more = checkpoint.parts
    metadata = {"format": "pt"} if first.name else first.view.metadata
    configs = {
        part.name: part.view.source.config
        for part in checkpoint.parts
        if part.name in COMPONENTS and part.view.source.config is not None
    }
    if not first.name and not more and first.view.source.config is not None:
        known = {found.component for found in first.view.networks}
        if len(known) == 1:
            metadata[CONFIG_KEY] = json.dumps(dict(first.view.source.config))
    elif configs:
        metadata[CONFIG_KEY] = json.dumps(configs)
    return metadata


def _folder(checkpoint: Checkpoint, folder: Path, out: Path, on_tensor: OnTensor) -> list[Path]:
    """Everything is written next to the output first, so that it is there completely or not at
    all."""
    try:
        with made_folder(out.parent):
            prefix = f".{out.name[:40]}."
            stage = Path(tempfile.mkdtemp(dir=out.parent, prefix=prefix, suffix=".part"))
            try:
                files = _stage(checkpoint, folder, stage, on_tensor)
                _move(stage, out)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot be written ({error})", where=out) from error
    return [out / file for file in files]


def _stage(checkpoint: Checkpoint, folder: Path, stage: Path, on_tensor: OnTensor) -> list[Path]:
    """Writes everything into a folder, and returns the files with weights relative to it."""
    parts = {part: _tensors(part, prefixed=False) for part in checkpoint.parts}
    sizes = {part: sum(i.nbytes for one in own for i in one.infos) for part, own in parts.items()}
    total, before, files = sum(sizes.values()), 0, []
    for part, own in parts.items():
        files.append(Path(part.name) / _file_name(part))
        metadata = part.view.metadata or {"format": "pt"}
        stream(own, stage / files[-1], metadata, on_tensor=_after(before, total, on_tensor))
        before += sizes[part]
    for relative in _other_files(folder):
        (stage / relative).parent.mkdir(parents=True, exist_ok=True)
        with os_errors(folder / relative):
            shutil.copyfile(folder / relative, stage / relative)
    return files


def _after(before: int, total: int, on_tensor: OnTensor) -> OnTensor:
    """Reports the progress of one file as that of all."""
    return lambda name, done, _: on_tensor(name, before + done, total)


def _file_name(part: Part) -> str:
    """The name of a component's weights in one safetensors file."""
    stem, _, kind = _SHARD.sub("", Path(part.view.source.files[0].label).name).rpartition(".")
    if kind.lower() not in ("safetensors", "sft") and stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")  # transformers' name for a pickle
    return f"{stem}.safetensors"


def _other_files(folder: Path) -> Iterator[Path]:
    """The files of a folder that are not weights, relative to it; hidden ones are left out."""
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            if not name.startswith(".") and not _WEIGHTS.fullmatch(name):
                yield (Path(at) / name).relative_to(folder)


def _move(stage: Path, out: Path) -> None:
    """Gives a complete folder its name; in one that exists, its files replace those of the same
    names."""
    umask = os.umask(0)
    os.umask(umask)
    stage.chmod(0o777 & ~umask)  # mkdtemp's are private
    with suppress(OSError):  # not there, or not empty
        out.rmdir()
    if not out.exists():
        stage.rename(out)
        return
    for file in sorted(stage.rglob("*")):
        target = out / file.relative_to(stage)
        if file.is_dir():
            target.mkdir(exist_ok=True)
        else:
            file.replace(target)
