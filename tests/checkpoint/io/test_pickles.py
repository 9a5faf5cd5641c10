"""Reading torch checkpoints: weights are found, other objects dropped, bad files refused."""

from __future__ import annotations

import argparse
import pickle
import sys
import types
import warnings
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from helpers.weight_files import is_mapped
from safetensors.torch import load_file, save_file

import sdconv
from sdconv.checkpoint.io.pickles import WRAPPERS, read_pickle, weights_key
from sdconv.errors import CheckpointError, InputError

FORMATS = pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
WEIGHTS = {"conv.weight": torch.arange(8.0).reshape(2, 2, 2), "conv.bias": torch.ones(2).half()}


def saved(file: Path, content: object, new: bool = True, protocol: int = 2) -> Path:
    torch.save(content, file, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    return file


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[n], expected[n]) for n in expected)


@pytest.fixture
def foreign_class(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, type], type]:
    """Put a class into a module that is not installed, while a file is written."""

    def place(module: str, name: str, base: type) -> type:
        made = type(name, (base,), {"__module__": module, "__qualname__": name})
        for depth in range(1, module.count(".") + 2):
            part = ".".join(module.split(".")[:depth])
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        setattr(sys.modules[module], name, made)
        return made

    return place


@FORMATS
def test_a_state_dict_comes_back(tmp_path: Path, new: bool) -> None:
    got = read_pickle(str(saved(tmp_path / "a.pth", WEIGHTS, new)))
    assert same(got, WEIGHTS)
    assert got["conv.bias"].dtype == torch.float16


@FORMATS
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_weights_are_found_under_their_usual_names(tmp_path: Path, wrapper: str, new: bool) -> None:
    others = {"epoch": 3, "optimizer_states": [{"state": {0: torch.ones(2)}}], "lr": 1e-4}
    file = saved(tmp_path / "a.ckpt", {**others, wrapper: OrderedDict(WEIGHTS)}, new)
    assert same(read_pickle(file), WEIGHTS)


def test_objects_are_dropped_and_a_parameter_becomes_a_plain_tensor(tmp_path: Path) -> None:
    content: dict[Any, Any] = {**WEIGHTS, "step": 7, "names": ["a"], 5: torch.ones(1)}
    content["nested"] = {"x": torch.ones(1)}
    content["scale"] = torch.nn.Parameter(torch.ones(3))
    got = read_pickle(saved(tmp_path / "a.bin", content))
    assert list(got) == [*WEIGHTS, "scale"]
    assert type(got["scale"]) is torch.Tensor
    assert not got["scale"].requires_grad


