"""Which files of a folder are opened as its weights, and what is wrong with the others."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.weight_files import PLAIN, A, B, put, sharded, without_permission

from sdconv.checkpoint.io.source import components_in, open_source
from sdconv.errors import CheckpointError, InputError


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([PLAIN], PLAIN),
        (["vae.safetensors"], "vae.safetensors"),
        (["v1.5.safetensors"], "v1.5.safetensors"),
        ([PLAIN, "diffusion_pytorch_model.fp16.safetensors"], PLAIN),
        ([PLAIN, "diffusion_pytorch_model.non_ema.safetensors", "other.safetensors"], PLAIN),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model.fp16.safetensors"),
        (["model.safetensors", "model.fp16.safetensors"], "model.safetensors"),
        ([PLAIN, "diffusion_pytorch_model.bin"], PLAIN),
        (["a.safetensors", "diffusion_pytorch_model.bin", "b.ckpt"], "a.safetensors"),
        (["diffusion_pytorch_model.bin", "x.ckpt"], "diffusion_pytorch_model.bin"),
        (["model.ckpt"], "model.ckpt"),
        ([PLAIN, ".hidden.safetensors"], PLAIN),
    ],
    ids=str,
)
def test_which_file_of_a_folder_is_taken(tmp_path: Path, names: list[str], chosen: str) -> None:
    for name in names:
        put(tmp_path / name, a=A)
    (tmp_path / "README.md").write_text("text")
    with open_source(tmp_path) as source:
        assert [file.label for file in source.files] == [str(tmp_path / chosen)]
        assert source.label == str(tmp_path)
        assert torch.equal(source.tensor("a"), A)


@pytest.mark.parametrize(
    "names",
    [
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bf16.safetensors"],
        ["taesd_encoder.safetensors", "taesd_decoder.safetensors"],
        ["a.safetensors", "b.fp16.safetensors"],
        ["a.ckpt", "a.bin"],
    ],
    ids=str,
)
def test_an_ambiguous_folder_is_an_error_that_names_the_files(
    tmp_path: Path, names: list[str]
) -> None:
    for name in names:
        put(tmp_path / name, a=A)
    with pytest.raises(CheckpointError, match="it is unclear which one is meant") as error:
        open_source(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        open_source(tmp_path)
    assert "an empty folder" in str(error.value)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"onnx")
    with pytest.raises(CheckpointError, match="holds no weights") as error:
        open_source(tmp_path)
    assert "model.onnx" in str(error.value)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path / "absent")


def test_a_dangling_link_is_not_ignored(tmp_path: Path) -> None:
    (tmp_path / PLAIN).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_source(tmp_path)


def test_the_config_next_to_the_weights(tmp_path: Path) -> None:
    put(tmp_path / PLAIN, a=A)
    assert open_source(tmp_path).config is None
    config = tmp_path / "config.json"
    config.write_text('{"latent_channels": 4, "scale": Infinity}', encoding="utf-8-sig")
    assert open_source(tmp_path).config == {"latent_channels": 4, "scale": float("inf")}
    put(tmp_path / "other.safetensors", a=A)
    assert open_source(tmp_path / "other.safetensors").config is None  # not diffusers' name for it
    for text, what in (
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"a":1,"a":2}', "names 'a' twice"),
        ("[" * 100_000, "is not JSON"),
        ("<html>", "a web page"),
    ):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=what) as error:
            open_source(tmp_path)
        assert str(error.value).startswith(str(config))
    config.write_bytes(b'{"a":"\xff"}')
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_source(tmp_path)


def test_the_config_of_weights_given_file_by_file(tmp_path: Path) -> None:
    index = sharded(tmp_path / "here")
    shards = sorted(index.parent.glob("*.safetensors"))
    (tmp_path / "here" / "config.json").write_text('{"latent_channels": 4}')
    for named in (shards[0], str(shards[0]), shards, index):
        assert open_source(named).config == {"latent_channels": 4}
    elsewhere = put(tmp_path / "there" / shards[1].name, b=B)
    (tmp_path / "there" / "config.json").write_text('{"latent_channels": 16}')
    assert open_source([shards[0], elsewhere]).config is None  # from two folders
    for text in ("config.json", "model_index.json"):
        (tmp_path / text).write_text("{}")
        with pytest.raises(CheckpointError, match="not weights"):
            open_source(tmp_path / text)


def test_a_pipeline_is_not_one_component(tmp_path: Path) -> None:
    vae = put(tmp_path / "vae" / PLAIN, a=A)
    put(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", b=B)
    sharded(tmp_path / "text_encoder")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    names = ["text_encoder", "unet", "vae"]
    assert components_in(tmp_path) == {name: tmp_path / name for name in names}
    for _ in range(2):  # without model_index.json, then with it and a whole checkpoint
        with pytest.raises(CheckpointError, match="a whole pipeline") as error:
            open_source(tmp_path)
        assert "text_encoder, unet, vae" in str(error.value)
        (tmp_path / "model_index.json").write_text("{}")
        put(tmp_path / "v1-5-pruned.safetensors", a=A)
    assert open_source(components_in(tmp_path)["vae"]).files[0].label == str(vae)
    with pytest.raises(CheckpointError, match="is a file"):
        components_in(vae)
    with pytest.raises(CheckpointError, match="does not exist"):
        components_in(tmp_path / "absent")
    with pytest.raises(InputError):
        components_in(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_folder_without_permission(inner: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # readable by all, unlike pytest's own folders
        folder = Path(name)
        folder.chmod(0o755)
        put(folder / "pipe" / "vae" / PLAIN, a=A)
        closed = folder / "pipe" / inner
        asked = folder / "pipe" / "vae"
        with without_permission(closed):
            with pytest.raises(CheckpointError, match="may not be read"):
                open_source(asked)
            with pytest.raises(CheckpointError, match="may not be read"):
                components_in(folder / "pipe")
        assert open_source(asked).shapes == {"a": (2, 3)}  # the control
        asked.chmod(0o444)  # it may be listed, but nothing in it may be opened
        with (
            pytest.raises(CheckpointError, match="may not be read"),
            without_permission(folder / "pipe" / "vae" / PLAIN),
        ):
            open_source(asked)
        asked.chmod(0o755)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize(
    "form",
    [
        "{base}.{kind}.index.json",
        "{base}.fp16.{kind}.index.json",
        "{base}.{kind}.fp16.index.json",
        "{base}.{kind}.index.fp16.json",
    ],
)
def test_shards_are_read_through_their_index(tmp_path: Path, kind: str, form: str) -> None:
    index = sharded(tmp_path, kind)
    index = index.rename(tmp_path / form.format(base="diffusion_pytorch_model", kind=kind))
    for named in (tmp_path, index):
        with open_source(named) as source:
            assert source.shapes == {"a": (2, 3), "b": (4,)}
            assert torch.equal(source.tensor("a"), A)
            assert torch.equal(source.tensor("b"), B)
            assert len(source.files) == 2


@pytest.mark.parametrize(
    ("index", "first"),
    [
        # in upper case, wholly or in part
        ("{base}.safetensors.INDEX.JSON", "{base}-00001-of-00002.safetensors"),
        ("{BASE}.SAFETENSORS.INDEX.JSON", "{BASE}-00001-OF-00002.SAFETENSORS"),
        ("{BASE}.SAFETENSORS.INDEX.JSON", "{base}-00001-of-00002.safetensors"),
        # transformers' name
        ("model.safetensors.index.json", "model-00001-of-00002.safetensors"),
        ("model.safetensors.index.json", "{base}-00001-of-00002.safetensors"),
        # names that do not say the shards' kind
        ("index.json", "{base}-00001-of-00002.safetensors"),
        ("model.index.json", "a-00001-of-00002.bin"),
        ("{base}.safetensors-index.json", "{base}-00001-of-00002.safetensors"),
        # other numbers of shards
        ("model.safetensors.index.json", "model-1-of-2.safetensors"),
    ],
)
def test_indexes_of_other_names(tmp_path: Path, index: str, first: str) -> None:
    names = {"base": "diffusion_pytorch_model", "BASE": "DIFFUSION_PYTORCH_MODEL"}
    index, first = index.format(**names), first.format(**names)
    second = first.replace("1-", "2-", 1)
    kind = "." + first.rpartition(".")[2].lower()
    for name, tensors in ((first, {"a": A}), (second, {"b": B})):
        put(tmp_path / f"x{kind}", **tensors).rename(tmp_path / name)
    content = {"weight_map": {"a": first, "b": second}}
    (tmp_path / index).write_text(json.dumps(content))
    for named in (tmp_path, tmp_path / index):
        with open_source(named) as source:
            assert torch.equal(source.tensor("a"), A) and torch.equal(source.tensor("b"), B)
    # the control: without it there are shards alone
    (tmp_path / index).unlink()
    with pytest.raises(CheckpointError, match="shards without the index"):
        open_source(tmp_path)


def test_an_index_under_the_name_of_another_kind_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path).rename(tmp_path / "pytorch_model.bin.index.json")
    for named in (tmp_path, index):
        with pytest.raises(CheckpointError, match="names a shard that is not a file") as error:
            open_source(named)
        assert str(error.value).startswith(str(index))


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"weight_map": {"a": "a.onnx"}}'])
def test_other_json_files_next_to_weights_are_left_alone(tmp_path: Path, text: str) -> None:
    put(tmp_path / "model.safetensors", whole=A)
    for name in ("index.json", "x.index.json", "model_index.json.bak"):
        (tmp_path / name).write_text(text)
    assert list(open_source(tmp_path).shapes) == ["whole"]


def test_a_plain_file_goes_before_a_late_variant(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    index.rename(tmp_path / f"{PLAIN}.fp16.index.json")
    put(tmp_path / PLAIN, whole=A)
    assert list(open_source(tmp_path).shapes) == ["whole"]


def test_a_stale_index_next_to_a_whole_file(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    put(tmp_path / PLAIN, whole=A)
    for shard in tmp_path.glob("*-of-*"):
        shard.unlink()
    with pytest.raises(CheckpointError) as error:
        open_source(tmp_path)
    for words in (
        f"{index}: lists 2 shards, 2 of them missing, and lies next to a whole file, {PLAIN}",
        f"if {PLAIN} is what you want, delete {index.name}",
    ):
        assert words in str(error.value)
    assert list(open_source(tmp_path / PLAIN).shapes) == ["whole"]
    index.unlink()
    assert list(open_source(tmp_path).shapes) == ["whole"]


@pytest.mark.parametrize("name", ["model.safetensors", PLAIN.replace(".", ".fp16."), "a.ckpt"])
def test_a_stale_index_next_to_a_whole_file_of_another_name(name: str, tmp_path: Path) -> None:
    index = sharded(tmp_path)
    put(tmp_path / name, whole=A)
    for shard in tmp_path.glob("*-of-*"):
        shard.unlink()
    with pytest.raises(CheckpointError, match="lies next to a whole file") as error:
        open_source(tmp_path)
    assert f"if {name} is what you want, delete {index.name}" in str(error.value)


def test_a_shard_may_be_a_link_to_elsewhere_and_lie_in_a_subfolder(tmp_path: Path) -> None:
    blob = put(tmp_path / "blobs" / "x.safetensors", a=A)
    folder = tmp_path / "snapshot"
    put(folder / "inner" / "2.safetensors", b=B)
    sharded(folder, a="1.safetensors", b="inner/2.safetensors")
    (folder / "1.safetensors").symlink_to(blob)
    assert open_source(folder).shapes == {"a": (2, 3), "b": (4,)}


def test_an_index_takes_precedence_over_a_file_of_its_name_but_not_over_a_plain_one(
    tmp_path: Path,
) -> None:
    index = sharded(tmp_path)
    put(tmp_path / PLAIN, whole=A)
    assert list(open_source(tmp_path).shapes) == ["a", "b"]
    index.rename(tmp_path / "diffusion_pytorch_model.fp16.safetensors.index.json")
    assert list(open_source(tmp_path).shapes) == ["whole"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    sharded(tmp_path).unlink()
    with pytest.raises(CheckpointError, match="shards without the index"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "inner/../../x.safetensors",
        "/etc/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\x.safetensors",
        "x\0.safetensors",
        "x.bin",
        "x.ckpt",
        "",
        7,
        None,
        ["x.safetensors"],
    ],
    ids=repr,
)
def test_an_index_that_leads_out_of_its_folder_opens_nothing(tmp_path: Path, shard: Any) -> None:
    put(tmp_path / "x.safetensors", a=A)  # what '../x.safetensors' would find
    sharded(tmp_path / "vae", a=shard)
    with pytest.raises(CheckpointError, match="a shard that is not a file in this folder"):
        open_source(tmp_path / "vae")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    one, two = (f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2))
    for weight_map, what in (
        ({"a": one, "b": two, "c": one}, "'c' into a shard that does not hold it"),
        ({"a": two, "b": two}, "'a' into a shard that does not hold it"),
        ({"a": one, "b": "absent.safetensors"}, "lists 2 shards, 1 of them missing"),
    ):
        sharded(tmp_path, **weight_map)
        with pytest.raises(CheckpointError, match=what):
            open_source(tmp_path)
    sharded(tmp_path)
    put(tmp_path / one, a=A, more=B)
    with pytest.raises(CheckpointError, match="holds tensor 'more', which its index does not"):
        open_source(tmp_path)
    put(tmp_path / one, a=A, b=B)
    with pytest.raises(CheckpointError, match="holds tensor 'b', which its index does not"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[]", "{", ""])
def test_an_invalid_index(tmp_path: Path, text: str) -> None:
    index = sharded(tmp_path)
    index.write_text(text)
    for named in (tmp_path, index):
        with pytest.raises(CheckpointError) as error:
            open_source(named)
        assert str(error.value).startswith(str(index))


def test_a_name_twice_in_an_index(tmp_path: Path) -> None:
    sharded(tmp_path).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        open_source(tmp_path)
