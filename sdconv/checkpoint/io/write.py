"""Writes safetensors files and ``config.json``: each is complete, or not written at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdconv.checkpoint.io.files import as_path
from sdconv.checkpoint.io.folder import DIFFUSERS_NAME
from sdconv.config import AutoencoderTinyConfig, Config
from sdconv.errors import CheckpointError, InputError, SdconvError

if TYPE_CHECKING:
    from torch import Tensor

# the metadata key for a single file's config
CONFIG_KEY = "sdconv.config"
# the state of diffusers.training_utils.EMAModel, which it keeps in a network's config.json
AVERAGING_FIELDS = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)
# suffixes of other kinds of files, which are not written
_NOT_WRITTEN = frozenset(".ckpt .pth .pt .pkl .bin .sft .gguf .onnx .h5 .npz .msgpack".split())


def output_path(path: str | Path) -> tuple[Path, bool]:
    """The path to write weights to, and whether it is a single file (``.safetensors``) or a folder.

    Raises:
        InputError: it is not a path, or it names a kind of file that is not written.
    """
    out = as_path(path)
    if (suffix := out.suffix.lower()) in _NOT_WRITTEN:
        raise InputError(
            "only safetensors files are written",
            where=out,
            expected="a name that ends in .safetensors for a single file, or a folder",
            got=f"a name that ends in {out.suffix}",
            hint=f"name it {out.with_suffix('.safetensors').name}",
        )
    is_file = suffix == ".safetensors"
    if is_file and out.is_dir():
        raise InputError(
            "is a folder",
            where=out,
            expected="a file, since its name ends in .safetensors",
            hint="name a file in it, or remove the folder",
        )
    return out, is_file


def write_folder(
    tensors: Mapping[str, Tensor],
    config: Config,
    folder: Path,
    *,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Writes one component in diffusers' form: ``config.json`` and
    ``diffusion_pytorch_model.safetensors``, or its shards and their index.

    Args:
        tensors: by diffusers' names.
        config: the network's.
        folder: created if it does not exist.
        variant: a word for the file's name, such as ``"fp16"``.
        max_shard_size: most bytes of a file, or ``"5GB"``; None for one file of any size. A larger
            tensor gets a file of its own.
        extra: more fields for ``config.json``.

    Returns:
        The files written.

    Raises:
        InputError: the size of a shard is not a size.
        SdconvError: diffusers has no class for this network.
        CheckpointError: the folder cannot be written.
    """
    check_in_diffusers(config, folder)
    stem = f"{DIFFUSERS_NAME}.{variant}" if variant else DIFFUSERS_NAME
    late = f".{variant}" if variant else ""
    index = folder / f"{DIFFUSERS_NAME}.safetensors.index{late}.json"
    shards = _shards(tensors, stem, max_shard_size)
    files = []
    for name, keys in shards.items():
        files.append(folder / name)
        write_tensors({key: tensors[key] for key in keys}, files[-1], {"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {key: name for name, keys in shards.items() for key in keys}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        write_whole(index, lambda part: part.write_text(text, encoding="utf-8"))
        files.append(index)
    _remove_earlier(folder, stem, index, files)
    return [write_config(config, folder, extra), *files]


def _shards(
    tensors: Mapping[str, Tensor], stem: str, most: int | str | None
) -> dict[str, list[str]]:
    """The names of each file's tensors, by the file's name: diffusers' division."""
    if most is None:
        return {f"{stem}.safetensors": list(tensors)}
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=most,
        )
    except (TypeError, ValueError) as error:
        raise InputError(
            "not a size", where="max_shard_size", expected="'5GB', or a number of bytes", got=most
        ) from error
    return dict(split.filename_to_tensors)


def _remove_earlier(folder: Path, stem: str, index: Path, written: list[Path]) -> None:
    """Removes what an earlier save of the same variant has left, in one file or in shards."""
    shard = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors")
    for path in folder.iterdir():
        old = shard.fullmatch(path.name) is not None or path == index
        if old and path not in written and path.is_file():
            path.unlink()


def check_in_diffusers(config: Config, folder: Path) -> None:
    """Refuses a network that cannot be saved as a folder in diffusers' form.

    Raises:
        SdconvError: diffusers has no class for this network.
    """
    if isinstance(config, AutoencoderTinyConfig) and not config.in_diffusers:
        raise SdconvError(
            "diffusers' AutoencoderTiny cannot represent this network",
            where=folder,
            expected="both halves, one width, plain stem, no pooled blocks",
            got=f"blocks {config.num_encoder_blocks} and {config.num_decoder_blocks}",
            hint="save it as a single file: sdconv.save(model, 'name.safetensors')",
        )


def write_config(config: Config, folder: Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Writes a component's ``config.json``, with ``extra`` fields, and returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    fields = {**config.to_json(), **(extra or {})}
    path, content = folder / "config.json", json.dumps(fields, indent=2) + "\n"
    write_whole(path, lambda part: part.write_text(content, encoding="utf-8"))
    return path


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, which gets its name only once it is complete.

    Raises:
        InputError: a tensor has no values.
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save_file

    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise InputError(
            "tensors without values cannot be written",
            where=path,
            expected="every tensor on the CPU or a GPU",
            got=f"{len(empty)} of {len(tensors)} on the meta device, such as {empty[0]}",
            hint="load weights into the network first, or end its offloading",
        )
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(contiguous, part, metadata=dict(metadata)))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name in the same folder, and then renames it to ``path``.

    Raises:
        CheckpointError: the file cannot be written.
    """
    try:
        with suppress(OSError):
            path.lstat()  # a NUL or a lone surrogate in the path is a ValueError
    except ValueError as error:
        raise _unwritable(path, error) from error
    try:
        with made_folder(path.parent):
            start = f".{path.name[:40]}."
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=start, suffix=".part")
            os.close(handle)
            part = Path(name)
            try:
                write(part)
                # mkstemp's files are private; weights get the umask's permissions
                umask = os.umask(0)
                os.umask(umask)
                part.chmod(0o666 & ~umask)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise _unwritable(path, error) from error
        raise


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Creates a folder, and removes it again if the work in it fails."""
    new = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for one in new:
            with suppress(OSError):  # not there, or not empty any more
                one.rmdir()
        raise


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot be written ({error})",
        where=path if isinstance(error, OSError) else repr(str(path)),
        hint="check that the folder exists, is writable and has room",
    )
