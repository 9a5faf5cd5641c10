"""A file that is replaced or written to while it is read: one file's tensors only, or an error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import seeded
from helpers.weight_files import convert, put
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.analysis.diff import compare
from sdconv.checkpoint.average import average
from sdconv.checkpoint.io.source import open_source
from sdconv.errors import CheckpointError
from sdconv.lora.bake import bake_lora
from sdconv.lora.extract import extract_lora

KL = seeded.SMALL_KL
State = dict[str, Tensor]


def written(path: Path, seed: int) -> State:
    state = seeded.tensors(KL, seed)
    save_file(state, path)
    return state


def same(found: State, right: State) -> bool:
    return set(found) == set(right) and all(torch.equal(found[k], right[k]) for k in right)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_replaced_by_rename_during_convert(dtype: torch.dtype | None, tmp_path: Path) -> None:
    path, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    old = written(path, 1)
    new = written(tmp_path / "new", 2)
    calls: list[str] = []

    def replace(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == 20:
            (tmp_path / "new").replace(path)

    convert(path, out, "diffusers", family="sd1", dtype=dtype, on_tensor=replace)
    assert len(calls) > 40
    assert same(load_file(out), {k: v.to(dtype or v.dtype) for k, v in old.items()})
    assert same(load_file(path), new)  # the control: it was replaced


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("shorter", [False, True])
def test_written_to_during_convert(
    shorter: bool, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    path, out = tmp_path / "vae.safetensors", tmp_path / "out.safetensors"
    written(path, 1)
    written(tmp_path / "new", 2)
    content = (tmp_path / "new").read_bytes()
    calls: list[str] = []

    def write(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == 20:
            with path.open("r+b") as handle:
                handle.write(content[: len(content) // 2] if shorter else content)
                if shorter and dtype is None:  # a mapping of what is cut off ends the process
                    handle.truncate()
            os.utime(path, ns=(1, 1))

    with pytest.raises(CheckpointError, match="while it was read"):
        convert(path, out, "diffusers", family="sd1", dtype=dtype, on_tensor=write)
    assert list(tmp_path.glob("*out*")) == []


def test_replaced_between_header_and_tensors(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    old = written(path, 1)
    source = open_source(path)
    written(tmp_path / "new", 2)
    (tmp_path / "new").replace(path)
    assert same({name: source.tensor(name) for name in source.entries}, old)
    source.check_unchanged()
    source.close()
    # a closed source opens its file again, which is another one now
    with pytest.raises(CheckpointError, match="not the file any more"):
        source.tensor(next(iter(old)))


def test_removed_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    old = written(path, 1)
    with open_source(path) as source:
        path.unlink()
        assert same({name: source.tensor(name) for name in source.entries}, old)


def test_descriptors_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    written(path, 1)

    def count() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = count()
    network = sdconv.load(path, family="sd1")
    open_source(path)  # which nobody closes
    sdconv.read_header(path)
    assert count() == before
    assert network.dtype == torch.float32
    source = open_source(path)
    assert count() == before + 1
    source.close()
    source.close()
    assert count() == before


def in_place(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50_000:] = bytes(50_000)
    with path.open("r+b") as handle:
        handle.write(content)
    os.utime(path, ns=(1, 1))


def renamed(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    in_place(new)
    new.replace(path)


LORA = {
    "lora_vae_decoder_mid_block_attentions_0_to_q.lora_down.weight": torch.ones(2, 64),
    "lora_vae_decoder_mid_block_attentions_0_to_q.lora_up.weight": torch.ones(64, 2),
}


@pytest.mark.parametrize("how", [in_place, renamed])
@pytest.mark.parametrize("what", ["convert", "average", "merge", "extract", "diff"])
@pytest.mark.parametrize("kind", ["safetensors", "ckpt"])
def test_every_command_notices(
    kind: str, what: str, how: Callable[[Path], None], tmp_path: Path
) -> None:
    """Also of pickles, which are mapped too."""
    first, second, out = (tmp_path / f"{name}.{kind}" for name in ("a", "b", "c"))
    out = out.with_suffix(".safetensors")
    for path, seed in ((first, 1), (second, 2)):
        put(path, **seeded.tensors(KL, seed))
    calls: list[str] = []

    def on_tensor(name: str, done: int, total: int) -> None:
        calls.append(name)
        if len(calls) == 20:
            how(first)

    work: dict[str, Callable[[], object]] = {
        "convert": lambda: convert(first, out, "original", family="sd1", on_tensor=on_tensor),
        "average": lambda: average([first, second], out, on_tensor=on_tensor),
        "merge": lambda: bake_lora(first, LORA, out, on_tensor=on_tensor),
        "extract": lambda: extract_lora(first, second, out, 1, on_tensor=on_tensor),
        "diff": lambda: compare(first, second, on_tensor=on_tensor),
    }
    if how is renamed:  # the old file to the last tensor
        work[what]()
    else:
        with pytest.raises(CheckpointError, match="changed while it was read"):
            work[what]()
        assert not out.exists()
    assert len(calls) >= 20


def test_a_lora_that_changes(tmp_path: Path) -> None:
    path, lora, out = (tmp_path / f"{name}.safetensors" for name in ("a", "lora", "out"))
    written(path, 1)
    save_file(LORA, lora)
    content = lora.read_bytes()

    def on_tensor(name: str, done: int, total: int) -> None:
        with lora.open("r+b") as handle:
            handle.write(content[:-8] + bytes(8))
        os.utime(lora, ns=(1, 1))

    with pytest.raises(CheckpointError, match="file any more that was opened"):
        bake_lora(path, lora, out, on_tensor=on_tensor)
    assert not out.exists()
    lora.write_bytes(content)
    bake_lora(path, lora, out)  # the control
