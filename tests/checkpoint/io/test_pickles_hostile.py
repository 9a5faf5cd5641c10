"""Pickles made to run something, or damaged: nothing runs, and only our errors come out."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdconv.checkpoint.io.pickles import read_pickle
from sdconv.errors import CheckpointError, SdconvError

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])


def archive(file: Path, program: bytes) -> Path:
    """A checkpoint in torch's zip format around a handmade pickle."""
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("archive/data.pkl", program)
        writer.writestr("archive/version", "3\n")
    return file


def legacy(file: Path, program: bytes) -> Path:
    """A checkpoint in torch's older format around a handmade pickle."""
    torch.save({}, file, _use_new_zipfile_serialization=False)
    raw = io.BytesIO(file.read_bytes())
    for _ in range(3):
        pickle.load(raw)
    file.write_bytes(raw.getvalue()[: raw.tell()] + program + pickle.dumps([], protocol=2))
    return file


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Programs that would write ``marker``, and the name under which each must be refused."""
    shell = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"

    def call(function: str, argument: str) -> bytes:
        module, _, name = function.rpartition(".")
        text = argument.encode()
        return (
            b"\x80\x02c%b\n%b\n" % (module.encode(), name.encode())
            + b"X"
            + struct.pack("<I", len(text))
            + text
            + b"\x85R."
        )

    return {
        "os.system": (pickle.dumps(Calls(os.system, shell), 2), "posix.system"),
        "os.system, first protocol": (b"cos\nsystem\n(S'%b'\ntR." % shell.encode(), "os.system"),
        "os.system, newer protocol": (pickle.dumps(Calls(os.system, shell), 4), "posix.system"),
        "eval": (pickle.dumps(Calls(eval, code), 2), "eval, which is refused"),
        "eval, python 2 name": (call("__builtin__.eval", code), "eval, which is refused"),
        "exec": (pickle.dumps(Calls(exec, code), 2), "exec, which is refused"),
        "open": (pickle.dumps(Calls(open, str(marker), "w"), 2), "io.open"),
        "getattr": (call("builtins.getattr", code), "builtins.getattr"),
        "import": (call("builtins.__import__", "os"), "__import__, which is refused"),
        "subprocess": (call("subprocess.getoutput", shell), "subprocess.getoutput"),
        # classes of Python's own, which run what they are given
        "a process": (call("subprocess.Popen", f"touch {marker}"), "subprocess.Popen"),
        "a thread": (call("threading.Thread", code), "threading.Thread"),
        "a library": (call("ctypes.CDLL", f"{marker}.so"), "ctypes.CDLL"),
        "a console": (call("code.InteractiveConsole", code), "code.InteractiveConsole"),
        "an error": (call("builtins.Exception", code), "Exception, which is refused"),
        "a file": (call("zipfile.ZipFile", str(marker)), "zipfile.ZipFile"),
        "a module of torch's": (call("torch.nn.Module", code), "torch.nn.Module"),
        "no name": (call("my-trainer.State", code), "my-trainer.State"),
        "a name for a terminal": (call("x\033[31m.State", code), "State"),
        "a function of Lightning's": (
            call("pytorch_lightning.utilities.cloud_io.load", shell),
            "pytorch_lightning.utilities.cloud_io.load",
        ),
        "a way through Lightning": (call("pytorch_lightning.os.system", shell), ".os.system"),
        "numpy": (call("numpy.testing._private.utils.runstring", code), "runstring"),
        "torch.load": (call("torch.load", str(marker)), "torch.load"),
        "torch.hub": (call("torch.hub.load", str(marker)), "torch.hub.load"),
        "torch's compiler": (
            call("torch._inductor.codecache.PyCodeCache.load", code),
            "PyCodeCache.load",
        ),
        "torch.jit": (call("torch.jit.unsupported_tensor_ops.execWrapper", code), "execWrapper"),
    }


NAMES = sorted(hostile(Path("x")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrap", [archive, legacy, Path.write_bytes], ids=["zip", "legacy", "bare"])
def test_nothing_runs_and_the_error_names_what_was_refused(
    tmp_path: Path, name: str, wrap: Callable[[Path, bytes], object]
) -> None:
    marker = tmp_path / "marker"
    program, refused = hostile(marker)[name]
    file = tmp_path / "evil.ckpt"
    wrap(file, program)
    with pytest.raises(CheckpointError) as error:
        read_pickle(file)
    assert not marker.exists()
    text = str(error.value)
    assert text.startswith(str(file))
    assert refused in text.replace(f"{file}", "")
    assert "weights_only" not in text
    assert "\033" not in text


@pytest.mark.parametrize("name", ["os.system", "os.system, first protocol", "eval", "open"])
def test_the_hostile_programs_work_where_they_are_allowed(tmp_path: Path, name: str) -> None:
    """Negative control: without it, an absent marker says nothing."""
    marker = tmp_path / "marker"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pickle.loads(hostile(marker)[name][0])
    assert marker.exists()


@FORMATS
def test_a_module_under_an_allowed_name_is_not_even_imported(
    tmp_path: Path, new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    source = f"""