def test_zip_checkpoints_are_mapped_and_unchanged_on_the_disk(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.ckpt", {"state_dict": {"w": torch.zeros(1_000_000)}})
    before = file.read_bytes()
    tensor = read_pickle(file)["w"]
    assert is_mapped(tensor, file)
    tensor += 1
    assert file.read_bytes() == before


def test_a_compressed_archive_is_unpacked_not_mapped(tmp_path: Path) -> None:
    stored = saved(tmp_path / "stored.ckpt", WEIGHTS)
    packed = tmp_path / "packed.ckpt"
    with zipfile.ZipFile(stored) as reader, zipfile.ZipFile(packed, "w", 8) as writer:
        for name in reader.namelist():
            writer.writestr(name, reader.read(name))
    assert same(read_pickle(packed), WEIGHTS)
    noise = torch.load(packed, mmap=True, weights_only=True)  # the control: mapped, it is noise
    assert not torch.equal(noise["conv.weight"], WEIGHTS["conv.weight"])


@FORMATS
def test_a_real_lightning_checkpoint(
    tmp_path: Path, new: bool, foreign_class: Callable[[str, str, type], type]
) -> None:
    """Like Stable Diffusion's first files: callbacks keyed by class, numpy scalars, OmegaConf."""
    checkpoint = foreign_class(
        "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint", object
    )
    attributes = foreign_class("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    config = foreign_class("omegaconf.dictconfig", "DictConfig", object)
    hyper, options = attributes(learning_rate=1e-4), config()
    options.__dict__.update(_metadata={"ref_type": Any, "object_type": dict}, _parent=None)
    counts: defaultdict[str, int] = defaultdict(int)
    counts["steps"] = 4
    content = {
        "callbacks": {checkpoint: {"best_model_score": np.float64(0.5), "path": Path("/a/b")}},
        "hyper_parameters": hyper,
        "config": options,
        "counts": counts,
        "best": np.arange(3),
        "place": PurePosixPath("x"),
        "state_dict": WEIGHTS,
    }
    file = saved(tmp_path / "lightning.ckpt", content, new)
    modules, allowed = set(sys.modules), set(torch.serialization.get_safe_globals())
    assert same(read_pickle(file), WEIGHTS)
    assert {name.partition(".")[0] for name in set(sys.modules) - modules} <= {"encodings"}
    assert set(torch.serialization.get_safe_globals()) == allowed


@FORMATS
def test_a_stand_in_is_never_the_installed_class(
    tmp_path: Path, new: bool, foreign_class: Callable[[str, str, type], type]
) -> None:
    ran: list[str] = []

    class Loud:
        def __new__(cls, *args: object) -> Any:
            ran.append("new")
            return super().__new__(cls)

        def __setstate__(self, state: object) -> None:
            ran.append("setstate")

    loud = foreign_class("lightning.pytorch.callbacks", "Loud", Loud)
    callback = loud()
    callback.__dict__["state"] = 1
    file = saved(tmp_path / "a.ckpt", {"callback": callback, "state_dict": WEIGHTS}, new)
    ran.clear()
    assert same(read_pickle(file), WEIGHTS)
    assert ran == []
    with torch.serialization.safe_globals([(loud, "lightning.pytorch.callbacks.Loud")]):
        torch.load(file, weights_only=True)  # the control: the class itself would have run
    assert ran == ["new", "setstate"]


@FORMATS
def test_objects_of_any_training_code_are_left_out(
    tmp_path: Path, new: bool, foreign_class: Callable[[str, str, type], type]
) -> None:
    """Like those in early checkpoints: each line was a reason to refuse one."""
    classes = [
        foreign_class("ldm.modules.ema", "LitEma", object),
        foreign_class("main", "ImageLogger", object),
        foreign_class("my_trainer.core.state", "_State", object),
        foreign_class("easydict", "EasyDict", dict),
    ]
    objects: list[Any] = [one() for one in classes]
    for number, one in enumerate(objects):
        one.__dict__["number"] = number
    objects[-1]["lr"] = 1e-4
    content = {
        "objects": objects,
        "losses": deque([0.5, 0.25], maxlen=100),
        "counts": Counter("abca"),
        "started": datetime(2022, 8, 22, tzinfo=UTC),
        "took": timedelta(hours=3),
        "options": argparse.Namespace(lr=1e-4, path=Path("/a")),
        "space": types.SimpleNamespace(a=1),
        "random": np.random.RandomState(0),
        "generator": np.random.default_rng(0),
        "dtypes": [np.float32, np.dtype("int64"), np.float16(1.5), np.bool_(True)],
        "sets": [{1, 2}, frozenset("ab"), range(3), slice(1, 2), b"bytes", 2 + 1j],
        "state_dict": WEIGHTS,
    }
    file = saved(tmp_path / "old.ckpt", content, new)
    assert same(read_pickle(file), WEIGHTS)


@FORMATS
def test_weights_in_a_dict_of_another_kind(
    tmp_path: Path, new: bool, foreign_class: Callable[[str, str, type], type]
) -> None:
    kind = foreign_class("my_trainer", "StateDict", dict)
    assert same(read_pickle(saved(tmp_path / "a.ckpt", {"model": kind(WEIGHTS)}, new)), WEIGHTS)


def test_several_at_once(tmp_path: Path, foreign_class: Callable[[str, str, type], type]) -> None:
    """torch keeps the allowed names for all threads together."""
    callback = foreign_class("my_trainer", "Callback", object)
    content = {"callbacks": [callback()] * 50, "state_dict": WEIGHTS}
    file = saved(tmp_path / "a.ckpt", content)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(read_pickle, [file] * 32):
            assert same(found, WEIGHTS)


@FORMATS
def test_a_function_of_another_package_is_refused_by_its_name(
    tmp_path: Path, new: bool, foreign_class: Callable[[str, str, type], type]
) -> None:
    function = foreign_class("my_trainer.core", "make_state", object)  # by its name
    file = saved(tmp_path / "a.ckpt", {"state": function(), "state_dict": WEIGHTS}, new)
    with pytest.raises(CheckpointError, match=r"asks for my_trainer\.core\.make_state"):
        read_pickle(file)


@FORMATS
def test_a_whole_pickled_module_is_refused_by_the_names_of_its_classes(
    tmp_path: Path, new: bool
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = saved(tmp_path / "a.pth", torch.nn.Conv2d(1, 1, 3), new)
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.conv\.Conv2d"):
        read_pickle(file)


@FORMATS
@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {}}, {"epoch": 1, "lr": 0.1}, [1, 2], "text", None],
    ids=str,
)
def test_a_pickle_without_named_tensors(tmp_path: Path, content: object, new: bool) -> None:
    file = saved(tmp_path / "a.ckpt", content, new)
    with pytest.raises(CheckpointError, match="a pickle without weights") as error:
        read_pickle(file)
    assert "state_dict" in str(error.value)


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_numpy_arrays_in_the_place_of_tensors(tmp_path: Path, wrapper: str | None) -> None:
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    file = tmp_path / "a.ckpt"
    torch.save(arrays if wrapper is None else {wrapper: arrays}, file)
    with pytest.raises(CheckpointError, match="such as numpy arrays"):
        read_pickle(file)
    # the control: next to the weights they are left alone
    torch.save({"state_dict": WEIGHTS, "loss.mean": arrays}, file)
    assert set(read_pickle(file)) == set(WEIGHTS)


