"""Whole checkpoints there and back: names, bytes and other tensors; no file is held in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import pytest
import torch
from helpers import seeded
from helpers.paths import DATA
from helpers.weight_files import convert, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import sdconv
from sdconv.checkpoint.convert import Converted
from sdconv.checkpoint.io.header import DTYPE_BITS
from sdconv.checkpoint.naming import ORIGIN_KEY
from sdconv.errors import CheckpointError, InputError, UnknownNetworkError, WeightsMismatchError

VAE, UNET = "first_stage_model.", "model.diffusion_model."
# as Lightning saves them with the networks, and as other programs add them
OTHERS = {
    "betas": torch.linspace(0, 1, 10, dtype=torch.float64),
    "global_step": torch.tensor(470000),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    "cond_stage_model.transformer.text_model.final_layer_norm.weight": torch.ones(32) / 3,
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.diffusion_modelout2bias": torch.ones(4) / 7,
    "first_stage_model.loss.logvar": torch.zeros(()),
    "model.diffusion_model.scaled_fp8": torch.ones(2, 3).to(torch.float8_e4m3fn),
    "mask": torch.tensor([True, False, True]),
    "nothing": torch.empty(0, 5, dtype=torch.bfloat16),
    "text_encoder.odd": torch.full((3,), 1 + 2j, dtype=torch.complex64),
}


@cache
def originals() -> Mapping[str, Tensor]:
    """A small VAE and U-Net by the names that the original classes gave."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, prefix in (("open-vae", ""), ("open-unet-sd1", UNET)):
        read = json.loads((DATA / f"{name}.json").read_text("utf-8"))
        shapes |= {prefix + key: tuple(shape) for key, shape in read.items()}
    drawn = seeded.weights(shapes, 3)
    return MappingProxyType({name: tensor.half() for name, tensor in drawn.items()})


def vae_alone() -> dict[str, Tensor]:
    return {name: tensor for name, tensor in originals().items() if name.startswith(VAE)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint in the original layout."""
    path = tmp_path_factory.mktemp("whole") / "model.safetensors"
    save_file(originals() | OTHERS, path, metadata={"modelspec.title": "Über\n\u20ac"})
    return path


def metadata(path: Path) -> dict[str, str]:
    return dict(sdconv.read_header(path).metadata)


def there_and_back(path: Path, folder: Path) -> Path:
    """``path`` in diffusers' layout and in the original one again; the file between is left."""
    convert(path, folder / "between.safetensors", "diffusers", family="sd1")
    convert(folder / "between.safetensors", folder / "back.safetensors", "original")
    return folder / "back.safetensors"


def test_round_trip_is_the_same_file(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "between.safetensors", "diffusers")
    back = tmp_path / "back.safetensors"
    convert(tmp_path / "between.safetensors", back, "original")
    assert raw(back) == raw(whole)
    assert metadata(back) == metadata(whole)
    # the control: the file in between is another one, and one changed bit is noticed
    assert set(raw(tmp_path / "between.safetensors")) & set(raw(whole)) == set(OTHERS)
    data = bytearray(back.read_bytes())
    data[-1] ^= 1
    back.write_bytes(data)
    assert raw(back) != raw(whole)


def test_the_file_between(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    assert convert(whole, out, "diffusers") == Converted(
        files=(out,),
        layout="diffusers",
        moved={"vae": 248, "unet": 686},
        dtypes=("float16",),
        carried={
            "": 4,
            "cond_stage_model": 2,
            "first_stage_model": 1,
            "model": 1,
            "model_ema": 2,
            "text_encoder": 1,
        },
        left_out={},
    )
    written, before = raw(out), raw(whole)
    assert {name: written[name] for name in OTHERS} == {name: before[name] for name in OTHERS}
    # exactly diffusers' own names
    tensors, source = load_file(out), originals()
    for component, prefix in (("vae", VAE), ("unet", UNET)):
        state = {k: v for k, v in source.items() if k.startswith(prefix)}
        network = sdconv.load(state, family="sd1").state_dict()
        own = {k for k in written if k.startswith(f"{component}.")}
        assert own == {f"{component}.{k}" for k in network}
        assert all(torch.equal(tensors[f"{component}.{k}"], v) for k, v in network.items())
    assert written["vae.decoder.mid_block.attentions.0.to_q.weight"][1] == [128, 128]
    assert before[VAE + "decoder.mid.attn_1.q.weight"][1] == [128, 128, 1, 1]


def test_from_a_pickle(tmp_path: Path) -> None:
    tensors = dict(originals())
    tensors["odd"] = torch.arange(12).reshape(3, 4).T  # not contiguous
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "m.ckpt")
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "same.safetensors")
    back = there_and_back(tmp_path / "m.ckpt", tmp_path)
    assert raw(back) == raw(tmp_path / "same.safetensors")


