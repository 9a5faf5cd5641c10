"""Writes safetensors files and ``config.json``: each is complete, or not written at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdconv.checkpoint.io.files import as_path
from sdconv.checkpoint.io.folder import DIFFUSERS_NAME
from sdconv.config import AutoencoderTinyConfig, Config
from sdconv.errors import CheckpointError, InputError, SdconvError

if TYPE_CHECKING:
    from torch import Tensor

# the metadata key for a single file's config
CONFIG_KEY = "sdconv.config"
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
    return out, suffix == ".safetensors"


def write_folder(
    tensors: Mapping[str, Tensor], config: Config, folder: Path, *, variant: str | None = None
) -> list[Path]:
    """Writes one component in diffusers' form: ``config.json`` and
    ``diffusion_pytorch_model.safetensors``.

    Args:
        tensors: by diffusers' names.
        config: the network's.
        folder: created if it does not exist.
        variant: a word for the file's name, such as ``"fp16"``.

    Returns:
        The files written.

    Raises:
        SdconvError: diffusers has no class for this network.
        CheckpointError: the folder cannot be written.
    """
    check_in_diffusers(config, folder)
    suffix = f".{variant}" if variant else ""
    weights = folder / f"{DIFFUSERS_NAME}{suffix}.safetensors"
    write_tensors(tensors, weights, {"format": "pt"})
    return [write_config(config, folder), weights]


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


def write_config(config: Config, folder: Path) -> Path:
    """Writes a component's ``config.json`` and returns its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    path, content = folder / "config.json", json.dumps(config.to_json(), indent=2) + "\n"
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
        with _made(path.parent):
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
def _made(folder: Path) -> Iterator[None]:
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