def test_other_files_under_a_pickles_name(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    save_file(WEIGHTS, file)
    with pytest.raises(CheckpointError, match="is a safetensors file under a pickle's name"):
        read_pickle(file)
    contents = {
        "is empty": b"",
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "a web page": b"<!doctype html><html></html>",
        "a GGUF file": b"GGUF\x03\0\0\0",
        "is not a torch checkpoint": bytes(100),
        "is a pickle, but not a torch checkpoint": pickle.dumps({"a": 1}),
        "is a damaged zip archive": b"PK\x03\x04" + bytes(100),
    }
    for what, content in contents.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=what):
            read_pickle(file)
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="a zip archive, but not a torch checkpoint"):
        read_pickle(file)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_pickle(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_pickle(tmp_path)
    with pytest.raises(InputError, match="not a path"):
        read_pickle(None)  # type: ignore[arg-type]


def test_a_torchscript_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    with zipfile.ZipFile(file, "w") as writer:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py", "version"):
            writer.writestr(f"a/{name}", b"\x80\x02N." if name.endswith("pkl") else b"3\n")
    with pytest.raises(CheckpointError, match="a TorchScript program"):
        read_pickle(file)


@FORMATS
def test_a_file_cut_short_anywhere(tmp_path: Path, new: bool) -> None:
    whole = saved(tmp_path / "a.ckpt", WEIGHTS, new).read_bytes()
    file = tmp_path / "cut.ckpt"
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(CheckpointError) as error:
            read_pickle(file)
        assert "weights_only" not in str(error.value)


def test_newer_protocols_raise_no_warning(tmp_path: Path) -> None:
    assert same(read_pickle(saved(tmp_path / "a.ckpt", WEIGHTS, protocol=3)), WEIGHTS)
    with pytest.raises(CheckpointError, match="restricted reader does not accept"):
        read_pickle(saved(tmp_path / "b.ckpt", WEIGHTS, protocol=4))


OTHERS = {"conv.weight": torch.zeros(2, 2, 2), "conv.bias": torch.zeros(2).half()}


def nested(path: str, value: object) -> dict[str, object]:
    """``value`` in dicts under the names in ``path``."""
    for name in reversed(path.split(".")):
        value = {name: value, "epoch": 3}
    assert isinstance(value, dict)
    return value


@FORMATS
@pytest.mark.parametrize(
    "path",
    ["ema", "params_ema", "net", "model.state_dict", "a.b.c.d.e", "checkpoint.model.module"],
)
def test_weights_at_any_depth(tmp_path: Path, path: str, new: bool) -> None:
    content = nested(path, WEIGHTS)
    content |= {"step": torch.tensor(3), "optimizer": {"a.b": torch.ones(2)}}
    content["optimizer_states"] = [{"state": {0: {"exp.avg": torch.ones(2)}}}]
    file = saved(tmp_path / "a.pth", content, new)
    assert same(read_pickle(file), WEIGHTS)
    with weights_key(path):
        assert same(read_pickle(file), WEIGHTS)
    with (
        weights_key("other"),
        pytest.raises(CheckpointError, match="no weights under 'other'") as error,
    ):
        read_pickle(file)
    assert f"'{path}' (2 tensors)" in str(error.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("params", "params_ema"),
        ("state_dict", "ema"),
        ("model.state_dict", "model.ema"),
        ("gen.net", "disc.net"),
    ],
)
def test_several_sets_of_weights(tmp_path: Path, one: str, other: str) -> None:
    content: dict[str, Any] = {"epoch": 3}
    for path, weights in ((one, WEIGHTS), (other, OTHERS)):
        *outer, last = path.split(".")
        place = content
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = weights
    file = saved(tmp_path / "a.pth", content)
    with pytest.raises(CheckpointError, match="several sets of weights") as error:
        read_pickle(file)
    assert f"'{one}' (2 tensors), '{other}' (2 tensors)" in str(error.value)
    assert f"to choose, pass key='{one}'" in str(error.value)
    for path, weights in ((one, WEIGHTS), (other, OTHERS)):
        with weights_key(path):
            assert same(read_pickle(file), weights)