@pytest.mark.parametrize(
    ("prefix", "linear", "others"),
    [
        (VAE, True, {}),
        ("vae.", False, {"betas": torch.ones(2)}),
        ("some.model.", True, {"betas": torch.ones(2)}),
        ("some.model.", False, {}),
        ("", True, {"loss.discriminator.weight": torch.ones(2)}),
    ],
)
def test_unusual_originals_come_back_too(
    prefix: str, linear: bool, others: dict[str, Tensor], tmp_path: Path
) -> None:
    tensors = {name.replace(VAE, prefix): tensor for name, tensor in vae_alone().items()}
    if linear:
        tensors |= {k: v.flatten(1) for k, v in tensors.items() if ".attn_1." in k and v.ndim == 4}
    path = tmp_path / "odd.safetensors"
    save_file(tensors | others, path)
    assert raw(there_and_back(path, tmp_path)) == raw(path)


def test_half_of_a_tiny_autoencoder_comes_back(tmp_path: Path) -> None:
    tensors = seeded.tensors(seeded.tiny())
    bare = {
        f"{int(number) + 1}.{rest}": tensor
        for name, tensor in tensors.items()
        if name.startswith("decoder")
        for _, _, number, rest in [name.split(".", 3)]
    }
    save_file(bare, tmp_path / "taesd_decoder.safetensors")
    back = there_and_back(tmp_path / "taesd_decoder.safetensors", tmp_path)
    assert "decoder.layers.0.weight" in raw(tmp_path / "between.safetensors")
    assert raw(back) == raw(tmp_path / "taesd_decoder.safetensors")


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12
)
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: name != "__metadata__" and not name[0].isdecimal()),
    st.tuples(
        st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.sampled_from([0, 1, 2, 8]), max_size=3)
    ),
    max_size=5,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(others=TENSORS, said=st.dictionaries(NAMES, NAMES, max_size=2), data=st.binary())
def test_all_other_tensors_are_carried_over(
    others: dict[str, tuple[str, list[int]]], said: dict[str, str], data: bytes, tmp_path: Path
) -> None:
    # also dtypes that torch lacks, such as two numbers in a byte
    config = seeded.tiny(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
    )
    parts: dict[str, tuple[str, list[int], bytes]] = {}
    for name, tensor in seeded.tensors(config).items():
        half, _, number, rest = name.split(".", 3)
        original = f"vae.{half}.{int(number) + (half == 'decoder')}.{rest}"
        parts[original] = ("F32", list(tensor.shape), tensor.numpy().tobytes())
    for name, (dtype, shape) in others.items():
        size = 8 * torch.Size(shape).numel() * DTYPE_BITS[dtype] // 8  # whole bytes
        parts[name] = (dtype, [*shape, 8], (data + bytes(size))[:size])
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    source.write_bytes(file_of(parts, said))
    assert raw(source) == parts
    convert(source, out, "diffusers")
    written = raw(out)
    assert {name: written[name] for name in others} == {name: parts[name] for name in others}
    assert metadata(out).items() >= said.items()
    convert(out, tmp_path / "back.safetensors", "original")
    assert raw(tmp_path / "back.safetensors") == parts