from pathlib import Path
def mark(word): Path({str(marker)!r}).write_text(word)
class State:
    def __new__(cls, *args): mark("new"); return object.__new__(cls)
    def __setstate__(self, state): mark("state")
mark("import")
"""
    (tmp_path / "installed_package.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    program = b"\x80\x02cinstalled_package\nState\n)R}X\x01\x00\x00\x00aK\x01sb."
    file = (archive if new else legacy)(tmp_path / "a.ckpt", program)
    with pytest.raises(CheckpointError, match="without weights"):
        read_pickle(file)
    assert not marker.exists()
    assert "installed_package" not in sys.modules
    pickle.loads(program)  # the control: executed by pickle, it does run
    assert marker.read_text() == "state"
    del sys.modules["installed_package"]


@FORMATS
@pytest.mark.parametrize("name", ["detach", "numel"])
def test_attributes_that_a_pickle_gives_to_tensors_are_not_called(
    tmp_path: Path, name: str, new: bool
) -> None:
    tensor = torch.arange(3.0)
    tensor.__dict__[name] = OrderedDict  # torch lets a pickle name it, and call it
    file = tmp_path / "a.ckpt"
    torch.save({"w": tensor}, file, _use_new_zipfile_serialization=new)
    found = read_pickle(file)["w"]
    assert type(found) is torch.Tensor
    assert torch.equal(found, torch.arange(3.0))
    assert name not in vars(found)


def test_more_classes_than_training_code_has(tmp_path: Path) -> None:
    names = b"".join(b"cmy\nClass%d\n" % number for number in range(1001))
    with pytest.raises(CheckpointError, match=r"my\.Class0, .*, which is refused"):
        read_pickle(archive(tmp_path / "a.ckpt", b"\x80\x02(" + names + b"t."))
    few = b"".join(b"cmy\nClass%d\n" % number for number in range(1000))
    with pytest.raises(CheckpointError, match="without weights"):
        read_pickle(archive(tmp_path / "b.ckpt", b"\x80\x02(" + few + b"t."))


def test_keys_nested_too_deeply_to_print(tmp_path: Path) -> None:
    deep = b"\x80\x02}K\x01" + b"\x85" * 5000 + b"K\x01s."
    with pytest.raises(CheckpointError):
        read_pickle(archive(tmp_path / "a.ckpt", deep))


@FORMATS
def test_a_call_of_a_stand_in_with_hostile_arguments_makes_an_empty_object(
    tmp_path: Path, new: bool
) -> None:
    marker = tmp_path / "marker"
    program = (
        b"\x80\x02}(X\x01\x00\x00\x00xcpytorch_lightning.cli\nRun\nX"
        + struct.pack("<I", len(f"touch {marker}"))
        + f"touch {marker}".encode()
        + b"\x85R}X\x01\x00\x00\x00aK\x01sbu."
    )
    file = (archive if new else legacy)(tmp_path / "a.ckpt", program)
    with pytest.raises(CheckpointError, match=r"a pickle without weights"):
        read_pickle(file)
    assert not marker.exists()


def test_an_environment_variable_for_a_looser_reader_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    file = archive(tmp_path / "a.ckpt", hostile(marker)["os.system"][0])
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        read_pickle(file)
    assert not marker.exists()


def _base(new: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.ckpt"
        weights = {"weight": torch.arange(8.0).reshape(2, 2, 2), "bias": torch.ones(2).half()}
        content = {"state_dict": weights, "epoch": 3, "path": PurePosixPath("x")}
        torch.save(content, file, _use_new_zipfile_serialization=new)
        return file.read_bytes()


BASES = {new: _base(new) for new in (True, False)}


def with_other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A checkpoint with changed bytes anywhere, or only in its program, so that torch reads it."""
    new = draw(st.booleans())
    base = io.BytesIO(BASES[new])
    if draw(st.booleans()):
        return with_other_bytes(draw, base.getvalue())
    if not new:
        for _ in range(3):
            pickle.load(base)
        start = base.tell()
        program = base.getvalue()[start : start + 400]
        return base.getvalue()[:start] + with_other_bytes(draw, program) + base.read()[400:]
    out = io.BytesIO()
    with zipfile.ZipFile(base) as reader, zipfile.ZipFile(out, "w") as writer:
        for name in reader.namelist():
            record = reader.read(name)
            is_program = name.endswith("/data.pkl")
            writer.writestr(name, with_other_bytes(draw, record) if is_program else record)
    return out.getvalue()


@given(mutated())
@settings(max_examples=400, deadline=None)
def test_only_our_errors_come_out_of_mutated_checkpoints(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "a.ckpt"
        file.write_bytes(content)
        try:
            for tensor in read_pickle(file).values():
                assert type(tensor) is torch.Tensor
                if not tensor.is_meta and tensor.numel() < 10**6:
                    tensor.clone()  # reads every value: none lies outside of the mapping
        except SdconvError as error:
            assert str(error).startswith(str(file))
