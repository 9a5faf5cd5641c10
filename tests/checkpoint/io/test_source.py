"""Weights as one source: files, folders and state dicts, mapped and read on demand."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weight_files import PLAIN, A, B, is_mapped, put, sharded
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from sdconv.checkpoint.io.header import DTYPE_BITS
from sdconv.checkpoint.io.source import open_source
from sdconv.checkpoint.io.tensor_files import TORCH_DTYPES
from sdconv.errors import CheckpointError, InputError, SdconvError


def test_a_files_tensors_are_known_before_they_are_read(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", a=A, b=B)
    for given_path in (file, str(file)):
        with open_source(given_path) as source:
            assert source.shapes == {"a": (2, 3), "b": (4,)}
            assert {n: e.dtype for n, e in source.entries.items()} == {"a": "F32", "b": "BF16"}
            assert source.metadata == {"format": "pt", "of": "a"}
            assert source.nbytes == 6 * 4 + 4 * 2
            assert source.label == str(file)
            assert source.config is None
            assert torch.equal(source.tensor("a"), A)
            assert torch.equal(source.tensor("b"), B)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_tensors_are_mapped_stay_valid_and_leave_the_file_alone(
    tmp_path: Path, suffix: str
) -> None:
    file = put(tmp_path / f"a{suffix}", a=A, big=torch.zeros(100_000))
    before = file.read_bytes()
    with open_source(file) as source:
        big, again, a = source.tensor("big"), source.tensor("big"), source.tensor("a")
    assert is_mapped(big, file)
    assert is_mapped(a, file)
    assert big.data_ptr() == again.data_ptr()
    assert not is_mapped(big.clone(), file)  # the control
    big += 1
    assert torch.equal(a, A)
    assert file.read_bytes() == before
    assert torch.equal(source.tensor("a"), A)  # a closed source opens its file again


def test_files_are_unmapped_when_the_source_is_closed(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", a=A)

    def held() -> bool:
        maps = Path("/proc/self/maps").read_text()
        return str(file) in maps

    source = open_source(file)
    assert not held()
    tensor = source.tensor("a")
    assert held()
    source.close()
    del tensor
    assert not held()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_becomes_torchs_own_or_is_refused(tmp_path: Path, dtype: str) -> None:
    nbytes = 32 * DTYPE_BITS[dtype] // 8
    entry = {"dtype": dtype, "shape": [4, 8], "data_offsets": [0, nbytes]}
    text = json.dumps({"a": entry}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(nbytes))
    with open_source(file) as source:
        assert source.entries["a"].dtype == dtype
        if dtype in TORCH_DTYPES:
            assert source.tensor("a").dtype is TORCH_DTYPES[dtype]
        else:
            assert dtype in ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
            assert dtype != "F8_E8M0" or not hasattr(torch, "float8_e8m0fnu")  # since 2.7
            with pytest.raises(CheckpointError, match="'a' has a dtype that torch does not have"):
                source.tensor("a")


@pytest.mark.parametrize("dtype", TORCH_DTYPES.values(), ids=str)
def test_values_are_those_that_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.randint(256, (5, 48), dtype=torch.uint8, generator=torch.manual_seed(0))
    bits = bits % 2 if dtype is torch.bool else bits
    a, b, none = bits.view(dtype), bits[2].clone().view(dtype), torch.empty(0, 3, dtype=dtype)
    file = put(tmp_path / "x.safetensors", a=a, b=b, none=none, scalar=torch.tensor(3.0))
    expected = load_file(file)
    with open_source(file) as source:
        assert set(source.entries) == set(expected)
        for name, tensor in expected.items():
            got = source.tensor(name)
            assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
            assert got.is_contiguous()
            ours, theirs = (each.reshape(-1).view(torch.uint8) for each in (got, tensor))
            assert torch.equal(ours, theirs)


def test_no_page_is_read_before_a_value_in_it(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", **{f"t{n}": torch.ones(50_000) for n in range(20)})

    def read() -> int:
        """Kilobytes of the file that this process has touched."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = [next(x for x in lines if x.startswith("Rss:")) for y in lines if str(file) in y]
        return sum(int(line.split()[1]) for line in found)

    with open_source(file) as source:
        tensors = [source.tensor(name) for name in source.entries]
        assert read() == 0
        assert tensors[0].sum() == 50_000
        assert read() >= 50_000 * 4 // 1024


