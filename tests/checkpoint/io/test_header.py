"""Reading safetensors headers: valid ones, damaged ones, and paths that are not files."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weight_files import HUGE, U8, entry, packed, without_permission, written
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdconv.checkpoint.io.header import DTYPE_BITS, read_header
from sdconv.errors import CheckpointError, InputError


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may pass through; pytest's own ones are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_what_safetensors_writes_is_read_back_with_its_offsets(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6.0).reshape(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
    }
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = read_header(str(file))
    assert header.path == file
    assert header.metadata == {"format": "pt"}
    assert header.shapes == {"b.weight": (2, 3), "a": (5,)}
    assert header.names == list(header.shapes)
    assert set(header.dtypes) == set(header.names)
    assert {name: info.dtype for name, info in header.tensors.items()} == {
        "b.weight": "F32",
        "a": "BF16",
    }
    raw = file.read_bytes()
    for name, info in header.tensors.items():
        values = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[info.start : info.end] == values
        assert info.nbytes == len(values)


def test_tensors_are_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    late_first = {"late": entry("U8", [2], 1, 3), "early": entry("U8", [1], 0, 1)}
    assert list(read_header(written(tmp_path, packed(late_first, b"123"))).tensors) == [
        "early",
        "late",
    ]


def test_a_header_cannot_be_changed(tmp_path: Path) -> None:
    header = read_header(written(tmp_path, packed({"a": entry("U8", [1], 0, 1)}, b"1")))
    with pytest.raises(TypeError):
        header.tensors["b"] = header.tensors["a"]  # type: ignore[index]
    with pytest.raises(AttributeError):
        header.path = Path()  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_safetensors_is_known_by_its_size(tmp_path: Path, dtype: str) -> None:
    nbytes = 32 * DTYPE_BITS[dtype] // 8
    file = written(tmp_path, packed({"a": entry(dtype, [4, 8], 0, nbytes)}, bytes(nbytes)))
    assert read_header(file).tensors["a"].nbytes == nbytes
    with safe_open(file, framework="pt") as theirs:
        assert theirs.get_slice("a").get_dtype() == dtype
    too_long = packed({"a": entry(dtype, [4, 8], 0, nbytes + 1)}, bytes(nbytes + 1))
    with pytest.raises(CheckpointError, match="does not fit its bytes"):
        read_header(written(tmp_path, too_long))


def test_no_dtype_of_safetensors_is_missing_here(tmp_path: Path) -> None:
    file = written(tmp_path, packed({"a": entry("none such", [1], 0, 1)}, b"1"))
    with pytest.raises(SafetensorError) as error, safe_open(file, framework="pt"):
        pass
    listed = str(error.value).partition("expected one of")[2].partition(" at line")[0]
    assert {name.strip(" `") for name in listed.split(",")} == set(DTYPE_BITS)


STRICTER = ("twice", "not an object", "too large for")
"""Where safetensors is laxer, and may take the file."""
LONG = 2**40
BROKEN: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "is empty"),
    "seven bytes": (b"1234567", "cut short before its header"),
    "header longer than the file": (packed(b"{}", length=3), "larger than the file"),
    "header over 100 MB": (packed(b"{}", length=100_000_001), "length that is too large"),
    "header of 2**64 - 1 bytes": (
        packed(b"{}", length=2**64 - 1),
        "length that is too large",
    ),
    "data cut short": (packed({"a": entry("U8", [4], 0, 4)}, b"123"), "is cut short"),
    "data too long": (packed({"a": U8}, b"12"), "is longer than its tensors"),
    "not UTF-8": (packed(b'{"\xff":1}'), "not UTF-8"),
    "UTF-8 of a surrogate": (packed(b'{"\xed\xa0\x80":1}'), "not UTF-8"),
    "not JSON": (packed(b'{"a":'), "not JSON"),
    "no header": (packed(b""), "not JSON"),
    "NaN": (packed(b'{"a":NaN}'), "not JSON"),
    "a number beyond floats": (packed(b'{"a":1e999}'), "not JSON"),
    "a number of 5000 digits": (packed(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "a control character": (packed(b'{"a\n":1}'), "not JSON"),
    "a byte order mark": (packed(b"\xef\xbb\xbf{}"), "not JSON"),
    "zeros behind the JSON": (packed(b"{}\0\0"), "not JSON"),
    "a list": (packed([]), "not a JSON object"),
    "a number": (packed(b"17"), "not a JSON object"),
    "nested 500 levels": (packed(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"), "nested too deeply"),
    "nested 1e5 levels": (packed(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "half a surrogate pair": (packed({"\ud800": U8}, b"1"), "half a surrogate pair"),
    "a name twice": (packed(b'{"a":%b,"a":%b}' % ((json.dumps(U8).encode(),) * 2)), "twice"),
    "a name twice, escaped": (packed(b'{"a":1,"\\u0061":1}'), "names 'a' twice"),
    "a field twice": (packed(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' twice"),
    "an entry that is a list": (packed({"a": ["U8", [1], [0, 1]]}, b"1"), "not an object"),
    "an entry that is null": (packed({"a": None}), "not an object"),
    "no dtype": (packed({"a": {"shape": [], "data_offsets": [0, 1]}}, b"1"), "no dtype"),
    "no shape": (packed({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"1"), "no shape"),
    "no offsets": (packed({"a": {"dtype": "U8", "shape": [1]}}, b"1"), "no data_offsets"),
    "unknown dtype": (packed({"a": entry("Q4", [1], 0, 1)}, b"1"), "unknown dtype"),
    "dtype in small letters": (packed({"a": entry("u8", [1], 0, 1)}, b"1"), "unknown dtype"),
    "dtype that is a number": (packed({"a": entry(8, [1], 0, 1)}, b"1"), "unknown dtype"),
    "dtype that is a list": (packed({"a": entry(["U8"], [1], 0, 1)}, b"1"), "unknown dtype"),
    "shape that is a number": (packed({"a": entry("U8", 1, 0, 1)}, b"1"), "a malformed shape"),
    "shape with true": (packed({"a": entry("U8", [True], 0, 1)}, b"1"), "a malformed shape"),
    "shape with 1.0": (packed({"a": entry("U8", [1.0], 0, 1)}, b"1"), "a malformed shape"),
    "shape with -1": (packed({"a": entry("U8", [-1, -1], 0, 1)}, b"1"), "a malformed shape"),
    "shape with -0": (
        packed(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'),
        "a malformed shape",
    ),
    "shape with 2**63": (packed({"a": entry("U8", [0, HUGE], 0, 0)}), "too large for"),
    "shape with 2**64 - 1": (
        packed({"a": entry("F4", [2**64 - 1, 0], 0, 0)}),
        "too large for",
    ),
    "offset of 2**64 - 1": (packed({"a": entry("U8", [0], 2**64 - 1, 2**64 - 1)}), "outside"),
    "shape with 2**70": (packed({"a": entry("U8", [2**70], 0, 1)}, b"1"), "a malformed shape"),
    "product of 2**80": (
        packed({"a": entry("U8", [LONG, LONG], 0, 1)}, b"1"),
        "too large for",
    ),
    "product of 2**64": (
        packed({"a": entry("U8", [2**32, 2**32], 0, 0)}),
        "too large for",
    ),
    "nothing of 2**80": (
        packed({"a": entry("U8", [0, LONG, LONG], 0, 0)}),
        "too large for",
    ),
    "one offset": (packed({"a": entry("U8", [1], 0)}, b"1"), "malformed data_offset"),
    "three offsets": (packed({"a": entry("U8", [1], 0, 1, 2)}, b"1"), "malformed data_offset"),
    "offset that is text": (
        packed({"a": entry("U8", [1], "0", 1)}, b"1"),
        "malformed data_offsets",
    ),
    "offset that is true": (
        packed({"a": entry("U8", [1], 0, True)}, b"1"),
        "malformed data_offsets",
    ),
    "offset below zero": (packed({"a": entry("U8", [1], -1, 0)}, b"1"), "malformed data_offset"),
    "end before start": (packed({"a": entry("U8", [0], 1, 0)}, b"1"), "ends before it begins"),
    "too few bytes": (packed({"a": entry("F32", [2], 0, 4)}, bytes(4)), "does not fit its bytes"),
    "half a byte": (packed({"a": entry("F4", [3], 0, 2)}, bytes(2)), "does not fit its bytes"),
    "out of range": (packed({"a": entry("U8", [1], 9, 10)}, b"1"), "lies outside the file"),
    "hole": (packed({"a": U8, "b": entry("U8", [1], 2, 3)}, b"123"), "gap after 'a'"),
    "hole at the start": (packed({"b": entry("U8", [1], 1, 2)}, b"12"), "gap after the header"),
    "overlap": (
        packed({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"123"),
        "overlaps 'a'",
    ),
    "metadata that is a list": (packed({"__metadata__": []}), "that is not a mapping"),
    "metadata with a number": (
        packed({"__metadata__": {"a": 1}}),
        "that is not a mapping",
    ),
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 334643276\n",
        "git-lfs pointer",
    ),
    "web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "web page without a doctype": (b"<html lang=en><body>Sign in</body></html>", "a web page"),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML answer"),
    "JSON answer of a server": (
        b'{"error":"Repository not found"}',
        "length that is too large",
    ),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "is a pickle"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0" + bytes(600_000), "compressed with gzip"),
}


@pytest.mark.parametrize(("content", "what"), BROKEN.values(), ids=BROKEN)
def test_every_kind_of_damage_has_its_own_error(tmp_path: Path, content: bytes, what: str) -> None:
    file = written(tmp_path, content)
    with pytest.raises(CheckpointError, match=what) as error:
        read_header(file)
    text = str(error.value)
    assert text.startswith(str(file))
    assert len(text) < 1000
    assert "hint: " in text
    if what not in STRICTER:
        with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
            pass


def test_a_torch_checkpoint_under_this_name_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    for legacy, what in ((False, "a zip archive"), (True, "a pickle")):
        torch.save({"a": torch.ones(3)}, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=what) as error:
            read_header(file)
        assert "ends in .ckpt" in str(error.value)


def test_a_length_that_looks_like_a_pickle_is_still_a_length(tmp_path: Path) -> None:
    text = json.dumps({"a": U8}).encode().ljust(0x0280)
    file = written(tmp_path, packed(text, b"1"))
    assert file.read_bytes().startswith(pickle.PROTO + b"\x02")
    assert read_header(file).shapes == {"a": (1,)}
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError) as error:
        read_header(file)
    assert "pickle" not in str(error.value)


def test_a_valid_neighbour_of_every_damaged_file_is_read(tmp_path: Path) -> None:
    """The control: each of these differs from one above in what was wrong with it."""
    good: list[tuple[bytes, dict[str, tuple[int, ...]]]] = [
        (packed({}), {}),
        (packed(b"  {} \n"), {}),
        (packed({"__metadata__": None}), {}),
        (packed({"": U8}, b"1"), {"": (1,)}),
        (packed({"\U0001f600": U8}, b"1"), {"\U0001f600": (1,)}),
        (packed({"a": entry("U8", [], 0, 1)}, b"1"), {"a": ()}),
        (packed({"a": entry("U8", [0, LONG], 0, 0)}), {"a": (0, LONG)}),
        (packed({"a": entry("F4", [2, 3], 0, 3)}, bytes(3)), {"a": (2, 3)}),
        (packed({"a": {**U8, "more": [["x"], 1.5e3]}}, b"1"), {"a": (1,)}),
        (
            packed({"b": entry("U8", [0], 1, 1), "a": U8, "c": entry("F16", [1], 1, 3)}, b"123"),
            {"a": (1,), "b": (0,), "c": (1,)},
        ),
    ]
    for content, shapes in good:
        assert read_header(written(tmp_path, content)).shapes == shapes


def test_absent_folder_and_special_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)
    file = written(tmp_path, packed({}))
    with pytest.raises(CheckpointError, match="a file where the path names a folder"):
        read_header(file / "inner.safetensors")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header(pipe)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_header("/dev/zero")
    circle = tmp_path / "circle.safetensors"
    circle.symlink_to(circle)
    with pytest.raises(CheckpointError, match="form a loop"):
        read_header(circle)
    dangling = tmp_path / "dangling.safetensors"
    dangling.symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_header(dangling)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "\ud800", "/".join(["x"] * 9000)])
def test_paths_that_no_system_accepts(path: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read|does not exist"):
        read_header(path)


@pytest.mark.parametrize("path", [None, 3, b"weights.safetensors", "", ["a.safetensors"]])
def test_what_is_not_a_path(path: Any) -> None:
    with pytest.raises(InputError, match="not a path"):
        read_header(path)


def test_a_file_without_permission(open_folder: Path) -> None:
    file = written(open_folder, packed({}))
    with without_permission():
        assert read_header(file).shapes == {}  # the control: until the mode changes it is read
    file.chmod(0)
    with without_permission(), pytest.raises(CheckpointError, match="may not be read") as error:
        read_header(file)
    assert "every folder above it" in str(error.value)


def test_a_folder_above_without_permission(open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir()
    file = written(closed, packed({}))
    closed.chmod(0)
    try:
        with without_permission(), pytest.raises(CheckpointError, match="may not be read"):
            read_header(file)
    finally:
        closed.chmod(0o755)
    assert read_header(file).shapes == {}


def test_nothing_is_allocated_for_a_header_that_is_not_there(tmp_path: Path) -> None:
    file = written(tmp_path, packed(b"{}", length=99_999_999))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="larger than the file"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_only_the_header_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, packed({"a": entry("U8", [2**36], 0, 2**36)}))
    with file.open("r+b") as handle:  # 64 GiB of nothing: a sparse file
        handle.truncate(file.stat().st_size + 2**36)
    assert read_header(file).tensors["a"].nbytes == 2**36


def test_a_shape_of_very_many_dimensions_takes_no_quadratic_time(tmp_path: Path) -> None:
    file = written(tmp_path, packed({"a": entry("U8", [2] * 1_000_000, 0, 1)}, b"1"))
    with pytest.raises(CheckpointError, match="too large for") as error:
        read_header(file)
    assert len(str(error.value)) < 1000


def test_reading_a_header_imports_no_torch(tmp_path: Path) -> None:
    file = written(tmp_path, packed({"a": U8}, b"1"))
    code = (
        "import sys; from sdconv.checkpoint.io.header import read_header;"
        "print(read_header(sys.argv[1]).shapes, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "{'a': (1,)} False False"


def test_a_zip_of_anything_else_is_recognised(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.txt", "none")
    with pytest.raises(CheckpointError, match="a zip archive"):
        read_header(file)