def file_of(parts: Mapping[str, tuple[str, list[int], bytes]], said: Mapping[str, str]) -> bytes:
    """A safetensors file, written without safetensors, which lacks some dtypes."""
    header: dict[str, Any] = {"__metadata__": said} if said else {}
    place = 0
    for name, (dtype, shape, data) in parts.items():
        offsets = [place, place + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        place += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in parts.values())
    return len(text).to_bytes(8, "little") + text + body


def test_dtype_of_converted_tensors(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide.safetensors"
    assert convert(whole, out, "original", dtype=torch.float32).dtypes == ("float32",)
    written, before = load_file(out), load_file(whole)
    assert set(written) == set(before)
    for name, tensor in before.items():
        assert written[name].dtype == (tensor.dtype if name in OTHERS else torch.float32)
        assert torch.equal(written[name].to(tensor.dtype), tensor), name


def test_one_component(whole: Path, tmp_path: Path) -> None:
    convert(whole, tmp_path / "vae.safetensors", "original", "vae")
    written, before = raw(tmp_path / "vae.safetensors"), raw(whole)
    assert written == {k.removeprefix(VAE): before[k] for k in vae_alone()}
    assert sdconv.load(tmp_path / "vae.safetensors").config["scaling_factor"] == 0.18215
    convert(whole, tmp_path / "unet", "diffusers", "unet", family="sd1")
    network = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(network.conv_out.weight, load_file(whole)[UNET + "out.2.weight"].float())


def test_to_folders_for_diffusers(whole: Path, tmp_path: Path) -> None:
    result = convert(whole, tmp_path / "model", "diffusers", family="sd1", dtype=torch.float32)
    weights = "diffusion_pytorch_model.safetensors"
    assert result.files == tuple(
        tmp_path / "model" / component / name
        for component in ("vae", "unet")
        for name in ("config.json", weights)
    )
    assert sum(result.left_out.values()) == len(OTHERS)
    for component, kind in (("vae", "AutoencoderKL"), ("unet", "UNet2DConditionModel")):
        theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "model" / component)
        ours = sdconv.load(tmp_path / "model" / component).state_dict()
        assert list(ours) == list(theirs.state_dict())
        assert all(torch.equal(ours[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int32, "float16"])
def test_a_dtype_of_another_kind(dtype: Any, tmp_path: Path) -> None:
    save_file(vae_alone(), tmp_path / "vae.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(InputError, match="dtype: weights are not written in this dtype"):
        convert(tmp_path / "vae.safetensors", out, "original", family="sd1", dtype=dtype)
    assert not out.exists()


def test_one_network_becomes_a_components_folder(tmp_path: Path) -> None:
    save_file(vae_alone(), tmp_path / "vae.safetensors")
    with pytest.warns(sdconv.SdconvWarning, match="scaling factor"):
        result = convert(tmp_path / "vae.safetensors", tmp_path / "vae", "diffusers")
    assert result.files[0] == tmp_path / "vae" / "config.json"


def _without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in originals().items() if key != name}


BAD: Mapping[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no network": ({"a": torch.ones(1)}, {}, UnknownNetworkError, "no network"),
    "a tensor missing": (
        _without(UNET + "out.2.bias"),
        {},
        WeightsMismatchError,
        r"unet: 1 missing(?s:.*)conv_out\.bias",
    ),
    "a wrong shape": (
        originals() | {VAE + "encoder.conv_in.bias": torch.ones(5)},
        {},
        WeightsMismatchError,
        "1 of the wrong shape",
    ),
    "integers": (
        originals() | {k: originals()[k].to(torch.int8) for k in [VAE + "encoder.conv_in.bias"]},
        {},
        WeightsMismatchError,
        r"vae: 1 not floating-point(?s:.*)encoder\.conv_in\.bias I8",
    ),
    "another kind of file": (
        originals(),
        {"out": "out.ckpt"},
        InputError,
        r"only safetensors files are written(?s:.*)name it out\.safetensors",
    ),
    "a name taken": (
        originals() | {"unet.conv_in.weight": torch.ones(5)},
        {},
        CheckpointError,
        "would get the same name",
    ),
    "another layout": (originals(), {"layout": "theirs"}, InputError, "unknown layout"),
    "a folder of originals": (
        originals(),
        {"layout": "original", "out": "folder"},
        InputError,
        "single file",
    ),
    "no such component": (originals(), {"component": "text"}, UnknownNetworkError, "'text'"),
    "unknown family": (originals(), {"family": "sd9"}, InputError, "unknown family"),
    "a dtype of torch's alone": (
        originals() | {"x": torch.ones(2, dtype=torch.complex128)},
        {},
        CheckpointError,
        "x cannot be written",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_leaves_nothing_behind(case: str, tmp_path: Path) -> None:
    tensors, given, kind, words = BAD[case]
    arguments = {"layout": "diffusers", "out": "out.safetensors"} | given
    out = tmp_path / arguments.pop("out")
    with pytest.raises(kind, match=words):
        convert(tensors, out, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "said", ["[]", "no JSON", '{"vae": 1}', '{"vae": {"prefix": 1, "unusual": {}}}']
)
def test_damaged_record_of_the_original(said: str, tmp_path: Path) -> None:
    tensors = {f"vae.{name}": t for name, t in seeded.tensors(seeded.kl((32,), 4, True)).items()}
    path = tmp_path / "m.safetensors"
    save_file(tensors | {"betas": torch.ones(1)}, path, metadata={ORIGIN_KEY: said})
    with pytest.raises(CheckpointError, match="does not fit its tensors"):
        convert(path, tmp_path / "out.safetensors", "original")


def test_a_pipeline_without_networks(tmp_path: Path) -> None:
    (tmp_path / "model" / "text_encoder").mkdir(parents=True)
    (tmp_path / "model" / "model_index.json").write_text('{"text_encoder": ["a", "b"]}')
    save_file({"a": torch.ones(1)}, tmp_path / "model" / "text_encoder" / "model.safetensors")
    with pytest.raises(UnknownNetworkError, match="no network"):
        convert(tmp_path / "model", tmp_path / "out.safetensors", "original")


CHILD = """
import re, sys, threading, time, warnings
from pathlib import Path
import functools, torch
from sdconv.checkpoint import convert
from sdconv.loading import build

convert = functools.partial(convert.convert, build=build)

def anonymous():
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024

source, out = sys.argv[1:]
small = Path(source).with_name("small.safetensors")
convert(small, out, "diffusers", family="sd1", dtype=torch.float16)  # imports everything

def taken(held):
    # memory that two conversions add, perhaps while the file is held
    done, peak, before = threading.Event(), [0], anonymous()

    def watch():
        while not done.wait(0.002):
            peak.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    whole = Path(source).read_bytes() if held else b""
    for dtype in (None, torch.float16):
        convert(source, out, "diffusers", family="sd1", dtype=dtype)
    done.set()
    thread.join()
    return max(peak) - before

print(taken(False), taken(True))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux: it reads /proc")
def test_memory_stays_far_below_the_size_of_the_file(tmp_path: Path) -> None:
    # the small VAE with twice the channels, in float32, its values a hole in the file
    shapes = {
        name: [2 * n if n >= 32 else n for n in tensor.shape]
        for name, tensor in vae_alone().items()
    }
    head = file_of({name: ("F32", shape, b"") for name, shape in shapes.items()}, {})
    header, place = json.loads(head[8:]), 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        header[name]["data_offsets"] = [place, place + size]
        place += size
    text = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    save_file(vae_alone(), tmp_path / "small.safetensors")
    files = (tmp_path / "big.safetensors", tmp_path / "out.safetensors")
    command = [sys.executable, "-c", CHILD, *map(str, files)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    streamed, held = map(int, ran.stdout.split())
    assert place > 50 << 20
    assert streamed < 0.6 * place < held