def test_the_outermost_dict_has_a_key_too(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pth", {**WEIGHTS, "ema": OTHERS})
    with pytest.raises(CheckpointError, match=r"'\.' \(2 tensors\), 'ema' \(2 tensors\)"):
        read_pickle(file)
    with weights_key("."):
        assert same(read_pickle(file), WEIGHTS)


def test_one_set_under_two_names_and_in_a_circle(tmp_path: Path) -> None:
    content: dict[str, Any] = {"model": WEIGHTS, "state_dict": WEIGHTS}
    content["self"] = content
    assert same(read_pickle(saved(tmp_path / "a.pth", content)), WEIGHTS)


def test_a_key_is_a_name() -> None:
    with pytest.raises(InputError, match="not a name"), weights_key(3):  # type: ignore[arg-type]
        pass


def test_a_key_without_a_pickle_is_a_warning(tmp_path: Path) -> None:
    from helpers import seeded

    network = seeded.network(seeded.SMALL_KL)
    sdconv.save(network, tmp_path / "a.safetensors")
    with pytest.warns(sdconv.SdconvWarning, match="'ema' chose nothing"):
        sdconv.load(tmp_path / "a.safetensors", family="sd1", key="ema")


def test_keys_of_load_and_the_commands(tmp_path: Path) -> None:
    from helpers import commands, seeded

    one, other = (seeded.tensors(seeded.SMALL_KL, seed) for seed in (0, 1))
    file = saved(tmp_path / "a.pth", {"params": one, "params_ema": other})
    with pytest.raises(CheckpointError, match="several sets of weights"):
        sdconv.load(file, family="sd1")
    for key, tensors in (("params", one), ("params_ema", other)):
        network = sdconv.load(file, family="sd1", key=key)
        assert torch.equal(network.encoder.conv_in.weight, tensors["encoder.conv_in.weight"])
    shown = commands.run("inspect", file, "--key", "params_ema", "--family", "sd1")
    assert shown.exit_code == 0, shown.output
    out = tmp_path / "b.safetensors"
    to = ("--layout", "diffusers", "--family", "sd1", "--key", "params_ema")
    assert commands.run("convert", file, out, *to).exit_code == 0
    assert torch.equal(load_file(out)["encoder.conv_in.weight"], other["encoder.conv_in.weight"])
    refused = commands.run("convert", file, out, *to[:4], "--force")
    assert refused.exit_code != 0 and "--key params" in refused.stderr


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"models": [WEIGHTS]}, "models.0"),
        ({"a": ({"b": [3, WEIGHTS]},)}, "a.0.b.1"),
        ([WEIGHTS], "0"),
        ({"states": {0: WEIGHTS}}, "states.0"),
    ],
)
def test_weights_in_lists(content: object, key: str, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.ckpt", content)
    assert same(read_pickle(file), WEIGHTS)
    with weights_key(key):
        assert same(read_pickle(file), WEIGHTS)
    optimizer = {"optimizer_states": [{"state": {0: {"exp_avg.0": torch.ones(2)}}}]}
    assert same(read_pickle(saved(file, {"model": [WEIGHTS], **optimizer})), WEIGHTS)


def test_a_single_tensor(tmp_path: Path) -> None:
    assert same(read_pickle(saved(tmp_path / "a.pt", torch.ones(3))), {"tensor": torch.ones(3)})