def test_tensors_are_on_the_cpu_even_with_another_default_device(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", a=A)
    with torch.device("meta"), open_source(file) as source:
        assert source.tensor("a").device.type == "cpu"


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", a=A)
    source = open_source(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="cannot be mapped into memory"):
        source.tensor("a")


def test_a_tensor_keeps_its_values_without_its_file(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", a=A, b=B)
    with open_source(file) as source:
        assert source.tensor("a").untyped_storage().nbytes() == A.nbytes


def test_an_absent_name(tmp_path: Path) -> None:
    source = open_source(put(tmp_path / "a.safetensors", a=A))
    for ask in (source.tensor, source.files[0].tensor):
        with pytest.raises(CheckpointError, match="holds no tensor 'x'"):
            ask("x")


def test_a_list_of_files_is_one_network(tmp_path: Path) -> None:
    files = [put(tmp_path / "1.safetensors", a=A), put(tmp_path / "2.pth", b=B)]
    with open_source([str(files[0]), files[1]]) as source:
        assert source.shapes == {"a": (2, 3), "b": (4,)}
        assert torch.equal(source.tensor("b"), B)
        assert [list(file.entries) for file in source.files] == [["a"], ["b"]]
        assert [file.label for file in source.files] == list(map(str, files))
        assert source.metadata["of"] == "1"
        assert source.nbytes == A.nbytes + B.nbytes


def test_a_name_in_two_files_is_an_error_only_in_one_network(
    tmp_path: Path,
) -> None:
    files = [put(tmp_path / f"{n}.safetensors", weight=A + n, **{f"own{n}": B}) for n in (1, 2)]
    with open_source(files) as source:
        for number, file in enumerate(source.files, 1):
            assert torch.equal(file.tensor("weight"), A + number)
        for ask in (lambda: source.entries, lambda: source.shapes, lambda: source.tensor("own1")):
            with pytest.raises(CheckpointError, match="'weight' is in two files") as error:
                ask()
            assert f"{files[0]} and {files[1]}" in str(error.value)


def test_a_state_dict_in_memory_is_not_copied() -> None:
    state = {"a": A, "b": torch.nn.Parameter(B.float())}
    with open_source(state) as source:
        assert source.shapes == {"a": (2, 3), "b": (4,)}
        assert source.entries["a"].dtype == "F32"
        assert source.nbytes == 6 * 4 + 4 * 4
        assert source.tensor("a").data_ptr() == A.data_ptr()
        assert not source.tensor("b").requires_grad


def test_dtypes_in_memory_are_named_as_in_files(tmp_path: Path) -> None:
    for name, dtype in TORCH_DTYPES.items():
        assert open_source({"a": torch.zeros(2, dtype=dtype)}).entries["a"].dtype == name
    assert open_source({"a": torch.zeros(2, dtype=torch.complex128)}).entries["a"].nbytes == 32


def test_a_tensor_without_values_is_known_but_not_read() -> None:
    source = open_source({"a": torch.empty(2, 3, device="meta")})
    assert source.shapes == {"a": (2, 3)}
    with pytest.raises(CheckpointError, match="on the meta device"):
        source.tensor("a")


@pytest.mark.parametrize(
    ("argument", "what"),
    [
        (None, "not weights"),
        (3, "not weights"),
        ([], "not weights"),
        (b"a.safetensors", "not weights"),
        ("", "not a path"),
        ([1, 2], "not a path"),
        ([{"a": A}], "not a path"),
        (A, "not weights"),
        ({}, "an empty state dict"),
        ({"a": 1}, "something other than tensors by name"),
        ({1: A}, "something other than tensors by name"),
        ({"state_dict": {"a": A}}, r"checkpoint\['state_dict'\]"),
    ],
    ids=str,
)
def test_what_is_not_a_source(argument: Any, what: str) -> None:
    with pytest.raises(InputError, match=what):
        open_source(argument)


def test_a_list_holds_files_only(tmp_path: Path) -> None:
    put(tmp_path / PLAIN, a=A)
    with pytest.raises(CheckpointError, match="is a folder"):
        open_source([tmp_path])
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source([tmp_path / PLAIN, tmp_path / "absent.safetensors"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sharded folder, a single file and a pickle, as bytes by their names."""
    folder = tmp_path_factory.mktemp("whole")
    sharded(folder)
    put(folder / "a.ckpt", a=A)
    (folder / "config.json").write_text('{"latent_channels": 4}')
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_only_our_errors_come_out_of_damaged_files(
    whole: dict[str, bytes], data: st.DataObject
) -> None:
    damaged = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[damaged])
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
        content = content or bytearray(1)
    folder = Path(tempfile.mkdtemp())
    try:
        for name, original in whole.items():
            (folder / name).write_bytes(bytes(content) if name == damaged else original)
        kept = data.draw(st.sampled_from([None, damaged, *whole]))
        try:
            with open_source(folder / kept if kept else folder) as source:
                for name, entry in source.entries.items():
                    tensor = source.tensor(name)
                    if entry.dtype in TORCH_DTYPES and not tensor.is_meta:
                        assert tuple(tensor.shape) == entry.shape
                        assert tensor.dtype is TORCH_DTYPES[entry.dtype]
        except SdconvError as error:
            assert str(folder) in str(error)
    finally:
        shutil.rmtree(folder)


def test_the_undamaged_files_are_read(whole: dict[str, bytes], tmp_path: Path) -> None:
    """The control of the test above."""
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert open_source(tmp_path).config == {"latent_channels": 4}
    assert list(open_source(tmp_path).entries) == ["a", "b"]
    assert list(open_source(tmp_path / "a.ckpt").entries) == ["a"]
